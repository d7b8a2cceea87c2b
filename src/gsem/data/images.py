"""Images that are read from disk on access, instead of a tensor, for data sets too large for memory."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

Rows: TypeAlias = "Tensor | slice | Sequence[int]"

_CHUNK = 64  # images that a thread reads between two visits to the queue
# Pillow decodes outside the interpreter's lock, but for a small image the passing of the lock costs more than is
# won: measured on 2 cores, two threads take 1.7 to 1.9 times as long as one for 32 × 32 JPEGs, and 0.7 for 224.
_PIXELS_WORTH_THREADS = 96 * 96


class DamagedImage(ValueError):
    """An image cannot be read or is not like the others; the message names its file or number."""


class Images(ABC):
    """Images uint8 [n, c, h, w], 0 … 255, of which any rows can be read at any time, also in another process.

    `images[rows]` reads those rows into a tensor, whatever the rows are: a slice, numbers or a mask. Reading the same
    row again gives the same pixels. Objects can be pickled.
    """

    shape: torch.Size
    dtype = torch.uint8

    @abstractmethod
    def read(self, rows: Sequence[int]) -> UInt8[Tensor, "b c h w"]:
        """These images, in one thread.

        Raises:
            DamagedImage: one of them cannot be read.
        """

    def check(self) -> None:  # noqa: B027 (most have nothing to look at)
        """Look at what can be seen of all images without decoding them; raises a ValueError if one does not fit."""

    def whole(self) -> UInt8[Tensor, "n c h w"]:
        """All images."""
        return self[:]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> UInt8[Tensor, "b c h w"]:
        return in_threads(self.read, numbers(rows, len(self)).tolist(), tuple(self.shape[1:]))

    def view(self, rows: Tensor) -> "Images":
        """Those images, still unread."""
        return _Chosen(self, numbers(rows, len(self)))


def numbers(rows: Rows, n: int) -> Tensor:
    """The row numbers, int64, that a slice, a mask or numbers name among n rows."""
    if isinstance(rows, slice):
        return torch.arange(n)[rows]
    rows = torch.as_tensor(rows).cpu()
    return rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long() % max(n, 1)


def in_threads(
    read: Callable[[Sequence[int]], Tensor], rows: Sequence[int], shape: tuple[int, ...]
) -> UInt8[Tensor, "n c h w"]:
    """Read all the rows, in threads where the images are large. If several fail, the error of the first is raised."""
    x = torch.empty((len(rows), *shape), dtype=torch.uint8)

    def fill(start: int) -> None:
        x[start : start + _CHUNK] = read(rows[start : start + _CHUNK])

    threads = os.cpu_count() if shape[-2] * shape[-1] >= _PIXELS_WORTH_THREADS else 1
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, range(0, len(rows), _CHUNK)):  # in order
            pass
    return x


def stacked(arrays: list[np.ndarray]) -> UInt8[Tensor, "b c h w"]:
    return torch.from_numpy(np.stack(arrays))


class _Chosen(Images):
    def __init__(self, images: Images, rows: Tensor):
        self.images, self.rows = images, rows
        self.shape = torch.Size((len(rows), *images.shape[1:]))

    def read(self, rows: Sequence[int]) -> Tensor:
        return self.images.read(self.rows[torch.as_tensor(rows)].tolist())


class Joined(Images):
    """Several sets of images, tensors among them, one after the other."""

    def __init__(self, parts: "Sequence[Tensor | Images]"):
        self.parts = list(parts)
        self.first = np.cumsum([0, *map(len, self.parts)])
        self.shape = torch.Size((int(self.first[-1]), *self.parts[0].shape[1:]))

    def whole(self) -> Tensor:
        x = torch.empty(self.shape, dtype=torch.uint8)
        for start, part in zip(self.first, self.parts, strict=False):
            x[start : start + len(part)] = part if isinstance(part, Tensor) else part.whole()
        return x

    def check(self) -> None:
        for part in self.parts:
            if isinstance(part, Images):
                part.check()

    def read(self, rows: Sequence[int]) -> Tensor:
        wanted = np.asarray(rows)
        part = np.searchsorted(self.first, wanted, side="right") - 1
        x = torch.empty((len(wanted), *self.shape[1:]), dtype=torch.uint8)
        for number in np.unique(part):
            here = part == number
            mine = wanted[here] - self.first[number]
            images = self.parts[number]
            x[torch.from_numpy(here)] = (
                images[torch.from_numpy(mine)] if isinstance(images, Tensor) else images.read(mine.tolist())
            )
        return x


class RowsOfFile(Images):
    """Pixels [n, h, w, c] or [n, h, w] that lie one after the other in a file, from a byte on.

    They are read by position, not mapped: pages of a mapped file count as the process's memory, which would then grow
    with what was read.
    """

    def __init__(self, path: str | os.PathLike, start: int, shape: Sequence[int]):
        n, h, w = shape[:3]
        self.path, self.start = os.fspath(path), start
        self.item = (h, w, shape[3] if len(shape) == 4 else 1)
        self.shape = torch.Size((n, self.item[2], h, w))

    def read(self, rows: Sequence[int]) -> Tensor:
        x = np.empty((len(rows), *self.item), np.uint8)
        size = int(np.prod(self.item))
        with open(self.path, "rb", buffering=0) as file:  # opened each time: safe in threads and after a fork
            for i, row in enumerate(rows):
                file.seek(self.start + row * size)
                if file.readinto(x[i].data.cast("B")) != size:
                    raise DamagedImage(f"{self.path} ends before image {row}: it is damaged")
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
