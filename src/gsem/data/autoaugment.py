"""AutoAugment's CIFAR-10 policy and Cutout: batched, for uint8 images, on their device.

Every operation means what the same operation of Pillow means, level by level: the policy was searched with
Pillow, and published results rest on its truncations. Magnitudes are one value per image, [n].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64, UInt8
from torch import Tensor

from gsem.rng import Shard

Images = UInt8[Tensor, "n c h w"]  # 0 … 255
Rows = Float[Tensor, "n"]  # a magnitude for each image

# --- operations of geometry: where each pixel comes from -------------------------------------------------------


def shear_x(x: Images, shear: Rows, *, fill: int) -> Images:
    """The pixel at (column, row) comes from column + shear · row, bicubic; `fill` from outside the image.

    Pillow's kernel is the cubic convolution with a = −1, its result truncated.
    """
    h, w = x.shape[2:]
    place = _centres(w, x) + shear.double()[:, None, None] * _centres(h, x)[:, None]
    outside = ((place < 0) | (place >= w))[:, None]
    # In float64, as Pillow computes: in float32, results that should be whole numbers are truncated to one less.
    place = place - 0.5
    left = place.floor()
    t = (place - left)[:, None]
    near = [(left.long() + tap).clamp_(0, w - 1)[:, None].expand(x.shape) for tap in (-1, 0, 1, 2)]
    p, q, r, s = (x.gather(3, columns).short() for columns in near)
    value = q + t * ((r - p) + t * ((2 * (p - q) + r - s) + t * (q - p - r + s)))
    return value.clamp_(0, 255).to(torch.uint8).masked_fill_(outside, fill)


def shear_y(x: Images, shear: Rows, *, fill: int) -> Images:
    """The pixel at (column, row) comes from row + shear · column, bicubic; `fill` from outside the image."""
    return shear_x(x.transpose(2, 3), shear, fill=fill).transpose(2, 3).contiguous()


def translate_x(x: Images, share: Rows, *, fill: int) -> Images:
    """The pixel at a column comes from column + share · width, nearest; `fill` from outside the image."""
    h, w = x.shape[2:]
    columns = (_centres(w, x) + share.double()[:, None] * w).floor().long()
    return _nearest(x, columns[:, None, :], torch.arange(h, device=x.device)[:, None], fill)


def translate_y(x: Images, share: Rows, *, fill: int) -> Images:
    """The pixel at a row comes from row + share · height, nearest; `fill` from outside the image."""
    h, w = x.shape[2:]
    rows = (_centres(h, x) + share.double()[:, None] * h).floor().long()
    return _nearest(x, torch.arange(w, device=x.device), rows[:, :, None], fill)


def rotate(x: Images, degrees: Rows, *, fill: int) -> Images:
    """Counter-clockwise about the centre, nearest; `fill` from outside the image. Sides below 32,768."""
    h, w = x.shape[2:]
    angle = -torch.deg2rad(degrees.double())
    cos, sin = angle.cos(), angle.sin()
    # Pillow walks the source in 16.16 fixed point, from the rounded place of the first pixel by rounded steps.
    right, down = _fixed(cos), _fixed(sin)
    first_column = _fixed(w / 2 - cos * (w / 2) - sin * (h / 2) + cos * 0.5 + sin * 0.5)
    first_row = _fixed(h / 2 + sin * (w / 2) - cos * (h / 2) - sin * 0.5 + cos * 0.5)
    across = torch.arange(w, device=x.device)
    along = torch.arange(h, device=x.device)[:, None]
    columns = (first_column + along * down + across * right) >> 16
    rows = (first_row + along * right + across * _fixed(-sin)) >> 16
    return _nearest(x, columns, rows, fill)


def _centres(side: int, x: Tensor) -> Float[Tensor, "side"]:
    return torch.arange(side, dtype=torch.float64, device=x.device) + 0.5


def _fixed(value: Float[Tensor, "n"]) -> Int64[Tensor, "n 1 1"]:
    return (value * 65536 + 0.5).floor().long()[:, None, None]


def _nearest(x: Images, columns: Tensor, rows: Tensor, fill: int) -> Images:
    """out[column, row] = x[columns, rows], integers that broadcast to [n, h, w]; `fill` where they lie outside."""
    n, c, h, w = x.shape
    outside = (columns < 0) | (columns >= w) | (rows < 0) | (rows >= h)
    # One value of `fill` at the end of each flat channel is what every place outside points at.
    position = (rows * w + columns).masked_fill_(outside, h * w)
    flat = F.pad(x.flatten(2), (0, 1), value=fill)
    return flat.gather(2, position.view(n, 1, h * w).expand(n, c, h * w)).view(x.shape)


# --- operations of enhancement: between the image and a poorer one --------------------------------------------


def brightness(x: Images, factor: Rows) -> Images:
    """From black at factor 0 over the image at 1 and on."""
    return _blend(0, x, factor)


def color(x: UInt8[Tensor, "n 3 h w"], factor: Rows) -> UInt8[Tensor, "n 3 h w"]:
    """From the grey image at factor 0 over the image at 1 and on."""
    return _blend(_grey(x), x, factor)


def contrast(x: UInt8[Tensor, "n 3 h w"], factor: Rows) -> UInt8[Tensor, "n 3 h w"]:
    """From the rounded mean of its grey image at factor 0 over the image at 1 and on."""
    pixels = x.shape[2] * x.shape[3]
    total = _grey(x).sum((1, 2, 3), keepdim=True)
    return _blend((2 * total + pixels) // (2 * pixels), x, factor)


def sharpness(x: Images, factor: Rows) -> Images:
    """From the smoothed image at factor 0 over the image at 1 and on; the border is never changed.

    Smoothing is the mean over 3 × 3 pixels, the centre counted 5 times, rounded.
    """
    out = x.clone()
    if min(x.shape[2:]) < 3:
        return out
    inner = x[:, :, 1:-1, 1:-1]
    wide = x.short()  # sums reach 13 · 255
    wide = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:] + 4 * inner.short()
    # total / 13 is at least 1/26 from every half, so float32 rounds it as whole numbers would.
    out[:, :, 1:-1, 1:-1] = _blend(total.float().mul_(1 / 13).round_(), inner, factor)
    return out


def _grey(x: UInt8[Tensor, "n 3 h w"]) -> Int32[Tensor, "n 1 h w"]:
    """ITU-R 601-2 luma in Pillow's 16-bit fixed point."""
    r, g, b = x.int().split(1, dim=1)
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


