"""The named data sets, and `load`, which finds one by name or path."""

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from gsem.data import cifar, digits, folder, npz, svhn
from gsem.data.dataset import Dataset


class _Entry(NamedTuple):
    description: str
    read: Callable[[Path | None], Dataset]


def _at(root: Path | None, name: str) -> Path:
    if root is None:
        raise ValueError(f"data {name!r} needs root: load({name!r}, root=PATH)")
    return root


# A data set is one entry: its description, and the function from the given root (or None) to the `Dataset`.
_ENTRIES = {
    "digits": _Entry(digits.DESCRIPTION, lambda root: digits.digits()),
    "folder": _Entry(folder.DESCRIPTION, lambda root: folder.image_folder(_at(root, "folder"))),
    "npz": _Entry(npz.DESCRIPTION, lambda root: npz.npz_file(_at(root, "npz"))),
    "cifar10": _Entry(cifar.DESCRIPTION_10, cifar.cifar10),
    "cifar100": _Entry(cifar.DESCRIPTION_100, cifar.cifar100),
    "svhn": _Entry(svhn.DESCRIPTION, svhn.svhn),
}

DATASETS: dict[str, str] = {name: entry.description for name, entry in _ENTRIES.items()}


def load(name: str, root: str | Path | None = None) -> Dataset:
    """The data set of that name, or at that path.

    Args:
        name: a name in `DATASETS`, the path of an .npz file, or the path of an image folder. A name wins over a
            path: a folder that happens to be called digits is "./digits".
        root: where the data of a name lie; "folder" and "npz" need it, "digits" makes no use of it, for the
            others None is "dataset". What is not there of cifar10, cifar100 and svhn is downloaded into it.

    Raises:
        FileNotFoundError: nothing is at that path, or what is missing cannot be downloaded.
        NotADirectoryError: root is a file.
        ValueError: an unknown name, a missing root, a root beside a path, or damaged data.
    """
    name = os.fspath(name)
    if name in _ENTRIES:
        return _ENTRIES[name].read(None if root is None else Path(root))
    path = Path(name).expanduser()
    is_path = path.exists() or path.suffix.lower() == ".npz" or len(path.parts) > 1
    if not is_path:
        near = get_close_matches(name.lower(), _ENTRIES, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join(_ENTRIES)
        raise ValueError(
            f"data {name!r} is unknown.{hint} Possible are: {known}, or the path of an .npz file or image folder"
        )
    if root is not None:
        raise ValueError(f"root goes with a name of data ({', '.join(_ENTRIES)}), not with the path {name}")
    if path.is_dir():
        return folder.image_folder(path)
    if path.suffix.lower() == ".npz":
        return npz.npz_file(path)
    if path.exists():
        raise ValueError(f"{path} is neither an .npz file nor a directory")
    raise FileNotFoundError(f"there is no file or directory {path}")
