"""Image folders: root/train/CLASS/* and root/test/CLASS/*, decoded into one tensor."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gsem.data.dataset import Dataset, Split, crop_padding

DESCRIPTION = "a directory with train/CLASS/* and test/CLASS/* image files, all of one size"

_GREY = ("1", "L")
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")
_CHUNK = 64  # files a thread decodes between two visits to the queue
# Pillow decodes outside the interpreter's lock, but for a small image the passing of the lock costs more than is
# won: measured on 2 cores, two threads take 1.7 to 1.9 times as long as one for 32 × 32 JPEGs, and 0.7 for 224.
_PIXELS_WORTH_THREADS = 96 * 96


@dataclass(frozen=True)
class _Layout:
    """What every image must be like: the size of the file `first`, in `channels` channels."""

    channels: int
    height: int
    width: int
    first: str


def image_folder(root: str | Path) -> Dataset:
    """The images below `root`/train/CLASS/ and `root`/test/CLASS/; either part may be absent.

    Classes are the folders of train/ (of test/ if there is no train/), sorted by name; images come in the order
    of their sorted file names. They are [1, h, w] if every image of that part is grey, otherwise all are made
    RGB, [3, h, w] (transparency is dropped). Hidden files are passed over.

    Here only the folders are listed and the headers of the first part's images looked at, up to the first one
    in colour; images are decoded by `training()` and `test()`.

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
    names = {part: _class_names(folder) for part, folder in parts.items()}
    main = next(iter(parts))
    classes = names[main]
    if "test" in parts:
        _check_same(root, classes, names["test"])
    layout = _layout([file for file, _ in _files(parts[main], classes)])
    readers = {part: partial(_read, folder, classes, layout) for part, folder in parts.items()}
    return Dataset(
        name=root.resolve().name,
        classes=classes,
        shape=(layout.channels, layout.height, layout.width),
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


def _class_names(part: Path) -> tuple[str, ...]:
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


def _files(part: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Every image file with its label, by class and then by name."""
    files: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        entries = _entries(part / name)
        if not entries:
            raise ValueError(f"class folder {part / name} is empty")
        for entry in entries:
            if entry.is_dir():
                raise ValueError(f"{entry.path} is a folder: images lie directly in {part / name}")
            files.append((entry.path, label))
    return files


@contextmanager
def _open(file: str) -> Iterator[Image.Image]:
    """The image, its pixels not yet decoded; whatever goes wrong in the block is told with the file's name."""
    try:
        with Image.open(file) as image:
            # Pillow cuts 16-bit colour to 8 bits without a word; the raw mode of its decoder tells.
            raw = next((str(tile[3]) for tile in image.tile), "")
            if image.mode.startswith(("I", "F")) or any(f";16{order}" in raw for order in "BLN"):
                kind = "float" if image.mode.startswith("F") else "more than 8-bit"
                raise ValueError(f"it has {kind} values (mode {image.mode}); save it with 8 bits per channel")
            yield image
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{file} is not an image, or is damaged: move it away or replace it") from error
    # Pillow's decoders raise what they meet in a damaged file: OSError, SyntaxError, struct.error, zlib.error …
    except Exception as error:
        raise ValueError(f"{file} cannot be used: {error}") from error


def _layout(files: Sequence[str]) -> _Layout:
    # One image in colour settles it, so for a colour data set this looks at one header.
    with _open(files[0]) as image:
        width, height = image.size
    return _Layout(1 if all(map(_is_grey, files)) else 3, height, width, files[0])


def _is_grey(file: str) -> bool:
    with _open(file) as image:
        return image.mode in _GREY


def _decode(file: str, layout: _Layout) -> np.ndarray:
    """uint8 [h, w] or [h, w, 3]."""
    with _open(file) as image:
        if image.size != (layout.width, layout.height):
            raise ValueError(
                f"it is {image.width} × {image.height} pixels, while {layout.first} is "
                f"{layout.width} × {layout.height}; all images must have one size"
            )
        if layout.channels == 1 and image.mode not in _GREY:
            raise ValueError(f"it is in colour (mode {image.mode}), while all training images are grey")
        mode = "L" if layout.channels == 1 else "RGB"
        if image.mode == mode:
            return np.asarray(image)
        # A palette with transparency wants the detour, or Pillow warns.
        if "transparency" in image.info:
            return np.asarray(image.convert("RGBA").convert(mode))
        return np.asarray(image.convert(mode))


def _read(part: Path, classes: Sequence[str], layout: _Layout) -> Split:
    files = _files(part, classes)
    x = np.empty((len(files), layout.channels, layout.height, layout.width), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(files))):
            image = _decode(files[i][0], layout)
            x[i] = image if image.ndim == 2 else image.transpose(2, 0, 1)

    threads = os.cpu_count() if layout.height * layout.width >= _PIXELS_WORTH_THREADS else 1
    # `map` gives results in order, so of several bad files the first is told, however the threads ran.
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, range(0, len(files), _CHUNK)):
            pass
    return Split(torch.from_numpy(x), torch.tensor([label for _, label in files]))