def _blend(poorer: Tensor | int, x: Images, factor: Rows) -> Images:
    """poorer + factor · (x − poorer), in float32 and truncated to a level, as Pillow does."""
    difference = x.float() - poorer
    return difference.mul_(factor.float().view(-1, 1, 1, 1)).add_(poorer).clamp_(0, 255).to(torch.uint8)


# --- operations on levels: a table from 256 levels to 256 ------------------------------------------------------


def posterize(x: Images, bits: Rows) -> Images:
    """Only the highest `bits` bits of each value are kept; bits from 1 to 8."""
    mask = 256 - 2 ** (8 - bits.long())
    return x & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(x: Images, threshold: Rows) -> Images:
    """Values of at least `threshold` are inverted."""
    levels = torch.arange(256, dtype=torch.uint8, device=x.device)
    table = torch.where(levels < threshold[:, None, None], levels, ~levels)
    return _look_up(x, table.expand(-1, x.shape[1], -1))


def invert(x: Images) -> Images:
    """255 − x."""
    return ~x


def autocontrast(x: Images) -> Images:
    """Each channel stretched to the range from 0 to 255; a channel of one value stays."""
    flat = x.flatten(2)
    low, high = flat.amin(2, keepdim=True).double(), flat.amax(2, keepdim=True).double()
    levels = torch.arange(256, dtype=torch.float64, device=x.device)
    # In float64 and in this order, as Pillow computes, since the result is truncated.
    # (A number divided by a tensor would be its reciprocal times the number, which rounds twice.)
    scale = levels[255] / (high - low)
    table = torch.where(high > low, levels * scale - low * scale, levels)
    return _look_up(x, table.clamp_(0, 255).to(torch.uint8))


