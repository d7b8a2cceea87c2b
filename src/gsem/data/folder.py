"""Image folders: root/train/CLASS/* and root/test/CLASS/*."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from gsem.data.dataset import Dataset, Split, crop_padding
from gsem.data.decode import GREY, Layout, check_size, decoded, layout_of, opened
from gsem.data.images import Images, stacked

DESCRIPTION = "a directory with train/CLASS/* and test/CLASS/* image files, all of one size (or --resize)"

_SYSTEM_FILES = ("thumbs.db", "desktop.ini")


def image_folder(root: str | Path, resize: int | None = None) -> Dataset:
    """The images below `root`/train/CLASS/ and `root`/test/CLASS/; either part may be absent.

    Classes are the folders of train/ (of test/ if there is no train/), sorted by name; images come in the order
    of their sorted file names. They are [1, h, w] if every image of that part is grey, otherwise all are made
    RGB, [3, h, w] (transparency is dropped). Hidden files are passed over.

    Here only the folders are listed and the headers of the first part's images looked at, up to the first one
    in colour; images are decoded by `training()` and `test()`, or during the training (see `Dataset.hold`).

    Args:
        resize: bring images of any sizes to `resize` × `resize`: the shorter side is resized, the centre cropped.

    Raises:
        FileNotFoundError: `root` is no directory.
        ValueError: neither train/ nor test/, no classes, classes that differ, an empty class, a file that is no
            image of 8 bits per channel. Reading raises it for damaged files and mixed sizes. The message names
            the file or folder.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no directory {root}")
    parts = {part: root / part for part in ("train", "test") if (root / part).is_dir()}
    if not parts:
        raise ValueError(f"{root} has neither a train nor a test folder: images lie in {root}/train/CLASS/")
    names = {part: class_names(folder) for part, folder in parts.items()}
    main = next(iter(parts))
    classes = names[main]
    if "test" in parts:
        _check_same(root, classes, names["test"])
    layout = _layout(FolderImages(parts[main], classes), resize)
    readers = {part: partial(_read, folder, classes, layout) for part, folder in parts.items()}
    return Dataset(
        name=root.resolve().name,
        classes=classes,
        shape=layout.shape,
        eps=8 / 255,
        padding=crop_padding(layout.height),
        fill=128,
        flip=True,
        description=f"image folder {root}",
        read_train=readers.get("train"),
        read_test=readers.get("test"),
    )


def _entries(folder: Path | str) -> list[os.DirEntry]:
    with os.scandir(folder) as found:
        seen = [e for e in found if not e.name.startswith(".") and e.name.lower() not in _SYSTEM_FILES]
    return sorted(seen, key=lambda e: e.name)


def class_names(part: Path) -> tuple[str, ...]:
    entries = _entries(part)
    for entry in entries:
        if not entry.is_dir():
            raise ValueError(f"{entry.path} is in no class: images lie in {part}/CLASS/")
    if not entries:
        raise ValueError(f"{part} has no class folders: images lie in {part}/CLASS/")
    return tuple(entry.name for entry in entries)


def _check_same(root: Path, train: Sequence[str], test: Sequence[str]) -> None:
    only = {"train": sorted(set(train) - set(test)), "test": sorted(set(test) - set(train))}
    differences = [f"only in {part}: {', '.join(names)}" for part, names in only.items() if names]
    if differences:
        raise ValueError(f"{root}: train and test have different classes ({'; '.join(differences)})")


class FolderImages(Images):
    """The image files part/CLASS/*, by class and then by name; `y` are their labels.

    Names are kept as bytes in one array: a list of a million strings would be copied into every worker process.
    """

    def __init__(self, part: Path | str, classes: Sequence[str], layout: Layout | None = None):
        """Without a layout, files can be named, but no images be read."""
        self.part, self.classes, self.layout = os.fspath(part), tuple(classes), layout
        names: list[np.ndarray] = []
        for name in classes:
            entries = _entries(Path(part) / name)
            if not entries:
                raise ValueError(f"class folder {Path(part) / name} is empty")
            for entry in entries:
                if entry.is_dir():
                    raise ValueError(f"{entry.path} is a folder: images lie directly in {Path(part) / name}")
            names.append(np.array([os.fsencode(entry.name) for entry in entries]))
        self.names = np.concatenate(names)
        self.y = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(found) for found in names]))
        self.shape = torch.Size((len(self.names), *(layout.shape if layout else (0, 0, 0))))

    def file(self, row: int) -> str:
        return os.path.join(self.part, self.classes[int(self.y[row])], os.fsdecode(self.names[row]))

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        assert self.layout is not None
        return stacked([decoded(self.file(row), self.layout) for row in rows])

    def check(self) -> None:
        assert self.layout is not None
        if self.layout.resize is None:
            for row in range(len(self)):
                with opened(self.file(row)) as image:
                    check_size(image, self.layout)


def _layout(images: FolderImages, resize: int | None) -> Layout:
    first = images.file(0)
    # One image in colour decides, so for a colour data set this looks at one header.
    grey = all(_is_grey(images.file(row)) for row in range(len(images)))
    with opened(first) as image:
        return layout_of(image, first, grey=grey, resize=resize)


def _is_grey(file: str) -> bool:
    with opened(file) as image:
        return image.mode in GREY


def _read(part: Path, classes: Sequence[str], layout: Layout) -> Split:
    images = FolderImages(part, classes, layout)
    return Split(images, images.y)
