"""--processes N: the same command in several processes on this host, started by torch's own launcher."""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gsem._interrupt import sigterm_raises
from gsem._world import World
from gsem.cli.options import ProcessesOptions

STOP_SECONDS = "300"
"""For the processes to finish their step after Ctrl-C."""
OWN_CODES = (1, 2, 130, 143)
"""With these, a process has printed why it ended."""


def processes_to_start(o: Any, place: World) -> int:
    """How many processes these options ask for; 1 where this process computes itself.

    Raises:
        ValueError: a number that this machine cannot run, or that differs from that of a launcher.
    """
    asked = o.processes if isinstance(o, ProcessesOptions) else None
    if asked is None:
        return 1
    if place.size > 1:
        if asked not in ("auto", place.size):
            raise ValueError(f"--processes {asked}, but {place.size} were started together: leave out --processes")
        return 1
    import torch  # (not for the help texts)

    from gsem._env import device_named

    if asked == "auto":
        asked = torch.cuda.device_count()
        if asked == 0 or o.device == "cpu":
            raise ValueError("--processes auto starts one process for each GPU, and there is none: give --processes N")
    if asked < 1:
        raise ValueError(f"--processes must be at least 1, not {asked}")
    device_named(o.device, World(asked - 1, asked, asked - 1))  # what the last of them takes
    return int(asked)


def launch(words: list[str], processes: int) -> int:
    """Run `gsem WORDS` in several processes to their ends. Prints which of them was killed.

    Returns:
        The exit code: of the process that ended first with an error, 128 and the number of a signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from gsem.distributed import KILLED_FILE

    threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    with TemporaryDirectory(prefix="gsem-") as folder:
        killed = Path(folder) / "killed.json"
        variables = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOP_SECONDS),
            KILLED_FILE: str(killed),
        }
        with _environment(variables), _quiet(), sigterm_raises(), _signals_kept():
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                logs_specs=DefaultLogsSpecs(log_dir=folder),
                run_id=str(os.getpid()),
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",  # a free port
                max_restarts=0,
            )
            try:
                elastic_launch(config, sys.executable)("-m", "gsem", *words)
            except ChildFailedError as error:
                return _ended(error.failures, json.loads(killed.read_text()) if killed.exists() else {})
            except SignalException as stopped:  # the processes have printed that they were stopped
                return 128 + int(stopped.sigval)
    return 0


def _ended(failures: dict[int, Any], killed: dict[str, Any]) -> int:
    """The exit code, after the message for a process that could not print its own.

    Args:
        failures: by rank, the first first.
        killed: what the other processes noticed (see `gsem.distributed`); empty where they noticed nothing.
    """
    started = min(failure.timestamp for failure in failures.values())
    at_once = [rank for rank, failure in failures.items() if failure.timestamp == started]
    # (SIGTERM is what torch's launcher sends to the others.)
    first = min(at_once, key=lambda rank: (failures[rank].exitcode == -signal.SIGTERM, failures[rank].exitcode))
    rank = killed.get("rank", first)
    failure = failures.get(rank)
    code = 1 if failure is None else failure.exitcode
    if killed or code not in OWN_CODES:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
        which = f"process {rank}" + ("" if failure is None else f" (process id {failure.pid})")
        hint = f". {killed['hint']}" if killed.get("hint") else ""
        print(f"gsem: {which} {how}. All processes end{hint}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines of torch's launcher."""
    former = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(former)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Torch's launcher handles signals in its own way, and does not put back the former ways."""
    names = [signal.SIGINT, *(getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name))]
    former = {name: signal.getsignal(name) for name in names}
    try:
        yield
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)