def equalize(x: Images) -> Images:
    """Each channel's levels spread so that its histogram is about even (`ImageOps.equalize`)."""
    n, c, h, w = x.shape
    levels = x.flatten(2).long()
    ones = torch.ones((), dtype=torch.int64, device=x.device).expand(levels.shape)
    counts = torch.zeros(n, c, 256, dtype=torch.int64, device=x.device).scatter_add_(2, levels, ones)
    of_highest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (h * w - of_highest) // 255
    below = counts.cumsum(2) - counts
    # Whole numbers in float64: the quotient, truncated below, is that of integers, and 5 times faster on a CPU.
    spread = (below + step // 2).double() / step
    table = torch.where(step > 0, spread, torch.arange(256, device=x.device))
    return _look_up(x, table.clamp_(max=255).to(torch.uint8))


def _look_up(x: Images, table: UInt8[Tensor, "n c 256"]) -> Images:
    return table.gather(2, x.flatten(2).long()).view(x.shape)


# --- the policy ------------------------------------------------------------------------------------------------

_OPERATIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "shear_x": lambda x, m, fill: shear_x(x, m, fill=fill),
    "shear_y": lambda x, m, fill: shear_y(x, m, fill=fill),
    "translate_x": lambda x, m, fill: translate_x(x, m, fill=fill),
    "translate_y": lambda x, m, fill: translate_y(x, m, fill=fill),
    "rotate": lambda x, m, fill: rotate(x, m, fill=fill),
    "brightness": lambda x, m, fill: brightness(x, m),
    "color": lambda x, m, fill: color(x, m),
    "contrast": lambda x, m, fill: contrast(x, m),
    "sharpness": lambda x, m, fill: sharpness(x, m),
    "posterize": lambda x, m, fill: posterize(x, m),
    "solarize": lambda x, m, fill: solarize(x, m),
    "autocontrast": lambda x, m, fill: autocontrast(x),
    "equalize": lambda x, m, fill: equalize(x),
    "invert": lambda x, m, fill: invert(x),
}

# (operation, probability, level 0 … 9) twice, from Cubuk et al. 2019, as torchvision ships it too. Operations
# that have no magnitude have level 0.
POLICY = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


def magnitude(name: str, level: int) -> tuple[float, float]:
    """(middle, swing) of the operation at a level from 0 to 9: it is applied with middle ± swing."""
    share = level / 9
    if name.startswith("shear"):
        return 0.0, 0.3 * share
    if name.startswith("translate"):
        return 0.0, 150 / 331 * share
    if name == "rotate":
        return 0.0, 30 * share
    if name in ("brightness", "color", "contrast", "sharpness"):
        return 1.0, 0.9 * share
    if name == "posterize":
        return 8.0 - round(4 * share), 0.0
    if name == "solarize":
        return 256 * (1 - share), 0.0
    return 0.0, 0.0


_NAMES = tuple(_OPERATIONS)
# By pass (first, second) and sub-policy, [2, 25]; an operation is its number in _NAMES.
_OPERATION = torch.tensor([[_NAMES.index(pair[i][0]) for pair in POLICY] for i in (0, 1)])
_PROBABILITY = torch.tensor([[pair[i][1] for pair in POLICY] for i in (0, 1)])
_MIDDLE, _SWING = torch.tensor(
    [[magnitude(pair[i][0], pair[i][2]) for pair in POLICY] for i in (0, 1)], dtype=torch.float64
).unbind(2)


