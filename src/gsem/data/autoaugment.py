"""AutoAugment's CIFAR-10 policy and Cutout: batched, on uint8 images, on the device they lie on.

Every operation means what the same operation of Pillow means, level by level: the policy was searched with
Pillow, and published results rest on its truncations. Magnitudes are one value per image, [n].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

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
    columns = left.long()[:, None].expand(x.shape)
    p, q, r, s = (x.gather(3, (columns + tap).clamp(0, w - 1)).double() for tap in (-1, 0, 1, 2))
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


def _grey(x: UInt8[Tensor, "n 3 h w"]) -> Int64[Tensor, "n 1 h w"]:
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
    return torch.where(x.float() < threshold.float().view(-1, 1, 1, 1), x, ~x)


def invert(x: Images) -> Images:
    """255 − x."""
    return ~x


def autocontrast(x: Images) -> Images:
    """Each channel stretched to the range from 0 to 255; a channel of one value stays."""
    low, high = x.flatten(2).aminmax(dim=2, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64, device=x.device)
    # In float64 and in this order, as Pillow computes, since the result is truncated.
    scale = 255 / (high.double() - low)  # infinite for one value only, and not used then
    table = levels * scale + -low * scale
    return _look_up(x, table.clamp_(0, 255), where=high > low)


def equalize(x: Images) -> Images:
    """Each channel's levels spread so that its histogram is about even (`ImageOps.equalize`)."""
    n, c, h, w = x.shape
    levels = x.flatten(2).long()
    ones = torch.ones((), dtype=torch.int64, device=x.device).expand(levels.shape)
    counts = torch.zeros(n, c, 256, dtype=torch.int64, device=x.device).scatter_add_(2, levels, ones)
    of_highest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (h * w - of_highest) // 255
    below = counts.cumsum(2) - counts
    table = (below + step // 2) // step.clamp(min=1)
    return _look_up(x, table.clamp_(max=255), where=step > 0)


def _look_up(x: Images, table: Tensor, *, where: Tensor) -> Images:
    """table[image, channel, value], truncated; where `where` [n, c, 1] is false, x as it is."""
    same = torch.arange(256, dtype=torch.uint8, device=x.device)
    table = torch.where(where, table.to(torch.uint8), same)
    return table.gather(2, x.flatten(2).long()).view(x.shape)
