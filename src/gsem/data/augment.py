"""Batched augmentation of uint8 images, on their device."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from gsem.data.images import Images
from gsem.rng import Shard


def to_float(x: UInt8[Tensor, "*s"] | Images) -> Float32[Tensor, "*s"]:
    """Pixels 0 … 255 as float32 in [0, 1]: exactly x / 255. Images that are unread are read.

    Raises:
        ValueError: `x` is not uint8.
    """
    if isinstance(x, Images):
        x = x.whole()
    if x.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 images, not {x.dtype}")
    return x.float().div_(255)


def crop_flip(
    x: UInt8[Tensor, "b c h w"],
    *,
    padding: int,
    flip: bool,
    fill: int = 0,
    generator: torch.Generator | None = None,
    shard: Shard | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """A random crop of each image after padding, then a horizontal flip of each with probability 1/2.

    Source: the standard CIFAR augmentation (He et al. 2016, section 4.2).

    Args:
        x: images, 0 … 255.
        padding: pixels added at each side; the crop's corner is uniform over its (2 · padding + 1)² places.
        flip: whether images are flipped at all.
        fill: the value of the added pixels, 0 … 255.
        generator: the random numbers, on x's device; None is torch's own stream. Drawn from it, in this order:
            the corners' [rows, columns], [2, b], then, if `flip`, one bit per image, [b].
        shard: which rows of a batch x is; the random numbers are drawn for the whole batch. Default: all of it.

    Returns:
        New images on x's device and in its memory format.

    Raises:
        ValueError: `x` is not uint8 [b, c, h, w], padding is below 0, or fill is no pixel value.
    """
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise ValueError(f"crop_flip takes uint8 images [b, c, h, w], not {x.dtype} {list(x.shape)}")
    if padding < 0:
        raise ValueError(f"padding must be at least 0, not {padding}")
    if not 0 <= fill <= 255:
        raise ValueError(f"fill must be a pixel value, 0 to 255, not {fill}")
    b, c, h, w = x.shape
    shard = shard or Shard(0, b, b)
    corner = torch.randint(2 * padding + 1, (2, shard.batch), generator=generator, device=x.device)[:, shard.rows]
    columns = torch.arange(w, device=x.device).expand(b, w)
    if flip:
        mirrored = torch.randint(2, (shard.batch, 1), generator=generator, device=x.device)[shard.rows].bool()
        columns = torch.where(mirrored, w - 1 - columns, columns)
    rows = torch.arange(h, device=x.device) + corner[0, :, None]
    columns = columns + corner[1, :, None]
    # Crop and flip are one gather of flat positions in the padded image. That is 7 times faster on a CPU than
    # the four-axis index it stands for, and twice as fast as indexing the view of all windows.
    padded = F.pad(x, (padding,) * 4, value=fill)
    position = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    out = padded.flatten(2).gather(2, position.view(b, 1, h * w).expand(b, c, h * w)).view(b, c, h, w)
    # A tensor that is contiguous in both senses (c = 1) stays as it is.
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return out
    return out.contiguous(memory_format=torch.channels_last)


_TRIES = 10  # crops drawn for each image, of which the first that fits is taken


def resized_crop(
    x: UInt8[Tensor, "b c h w"],
    *,
    flip: bool,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator | None = None,
    shard: Shard | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """A random part of each image, resized to the size of the image; then a flip of each with probability 1/2.

    The part's share of the area is uniform over `scale`, its width by its height log-uniform over `ratio`, its place
    uniform. Where ten such parts are all wider or higher than the image, the largest centred one with a ratio in
    `ratio` is taken. Interpolation is bilinear; nothing is made smaller, so there is nothing to antialias.

    Source: C. Szegedy et al., Going deeper with convolutions, CVPR 2015, section 6, as torchvision draws it.

    Args:
        x: images, 0 … 255.
        flip: whether images are flipped at all.
        scale, ratio: lowest and highest.
        generator: the random numbers, on x's device; None is torch's own stream. Drawn from it, in this order: areas
            and ratios, [2, 10, b], places, [2, b], then, if `flip`, one bit per image, [b].
        shard: which rows of a batch x is; the random numbers are drawn for the whole batch. Default: all of it.

    Returns:
        New images on x's device, contiguous.

    Raises:
        ValueError: `x` is not uint8 [b, c, h, w], or a range is empty or has a value that is not positive.
    """
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise ValueError(f"resized_crop takes uint8 images [b, c, h, w], not {x.dtype} {list(x.shape)}")
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high or (name == "scale" and high > 1):
            bound = " and at most 1" if name == "scale" else ""
            raise ValueError(f"{name} must be (lowest, highest), above 0{bound}, not {(low, high)}")
    b, _, h, w = x.shape
    shard = shard or Shard(0, b, b)
    drawn = torch.rand(2, _TRIES, shard.batch, generator=generator, device=x.device)[..., shard.rows]
    place = torch.rand(2, shard.batch, generator=generator, device=x.device)[:, shard.rows]
    size = _crop_sizes(drawn, h, w, scale, ratio)
    side = torch.tensor([[h], [w]], device=x.device)
    corner = torch.minimum((place * (side - size + 1)).long(), side - size)
    fits = ((size > 0) & (size <= side)).all(0)
    # The fallback is centred.
    fallback = _centred_size(h, w, ratio, x.device)
    size = torch.where(fits, size, fallback)
    corner = torch.where(fits, corner, (side - fallback) // 2)
    mirrored = None
    if flip:
        mirrored = torch.randint(2, (shard.batch,), generator=generator, device=x.device)[shard.rows].bool()
    return crop_resize(x, corner, size, mirrored)


def _crop_sizes(
    drawn: Tensor, h: int, w: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Int64[Tensor, "2 b"]:
    """(height, width) of the first drawn part that fits into the image; of one that does not, if none does."""
    area = h * w * (scale[0] + (scale[1] - scale[0]) * drawn[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = torch.exp(low + (high - low) * drawn[1])
    sizes = torch.stack([(area / shape).sqrt().round(), (area * shape).sqrt().round()]).long()  # [2, tries, b]
    fits = (sizes[0] > 0) & (sizes[1] > 0) & (sizes[0] <= h) & (sizes[1] <= w)
    first = fits.int().argmax(0)  # 0 where none fits
    return sizes.gather(1, first.expand(2, 1, -1))[:, 0]


def _centred_size(h: int, w: int, ratio: tuple[float, float], device: torch.device) -> Int64[Tensor, "2 1"]:
    if w < ratio[0] * h:
        size = (round(w / ratio[0]), w)
    elif w > ratio[1] * h:
        size = (h, round(h * ratio[1]))
    else:
        size = (h, w)
    return torch.tensor(size, device=device)[:, None]


def crop_resize(
    x: UInt8[Tensor, "b c h w"],
    corner: Int64[Tensor, "2 b"],
    size: Int64[Tensor, "2 b"],
    mirrored: Bool[Tensor, " b"] | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """A part of each image, from (top, left) `corner` on and (height, width) `size` large, resized to all of [h, w].

    Bilinear between the centres of pixels, as `torch.nn.functional.interpolate(…, align_corners=False)`; nothing
    outside the part is seen. Rounded to the nearest level. `mirrored` images are flipped.
    """
    for axis in (2, 3):
        place, weight = _between(corner[axis - 2], size[axis - 2], x.shape[axis])
        if axis == 3 and mirrored is not None:
            place = torch.where(mirrored[:, None], place.flip(2), place)
            weight = torch.where(mirrored[:, None], weight.flip(1), weight)
        view = [len(x), 1, 1, 1]
        view[axis] = x.shape[axis]
        first, second = (x.gather(axis, p.view(view).expand(x.shape)).float() for p in place)
        x = torch.lerp(first, second, weight.view(view))
    return x.round_().to(torch.uint8)


def _between(corner: Tensor, size: Tensor, n: int) -> tuple[Int64[Tensor, "2 b n"], Float32[Tensor, "b n"]]:
    """For each of n pixels of the result: the two pixels of the image around it, and the weight of the second."""
    at = (torch.arange(n, device=size.device) + 0.5) * (size[:, None] / n) - 0.5
    at = at.clamp_(min=0)
    first = at.long()
    second = torch.minimum(first + 1, size[:, None] - 1)
    return corner[:, None] + torch.stack([first, second]), at - first
