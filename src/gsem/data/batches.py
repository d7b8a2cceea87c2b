"""Batches of a training: from tensors on the device, or read by worker processes while the device computes."""

import os
import signal
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from gsem._env import require_room
from gsem.data.dataset import Split
from gsem.data.images import DamagedImage, Images, Joined

Batch: TypeAlias = tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]


@runtime_checkable
class Batches(Protocol):
    """Training images as batches on the device. The caller chooses the rows of each batch."""

    def __len__(self) -> int:
        """How many images there are."""

    def batches(self, rows: Iterable[Int64[Tensor, " b"]]) -> Generator[Batch, None, None]:
        """A batch for each tensor of row numbers (on the CPU), in their order.

        Raises:
            DamagedImage: an image of the next batch cannot be read.
        """


def batches_of(parts: Sequence[Split], device: torch.device) -> Batches:
    """Batches of the splits, one after the other: held on the device if all their images are tensors, else streamed."""
    x = [part.x for part in parts]
    y = torch.cat([part.y for part in parts]) if len(parts) > 1 else parts[0].y
    if all(isinstance(images, Tensor) for images in x):
        return Held(torch.cat(x) if len(x) > 1 else x[0], y, device)  # type: ignore[arg-type]
    return Streamed(Joined(x) if len(x) > 1 else x[0], y, device)  # type: ignore[arg-type]


class Held:
    """All images as one tensor on the device."""

    def __init__(self, x: UInt8[Tensor, "n c h w"], y: Int64[Tensor, " n"], device: torch.device):
        require_room(x, device, "hold=False (--no-hold) reads the training images batch by batch")
        self.x, self.y, self.device = x.to(device), y.to(device), device

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, rows: Iterable[Tensor]) -> Generator[Batch, None, None]:
        for picked in rows:
            here = picked.to(self.device)
            yield self.x[here], self.y[here]


class Streamed:
    """Images that worker processes read and decode in advance; the labels stay in memory.

    Workers get the numbers of the rows and draw nothing at random, so that their number changes no batch.
    """

    def __init__(self, images: Images, y: Int64[Tensor, " n"], device: torch.device, workers: int | None = None):
        self.images, self.y, self.device = images, y, device
        self.workers = usual_workers() if workers is None else workers

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, rows: Iterable[Tensor]) -> Generator[Batch, None, None]:
        loader: DataLoader[Any] = DataLoader(
            _Reading(self.images),  # type: ignore[arg-type]
            batch_size=None,  # a batch is one item: the worker reads all its images
            sampler=_Again(rows),
            num_workers=self.workers,
            worker_init_fn=_ignore_ctrl_c,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, or the process's random state would change
        )
        for picked, x in loader:
            if isinstance(x, str):
                raise DamagedImage(x)
            yield x.to(self.device, non_blocking=True), self.y[picked].to(self.device, non_blocking=True)


def usual_workers() -> int:
    """One for each CPU that this process may use, but one is left for the training; at least 1, at most 8."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cpus - 1))


class _Again:
    """What a DataLoader takes for a sampler; torch's own refuse a generator of tensors."""

    def __init__(self, rows: Iterable[Tensor]):
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows)


class _Reading:
    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor | str]:
        try:
            return rows, self.images.read(rows.tolist())
        # As text: a DataLoader would raise it anew with the worker's traceback in its message.
        except DamagedImage as error:
            return rows, str(error)


def _ignore_ctrl_c(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the training finishes its step, for which it needs its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
