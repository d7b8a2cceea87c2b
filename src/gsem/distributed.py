"""Several processes, started by torchrun, SLURM or `--processes`: whose rows are whose, and decisions made together.

All processes run the same program and call the same functions in the same order. This is the one place that asks
torch.distributed; the rest of the package asks `current()`.
"""

import atexit
import faulthandler
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gsem._env import device_named
from gsem._io import write_atomically
from gsem._lock import is_dead, this_process
from gsem._world import World as World
from gsem._world import has_launcher
from gsem._world import world as world

JOIN_SECONDS = 50.0
"""For all processes to arrive at the start, unless GSEM_JOIN_SECONDS is set: the end of one before it has joined is
noticed within a minute, too."""
STORE_SECONDS = 20.0
"""To reach the store of a launcher, which was there before the processes were."""
BEAT_SECONDS = 1.0
"""Between two signs of life of a process."""
MISSED_BEATS = 30
"""Beats of another process that may be missed before it counts as ended."""
GRACE_SECONDS = 10.0
"""Between the end of one process and the hard end of those that wait for it where Python cannot be interrupted."""
END = "the end of all"
"""What the process that prints why all end asks `Processes.speaks_for_all` for."""
KILLED_FILE = "GSEM_KILLED_FILE"
"""Names, in the environment, the file to which the end of a process is written, where `--processes` prints it."""

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Another process ended while this one needed it."""


class OtherProcessFailed(RuntimeError):
    """Another process raised an error, and raises it itself; this one ends with it."""


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
            lost = self.lost_soon(needed=True)
            if lost is None or isinstance(error, ProcessLost | OtherProcessFailed):
                raise
            raise ProcessLost(lost) from error

    @property
    def lost(self) -> str | None:
        """Which process has ended before its time; None while none has. The message was printed already."""
        return self._watch.lost if self._watch is not None else None

    def lost_soon(self, needed: bool = False) -> str | None:
        """As `lost`, after an error or signal that may come from the end of another process: waits for the watch.

        Args:
            needed: a process that has ended without an error counts, too.
        """
        return self._watch.lost_soon(needed) if self._watch is not None else None

    def parallel(self, module: nn.Module, *, unused: bool) -> nn.Module:
        """`module` in DistributedDataParallel: after a backward pass, gradients are the mean of those of all processes.

        Weights and buffers become those of the first process here.

        Args:
            unused: whether the loss does not depend on all of its parameters.
        """
        with self.explained(), warnings.catch_warnings():
            # From torch 2.13 on, another name is asked for, which older versions do not have.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
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
        """Whether this process is the first to ask with this text, and may print it.

        Why all end is asked for with `END`: one message, from one process.
        """
        if not self.several:
            return True
        try:
            return int(self.store.add(f"text/{text}", 1)) == 1
        except RuntimeError:  # the store is gone with process 0
            return self.rank == 1

    def leave(self, problem: str | None = None, *, printed: bool = False) -> None:
        """This process ends: the others need not wait for it. The first process waits for them, since all ask it.

        Args:
            problem: why it ends before its time; the others end with it. printed: it was printed already.
        """
        if self._watch is not None:
            self._watch.leave(problem, printed)


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

    Values in the store: `who/RANK` (host and process), `beat/RANK` (a count), `left/RANK` (at its end: the problem, and
    whether that was printed).
    """

    def __init__(self, processes: Processes):
        super().__init__(daemon=True, name="gsem-watch")
        self.processes, self.store = processes, processes.store.clone()
        self.lost: str | None = None
        self.leaving = threading.Event()
        self.noticed = threading.Event()
        self.awaited = False
        """Whether the main thread waits for what this one notices, and ends with it."""
        rank, size = processes.rank, processes.size
        self.others = [other for other in range(size) if other != rank]
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
                lost = self._store_problem()
            if lost is not None and not self.leaving.is_set():
                return self._end_all(*lost)

    def _named(self, rank: int) -> str:
        who = self.who[rank]
        return f"process {rank} (process id {who['pid']} on {who['host']})"

    def _problem(self, other: int) -> tuple[str, bool] | None:
        """What has happened to a process, and whether somebody else prints it."""
        if other in self.gone:
            return None
        if self.store.check([f"left/{other}"]):
            problem, printed = json.loads(self.store.get(f"left/{other}"))
            if problem:
                return f"{self._named(other)} has ended with an error: {problem}", printed
            self.gone.add(other)
            return None
        count, looks = self.beats[other]
        now = int(self.store.add(f"beat/{other}", 0))
        self.beats[other] = (now, 0) if now != count else (count, looks + 1)
        if is_dead(self.who[other]) and not self.store.check([f"left/{other}"]):
            return f"{self._named(other)} was killed", self._leave_to_launcher(other)
        if self.beats[other][1] >= MISSED_BEATS:
            return f"{self._named(other)} has shown no sign of life for {MISSED_BEATS * BEAT_SECONDS:.0f} s", False
        return None

    def _leave_to_launcher(self, killed: int) -> bool:
        """Whether the launcher prints that a process was killed: it knows the signal."""
        file = os.environ.get(KILLED_FILE)
        if file is None:
            return False
        with suppress(OSError):
            write_atomically(Path(file), json.dumps({"rank": killed, "hint": self.processes.hint}).encode())
        return True

    def _store_problem(self) -> tuple[str, bool]:
        """As `_problem`, of the process that held the store."""
        if has_launcher():
            return "the launcher of the processes has ended", False
        return f"{self._named(0)} {'was killed' if is_dead(self.who[0]) else 'has ended, and with it the store'}", False

    def _end_all(self, lost: str, printed: bool) -> None:
        self._print(lost, printed)
        # The main thread ends as after SIGTERM where it is in Python, or by torch's error; in a kernel, by neither.
        if not self.awaited:
            signal.raise_signal(signal.SIGTERM) if os.name == "nt" else os.kill(os.getpid(), signal.SIGTERM)
        if not self.leaving.wait(GRACE_SECONDS):
            os._exit(2)

    def lost_soon(self, needed: bool) -> str | None:
        self.awaited = True
        self.noticed.wait(4 * BEAT_SECONDS)
        if self.lost is None and needed and self.gone:
            self._print(f"{self._named(min(self.gone))} has ended, and this one still needs it")
        self.awaited = self.lost is not None
        return self.lost

    def _print(self, lost: str, printed: bool = False) -> None:
        self.lost = lost
        if not printed and self.processes.speaks_for_all(END):
            hint = f". {self.processes.hint}" if self.processes.hint else ""
            print(f"gsem: {lost}. All processes end{hint}", file=sys.stderr, flush=True)
        self.noticed.set()

    def leave(self, problem: str | None, printed: bool) -> None:
        if self.leaving.is_set():
            return
        self.leaving.set()
        # A thread that is inside torch when Python ends would abort the process.
        self.join(GRACE_SECONDS)
        rank, store = self.processes.rank, self.processes.store
        with suppress(RuntimeError):
            store.set(f"left/{rank}", json.dumps((problem or "", printed)))
            until = time.monotonic() + GRACE_SECONDS
            waited = self.others if self.processes.first else []
            while any(not store.check([f"left/{r}"]) and not is_dead(self.who[r]) for r in waited):
                if time.monotonic() > until:
                    return
                time.sleep(0.05)


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


