"""Data sets from map-style datasets of PyTorch, whose items are (image, label)."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from gsem.data.arrays import in_memory, integers, kind_of, pixels_of
from gsem.data.dataset import Dataset, Split
from gsem.data.decode import GREY, Layout, layout_of, pixels
from gsem.data.images import DamagedImage, Images, Rows, numbers, stacked

_READ_TWICE = 8  # images that are read twice, to notice transforms that draw at random


def from_torch(
    train: Any,
    *,
    test: Any = None,
    classes: Sequence[str] | None = None,
    eps: float = 8 / 255,
    name: str | None = None,
    flip: bool = True,
    hold: bool | None = None,
    resize: int | None = None,
) -> Dataset:
    """A data set of a map-style `torch.utils.data.Dataset`, whose items are (image, label).

    An image is a PIL image, a uint8 array or tensor, or a float one in [0, 1] (rounded to 8 bits); a label an integer.
    Each item must be the same whenever it is read: random transforms are the recipe's part (`augment`). Labels are
    those that the dataset lists as `targets` or `labels`, if these agree with some of its items; otherwise all items
    are read once for them, here.

    Args:
        train, test: the parts.
        classes: their names; default: the dataset's `classes`, or "0" … up to the largest label.
        eps, flip, hold: as in `Dataset`.
        name: what reports call it; default: the name of the dataset's class.
        resize: bring PIL images of any sizes to `resize` × `resize`: the shorter side is resized, the centre cropped.

    Raises:
        ValueError: an item is not as above, or differs when it is read again; reading raises it for mixed sizes. The
            message has the item's number.
    """
    name = name or type(train).__name__
    images = ItemImages(train, "item", resize=resize)
    others = None if test is None else ItemImages(test, "test item", layout=images.layout)
    for part in (images, others):
        if part is not None:
            part.check_repeatable()
    splits = [None if part is None else Split(part, _labels(part)) for part in (images, others)]
    assert splits[0] is not None
    names = getattr(train, "classes", None) if classes is None else classes
    description = f"{len(train)} items of {type(train).__name__}"
    return in_memory(splits[0], splits[1], names, description, eps=eps, name=name, flip=flip, hold=hold)


class ItemImages(Images):
    """The images of a map-style dataset, each made by `items[row]`, whose label is dropped."""

    def __init__(self, items: Any, word: str, *, layout: Layout | None = None, resize: int | None = None):
        """`layout` is that of other images which these must be like; default: that of the first item."""
        if len(items) == 0:
            raise ValueError(f"there is no {word}: the dataset is empty")
        self.items, self.word = items, word
        self.layout = layout or self._layout(resize)
        self.shape = torch.Size((len(items), *self.layout.shape))

    def _layout(self, resize: int | None) -> Layout:
        first, name = self.item(0)[0], f"{self.word} 0"
        if isinstance(first, Image.Image):
            return layout_of(first, name, grey=first.mode in GREY, resize=resize)
        if resize is not None:
            raise ValueError(f"resize is for PIL images, and {name} is {kind_of(first)}: resize it in the dataset")
        c, h, w = pixels_of(first, name).shape
        return Layout(c, h, w, name)

    def item(self, row: int) -> tuple[Any, Any]:
        """(image, label) as the dataset gives them.

        Raises:
            DamagedImage: the dataset raised something, or its item is no pair.
        """
        try:
            item = self.items[row]
        except Exception as error:
            raise DamagedImage(f"{self.word} {row} cannot be read: {type(error).__name__}: {error}") from error
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise DamagedImage(f"{self.word} {row} is {type(item).__name__}, but must be (image, label)")
        return item[0], item[1]

    def one(self, row: int) -> UInt8[np.ndarray, "c h w"]:
        image, name = self.item(row)[0], f"{self.word} {row}"
        try:
            array = pixels(image, self.layout) if isinstance(image, Image.Image) else pixels_of(image, name)
        except ValueError as error:
            known = str(error).startswith(name)
            raise DamagedImage(str(error) if known else f"{name} cannot be used: {error}") from error
        if array.shape != self.layout.shape:
            raise DamagedImage(
                f"{name} has the shape {list(array.shape)}, while {self.layout.first} has {list(self.layout.shape)}; "
                "all images must have one size"
            )
        return array

    def read(self, rows: Sequence[int]) -> UInt8[Tensor, "b c h w"]:
        return stacked([self.one(row) for row in rows])

    def __getitem__(self, rows: Rows) -> UInt8[Tensor, "b c h w"]:
        # In one thread: a user's dataset need not be safe in several.
        chosen = numbers(rows, len(self)).tolist()
        x = torch.empty((len(chosen), *self.shape[1:]), dtype=torch.uint8)
        for i, row in enumerate(chosen):
            x.numpy()[i] = self.one(row)  # (not from_numpy, which warns of a PIL image's read-only array)
        return x

    def check_repeatable(self) -> None:
        """Raise a ValueError if one of the first images differs when it is read again."""
        for row in range(min(_READ_TWICE, len(self))):
            if not np.array_equal(self.one(row), self.one(row)):
                raise ValueError(
                    f"{self.word} {row} differs when it is read again: take the random transforms out of the dataset. "
                    "The recipe augments (augment), and a resumed run must see the same images"
                )


def _labels(images: ItemImages) -> Int64[Tensor, " n"]:
    """The labels that the dataset lists, if some items have the same; else those of all items."""
    n = len(images)
    listed = _listed(images.items)
    some = sorted({*range(min(4, n)), n // 2, n - 1})
    true = [_label(images.item(row)[1], f"{images.word} {row}") for row in some]
    if listed is not None and len(listed) == n:
        array = listed if isinstance(listed, Tensor) else np.asarray(listed)
        if [int(array[row]) for row in some] == true:
            return integers(array, f"labels of {images.word}s")
    return torch.tensor([_label(images.item(row)[1], f"{images.word} {row}") for row in range(n)])


def _listed(items: Any) -> Any:
    if isinstance(items, Subset):
        inner = _listed(items.dataset)
        return None if inner is None else [inner[row] for row in items.indices]
    if isinstance(items, TensorDataset):
        return items.tensors[1] if len(items.tensors) > 1 else None
    found = (getattr(items, key, None) for key in ("targets", "labels"))
    return next(
        (labels for labels in found if isinstance(labels, (Iterable, Tensor)) and hasattr(labels, "__len__")), None
    )


def _label(label: Any, name: str) -> int:
    if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
        return int(label)
    kind = kind_of(label) if hasattr(label, "shape") else f"{label!r} ({type(label).__name__})"
    raise ValueError(f"the label of {name} is {kind}, but labels must be integers, 0 … classes - 1")
