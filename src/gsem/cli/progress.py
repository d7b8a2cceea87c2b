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
    """A bar on a terminal, and one line for each epoch everywhere."""

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


class CountingBar(ProgressBar):
    """A bar with a count and a status on a terminal; elsewhere a line now and then.

    Args:
        width: of the description.
        clock: seconds, as `time.monotonic` counts them.
    """

    def __init__(self, console: Console, width: int, clock: Callable[[], float]):
        super().__init__(
            console,
            TextColumn(f"{{task.description:<{width}}}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
        )
        self.clock, self.printed = clock, clock()

    @property
    def due(self) -> bool:
        return not self.console.is_terminal and self.clock() - self.printed >= LINE_EVERY

    def print(self, line: str) -> None:
        self.printed = self.clock()
        self.console.print(line, highlight=False, soft_wrap=True)


class CertifyBar(CountingBar):
    """A bar of the images on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console, images: int, clock: Callable[[], float] = time.monotonic):
        super().__init__(console, 20, clock)
        self.task = self.bar.add_task("certify", total=images, status="")
        self.started, self.before = clock(), 0

    def __call__(self, done: int, images: int) -> None:
        if not self.before:  # (images of an earlier call took none of this one's time)
            self.before, self.started = done, self.clock()
        rate = (done - self.before) / max(self.clock() - self.started, 1e-9)
        left = f"{duration((images - done) / rate)} left" if rate > 0 else ""
        self.bar.update(self.task, completed=done, status=left)
        if self.due:
            self.print(f"certify {done}/{images} images{', ' + left if left else ''}")


class AttackBar(CountingBar):
    """A bar for each attack on a terminal. Elsewhere a line now and then, and one when an attack is finished."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        super().__init__(console, 20, clock)
        self.tasks: dict[str, TaskID] = {}
        self.started: dict[str, float] = {}

    def __call__(self, p: AttackProgress) -> None:
        if p.name not in self.tasks:
            self.tasks[p.name] = self.bar.add_task(p.name, total=p.images, status="")
            self.started[p.name] = self.clock()
        accuracy, finished = percent(p.accuracy).strip(), p.done == p.images
        left = None if p.seconds_left is None else duration(p.seconds_left)
        status = "" if finished else f", {p.remaining} remain, {p.gradients_per_second:.0f} grad/s"
        status += f", {left}" if left and not finished else ""
        self.bar.update(self.tasks[p.name], completed=p.done, status=f"{accuracy} so far{status}")
        passed, line = (
            duration(self.clock() - self.started[p.name]),
            f"{p.name:<20} {p.done}/{p.images} images, {accuracy}",
        )
        if finished and not self.console.is_terminal:
            self.print(f"{line}, {passed}")
        elif self.due:
            # (How long a batch takes is not known before the first one is finished.)
            self.print(f"{line} so far, {f'{left} left' if left else f'{passed} so far'}")
