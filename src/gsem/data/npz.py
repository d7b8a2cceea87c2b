"""Data sets in one .npz file, or a folder of .npy files: x_train, y_train, x_test, y_test, and optionally classes."""

import lzma
import math
import shlex
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from gsem.data.dataset import Dataset, Split, crop_padding
from gsem.data.images import RowsOfFile

DESCRIPTION = "a .npz file with x_train [n, h, w, c] uint8, y_train [n] integers, x_test, y_test, or a folder of .npy"

_FROM_FLOATS = "; images in [0, 1] become it by (255 * x).round().astype('uint8')"
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError),
    # zipfile's errors for encryption and unknown compression; numpy's for a header of an absurd size.
    *(RuntimeError, NotImplementedError, MemoryError),
)


def npz_file(path: str | Path) -> Dataset:
    """The arrays of `path`: x_train [n, h, w, c] or [n, h, w] uint8 with y_train [n] integers, x_test, y_test.

    `path` is an .npz file, or a folder with x_train.npy and so on, which is what an .npz file is when it is unpacked.
    Images of a set larger than memory can be read one by one from a folder, and from an .npz that is not compressed
    (`np.savez`).

    Either part may be absent. Classes are named by the array `classes` (strings, in the order of the labels),
    otherwise "0" … up to the largest label of y_train (of y_test if there is no training part). Here only that
    part's labels and the header of its images are read. Pickled objects are never loaded. Other arrays are not used,
    and a warning names them.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is damaged, an array is missing or not as above, a label has no class, or a class
            has no training images. The message names the file and the key.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    keys = _keys(path)
    parts = [part for part in ("train", "test") if {f"x_{part}", f"y_{part}"} & set(keys)]
    if not parts:
        raise ValueError(f"{path} has neither x_train nor x_test; its keys are: {', '.join(keys) or 'none'}")
    for part in parts:
        for key, partner in ((f"x_{part}", f"y_{part}"), (f"y_{part}", f"x_{part}")):
            if key not in keys:
                raise ValueError(f"{path} has {partner} but no {key}; its keys are: {', '.join(keys)}")
    ignored = sorted(set(keys) - {f"{x}_{part}" for part in parts for x in "xy"} - {"classes"})
    if ignored:
        warnings.warn(
            f"{path}: {', '.join(ignored)} {'is' if len(ignored) == 1 else 'are'} not used; arrays must be called "
            "x_train, y_train, x_test, y_test or classes",
            stacklevel=2,
        )
    main = parts[0]
    labels = _labels(path, f"y_{main}")
    classes = _classes(path, labels, named="classes" in keys, complete=main == "train")
    shape = _shape(path, f"x_{main}")
    readers = {part: partial(_read, path, part, classes, shape) for part in parts}
    return Dataset(
        name=path.stem if path.is_file() else path.resolve().name,
        classes=classes,
        shape=shape,
        eps=8 / 255,
        padding=crop_padding(shape[1]),
        fill=128,
        flip=True,
        description=f"arrays of {path}",
        read_train=readers.get("train"),
        read_test=readers.get("test"),
    )


@contextmanager
def _opened(path: Path, key: str) -> Iterator[IO[bytes]]:
    # Read as a zip archive, not by np.load: that also opens bare .npy files, and cannot show a header alone.
    try:
        if path.is_dir():
            with open(path / f"{key}.npy", "rb") as file:
                yield file
            return
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
            yield member
    except _DAMAGE as error:
        raise ValueError(f"{path}: {key} cannot be read, the file is damaged ({error})") from error


def _keys(path: Path) -> list[str]:
    if path.is_dir():
        return sorted(file.stem for file in path.glob("*.npy"))
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except _DAMAGE as error:
        raise ValueError(f"{path} is not an .npz file, or is damaged ({error})") from error


def _header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, without its values."""
    with _opened(path, key) as member:
        shape, _, dtype = _read_header(member)
    if dtype.hasobject:
        raise ValueError(f"{path}: {key} holds Python objects (dtype object), which are never loaded")
    return shape, dtype


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first axis varies fastest, and dtype; the values follow in the file."""
    version = np.lib.format.read_magic(file)
    # Version 3 differs from 2 only in the names of record fields, and records are refused anyway.
    old = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    found: tuple[tuple[int, ...], bool, np.dtype] = read(file)
    return found


def _values_at(path: Path, key: str) -> tuple[Path, int] | None:
    """The file in which the values of an array lie uncompressed, row by row, and from which byte on; else None."""
    if path.is_dir():
        file, start = path / f"{key}.npy", 0
    else:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{key}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        file, start = path, member.header_offset
    with open(file, "rb") as opened:
        if file == path:  # after the member's own header: 30 bytes, its name and what is added to it
            opened.seek(start + 26)
            opened.seek(start + 30 + sum(struct.unpack("<HH", opened.read(4))))
        _, columns_first, _ = _read_header(opened)
        return None if columns_first else (file, opened.tell())


class ArrayImages(RowsOfFile):
    """The images [n, h, w, c] or [n, h, w] under a key of an .npz file or of a folder of .npy files."""

    def __init__(self, path: Path, key: str, shape: Sequence[int]):
        self.array, self.key = path, key
        self.at = _values_at(path, key)
        if self.at is not None and self.at[1] + math.prod(shape) > self.at[0].stat().st_size:
            raise ValueError(f"{path}: {key} cannot be read, the file is damaged (it ends before its last image)")
        super().__init__(*(self.at or (path, 0)), shape)

    def whole(self) -> UInt8[Tensor, "n c h w"]:
        """All images; the checksum of an .npz file is compared."""
        images = _array(self.array, self.key)
        self._check_range(images)
        return _channels_first(images)

    def check(self) -> None:
        if self.at is None:
            path = shlex.quote(str(self.array))
            folder = shlex.quote(str(self.array.with_suffix("")))
            raise ValueError(
                f"{self.array}: {self.key} is compressed or stored by columns, so its images cannot be read singly. "
                f"Unpack it once (python -m zipfile -e {path} {folder}) and give the folder {folder}; arrays stored by "
                "columns need np.ascontiguousarray. Or read all of it into memory: --hold (hold=True in Python)"
            )
        self._check_range(self[:1000].numpy())

    def _check_range(self, images: np.ndarray) -> None:
        if images.max() <= 1:  # what .astype("uint8") makes of images in [0, 1]: all but white is 0
            raise ValueError(
                f"{self.array}: {self.key} holds no value above 1, but must be uint8 from 0 to 255{_FROM_FLOATS}"
            )


def _array(path: Path, key: str) -> np.ndarray:
    with _opened(path, key) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        member.read()  # to the end, where zipfile compares the checksum
    return array


def _shape(path: Path, key: str) -> tuple[int, int, int]:
    """(c, h, w) of the images under `key`, whose dtype and axes are checked."""
    shape, dtype = _header(path, key)
    if dtype != np.uint8:
        hint = _FROM_FLOATS if dtype.kind == "f" else ""
        raise ValueError(f"{path}: {key} is {dtype}, but must be uint8 (0 to 255){hint}")
    if len(shape) not in (3, 4):
        raise ValueError(f"{path}: {key} has shape {list(shape)}, but must be [n, h, w, c] or [n, h, w]")
    if math.prod(shape) == 0:
        raise ValueError(f"{path}: {key} is empty (shape {list(shape)})")
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        raise ValueError(
            f"{path}: {key} has shape {list(shape)}, but must be [n, h, w, c]: "
            "channels come last, by x.transpose(0, 2, 3, 1)"
        )
    return (shape[3] if len(shape) == 4 else 1, shape[1], shape[2])


def _labels(path: Path, key: str) -> Int64[Tensor, "n"]:
    shape, dtype = _header(path, key)
    if dtype.kind not in "iu":
        raise ValueError(f"{path}: {key} is {dtype}, but labels must be integers")
    if len(shape) != 1:
        raise ValueError(f"{path}: {key} has shape {list(shape)}, but must be [n]: one label per image")
    if shape[0] == 0:
        raise ValueError(f"{path}: {key} is empty")
    labels = _array(path, key)
    if labels.min() < 0:
        raise ValueError(f"{path}: {key} has the label {labels.min()}, but labels start at 0")
    # Through int64 by numpy: torch knows neither other byte orders nor, everywhere, wide unsigned integers.
    return torch.from_numpy(labels.astype(np.int64))


def _classes(path: Path, labels: Int64[Tensor, "n"], *, named: bool, complete: bool) -> tuple[str, ...]:
    """Names from the array `classes` if `named`; if `complete`, each of them must have a label."""
    seen = set(labels.unique().tolist())
    if named:
        shape, dtype = _header(path, "classes")
        if dtype.kind != "U" or len(shape) != 1 or shape[0] == 0:
            raise ValueError(f"{path}: classes is {dtype} {list(shape)}, but must be strings, one per class")
        classes = tuple(_array(path, "classes").tolist())
        if len(set(classes)) < len(classes):
            raise ValueError(f"{path}: classes names a class twice: {', '.join(classes)}")
        if not complete:
            return classes
        missing = [f"{number} ({name})" for number, name in enumerate(classes) if number not in seen]
    else:
        if not complete:
            return tuple(map(str, range(max(seen) + 1)))
        # At most one is looked for beyond the labels there are, so that a stray huge label costs nothing.
        missing = [str(number) for number in range(min(max(seen), len(seen)) + 1) if number not in seen]
        classes = tuple(map(str, range(len(seen))))
    if missing:
        hint = ": labels start at 0, by y - 1" if missing == ["0"] else ""
        raise ValueError(f"{path}: y_train has no image of class {', '.join(missing)}{hint}")
    return classes


def _read(path: Path, part: str, classes: tuple[str, ...], shape: tuple[int, int, int]) -> Split:
    found = _shape(path, f"x_{part}")
    if found != shape:
        raise ValueError(f"{path}: x_{part} has images (c, h, w) {found}, but x_train has {shape}")
    y = _labels(path, f"y_{part}")
    if int(y.max()) >= len(classes):
        raise ValueError(f"{path}: y_{part} has the label {int(y.max())}, but there are {len(classes)} classes")
    return Split(_images(path, f"x_{part}", y, f"y_{part}"), y)


def _images(path: Path, key: str, y: Int64[Tensor, "n"], labels: str) -> ArrayImages:
    whole = _header(path, key)[0]
    if whole[0] != len(y):
        raise ValueError(f"{path}: {key} has {whole[0]} images, but {labels} has {len(y)} labels")
    return ArrayImages(path, key, whole)


def _channels_first(images: np.ndarray) -> UInt8[Tensor, "n c h w"]:
    x = torch.from_numpy(images)
    return x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