def auto_augment(
    x: UInt8[Tensor, "b 3 h w"],
    *,
    fill: int = 128,
    generator: torch.Generator | None = None,
    shard: Shard | None = None,
) -> UInt8[Tensor, "b 3 h w"]:
    """Each image through one of the 25 sub-policies that AutoAugment found for CIFAR-10.

    A sub-policy is two operations, each applied with its own probability, and where it has a direction, in either
    with equal chance. Levels 0 … 9 are linear in the magnitude: shear to 0.3, translation to 150/331 of the side,
    rotation to 30°, enhancement to 1 ± 0.9, posterize from 8 to 4 bits, solarize from 256 down to 0.

    Source: Cubuk et al., *AutoAugment*, CVPR 2019.

    Args:
        x: images, 0 … 255.
        fill: the value of pixels that come from outside the image, 0 … 255.
        generator: the random numbers; None is torch's own stream on the CPU. On a CPU it keeps a GPU's work free of
            waiting; from a generator on a GPU the choices are fetched, which waits. Drawn from it, in this order:
            the sub-policies [b], what the probabilities are compared with [2, b], the directions [2, b].
        shard: which rows of a batch x is; the random numbers are drawn for the whole batch. Default: all of it.

    Returns:
        New images on x's device and in its memory format.

    Raises:
        ValueError: `x` is not uint8 [b, 3, h, w], or fill is no pixel value.
    """
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise ValueError(f"auto_augment takes uint8 images [b, 3, h, w], not {x.dtype} {list(x.shape)}")
    if x.shape[1] != 3:
        raise ValueError(
            f"auto_augment takes colour images, 3 channels, not {x.shape[1]}: its operations include saturation"
        )
    if not 0 <= fill <= 255:
        raise ValueError(f"fill must be a pixel value, 0 to 255, not {fill}")
    operations, magnitudes = _choose(shard or Shard(0, len(x), len(x)), generator)
    out = x.contiguous()
    place = torch.arange(len(x))  # of each image in `out`
    for operation, m in zip(operations, magnitudes, strict=True):
        # The images are sorted by operation, so that each works on neighbours: index_select copies whole images,
        # and on a CPU takes a tenth of the time of gathering and scattering each operation's rows.
        order = operation.argsort(stable=True)
        out = out.index_select(0, place[order].to(x.device, non_blocking=True))
        m = m[order].to(x.device, non_blocking=True)
        place[order] = torch.arange(len(x))
        counts = operation.bincount(minlength=len(_NAMES) + 1).tolist()
        start = 0
        for name, count in zip(_NAMES, counts[: len(_NAMES)], strict=True):
            rows = slice(start, start := start + count)
            if count:
                out[rows] = _OPERATIONS[name](out[rows], m[rows], fill)
    out = out.index_select(0, place.to(x.device, non_blocking=True))
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return out
    return out.contiguous(memory_format=torch.channels_last)


def _choose(shard: Shard, generator: torch.Generator | None) -> tuple[Int64[Tensor, "2 b"], Float[Tensor, "2 b"]]:
    """The operations of both passes, as numbers in _NAMES or one above for none, and their magnitudes."""
    device = generator.device if generator is not None else "cpu"
    b, rows = shard.batch, shard.rows
    policy = torch.randint(len(POLICY), (b,), generator=generator, device=device)[rows].cpu()
    chance = torch.rand(2, b, generator=generator, device=device)[:, rows].cpu()
    sign = 2 * torch.randint(2, (2, b), generator=generator, device=device)[:, rows].cpu() - 1
    applied = chance < _PROBABILITY[:, policy]
    operations = torch.where(applied, _OPERATION[:, policy], len(_NAMES))
    return operations, _MIDDLE[:, policy] + sign * _SWING[:, policy]


def cutout(
    x: UInt8[Tensor, "b c h w"],
    *,
    size: int = 16,
    generator: torch.Generator | None = None,
    shard: Shard | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """One square of zeros in each image: its centre uniform over the pixels, what lies outside clipped.

    The square of centre i covers the `size` rows from i − size // 2 on, and columns likewise.

    Source: DeVries and Taylor, *Improved Regularization of Convolutional Neural Networks with Cutout*, 2017.

    Args:
        x: images, 0 … 255.
        size: the side of the square, in pixels; 0 for none.
        generator: the random numbers, on x's device; None is torch's own stream. Drawn from it, in this order:
            the centres' rows [b], then their columns [b].
        shard: which rows of a batch x is; the random numbers are drawn for the whole batch. Default: all of it.

    Returns:
        New images on x's device and in its memory format.

    Raises:
        ValueError: `x` is not uint8 [b, c, h, w], or size is below 0.
    """
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise ValueError(f"cutout takes uint8 images [b, c, h, w], not {x.dtype} {list(x.shape)}")
    if size < 0:
        raise ValueError(f"size must be at least 0, not {size}")

    shard = shard or Shard(0, len(x), len(x))

    def covered(side: int) -> Tensor:
        centre = torch.randint(side, (shard.batch, 1), generator=generator, device=x.device)[shard.rows]
        first = centre - size // 2
        places = torch.arange(side, device=x.device)
        return (first <= places) & (places < first + size)

    rows, columns = covered(x.shape[2]), covered(x.shape[3])
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])
