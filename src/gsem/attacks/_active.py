"""Attacks on the remaining images: which of them remain, and how attacks run one after the other."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem.attacks._checks import require_finite
from gsem.attacks._confirm import Confirmer, Counted, Trial, confirm_broken
from gsem.attacks._core import also_wrong_unfolded, expected
from gsem.attacks._types import Images, Labels, OnStep, Step
from gsem.losses import margin
from gsem.nn.contract import NotFinite
from gsem.rng import derive_seed, seeded

# On a GPU every look at a result makes the CPU wait and the queue of kernels run empty: one look in so many steps,
READ_EVERY = 10
# and not before so many steps after the device was given the work: by then the result has mostly arrived, and if not,
# the kernels of these steps are queued behind it.
LAG = 2
# Every new number of rows makes cuDNN plan all convolutions anew: on a GPU a batch shrinks to these numbers only.
BUCKETS = (512, 256, 128, 64, 32, 16)

Run = Callable[[Int[Tensor, " r"], int, OnStep | None], Images]
"""One run of an attack: (rows, seed, on_step) → x_adv [r, c, h, w] of the images with these numbers."""


class WorstSoFar:
    """The worst point of each image among those seen: one that is broken for good, then the highest loss.

    Broken (every draw misclassifies it) comes first because such a point may have the lower loss; among the others
    the mean loss decides, not the share of wrong draws, whose maximum over a path would mostly pick luck.
    """

    def __init__(self, x: Images):
        self.x = x.detach().clone()
        self.value = x.new_full((len(x),), float("-inf"))
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def update(
        self, x: Images, value: Float[Tensor, " r"], broken: Bool[Tensor, " r"], rows: Int[Tensor, " r"] | None = None
    ) -> None:
        """Compare points of the images numbered `rows` (default: all) with the worst so far."""
        at = slice(None) if rows is None else rows
        better = torch.where(broken == self.broken[at], value > self.value[at], broken)
        self.x[at] = torch.where(better[:, None, None, None], x, self.x[at])
        self.value[at] = torch.where(better, value, self.value[at])
        self.broken[at] |= broken


@runtime_checkable
class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


State = TypeVar("State", bound=_Dataclass)


def select(state: State, rows: Tensor) -> State:
    """An attack's state, a dataclass whose tensors have one row per image, for these images (a mask or numbers)."""
    return replace(state, **{name: value[rows] for name, value in vars(state).items() if isinstance(value, Tensor)})


