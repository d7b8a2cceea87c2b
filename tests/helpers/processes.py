"""Starts one program in several processes, as srun would: with nothing between them but the environment."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120  # for all of them to end; more is a hang


@dataclass(frozen=True)
class Ended:
    """One process after its end."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    mine = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    source = str(Path(__file__).parents[2] / "src")
    return (
        os.environ | {key: str(value) for key, value in mine.items()} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    )


def started(size: int, words: Sequence[str], port: int | None = None) -> list[subprocess.Popen[str]]:
    """`python WORDS` in `size` processes, running."""
    port = port or free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *words], env=environment(rank, size, port), **pipes)  # type: ignore[call-overload]
        for rank in range(size)
    ]


def ended(running: Sequence[subprocess.Popen[str]], seconds: float = SECONDS) -> list[Ended]:
    """Their ends. A process that does not end in time is an error, and is killed like the others."""
    until = time.monotonic() + seconds
    try:
        found = [process.communicate(timeout=max(0.1, until - time.monotonic())) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(running, found, strict=True)]


def run(size: int, words: Sequence[str], seconds: float = SECONDS) -> list[Ended]:
    """`python WORDS` in `size` processes, to their ends."""
    return ended(started(size, words), seconds)
