"""A lock file, so that two processes do not write into one run directory or one evaluation."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNREADABLE = 10.0  # seconds after which a lock file without content is what a killed process left


class Locked(ValueError):
    """Another process, or another thread of this one, is at work there."""


@contextmanager
def locked(file: Path, doing: str, instead: str) -> Iterator[None]:
    """Hold the lock `file` for the length of a `with` block. Its folder must exist.

    The file holds the process id and the host. Where that process is dead and ran on this host, the lock is taken
    over: a process that was killed blocks nobody.

    Args:
        doing: what is done, for the message to others: "training in runs/x".
        instead: what others can do about it, a sentence without its full stop.

    Raises:
        Locked: it is held; the message names the holder. OSError: the file cannot be written.
    """
    _take(file, doing, instead)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _take(file: Path, doing: str, instead: str) -> None:
    content = json.dumps(this_process() | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode()
    for _ in range(2):
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            holder = _remove_if_stale(file)
            if holder is not None:
                raise Locked(_held_message(file, doing, instead, holder)) from None
            continue
        try:
            os.write(descriptor, content)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise OSError(error.errno, f"{file} cannot be written: {os.strerror(error.errno or 0)}") from None
        finally:
            os.close(descriptor)
        return
    raise Locked(_held_message(file, doing, instead, _read(file) or {}))


def _held_message(file: Path, doing: str, instead: str, holder: dict[str, Any]) -> str:
    if not holder:
        return f"another process is {doing}: {instead}. If nothing runs there any more, delete {file}"
    here = holder["host"] == socket.gethostname()
    who = f"process {holder['pid']} on {'this host' if here else 'host ' + str(holder['host'])}"
    who = "this process itself" if here and holder["pid"] == os.getpid() else who
    since = f", since {holder['since']}" if "since" in holder else ""
    gone = f"If process {holder['pid']} does not run there any more, delete {file}"
    return f"{who} is {doing}{since}: {instead}" + ("" if here else f". {gone}")


def _remove_if_stale(file: Path) -> dict[str, Any] | None:
    """None if the lock is free now, else its holder ({} where that cannot be read)."""
    # One process at a time looks and removes; otherwise it could remove the lock that another has just taken over.
    folder = os.open(file.parent, os.O_RDONLY) if fcntl is not None else None
    try:
        if folder is not None:
            with suppress(OSError):  # (some network file systems lock no folders)
                fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            age = time.time() - file.stat().st_mtime
        except FileNotFoundError:
            return None
        holder = _read(file)
        if holder is None:
            return None
        if is_dead(holder) if holder else age > UNREADABLE:
            file.unlink(missing_ok=True)
            return None
        return holder
    finally:
        if folder is not None:
            os.close(folder)


def _read(file: Path) -> dict[str, Any] | None:
    """Who holds it; {} where the content is not (yet) there, None where the file is gone."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {"pid", "host"} <= found.keys() else {}


def this_process() -> dict[str, Any]:
    """What identifies this process among all hosts and times, for `is_dead`; values as JSON takes them."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process (see `this_process`) is known to have ended. On another host that is never known."""
    if holder["host"] != socket.gethostname() or os.name == "nt":
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, as somebody else's
        pass
    now = _started(int(holder["pid"]))
    # "": it has ended, but its parent has not waited for it. Another start: the number was given to another process.
    return now == "" or (now is not None and holder.get("started") not in (None, now))


def _started(pid: int) -> str | None:
    """When the process began, in ticks since the system did; "" where it has ended; None where that is not known."""
    try:
        # The name of the program, in brackets, may hold anything. State and start are fields 3 and 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]
