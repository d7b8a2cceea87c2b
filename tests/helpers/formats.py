"""Tiny data sets of noise in the original formats of CIFAR-10, CIFAR-100 and SVHN."""

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import savemat

from gsem.data import Split

CIFAR10 = ("cifar-10-python.tar.gz", "cifar-10-batches-py")
CIFAR100 = ("cifar-100-python.tar.gz", "cifar-100-python")


def write_cifar10(
    root: Path, n: int = 40, *, n_test: int = 20, keys: str = "python2", archive: bool = True, seed: int = 0
) -> dict[str, Split]:
    """`n` training images in five batches and `n_test` test images below `root`; returns what should be read.

    Args:
        keys: "python2" as published, "str" or "bytes" as repacked by Python 3.
        archive: the .tar.gz, otherwise the unpacked folder.
    """
    parts = {"train": noise(n, 10, seed), "test": noise(n_test, 10, seed + 1)}
    files: dict[str, Any] = {"batches.meta": {"label_names": [f"c{k}" for k in range(10)], "num_vis": 3072}}
    for k, (x, y) in enumerate(zip(parts["train"].x.chunk(5), parts["train"].y.chunk(5), strict=True), 1):
        files[f"data_batch_{k}"] = _batch(x, {"labels": y.tolist()})
    files["test_batch"] = _batch(parts["test"].x, {"labels": parts["test"].y.tolist()})
    write_pickles(root, CIFAR10, files, keys=keys, archive=archive)
    return parts


def write_cifar100(
    root: Path, n: int = 200, *, n_test: int = 100, keys: str = "python2", archive: bool = True, seed: int = 0
) -> dict[str, Split]:
    """As `write_cifar10`, with classes named fine-0 … fine-99."""
    parts = {"train": noise(n, 100, seed), "test": noise(n_test, 100, seed + 1)}
    files: dict[str, Any] = {
        part: _batch(s.x, {"fine_labels": s.y.tolist(), "coarse_labels": (s.y % 20).tolist()})
        for part, s in parts.items()
    }
    names = {"fine_label_names": 100, "coarse_label_names": 20}
    files["meta"] = {key: [f"{key[:-12]}-{k}" for k in range(count)] for key, count in names.items()}
    write_pickles(root, CIFAR100, files, keys=keys, archive=archive)
    return parts


def write_svhn(root: Path, n: int = 40, *, n_test: int = 20, seed: int = 0) -> dict[str, Split]:
    """`train_32x32.mat` and `test_32x32.mat` in `root`, where digit 0 has label 10."""
    parts = {"train": noise(n, 10, seed), "test": noise(n_test, 10, seed + 1)}
    root.mkdir(parents=True, exist_ok=True)
    for part, s in parts.items():
        y = torch.where(s.y == 0, 10, s.y).to(torch.uint8)
        arrays = {"X": s.x.permute(2, 3, 1, 0).numpy(), "y": y[:, None].numpy()}
        savemat(root / f"{part}_32x32.mat", arrays, do_compression=True)
    return parts


def noise(n: int, classes: int, seed: int) -> Split:
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, 32, 32), generator=random, dtype=torch.uint8)
    return Split(x, torch.arange(n) % classes)


def _batch(x: torch.Tensor, labels: dict[str, list[int]]) -> dict[str, Any]:
    return {**labels, "data": x.flatten(1).numpy(), "filenames": [f"{i}.png" for i in range(len(x))]}


def write_pickles(
    root: Path, names: tuple[str, str], files: dict[str, Any], *, keys: str = "python2", archive: bool = True
) -> Path:
    """Pickles of `files` (bytes are written as they are) in the archive or folder; returns its path."""
    contents = {name: f if isinstance(f, bytes) else pickled(f, keys) for name, f in files.items()}
    root.mkdir(parents=True, exist_ok=True)
    if not archive:
        folder = root / names[1]
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return folder
    with tarfile.open(root / names[0], "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{names[1]}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return root / names[0]


def pickled(value: Any, keys: str) -> bytes:
    """As Python 2 wrote it, or as Python 3 does with keys (and all strings) of that kind."""
    if keys == "str":
        return pickle.dumps(value, protocol=2)
    if keys == "bytes":
        return pickle.dumps(_in_bytes(value), protocol=4)
    out = io.BytesIO()
    _Python2(out, protocol=2).dump(_in_bytes(value))
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def _in_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {_in_bytes(k): _in_bytes(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_in_bytes(v) for v in value]
    return value.encode() if isinstance(value, str) else value


class _Python2(pickle._Pickler):
    """Bytes become strings of Python 2, and dtypes what its numpy made of them."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, (value.str[1:].encode(), 0, 1), (3, b"|", None, None, None, -1, -1, 0)
        return NotImplemented

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # noqa: RUF012
