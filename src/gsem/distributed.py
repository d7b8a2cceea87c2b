"""Several processes, started by torchrun, SLURM or `--processes`: whose rows are whose, and decisions made together.

All processes run the same program and call the same functions in the same order. This is the one place that asks
torch.distributed; the rest of the package asks `current()`.
"""

import atexit
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gsem._env import device_named
from gsem._lock import is_dead, this_process

JOIN_SECONDS = 120.0
"""For all processes to arrive at the start."""
BEAT_SECONDS = 1.0
"""Between two signs of life of a process."""
MISSED_BEATS = 30
"""Beats of another process that may be missed before it counts as ended."""
GRACE_SECONDS = 10.0
"""Between the end of one process and the hard end of those that wait for it where Python cannot be interrupted."""
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Another process ended while this one needed it."""


class OtherProcessFailed(RuntimeError):
    """Another process raised an error, and raises it itself; this one ends with it."""


@dataclass(frozen=True)
class World:
    """The place of this process among all, from the environment."""

    rank: int
    size: int
    local_rank: int
    """Among the processes of this host."""


def world(environment: Mapping[str, str] | None = None) -> World:
    """The processes that were started together; one process where nothing in the environment names several.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. In a step of SLURM (srun) they follow from
    SLURM's own variables.

    Raises:
        ValueError: some of the variables are there and others are not, or they are no sensible numbers.
    """
    found = os.environ if environment is None else environment
    if "RANK" not in found and "WORLD_SIZE" not in found and int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return World(*(int(found[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID")))
    size = _number(found, "WORLD_SIZE", 1)
    if size < 1:
        raise ValueError(f"WORLD_SIZE must be at least 1, not {size}")
    if size == 1 and "RANK" not in found:
        return World(0, 1, 0)
    missing = [name for name in VARIABLES if name not in found]
    if missing and (size > 1 or "WORLD_SIZE" not in found):
        given = ", ".join(f"{name}={found[name]}" for name in VARIABLES if name in found)
        raise ValueError(
            f"{given} is set, but {', '.join(missing)} is not: start several processes by torchrun "
            "(torchrun --nproc-per-node N -m gsem …) or --processes N, or unset it"
        )
    rank = _number(found, "RANK", 0)
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be 0 to {size - 1} where WORLD_SIZE is {size}, not {rank}")
    return World(rank, size, _number(found, "LOCAL_RANK", rank))


def _number(found: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(found.get(name, default))
    except ValueError:
        raise ValueError(f"{name} must be an integer, not {found[name]!r}") from None


class Processes:
    """All processes that compute together. Of one process, every method is a plain call that communicates nothing."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None):
        self.rank, self.size, self.local_rank, self.store = rank, size, local_rank, store
        self.hint = ""
        """What the user can do if a process ends before its time: a sentence without its full stop."""
        self._counters = 0
        self._watch = _Watch(self) if size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def device(self, name: str | None) -> torch.device:
        """As `device_named`; with several processes, "cuda" is the GPU of this one.

        Raises:
            ValueError: as `device_named`, or one device for several processes.
        """
        device = device_named(name)
        if not self.several:
            return device
        if device.type == "mps" or (device.type == "cuda" and device.index not in (None, torch.cuda.current_device())):
            raise ValueError(
                f"device {name!r} is one for all of {self.size} processes: with cuda each takes a GPU of its own"
            )
        return device

    def rows(self, count: int) -> slice:
        """This process's share of `count` rows: contiguous, and sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor, in place, by its sum over the processes, which is equal on all to the bit.

        The tensors lie on one device. On a GPU nothing waits.
        """
        self._reduce(dist.ReduceOp.SUM, tensors)

    def max_(self, *tensors: Tensor) -> None:
        """As `sum_`, with the largest value of each element."""
        self._reduce(dist.ReduceOp.MAX, tensors)

    def _reduce(self, operation: Any, tensors: tuple[Tensor, ...]) -> None:
        if not self.several:
            return
        with torch.no_grad(), self.explained():
            for dtype in dict.fromkeys(t.dtype for t in tensors):
                same = [t for t in tensors if t.dtype == dtype]
                flat = torch.cat([t.reshape(-1) for t in same])
                dist.all_reduce(flat, operation)
                for tensor, value in zip(same, flat.split([t.numel() for t in same]), strict=True):
                    tensor.copy_(value.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether it is true on any process. All ask at the same place."""
        if not self.several:
            return flag
        found = torch.tensor([int(flag)])
        self.max_(found)
        return bool(found)

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks: whatever can be pickled."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.size
        with self.explained():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on process 0, on all of them. An error that it raises, all raise."""
        if not self.several:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        problem = box[1]
        if problem is not None:
            box[1] = portable(problem)
        with self.explained():
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise problem or box[1]
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error that one process raises in this block is an error of all at its end, so that none waits for ever.

        Inside the block, processes may do different things, but must not communicate.

        Raises:
            OtherProcessFailed: on the processes that raised nothing themselves.
        """
        if not self.several:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        problems = self.gathered(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        for rank, text in enumerate(problems):
            if text is not None:
                raise OtherProcessFailed(f"process {rank}: {text}")

    @contextmanager
    def first_writes(self) -> Iterator[bool]:
        """Whether this process writes: the first does. What it cannot write is an error of all, as in `together`."""
        with self.together():
            yield self.first

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What torch raises in this block because another process has ended becomes an error that names it.

        Raises:
            ProcessLost: another process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            lost = self.lost_soon()
            if lost is None or isinstance(error, ProcessLost | OtherProcessFailed):
                raise
            raise ProcessLost(lost) from error

    @property
    def lost(self) -> str | None:
        """Which process has ended before its time; None while none has. The message was printed already."""
        return self._watch.lost if self._watch is not None else None

    def lost_soon(self) -> str | None:
        """As `lost`, after an error or signal that may come from the end of another process: waits for the watch."""
        return self._watch.lost_soon() if self._watch is not None else None

    def parallel(self, module: nn.Module, *, unused: bool) -> nn.Module:
        """`module` in DistributedDataParallel: after a backward pass, gradients are the mean of those of all processes.

        Weights and buffers become those of the first process here.

        Args:
            unused: whether the loss does not depend on all of its parameters.
        """
        with self.explained():
            return nn.parallel.DistributedDataParallel(
                module, broadcast_buffers=False, find_unused_parameters=unused, gradient_as_bucket_view=True
            )

    def counter(self) -> Callable[..., int]:
        """A number that all processes share, from 0: `count(by)` adds `by`, by default 1, and returns the former value.

        Called without an argument, it hands out 0, 1, 2, …: each number to one process. All processes call `counter`
        at the same places.
        """
        self._counters += 1
        name, number = f"counter/{self._counters}", 0

        def count(by: int = 1) -> int:
            nonlocal number
            if not self.several:
                number += by
                return number - by
            with self.explained():
                return int(self.store.add(name, by)) - by

        return count

    @property
    def incomplete(self) -> bool:
        """Whether another process has ended: what it has not finished will not come."""
        return self._watch is not None and bool(self._watch.gone or self._watch.lost)

    @contextmanager
    def first_warns(self) -> Iterator[None]:
        """The first process gives the warnings of all: its own at once, those of others at the end of the block.

        All processes leave the block without an error, or all with one.
        """
        if not self.several:
            yield
            return
        found: dict[str, type[Warning]] = {}
        with warnings.catch_warnings():
            show = warnings.showwarning

            def noted(message: Warning | str, category: type[Warning], *where: Any) -> None:
                found[str(message)] = category
                if self.first:
                    show(message, category, *where)

            warnings.showwarning = noted  # type: ignore[assignment]
            yield
        of_others = {text: kind for each in self.gathered(found) for text, kind in each.items()}
        for text, kind in of_others.items():
            if self.first and text not in found:
                warnings.warn(text, kind, stacklevel=3)

    def speaks_for_all(self, text: str) -> bool:
        """Whether this process is the first to ask with this text, and may print it."""
        if not self.several:
            return True
        try:
            return int(self.store.add(f"text/{text}", 1)) == 1
        except RuntimeError:  # the store is gone with process 0
            return self.rank == 1

    def leave(self, problem: str | None = None) -> None:
        """This process ends: the others need not wait for it. The first process waits for them, since all ask it."""
        if self._watch is not None:
            self._watch.leave(problem)


class SharedBatchNorm2d(nn.SyncBatchNorm):
    """A BatchNorm2d whose statistics are those of the images of all processes; in train mode on GPUs only.

    It prints as a BatchNorm2d, so that a network has one fingerprint on any number of processes.
    """

    def _get_name(self) -> str:
        return "BatchNorm2d"


def share_statistics(model: nn.Module) -> None:
    """Replace each BatchNorm2d inside `model` by a `SharedBatchNorm2d` with the same parameters and buffers.

    Layers of a subclass stay: what else they compute would be lost.
    """
    found: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.BatchNorm2d:
                if layer not in found:
                    found[layer] = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
                    found[layer].__class__ = SharedBatchNorm2d
                setattr(parent, name, found[layer])


class _Watch(threading.Thread):
    """Signs of life in the store, so that the end of one process ends all: no collective of torch notices every death.

    Values in the store: `who/RANK` (host and process), `beat/RANK` (a count), `left/RANK` ("" after a normal end, else
    the problem).
    """

    def __init__(self, processes: Processes):
        super().__init__(daemon=True, name="gsem-watch")
        self.processes, self.store = processes, processes.store.clone()
        self.lost: str | None = None
        self.leaving = threading.Event()
        self.noticed = threading.Event()
        rank, size = processes.rank, processes.size
        self.others = [other for other in range(size) if other != rank]
        self.store.set(f"who/{rank}", json.dumps(this_process()))
        self.who = {other: json.loads(self.store.get(f"who/{other}")) for other in self.others}
        self.beats = dict.fromkeys(self.others, (-1, 0))  # the last count seen, and looks since
        self.gone: set[int] = set()
        self.start()

    def run(self) -> None:
        rank = self.processes.rank
        while not self.leaving.wait(BEAT_SECONDS):
            try:
                self.store.add(f"beat/{rank}", 1)
                lost = next(filter(None, map(self._problem, self.others)), None)
            except RuntimeError:
                lost = None if self.leaving.is_set() else f"process 0 ({self._place(0)}) has ended: it held the store"
            if lost is not None and not self.leaving.is_set():
                return self._end_all(lost)

    def _place(self, rank: int) -> str:
        who = self.who.get(rank, {})
        return f"process id {who.get('pid', '?')} on {who.get('host', 'this host')}"

    def _problem(self, other: int) -> str | None:
        if other in self.gone:
            return None
        if self.store.check([f"left/{other}"]):
            problem = self.store.get(f"left/{other}").decode()
            self.gone.add(other)
            return f"process {other} ({self._place(other)}) has ended with an error: {problem}" if problem else None
        count, looks = self.beats[other]
        now = int(self.store.add(f"beat/{other}", 0))
        self.beats[other] = (now, 0) if now != count else (count, looks + 1)
        if is_dead(self.who[other]) and not self.store.check([f"left/{other}"]):
            return f"process {other} ({self._place(other)}) was killed"
        if self.beats[other][1] >= MISSED_BEATS:
            return f"process {other} ({self._place(other)}) has shown no sign of life for {MISSED_BEATS} s"
        return None

    def _end_all(self, lost: str) -> None:
        self.lost = lost
        if self.processes.speaks_for_all(lost):
            hint = f". {self.processes.hint}" if self.processes.hint else ""
            print(f"error: {lost}. All processes end{hint}", file=sys.stderr, flush=True)
        self.noticed.set()
        # The main thread ends as after SIGTERM where it is in Python, or by torch's error; in a kernel, by neither.
        signal.raise_signal(signal.SIGTERM) if os.name == "nt" else os.kill(os.getpid(), signal.SIGTERM)
        if not self.leaving.wait(GRACE_SECONDS):
            os._exit(1)

    def lost_soon(self) -> str | None:
        """Which process has ended, where torch has raised an error already and the watch will notice soon."""
        self.noticed.wait(4 * BEAT_SECONDS)
        if self.lost is None and self.gone:
            other = min(self.gone)
            return f"process {other} ({self._place(other)}) has ended, and this one still needs it"
        return self.lost

    def leave(self, problem: str | None) -> None:
        if self.leaving.is_set():
            return
        self.leaving.set()
        rank, store = self.processes.rank, self.store
        with suppress(RuntimeError):
            store.set(f"left/{rank}", problem or "")
            if self.processes.first and problem is None and self.lost is None:
                store.set_timeout(timedelta(seconds=GRACE_SECONDS))
                store.wait([f"left/{other}" for other in self.others])


def portable(error: Exception) -> Exception:
    """The error as the other processes raise it: of the same type, where it can be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    same = type(copy) is type(error) and str(copy) == str(error)
    return error if same else OtherProcessFailed(f"process 0: {type(error).__name__}: {error}")


_alone = Processes()
_current: Processes | None = None


def current() -> Processes:
    """The processes that this one belongs to. The first call joins the others, and waits for them.

    Raises:
        ValueError: variables in the environment that do not fit together; a port that is in use; others that do not
            come.
    """
    global _current
    if _current is None:
        place = world()
        _current = _alone if place.size == 1 else _join(place)
    return _current


def launched() -> bool:
    """Whether this process is one of several, joined or not."""
    return world().size > 1


def _join(place: World) -> Processes:
    _fill_environment()
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    if dist.is_initialized():  # by the caller's own program
        store = dist.PrefixStore("gsem", dist.distributed_c10d._get_default_store())
    else:
        store = _rendezvous(place)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=dist.PrefixStore("torch", store),
            rank=place.rank,
            world_size=place.size,
            # Another process may attack a batch for hours. That it is still there is the watch's question.
            timeout=timedelta(days=7),
        )
        store = dist.PrefixStore("gsem", store)
    found = Processes(place.rank, place.size, place.local_rank, store)
    atexit.register(_leave_at_exit, found)
    # Python calls what is registered for its exit also after an error, and says nothing of it there.
    hook = sys.excepthook

    def leave_with_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        hook(kind, error, trace)
        found.leave(f"{kind.__name__}: {error}")

    sys.excepthook = leave_with_error
    return found