class Remaining:
    """Which images of a run are still worked on.

    On a CPU an image leaves the attack's state with the step that breaks it, and a loss that is not finite is an error
    at once. On an accelerator the CPU would wait for both, at every step. There images are only marked as finished.
    Every `READ_EVERY` steps the marks are counted, `LAG` steps later the count is read, and the state is cut to one of
    the sizes in `BUCKETS`, filled up with finished images. A finished image keeps its result.

    Args:
        rows: numbers of the images. `rows` follows the state: one number for each of its rows.
    """

    sizes: ClassVar[Sequence[int] | None] = None
    """What takes the place of `BUCKETS`, also on a CPU: for tests."""

    def __init__(self, rows: Int[Tensor, " b"]):
        self.rows = rows
        sizes = self.sizes
        if sizes is None and rows.device.type != "cpu":
            sizes = BUCKETS
        self.marked = sizes is not None
        """Whether finished images may be among `rows`."""
        self.buckets = sorted(sizes or ())
        self.first = len(rows)
        self.place = torch.arange(len(rows), device=rows.device)
        self.live = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        """Of the state's rows: which are not finished."""
        self.finite = self.live.clone()
        self.held: tuple[Tensor, Tensor] | None = None
        self.trial: Trial | None = None
        self.decided = True
        """Whether the latest `broken` decided about any image, as it always does on a CPU."""
        self.counted: Counted | None = None
        self.steps = 0

    def __len__(self) -> int:
        return len(self.rows)

    def step(self, number: int, x: Images, value: Tensor, wrong: Tensor) -> Step:
        """What `on_step` gets."""
        return Step(self.rows, number, x, value, wrong, self.live.clone() if self.marked else None)

    def drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        """Random choices for the state's rows, of `draw` (rows → choices [rows, …]).

        Where finished images may remain, choices are drawn for all images of the run and belong to the image, so that
        they do not depend on the sizes. On a CPU that would change the results of every former version.
        """
        return draw(self.first)[self.place] if self.marked else draw(len(self))

    def only(self, wanted: Bool[Tensor, " r"]) -> Int[Tensor, " k"]:
        """Rows of the state to compute where only `wanted` matter: these; or all where the CPU would wait for their
        number, and each new number is a new shape."""
        at = torch.arange(len(self), device=self.rows.device)
        return at if self.marked else at[wanted]

    def require_finite(self, finite: Bool[Tensor, " r"]) -> None:
        """Refuse losses that are not finite; on an accelerator some steps later, at the latest in `finish`.

        Raises:
            NotFinite: naming the first image.
        """
        if self.marked:
            self.finite &= finite | ~self.live
        else:
            require_finite(finite, self.rows)

    def finish(self) -> None:
        """Raise what `require_finite` has put off. To be called at the end of a run."""
        if self.marked and len(self):
            require_finite(self.finite, self.rows)

    def broken(
        self,
        x: Tensor,
        value: Float[Tensor, " r"],
        wrong: Float[Tensor, " r"],
        confirmer: Confirmer,
        *,
        last: bool,
    ) -> tuple[Bool[Tensor, " r"], Tensor, Float[Tensor, " r"]]:
        """Which images are broken, where, and the loss there. To be called at every step, before `drop`.

        On a CPU the points x are confirmed at once. On an accelerator the CPU would wait at each part of the draws.
        There the highest point of `READ_EVERY` steps is tried (`Trial`), with the three parts 2, 4 and 6 steps later.
        `drop` counts the broken images two steps after that, so that no trial delays the step at which they leave.
        What is left of the draws at the last step is made there, and the CPU waits.

        Args:
            last: whether this is the last step.
        """
        if not (self.marked and confirmer.confirm):
            return confirmer(x, value, wrong, self.rows) & self.live, x, value
        self.hold(x, value, wrong == 1)
        assert self.held is not None
        self.decided, broken = last, torch.zeros_like(self.live)
        if self.trial is not None and (last or self.phase % LAG == 0):
            (self.trial.finish if last else self.trial.next_part)(confirmer, self.rows)
            if not self.trial.parts:
                self.decided = True
                x, value, broken = self._decided(self.trial, x, value)
                self.trial = None
        point, high = self.held
        each = (-1, *[1] * (x.ndim - 1))
        tried = (high > float("-inf")) & self.live
        if last:
            more = confirmer(point, high, tried.to(wrong.dtype), self.rows)
            x, value = torch.where(more.view(each), point, x), torch.where(more, high, value)
            broken = broken | more
        elif self.phase == 0 and self.trial is None:
            self.trial = Trial.begin(confirmer, point, high, confirmer.due(high, tried, self.rows))
            self.held = None
        return broken, x, value

    @property
    def phase(self) -> int:
        """Of the present step, where every `READ_EVERY`-th has 0."""
        return (self.steps + 1) % READ_EVERY

    def hold(self, x: Tensor, value: Float[Tensor, " r"], wrong: Bool[Tensor, " r"]) -> None:
        """On an accelerator: points that may be tried, where every draw was wrong; of each image the highest is."""
        former, high = self.held or (x, torch.full_like(value, float("-inf")))
        new = wrong & (value > high)
        self.held = torch.where(new.view(-1, *[1] * (x.ndim - 1)), x, former), torch.where(new, value, high)

    def _decided(self, trial: Trial, x: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Bool[Tensor, " r"]]:
        """Points, losses and which are broken, after a trial. Lower points are not tried any more."""
        assert self.held is not None
        broken, (point, high) = trial.broken & self.live, self.held
        self.held = point, torch.where(broken & (high <= trial.value), float("-inf"), high)
        each = broken.view(-1, *[1] * (x.ndim - 1))
        return torch.where(each, trial.point, x), torch.where(broken, trial.value, value), broken

    def record(self, result: Tensor, found: Tensor, which: Bool[Tensor, " r"] | None = None) -> None:
        """Write those of the state's points `found` (default: all) into the run's `result`, but for finished images."""
        if self.marked:
            mask = (self.live if which is None else which & self.live).view(-1, *[1] * (found.ndim - 1))
            result[self.place] = torch.where(mask, found, result[self.place])
        elif which is None:
            result[self.place] = found
        elif bool(which.any()):
            result[self.place[which]] = found[which]

    def drop(self, done: Bool[Tensor, " r"] | None = None, *, cut: bool = True) -> Tensor | None:
        """Work on these images ends. To be called at every step.

        Args:
            cut: False: not a step at which the state may be cut on an accelerator.

        Returns:
            the rows to which the caller cuts its state (a mask or numbers); None to leave it as it is.
        """
        if not self.marked:
            return None if done is None or not bool(done.any()) else self._cut(~done)
        if done is not None:
            self.live = self.live & ~done
        self.steps += 1
        phase = self.steps % READ_EVERY
        if phase == READ_EVERY - LAG:
            self.counted = Counted(torch.stack([self.live.sum(), (~self.finite).sum()]))
        if phase or self.counted is None or not cut:
            return None
        live, infinite = self.counted.read()  # of LAG steps before: no fewer than are left now
        if infinite:
            self.finish()
        size = min((size for size in self.buckets if size >= live), default=len(self)) if live else 0
        if size >= len(self):
            return None
        # Stays: what is live, and what is not finite but was not yet when it was counted; then the first of the rest.
        return self._cut((~self.live & self.finite).byte().argsort(stable=True)[:size])

    def _cut(self, kept: Tensor) -> Tensor:
        self.rows, self.place, self.live, self.finite = (
            t[kept] for t in (self.rows, self.place, self.live, self.finite)
        )
        self.held = None if self.held is None else (self.held[0][kept], self.held[1][kept])
        self.trial = None if self.trial is None else select(self.trial, kept)
        return kept


