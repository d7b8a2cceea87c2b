"""The named data sets, and `load`, which finds one by name or path."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsem.data import cifar, digits, folder, npz, parquet, svhn
from gsem.data.arrays import from_arrays
from gsem.data.augment import to_float
from gsem.data.dataset import Dataset
from gsem.data.huggingface import from_huggingface, is_huggingface
from gsem.data.items import from_torch
from gsem.data.parquet import is_parquet
from gsem.data.subset import balanced


class _Entry(NamedTuple):
    description: str
    read: Callable[..., Dataset]


_RESIZED = ("folder", "parquet")  # what is encoded may have any size


def _at(root: Path | None, name: str) -> Path:
    if root is None:
        raise ValueError(f"data {name!r} needs root: load({name!r}, root=PATH)")
    return root


# A data set is one entry: its description, and the function from the given root (or None) to the `Dataset`.
_ENTRIES = {
    "digits": _Entry(digits.DESCRIPTION, lambda root: digits.digits()),
    "folder": _Entry(folder.DESCRIPTION, lambda root, **options: folder.image_folder(_at(root, "folder"), **options)),
    "npz": _Entry(npz.DESCRIPTION, lambda root: npz.npz_file(_at(root, "npz"))),
    "parquet": _Entry(parquet.DESCRIPTION, lambda root, **options: parquet.parquet(_at(root, "parquet"), **options)),
    "cifar10": _Entry(cifar.DESCRIPTION_10, cifar.cifar10),
    "cifar100": _Entry(cifar.DESCRIPTION_100, cifar.cifar100),
    "svhn": _Entry(svhn.DESCRIPTION, svhn.svhn),
}

DATASETS: dict[str, str] = {name: entry.description for name, entry in _ENTRIES.items()}


def load(
    name: str | Path, root: str | Path | None = None, *, resize: int | None = None, hold: bool | None = None
) -> Dataset:
    """The data set of that name, or at that path.

    Args:
        name: a name in `DATASETS`, or the path of an image folder, an .npz file, a folder of .npy files, a parquet or
            arrow file, or a folder of these. A name wins over a path: a folder called digits is "./digits".
        root: where the data of a name lie; "folder", "npz" and "parquet" need it, "digits" makes no use of it, for the
            others None is "dataset". What is not there of cifar10, cifar100 and svhn is downloaded into it.
        resize: bring images to `resize` × `resize` pixels: the shorter side is resized, the centre cropped.
        hold: True reads a part into memory whole, False reads it batch by batch (see `Dataset.hold`).

    Raises:
        FileNotFoundError: nothing is at that path, or what is missing cannot be downloaded.
        NotADirectoryError: root is a file.
        ValueError: an unknown name, a missing root, a root beside a path, or damaged data.
    """
    name = os.fspath(name)
    kind, path = _kind(name, root)
    if resize is not None and kind not in _RESIZED:
        raise ValueError(f"resize is for image files of any size; {name} holds arrays of one size")
    options = {"resize": resize} if kind in _RESIZED else {}
    return replace(_ENTRIES[kind].read(path, **options), hold=hold)


def load_test(
    name: str | Path, n: int | None = None, root: str | Path | None = None, *, resize: int | None = None
) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
    """Test images and their labels, as `gsem.evaluate` takes them.

    Args:
        name, root, resize: as in `load`.
        n: number of images: the fixed, class-balanced subset that `gsem evaluate --images N` takes. Default: all.

    Returns:
        (x, y): x in [0, 1], float32; y in 0 … classes − 1. They are on the CPU, in the order of the test split.

    Raises:
        ValueError: n is not an integer from 1 to the number of test images, or there is no test part; and as `load`.
        FileNotFoundError, NotADirectoryError: as `load`.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"n must be an integer of at least 1, not {n!r}")
    test = load(name, root, resize=resize).test()
    if n is not None and n > len(test):
        raise ValueError(f"n = {n}, but {name} has {len(test)} test images: give at most {len(test)}")
    rows = torch.arange(len(test)) if n is None else balanced(test.y, n)
    return to_float(test.x[rows]), test.y[rows]


def as_dataset(data: Any) -> Dataset:
    """A `Dataset` of what a user has: itself, an (x, y) pair of arrays, a map-style or a Hugging Face dataset.

    For more than the defaults (a test part, names of the classes, eps) there are `from_arrays`, `from_torch` and
    `from_huggingface`.

    Raises:
        TypeError: it is none of these.
        ValueError: its images or labels are not as they should be.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, tuple) and len(data) == 2:
        return from_arrays(*data)
    if is_huggingface(data):
        return from_huggingface(data)
    no = (str, bytes, os.PathLike, list, tuple, Mapping, Tensor, np.ndarray)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, no):
        return from_torch(data)
    raise TypeError(
        f"data is {type(data).__name__}, but must be a gsem.data.Dataset (gsem.data.load makes one of a name or path), "
        "a map-style torch.utils.data.Dataset of (image, label), a pair (x, y) of arrays, or a Hugging Face dataset"
    )


def _kind(name: str, root: str | Path | None) -> tuple[str, Path | None]:
    """The entry that reads the data set of that name or path, and from where."""
    if name in _ENTRIES:
        return name, None if root is None else Path(root)
    path = Path(name).expanduser()
    is_path = path.exists() or path.suffix.lower() == ".npz" or len(path.parts) > 1
    if not is_path:
        near = get_close_matches(name.lower(), _ENTRIES, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join(_ENTRIES)
        raise ValueError(
            f"data {name!r} is unknown.{hint} Possible are: {known}, or the path of an image folder, an .npz file, or "
            "a folder of .npy, parquet or arrow files"
        )
    if root is not None:
        raise ValueError(f"root goes with a name of data ({', '.join(_ENTRIES)}), not with the path {name}")
    if path.suffix.lower() == ".npz" or any(path.glob("[xy]_t*.npy")):
        return "npz", path
    if is_parquet(path):
        return "parquet", path
    if path.is_dir():
        return "folder", path
    if path.exists():
        raise ValueError(f"{path} is neither a directory nor an .npz, parquet or arrow file")
    raise FileNotFoundError(f"there is no file or directory {path}")
