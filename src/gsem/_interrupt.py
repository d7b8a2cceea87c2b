"""Handles SIGTERM, which clusters send before they kill, like Ctrl-C."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


def exit_code(stopped: KeyboardInterrupt) -> int:
    """143 for SIGTERM, 130 for Ctrl-C: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)


@contextmanager
def on_signals(handler: Any, *signals: int) -> Iterator[None]:
    """Handle these signals by `handler` for the length of a `with` block. Outside of the main thread: nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated` for the length of a `with` block, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    with on_signals(stop, signal.SIGTERM):
        yield


class Interruption(threading.Event):
    """Set when Ctrl-C or SIGTERM asks to stop."""

    kind: type[KeyboardInterrupt] = KeyboardInterrupt
    since: float = 0.0
    """When it was set, on the monotonic clock."""


@contextmanager
def finish_step_on_interrupt(seconds: float = 0.0) -> Iterator[Interruption]:
    """The first Ctrl-C or SIGTERM sets the event, so that a step is never torn; the second stops at once.

    One that comes within so many `seconds` is not a second one: a launcher passes on to its processes the Ctrl-C that
    they have received from the terminal too.
    """
    event = Interruption()

    def stop(number: int, frame: Any) -> None:
        event.kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if not event.is_set():
            event.since = time.monotonic()
            event.set()
        elif time.monotonic() - event.since >= seconds:
            raise event.kind

    with on_signals(stop, signal.SIGINT, signal.SIGTERM):
        yield event