def joined() -> Processes | None:
    """All processes, where this one has joined the others, or is about to: after an error, unlike `current`."""
    return _current


def _join(place: World) -> Processes:
    global _current
    _fill_environment()
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    store = None
    if not dist.is_initialized():  # else by the caller's own program
        store = _rendezvous(place)
    ours = dist.PrefixStore("gsem", store if store is not None else dist.distributed_c10d._get_default_store())
    _wait_for_all(ours, place)
    # The watch begins before torch connects the processes, where one of them may end, too.
    _current = Processes(place.rank, place.size, place.local_rank, ours)
    _leave_at_the_end(_current)
    if store is not None:
        with _current.explained():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo",
                store=dist.PrefixStore("torch", store),
                rank=place.rank,
                world_size=place.size,
                # Another process may attack a batch for hours. That it is still there is the watch's question.
                timeout=timedelta(days=7),
            )
    return _current


def _leave_at_the_end(found: Processes) -> None:
    atexit.register(_leave_at_exit, found)
    # Python calls what is registered for its exit also after an error, and says nothing of it there.
    hook = sys.excepthook

    def leave_with_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        # What another process has printed already, or raises itself, needs no traceback here.
        if not issubclass(kind, ProcessLost | OtherProcessFailed):
            hook(kind, error, trace)
        found.leave(f"{kind.__name__}: {error}")

    sys.excepthook = leave_with_error


