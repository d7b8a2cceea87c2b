"""Progress bars and lines of trainings and evaluations."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from gsem._text import duration, percent
from gsem.evaluation.evaluate import Progress as AttackProgress
from gsem.training.progress import Progress as TrainingProgress

# A fall of the robust accuracy below its best that is worth showing: robust overfitting (Rice et al. 2020).
OVERFITTING = 0.02
LINE_EVERY = 30.0  # seconds between lines of an evaluation that writes to a file or a pipe


class ProgressBar:
    """A bar on a terminal that vanishes at the end; elsewhere none."""

    def __init__(self, console: Console, *columns: ProgressColumn):
        self.console = console
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


class TrainingBar(ProgressBar):
    """A bar on a terminal, and in any case one line for each epoch."""

    def __init__(self, console: Console):
        super().__init__(
            console,
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[rate]:>7.0f} img/s"),
            TimeRemainingColumn(compact=True),
        )
        self.task = self.bar.add_task("starting", total=None, rate=0.0)

    def __call__(self, p: TrainingProgress) -> None:
        accuracies = f"clean {percent(p.clean)} robust {percent(p.robust)}"
        place = f"epoch {p.epoch:>{len(str(p.epochs))}}/{p.epochs}"
        text = f"{place} loss {p.loss:.3f} {accuracies}"
        self.bar.update(self.task, description=text, total=p.steps, completed=p.step, rate=p.images_per_second)
        if p.epoch_ended:
            left = f"{duration(p.seconds_left)} left" if p.step < p.steps else "done"
            if p.robust is not None and p.best_robust is not None and p.best_robust - p.robust > OVERFITTING:
                left = f"best {percent(p.best_robust).strip()}"
            self.console.print(f"{text} {p.images_per_second:5.0f} img/s  {left}", highlight=False)


class Scalars:
    """TensorBoard's event files of a training: loss while it runs, accuracies after each epoch.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("TensorBoard is not installed: pip install 'gsem-torch[tensorboard]'") from None
        self.writer = SummaryWriter(str(directory))

    def __call__(self, p: TrainingProgress) -> None:
        self.writer.add_scalar("loss", p.loss, p.step)
        if p.epoch_ended:
            for name, value in (("clean", p.clean), ("robust", p.robust), ("best robust", p.best_robust)):
                if value is not None:
                    self.writer.add_scalar(f"validation/{name}", value, p.step)
            self.writer.flush()


class AttackBar(ProgressBar):
    """A bar for each attack on a terminal. Elsewhere a line now and then, and one when an attack is finished.

    Args:
        clock: seconds, as `time.monotonic` counts them.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        super().__init__(
            console,
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
        )
        self.clock, self.printed = clock, clock()
        self.tasks: dict[str, TaskID] = {}
        self.started: dict[str, float] = {}

    def __call__(self, p: AttackProgress) -> None:
        if not self.console.is_terminal:
            self._print(p)
            return
        if p.name not in self.tasks:
            self.tasks[p.name] = self.bar.add_task(p.name, total=p.images, status="")
        status = f"{percent(p.accuracy).strip()} so far"
        if p.done < p.images:
            status += f", {p.remaining} remain, {p.gradients_per_second:.0f} grad/s"
            status += "" if p.seconds_left is None else f", {duration(p.seconds_left)}"
        self.bar.update(self.tasks[p.name], completed=p.done, status=status)

    def _print(self, p: AttackProgress) -> None:
        now, finished = self.clock(), p.done == p.images
        started = self.started.setdefault(p.name, now)
        if now - self.printed < LINE_EVERY and not finished:
            return
        self.printed = now
        passed = duration(now - started)
        # (How long a batch takes is not known before the first one is finished.)
        time_left = f"{passed} so far" if p.seconds_left is None else f"{duration(p.seconds_left)} left"
        line = f"{p.name:<20} {p.done}/{p.images} images, {percent(p.accuracy).strip()}"
        self.console.print(f"{line}, {passed}" if finished else f"{line} so far, {time_left}", soft_wrap=True)
