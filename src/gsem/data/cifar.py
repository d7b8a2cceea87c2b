"""CIFAR-10 and CIFAR-100 in their original files, packed or unpacked.

Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
"""

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsem.data.dataset import Dataset, Split, crop_padding
from gsem.data.download import Remote, obtain

DESCRIPTION_10 = "60,000 photographs, 32 × 32 RGB, 10 classes; found in root or downloaded (170 MB)"
DESCRIPTION_100 = "60,000 photographs, 32 × 32 RGB, 100 classes; found in root or downloaded (169 MB)"

_CLASSES_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class _Layout:
    """How a data set is published: its archive, the folder in it, and the files in that folder."""

    archive: Remote
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str  # their key in each file


_CIFAR10 = _Layout(
    Remote("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{k}" for k in range(1, 6)),
    test=("test_batch",),
    labels="labels",
)
_CIFAR100 = _Layout(
    Remote("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    folder="cifar-100-python",
    train=("train",),
    test=("test",),
    labels="fine_labels",
)


def cifar10(root: Path | None = None) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images [3, 32, 32] of 10 classes.

    `cifar-10-python.tar.gz` or the folder `cifar-10-batches-py` is looked for in `root` (None is "dataset") and
    `root`/cifar10; if neither is there, the archive is downloaded into `root`.

    Raises:
        OSError: the data are not there and cannot be downloaded.
        ValueError: when a part is read: its files are damaged, incomplete, or hold something else than arrays.
    """
    path = obtain(_CIFAR10.archive, "cifar10", root=root, folder=_CIFAR10.folder)
    return _source("cifar10", DESCRIPTION_10, _CIFAR10, path, _CLASSES_10)


def cifar100(root: Path | None = None) -> Dataset:
    """CIFAR-100: 50,000 training and 10,000 test images [3, 32, 32] with their fine labels, of 100 classes.

    `cifar-100-python.tar.gz` or the folder `cifar-100-python` is looked for in `root` (None is "dataset") and
    `root`/cifar100; if neither is there, the archive is downloaded into `root`. The classes' names are read.

    Raises:
        OSError: the data are not there and cannot be downloaded.
        ValueError: the names, or a part when it is read, are damaged, incomplete, or something else than arrays.
    """
    path = obtain(_CIFAR100.archive, "cifar100", root=root, folder=_CIFAR100.folder)
    [(where, content)] = _contents(path, _CIFAR100.folder, ("meta",))
    names = _value(where, _table(where, content), "fine_label_names")
    # Python 3's reading of Python 2's strings may have left them bytes.
    classes = tuple(_text(name) for name in names) if isinstance(names, list) else ()
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) != 100:
        raise ValueError(f"{where}: fine_label_names must be the names of 100 classes")
    return _source("cifar100", DESCRIPTION_100, _CIFAR100, path, classes)


def _source(name: str, description: str, layout: _Layout, path: Path, classes: tuple[str, ...]) -> Dataset:
    return Dataset(
        name=name,
        classes=classes,
        shape=(3, 32, 32),
        eps=8 / 255,
        padding=crop_padding(32),
        fill=128,
        flip=True,
        description=description,
        read_train=partial(_read, path, layout, layout.train, len(classes)),
        read_test=partial(_read, path, layout, layout.test, len(classes)),
    )


def _read(path: Path, layout: _Layout, files: Sequence[str], classes: int) -> Split:
    images, labels = [], []
    for where, content in _contents(path, layout.folder, files):
        table = _table(where, content)
        images.append(_images(where, _value(where, table, "data")))
        labels.append(_labels(where, layout.labels, _value(where, table, layout.labels), classes))
        if len(images[-1]) != len(labels[-1]):
            raise ValueError(
                f"{where}: data has {len(images[-1])} images, but {layout.labels} has {len(labels[-1])} labels"
            )
    return Split(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


# --- files: of the folder, or of the archive, which is never unpacked to the disk ------------------------------


def _contents(path: Path, folder: str, files: Sequence[str]) -> list[tuple[str, bytes]]:
    """For each file: its name for messages, and its bytes."""
    if path.is_dir():
        for file in files:
            if not (path / file).is_file():
                raise ValueError(f"{path / file} is missing: unpack the archive again")
        return [(str(path / file), (path / file).read_bytes()) for file in files]
    found = _members(path, {f"{folder}/{file}" for file in files})
    for file in files:
        if f"{folder}/{file}" not in found:
            raise ValueError(f"{path} has no file {folder}/{file}")
    return [(f"{path}: {folder}/{file}", found[f"{folder}/{file}"]) for file in files]


def _members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    found = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                content = archive.extractfile(member) if name in wanted and member.isreg() else None
                if content is not None:
                    found[name] = content.read()
            while stream.read(1 << 20):  # to the end, where gzip compares the checksum
                pass
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read, the archive is damaged ({error})") from error
    return found


# --- pickles of Python 2, from untrusted files -----------------------------------------------------------------


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:
    # Python 2's numpy wrote 0 and 1, for which today's numpy warns.
    return np.dtype(code, bool(align), bool(copy))


def _encode(text: str, encoding: str) -> bytes:
    """Bytes that Python 3 has written as text, for a protocol of Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes are written as latin1, not {encoding}")
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # numpy's own, whose module depends on numpy's version
# Everything that a pickle of arrays, strings, numbers and lists needs. None of it runs code from the file.
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


class _Refused(ValueError):
    """A pickle needs something outside `_ADMITTED`."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _Refused(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


def _table(where: str, content: bytes) -> dict[Any, Any]:
    """The dictionary that a file is, with keys of str."""
    try:
        table = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except _Refused as error:
        raise ValueError(f"{where} is refused, nothing executed: {error}, but must hold arrays only") from error
    # A damaged pickle may raise any exception.
    except Exception as error:
        raise ValueError(f"{where} cannot be read, it is damaged ({error})") from error
    if not isinstance(table, dict):
        raise ValueError(f"{where} must hold a dictionary, not {type(table).__name__}")
    return {_text(key): value for key, value in table.items()}


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _value(where: str, table: dict[Any, Any], key: str) -> Any:
    if key not in table:
        raise ValueError(f"{where} has no {key}; its keys are: {', '.join(map(str, table)) or 'none'}")
    return table[key]


def _images(where: str, data: Any) -> np.ndarray:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        kind = data.dtype if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{where}: data is {kind}, but must be an array of uint8")
    if data.ndim != 2 or data.shape[1] != 3 * 32 * 32 or len(data) == 0:
        raise ValueError(f"{where}: data has shape {list(data.shape)}, but must be [n, 3072]: images 3 × 32 × 32")
    return data.reshape(-1, 3, 32, 32)


def _labels(where: str, key: str, labels: Any, classes: int) -> np.ndarray:
    try:
        y = np.asarray(labels)
    except ValueError:  # lists of several lengths
        y = np.empty(0, object)
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise ValueError(f"{where}: {key} must be integers, one per image")
    wrong = y[(y < 0) | (y >= classes)]
    if len(wrong):
        raise ValueError(f"{where}: {key} has the label {wrong[0]}, but there are {classes} classes")
    return y.astype(np.int64)
