"""A data set: name, classes, and functions that read its splits as uint8 tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels: `x` in 0 … 255, `y` in 0 … classes − 1."""

    x: UInt8[Tensor, "n c h w"]
    y: Int64[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on `device`."""
        return Split(self.x.to(device), self.y.to(device))


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

    def training(self, seed: int = 0) -> tuple[Split, Split]:
        """The training images without the validation images, and the validation images.

        The validation images are class-balanced, held out of the training part and fixed by `seed`: a tenth of the
        part, at most 1,000 images (see `validation_per_class`). The test part is not opened.

        Raises:
            ValueError: there is no training part, a class has too few images, or the part is damaged.
        """
        if self.read_train is None:
            raise ValueError(f"{self.name} has no training part, only a test part")
        part = self.read_train()
        held = held_out(part.y, validation_per_class(part.y, self.classes), seed)
        return Split(part.x[~held], part.y[~held]), Split(part.x[held], part.y[held])

    def test(self) -> Split:
        """The test images. The training part is not opened.

        Raises:
            ValueError: there is no test part, or it is damaged.
        """
        if self.read_test is None:
            raise ValueError(f"{self.name} has no test part, only a training part")
        return self.read_test()


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
    for name, count in zip(classes, counts, strict=True):
        if count < 2:
            raise ValueError(
                f"class {name!r} has {count} training image{'s' * (count != 1)}: "
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