def _leave_at_exit(processes: Processes) -> None:
    processes.leave()
    # Where another process was killed, torch's threads may wait for it for ever.
    faulthandler.dump_traceback_later(3 * GRACE_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    if dist.is_initialized() and processes.lost is None:
        dist.destroy_process_group()


def _rendezvous(place: World) -> Any:
    where, seconds = _where(), STORE_SECONDS if has_launcher() else join_seconds()
    if has_launcher():
        try:  # torch would try for twice that time also where nobody listens
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), seconds).close()
        except OSError as error:
            raise ValueError(f"the launcher of the processes has ended, or is not reached ({where}): {error}") from None
    try:
        timeout = timedelta(seconds=seconds)
        rendezvous = dist.rendezvous("env://", rank=place.rank, world_size=place.size, timeout=timeout)
        return next(iter(rendezvous))[0]
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "EADDRINUSE" in text or "already in use" in text:
            port = os.environ["MASTER_PORT"]
            raise ValueError(f"port {port} is in use ({where}): choose another MASTER_PORT") from None
        missed = f"process {place.rank} of {place.size} did not reach the others within {seconds:.0f} s"
        longer = "" if has_launcher() else f"; {_longer(seconds)}"
        raise ValueError(f"{missed} ({where}): {text}{longer}") from None


def join_seconds() -> float:
    """How long processes wait for each other at the start.

    Raises:
        ValueError: GSEM_JOIN_SECONDS is no positive number.
    """
    given = os.environ.get("GSEM_JOIN_SECONDS", str(JOIN_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"GSEM_JOIN_SECONDS must be a positive number of seconds, not {given!r}")
    return seconds


def _longer(seconds: float) -> str:
    return f"GSEM_JOIN_SECONDS={4 * seconds:.0f} waits longer"


def _where() -> str:
    return ", ".join(f"{name}={os.environ.get(name, '')}" for name in ("MASTER_ADDR", "MASTER_PORT"))


def _wait_for_all(store: Any, place: World) -> None:
    """Until all processes have written who they are.

    Raises:
        ValueError: one has ended since, or does not come.
    """
    store.set(f"who/{place.rank}", json.dumps(this_process()))
    missing, known = set(range(place.size)), {}
    seconds = join_seconds()
    until = time.monotonic() + seconds
    problem = ""
    while missing and not problem:
        try:
            for rank in [rank for rank in missing if store.check([f"who/{rank}"])]:
                known[rank] = json.loads(store.get(f"who/{rank}"))
                missing.remove(rank)
        except RuntimeError:
            raise ValueError(f"the process that holds the store has ended ({_where()})") from None
        dead = [rank for rank, who in known.items() if is_dead(who)]
        if missing and dead:
            problem = f"process {dead[0]} (process id {known[dead[0]]['pid']}) ended before all had come"
        elif missing and time.monotonic() > until:
            came = f"only {len(known)} of {place.size} processes came within {seconds:.0f} s"
            problem = f"{came}; {_longer(seconds)}"
        elif missing:
            time.sleep(0.05)
    if problem:
        raise ValueError(f"{problem} ({_where()})")


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