def draw_schedule(eot: int) -> list[int]:
    """Few draws first, and more for the images that remain: 5, then 20, then `eot`."""
    return [draws for draws in (5, 20) if draws < eot] + [eot]


def shifted(on_step: OnStep | None, rows: Int[Tensor, " r"]) -> OnStep | None:
    """`on_step` for a run on some rows of a batch: it gets their numbers in the whole batch."""
    if on_step is None:
        return None
    return lambda step: on_step(replace(step, rows=rows[step.rows]))


@contextmanager
def numbered(rows: Int[Tensor, " r"]) -> Iterator[None]:
    """An error that names an image by its number among `rows` names it by its number in the whole batch."""
    try:
        yield
    except NotFinite as error:
        error.args = (re.sub(r"(?<=^image )\d+", lambda number: str(int(rows[int(number[0])])), str(error)),)
        raise


def cascade(
    model: nn.Module,
    x: Images,
    y: Labels,
    runs: Iterable[Run],
    *,
    eot: int,
    confirm: int | None,
    seed: int,
    batch_size: int | None = None,
    on_step: OnStep | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Images:
    """Run attacks one after the other, each on the images that are not broken yet; keep the worst point of each image.

    Restarts, target classes, a suite, and the same attack with more draws are all this. An image that the model
    misclassifies already is not attacked. A point that breaks a deterministic folded model is also tried on the network
    itself before its image is given up. Of points that are not broken, the one with the highest margin, averaged
    over `eot` draws, is kept.

    Args:
        confirm: draws that confirm a broken point (`confirm_broken`); None attacks every image in every run.
        batch_size: images attacked at once, of those that remain; default: all.
        on_progress: called after each run with its number and how many images remain.
    """
    worst = WorstSoFar(x)
    everything = torch.arange(len(x), device=x.device)

    def judge(found: Images, rows: Tensor, *names: int) -> None:
        with seeded(derive_seed(seed, "judge", *names), x.device):
            values, wrong = expected(model, found, y[rows], margin, eot)
            require_finite(values.isfinite(), rows)
            broken = confirm_broken(model, found, y[rows], wrong, confirm or 0)
            if confirm == 0:
                broken = also_wrong_unfolded(model, found, y[rows], broken)
            worst.update(found, values, broken, rows)

    for part, rows in enumerate(everything.split(batch_size or max(1, len(x)))):
        judge(x[rows], rows, part)
    for number, run in enumerate(runs):
        remaining = everything if confirm is None else (~worst.broken).nonzero()[:, 0]
        if not len(remaining):
            break
        for part, rows in enumerate(remaining.split(batch_size or len(remaining))):
            with numbered(rows):
                found = run(rows, derive_seed(seed, "run", number, part), shifted(on_step, rows))
            judge(found, rows, number, part)
        if on_progress is not None:
            on_progress(number, int((~worst.broken).sum()))
    return worst.x
