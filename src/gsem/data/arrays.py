"""Data sets from arrays in memory, and what an array must be like to be an image or labels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from gsem.data.dataset import Dataset, Split, crop_padding
from gsem.data.images import Images, stacked

_RANGE = (
    "images are uint8 from 0 to 255, or floats in [0, 1]; take a Normalize out of the transforms (the network's own "
    "normalisation is gsem.normalized)"
)


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    eps: float = 8 / 255,
    name: str = "arrays",
    flip: bool = True,
    hold: bool | None = None,
) -> Dataset:
    """A data set of arrays (NumPy or torch).

    Args:
        x: images, uint8 or floats in [0, 1] (rounded to 8 bits): [n, c, h, w], [n, h, w, c] or [n, h, w]. Where both
            the second and the last axis may be the channels, tensors have them second and NumPy's arrays last. A
            memory-mapped uint8 array (`np.load(…, mmap_mode="r")`) is not read whole if it is large.
        y: integers [n], 0 … classes - 1.
        test: (x, y) of the test part.
        classes: their names; default: "0" … up to the largest label of y.
        eps, name, flip, hold: as in `Dataset`.

    Raises:
        ValueError: an array is not as above; the message names it.
    """
    part = _split(x, y, "")
    others = None if test is None else _split(*test, "test ")
    description = f"{kind_of(x)} and {kind_of(y)} in memory"
    return in_memory(part, others, classes, description, eps=eps, name=name, flip=flip, hold=hold)


def in_memory(
    part: Split,
    test: Split | None,
    classes: Sequence[str] | None,
    description: str,
    *,
    eps: float,
    name: str,
    flip: bool,
    hold: bool | None,
) -> Dataset:
    """A data set of parts that are there, whose labels and shapes are checked against each other.

    Raises:
        ValueError: a label has no class, there is none at all, or the parts have different shapes.
    """
    names = tuple(map(str, range(int(part.y.max()) + 1))) if classes is None else tuple(map(str, classes))
    shape = tuple(part.x.shape[1:])
    for split, which in ((part, "training"), (test, "test")):
        if split is None:
            continue
        wrong = split.y[(split.y < 0) | (split.y >= len(names))]
        if len(wrong):
            raise ValueError(
                f"{name}: the {which} part has the label {int(wrong[0])}, but labels are 0 … {len(names) - 1} "
                f"({len(names)} classes)"
            )
        if tuple(split.x.shape[1:]) != shape:
            raise ValueError(f"{name}: test images are {list(split.x.shape[1:])}, training images {list(shape)}")
    read_test: Callable[[], Split] | None = None if test is None else lambda: test
    return Dataset(
        name=name,
        classes=names,
        shape=shape,  # type: ignore[arg-type]
        eps=eps,
        padding=crop_padding(shape[1]),
        fill=128,
        flip=flip,
        description=description,
        read_train=lambda: part,
        read_test=read_test,
        hold=hold,
    )


class _MappedImages(Images):
    """A memory-mapped array, copied row by row."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.shape = torch.Size((len(array), *pixels_of(array[0], "x").shape))

    def read(self, rows: Sequence[int]) -> Tensor:
        return stacked([pixels_of(np.array(self.array[row]), "x") for row in rows])


def _split(x: Any, y: Any, part: str) -> Split:
    labels = integers(y, f"{part}y")
    if len(labels) == 0:
        raise ValueError(f"{part}y is empty")
    if not isinstance(x, (np.ndarray, Tensor)):
        x = np.asarray(x)
    if len(x) != len(labels):
        raise ValueError(f"{part}x has {len(x)} images, but {part}y has {len(labels)} labels")
    if isinstance(x, np.memmap) and x.dtype == np.uint8 and x.ndim in (3, 4):
        return Split(_MappedImages(x), labels)
    return Split(torch.from_numpy(pixels_of(x, f"{part}x", many=True)), labels)


def pixels_of(array: Any, name: str, *, many: bool = False) -> np.ndarray:
    """uint8 [c, h, w] of an image as an array or tensor, or with `many` [n, c, h, w] of several. It may be a view.

    Raises:
        ValueError: a value is out of range, or the dtype or the axes are none of an image; `name` is in front.
    """
    image = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    axes = image.ndim - many
    if axes not in (2, 3) or 0 in image.shape:
        begin = "n, " if many else ""
        forms = ", ".join(f"[{begin}{form}]" for form in ("c, h, w", "h, w, c", "h, w"))
        raise ValueError(f"{name} is {kind_of(array)}, but must be one of {forms}")
    if axes == 2:
        image = image[..., None, :, :]
    else:
        first, last = image.shape[-3] in (1, 3), image.shape[-1] in (1, 3)
        if last if first != last else not isinstance(array, Tensor):
            image = np.moveaxis(image, -1, -3)
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if image.dtype.kind != "f":
        raise ValueError(f"{name} is {kind_of(array)}, but {_RANGE}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} is float with values from {low:g} to {high:g}, but {_RANGE}")
    return np.ascontiguousarray((image * 255).round().astype(np.uint8))


def integers(y: Any, name: str) -> Int64[Tensor, " n"]:
    """Labels [n] as a tensor.

    Raises:
        ValueError: they are no integers, or have more axes.
    """
    array = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
        raise ValueError(f"{name} is {kind_of(array)}, but labels must be integers [n], one for each image")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def kind_of(value: Any) -> str:
    """`float32 [8, 3, 32, 32]`, or the name of a type without axes."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