def _leave_at_exit(processes: Processes) -> None:
    processes.leave()
    if dist.is_initialized() and processes.lost is None:
        dist.destroy_process_group()


def _rendezvous(place: World) -> Any:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    where = f"MASTER_ADDR={address}, MASTER_PORT={port}"
    try:
        rendezvous = dist.rendezvous(
            "env://", rank=place.rank, world_size=place.size, timeout=timedelta(seconds=JOIN_SECONDS)
        )
        store, _, _ = next(iter(rendezvous))
        store.add("arrived", 1)
        started = time.monotonic()
        while (arrived := int(store.add("arrived", 0))) < place.size:
            if time.monotonic() - started > JOIN_SECONDS:
                raise ValueError(f"only {arrived} of {place.size} processes came within {JOIN_SECONDS:.0f} s ({where})")
            time.sleep(0.05)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "EADDRINUSE" in text or "already in use" in text:
            raise ValueError(f"port {port} is in use ({where}): choose another MASTER_PORT") from None
        missed = f"process {place.rank} of {place.size} did not reach the others within {JOIN_SECONDS:.0f} s"
        raise ValueError(f"{missed} ({where}): {text}") from None
    return store


def _fill_environment() -> None:
    """Under srun: where the first process is, as torch asks for it."""
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost"))
    if "MASTER_PORT" not in os.environ:
        job = int(os.environ.get("SLURM_JOB_ID", "0")) * 64 + int(os.environ.get("SLURM_STEP_ID", "0"))
        os.environ["MASTER_PORT"] = str(20000 + job % 20000)


def _first_host(nodes: str) -> str:
    """Of SLURM's list of nodes: "gpu[03-05,9],login" → "gpu03"."""
    if shutil.which("scontrol"):
        ran = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30)
        if ran.returncode == 0 and ran.stdout.split():
            return ran.stdout.split()[0]
    found = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else socket.gethostname()
