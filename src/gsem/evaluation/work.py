"""Work items of an evaluation, handed out to whichever process is free, and the progress of all of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from gsem.attacks import Counting, Step
from gsem.distributed import Processes, current, portable
from gsem.evaluation.result import AttackScores

T = TypeVar("T")
REPORT_EVERY = 0.2  # seconds
LOOK_EVERY = 0.1  # seconds, of a process that waits for the others


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is. Several processes count together, but for the images that remain and the rate."""

    name: str
    """Of the attack, with the noise unless it is fresh."""
    done: int
    """Images finished with this attack, of `images`."""
    images: int
    remaining: int
    """Images of the current batch that this attack still works on."""
    accuracy: float | None
    """Expected accuracy so far, 0 to 1, on the selection draws; images of the current batch that are not
    broken yet count as right."""
    gradients_per_second: float
    """Image rows forward and back, in the current batch."""
    seconds_left: float | None
    """Of this attack."""


Report = Callable[[Progress], None]


class Stopped(Exception):
    """Another process has failed: this one need not finish its work item."""


class WorkItems:
    """All processes go through the same items in the same order, and each item is handed to one of them.

    The block `with work:` lies inside `Processes.together`. An error that one process raises in it stops the others:
    at their next `look`, before their next item, or while they wait.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self._taken, self._finished, self._failed = (processes.counter() for _ in range(3))
        self._start, self._number = 0, -1  # of the next item, and of the last one that was handed to this process

    def __enter__(self) -> "WorkItems":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            with suppress(RuntimeError):  # the counter is gone with process 0
                self._failed()
        return isinstance(error, Stopped)

    def own(self, count: int) -> Iterator[int]:
        """Which of the next `count` items, numbered from 0, are this process's."""
        start, end = self._start, self._start + count
        while self._number < end:
            if self._number >= start:
                yield self._number - start
                self._finished()
            self.look()
            self._number = self._taken()
        self._start = end

    def look(self) -> None:
        """Raise `Stopped` if another process has failed."""
        if self._failed(0):
            raise Stopped

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Until all items are finished, or another process has ended. `meanwhile` is called again and again."""
        while self._finished(0) < self._start and not self.processes.incomplete:
            self.look()
            meanwhile()
            time.sleep(LOOK_EVERY)
        meanwhile()


def shared_out(name: str, items: Sequence[Callable[[], T]]) -> list[T]:
    """What every item returns, on all processes: each item is computed by one of them.

    Args:
        name: of the items, for the message where processes disagree on what they compute.
        items: they return what can be pickled, on the CPU.

    Raises:
        ValueError: the processes have come to different items, because they computed something else before.
        And what an item raises: on all processes.
    """
    processes = current()
    if not processes.several:
        return [item() for item in items]
    work, number = WorkItems(processes), -1
    own: dict[int, T] = {}
    problem: Exception | None = None
    try:
        with work:
            for number in work.own(len(items)):
                own[number] = items[number]()
            work.wait(lambda: None)
    except Exception as error:
        problem = error
    gathered = processes.gathered((name, len(items), own, number, None if problem is None else portable(problem)))
    for rank, (other, count, *_) in enumerate(gathered):
        if (other, count) != gathered[0][:2]:
            raise ValueError(
                f"process 0 computes {gathered[0][0]}, process {rank} {other}: they found different figures before. "
                "Run them on devices of one type"
            )
    # Items are handed out in order, so that this is the error that one process alone comes to.
    errors = {at: (rank, error) for rank, (*_, at, error) in enumerate(gathered) if error is not None}
    if errors:
        rank, first_error = errors[min(errors)]
        raise problem if problem is not None and rank == processes.rank else first_error
    found = {at: value for _, _, values, *_ in gathered for at, value in values.items()}
    return [found[at] for at in range(len(items))]


class Watch:
    """The progress of one attack, which the first process reports."""

    def __init__(self, on_progress: Report | None, name: str, images: int, draws: int, work: WorkItems):
        self.on_progress = on_progress if work.processes.first else None
        self.name, self.images, self.draws, self.work = name, images, draws, work
        # Of the finished batches: images, right selection draws and milliseconds.
        self.done, self.correct, self.milliseconds = (work.processes.counter() for _ in range(3))
        self.seen = 0  # images that were finished at the last report
        self.begin(0)

    @property
    def used(self) -> bool:
        """Whether `on_step` does anything."""
        return self.on_progress is not None or self.work.processes.several

    def begin(self, size: int) -> None:
        """A batch of so many images."""
        self.size = size
        self.model: Counting | None = None
        self.started = self.reported = time.monotonic()

    def on_step(self, step: Step) -> None:
        now = time.monotonic()
        if now - self.reported >= REPORT_EVERY:
            self.reported = now
            self.work.look()
            if self.on_progress is not None:
                remaining = len(step.rows) if step.live is None else int(step.live.sum())
                self._report(remaining, remaining, self.size)

    def finished(self, part: AttackScores) -> None:
        self.milliseconds(round(1000 * part.seconds))
        # Each image counts with its share of right selection draws, as in an expected accuracy.
        self.correct(int(part.selection.sum()))
        self.done(len(part.selection))
        self._report()

    def refresh(self) -> None:
        """Report what other processes have finished since the last report."""
        if self.on_progress is not None and self.done(0) > self.seen:
            self._report()

    def _report(self, remaining: int = 0, right: int = 0, images: int = 0) -> None:
        """Args: of the current batch, images that remain, that count as right, and all."""
        if self.on_progress is None:
            return
        passed = max(time.monotonic() - self.started, 1e-9)
        rate = 0.0 if self.model is None else self.model.gradients / passed
        self.seen = done = self.done(0)
        accuracy = (self.correct(0) / self.draws + right) / (done + images)
        left = self.milliseconds(0) / 1000 / done * (self.images - done) / self.work.processes.size if done else None
        self.on_progress(Progress(self.name, done, self.images, remaining, accuracy, rate, left))
