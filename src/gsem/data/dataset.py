"""A data set: name, classes, and functions that read its splits, as uint8 tensors or as images still unread."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from gsem.data.images import Images, Rows, numbers

HOLD_BYTES = 4 * 2**30
"""Up to this size a part is decoded once and held as a tensor: 1.4 million images of 32 × 32 pixels in RGB, or 28,000
of 224 × 224. That leaves most of a usual GPU's memory to the network, and most of a usual machine's to the rest."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels: `x` in 0 … 255, `y` in 0 … classes − 1.

    In a large set `x` is not a tensor but `Images`; `x[rows]` reads some rows into a tensor.
    """

    x: UInt8[Tensor, "n c h w"] | Images
    y: Int64[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on `device`, its images read."""
        return Split(self.held().to(device), self.y.to(device))

    def held(self) -> UInt8[Tensor, "n c h w"]:
        """All its images as one tensor: the one there is, or read now."""
        return self.x if isinstance(self.x, Tensor) else self.x.whole()

    def rows(self, rows: Rows) -> "Split":
        """Those rows. Images that are unread stay so."""
        if isinstance(self.x, Tensor):
            return Split(self.x[rows], self.y[rows])
        return Split(self.x.view(numbers(rows, len(self))), self.y[rows])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, with the settings that training and attacks take from it. `dataclasses.replace` makes a variant.

    Attributes:
        name: its name in messages and reports.
        classes: the names of the classes, in the order of their labels.
        shape: (c, h, w) of every image.
        eps: the usual L∞ radius for such images, in [0, 1] units.
        padding: pixels of padding before the random crop of training.
        fill: the value of those pixels, 0 … 255.
        flip: whether a horizontal flip preserves the label.
        description: one line.
        read_train, read_test: read one part, all of it, and nothing of the other; None where the part is absent.
            What they return may hold unread `Images`.
        hold: whether such a part is read into memory whole, as a tensor (which training moves to the device), or
            streamed: read batch by batch, by worker processes. By default held up to `HOLD_BYTES`. It changes no
            result.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    eps: float
    padding: int
    fill: int
    flip: bool
    description: str
    read_train: Callable[[], Split] | None = field(default=None, repr=False)
    read_test: Callable[[], Split] | None = field(default=None, repr=False)
    hold: bool | None = None

    def whole_training(self) -> Split:
        """The training part with its validation images, held as a tensor or not, by `hold`.

        Raises:
            ValueError: there is no training part, or it is damaged.
        """
        if self.read_train is None:
            raise ValueError(f"{self.name} has no training part, only a test part")
        return held_or_not(self.read_train(), self.hold)

    def training(self, seed: int = 0) -> tuple[Split, Split]:
        """The training images without the validation images, and the validation images.

        The validation images are class-balanced, held out of the training part and fixed by `seed`: a tenth of the
        part, at most 1,000 images (see `validation_per_class`). The test part is not opened.

        Raises:
            ValueError: there is no training part, a class has too few images, or the part is damaged.
        """
        return without_validation(self.whole_training(), self.classes, seed)

    def test(self) -> Split:
        """The test images. The training part is not opened.

        Raises:
            ValueError: there is no test part, or it is damaged.
        """
        if self.read_test is None:
            raise ValueError(f"{self.name} has no test part, only a training part")
        return held_or_not(self.read_test(), self.hold)


def without_validation(part: Split, classes: Sequence[str], seed: int) -> tuple[Split, Split]:
    """The part without its validation images, and these, which are read. Raises as `Dataset.training`."""
    held = held_out(part.y, validation_per_class(part.y, classes), seed)
    validation = part.rows(held)
    return part.rows(~held), Split(validation.held(), validation.y)


def held_or_not(part: Split, hold: bool | None, limit: int = HOLD_BYTES) -> Split:
    """The part with its images read into a tensor, or as they are, once all of them were looked at.

    Raises:
        ValueError: an image does not fit, or `hold` is False and the images cannot be read one by one.
    """
    if isinstance(part.x, Tensor):
        return part
    if hold or (hold is None and math.prod(part.x.shape) <= limit):
        return Split(part.held(), part.y)
    part.x.check()
    return part


def crop_padding(height: int) -> int:
    """Padding of the random crop: an eighth of the height, which is the usual 4 pixels for 32."""
    return max(1, height // 8)


def validation_per_class(y: Int64[Tensor, "n"], classes: Sequence[str]) -> int:
    """Validation images of each class: a tenth of the labels, at most 1,000, shared equally by the classes.

    At least 1, and never more than half of the smallest class, so that every class stays in training.

    Raises:
        ValueError: a class has fewer than 2 images.
    """
    counts = torch.bincount(y, minlength=len(classes)).tolist()
    for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
        if count < 2:
            raise ValueError(
                f"class {name!r} (label {label}) has {count} training image{'s' * (count != 1)}: "
                "at least 2 are needed, one to train and one to validate"
            )
    return min(max(1, min(len(y) // 10, 1000) // len(classes)), min(counts) // 2)


def held_out(y: Int64[Tensor, "n"], per_class: int, seed: int) -> Bool[Tensor, "n"]:
    """True at `per_class` random places of each class, fixed by `seed`.

    The process's random state is neither read nor changed. Every class up to the largest label must have at least
    `per_class` images.
    """
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    # A stable sort by label puts each class's places together, in shuffled order. The first few are taken.
    by_class = shuffled[torch.argsort(y[shuffled], stable=True)]
    counts = torch.bincount(y)
    first = counts.cumsum(0) - counts
    held = torch.zeros(len(y), dtype=torch.bool)
    held[by_class[first[:, None] + torch.arange(per_class)]] = True
    return held
