"""Image files, or their bytes, decoded to uint8 pixels of one size."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gsem.data.images import DamagedImage

GREY = ("1", "L")


@dataclass(frozen=True)
class Layout:
    """What every image must be like: `channels` channels, and the size of the image that is called `first`.

    With `resize`, images of any size are brought to `resize` × `resize`: the shorter side is resized to it (bilinear,
    antialiased), then the centre is cropped. `height` and `width` are then `resize`.
    """

    channels: int
    height: int
    width: int
    first: str
    resize: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


def layout_of(image: Image.Image, name: str, *, grey: bool, resize: int | None) -> Layout:
    """The layout whose first image is this one.

    Raises:
        ValueError: resize is below 1.
    """
    if resize is not None and resize < 1:
        raise ValueError(f"resize must be at least 1 pixel, not {resize}")
    width, height = image.size if resize is None else (resize, resize)
    return Layout(1 if grey else 3, height, width, name, resize)


@contextmanager
def opened(content: str | bytes, name: str | None = None) -> Iterator[Image.Image]:
    """The image in a file (its path) or in bytes, its pixels not yet decoded.

    Raises:
        DamagedImage: whatever goes wrong in the block, with `name` (the path) in front.
    """
    name = os.fspath(content) if isinstance(content, str) else str(name)
    try:
        with Image.open(content if isinstance(content, str) else io.BytesIO(content)) as image:
            # Pillow cuts 16-bit colour to 8 bits without a warning; the raw mode of its decoder shows it.
            raw = next((str(tile[3]) for tile in image.tile), "")
            if image.mode.startswith(("I", "F")) or any(f";16{order}" in raw for order in "BLN"):
                kind = "float" if image.mode.startswith("F") else "more than 8-bit"
                raise ValueError(f"it has {kind} values (mode {image.mode}); save it with 8 bits per channel")
            yield image
    except Image.UnidentifiedImageError as error:
        raise DamagedImage(f"{name} is not an image, or is damaged: move it away or replace it") from error
    # For a damaged file, Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error …
    except Exception as error:
        raise DamagedImage(f"{name} cannot be used: {error}") from error


def decoded(content: str | bytes, layout: Layout, name: str | None = None) -> np.ndarray:
    """uint8 [c, h, w] of an image file or its bytes. Raises as `opened`."""
    with opened(content, name) as image:
        return pixels(image, layout)


def check_size(image: Image.Image, layout: Layout) -> None:
    """Raise a ValueError if the image is of another size than the first, and is not to be resized."""
    if layout.resize is None and image.size != (layout.width, layout.height):
        raise ValueError(
            f"it is {image.width} × {image.height} pixels, while {layout.first} is "
            f"{layout.width} × {layout.height}; all images must have one size, or be resized: --resize "
            f"{min(layout.width, layout.height)} (resize= in Python)"
        )


def pixels(image: Image.Image, layout: Layout) -> np.ndarray:
    """uint8 [c, h, w] of an opened image.

    Raises:
        ValueError: its size or its channels are not those of the layout.
    """
    check_size(image, layout)
    if layout.channels == 1 and image.mode not in GREY:
        raise ValueError(f"it is in colour (mode {image.mode}), while all training images are grey")
    mode = "L" if layout.channels == 1 else "RGB"
    if image.mode != mode:
        # A palette with transparency goes through RGBA, or Pillow warns.
        image = image.convert("RGBA").convert(mode) if "transparency" in image.info else image.convert(mode)
    if layout.resize is not None:
        image = _resized(image, layout.resize)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _resized(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    scale = side / min(width, height)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))
