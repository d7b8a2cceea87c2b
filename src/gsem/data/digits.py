"""Handwritten digits, 8 × 8, from scikit-learn: nothing is downloaded."""

from functools import partial
from typing import Literal

import torch

from gsem.data.dataset import Dataset, Split, crop_padding, held_out

DESCRIPTION = "1,797 handwritten digits, 8 × 8 grey, 10 classes; embedded, nothing to download"

# The split into training and test images is part of the data set, so its seed is fixed.
_TEST_PER_CLASS = 50
_TEST_SEED = 0


def digits() -> Dataset:
    """1,297 training and 500 test images [1, 8, 8], 50 test images of each class.

    Source: scikit-learn's `load_digits`, the test set of the UCI "Optical Recognition of Handwritten Digits" (E.
    Alpaydin and C. Kaynak, 1998); its values 0 … 16 become round(255 · v / 16).
    """
    return Dataset(
        name="digits",
        classes=tuple("0123456789"),
        shape=(1, 8, 8),
        eps=0.15,
        padding=crop_padding(8),
        fill=0,
        flip=False,
        description=DESCRIPTION,
        read_train=partial(_read, "train"),
        read_test=partial(_read, "test"),
    )


def _read(part: Literal["train", "test"]) -> Split:
    # Imported here because it takes a second and other data sets do not need it.
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(found.target).to(torch.int64)
    test = held_out(y, _TEST_PER_CLASS, _TEST_SEED)
    chosen = test if part == "test" else ~test
    return Split(x[chosen], y[chosen])
