"""Attacks on the remaining images: when an image counts as broken, and how attacks run one after the other."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem.attacks._checks import require_finite
from gsem.attacks._core import also_wrong_unfolded, expected
from gsem.attacks._types import Images, Labels, OnStep, Step
from gsem.losses import margin
from gsem.nn.contract import NotFinite
from gsem.nn.predict import is_stochastic
from gsem.rng import derive_seed, seeded

# One lucky draw breaks nothing: an image of a stochastic model is broken when a point of it is misclassified in all
# draws of the search and in so many more.
CONFIRM = 100
# Images of the two forward passes that show whether the model is stochastic.
PROBED = 32
# On a GPU every look at a result makes the CPU wait and the queue of kernels run empty: one look in so many steps.
READ_EVERY = 10
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


def confirmation(model: nn.Module, x: Images) -> int:
    """How many more draws confirm that a point is broken: none for a deterministic model."""
    return CONFIRM if len(x) and is_stochastic(model, x[:PROBED]) else 0


def confirm_broken(
    model: nn.Module, x: Images, y: Labels, wrong: Float[Tensor, " b"], confirm: int
) -> Bool[Tensor, " b"]:
    """Which points are broken: misclassified in every draw so far (`wrong` is 1) and in `confirm` more."""
    broken = wrong == 1
    done, draws = 0, 5
    while done < confirm:
        rows = broken.nonzero()[:, 0]
        if not len(rows):
            break
        now = min(draws, confirm - done)
        _, again = expected(model, x[rows], y[rows], margin, now)
        broken[rows] = again == 1
        done, draws = done + now, 4 * draws
    return broken


class Confirmer:
    """`confirm_broken` along a path, for many points of each image.

    After a point that was not confirmed, the next one is tried where its loss is higher, and in any case after 1, 2,
    4, … more points. Otherwise an image that is misclassified in 95 draws of 100 would cost more than all the others.
    """

    def __init__(self, model: nn.Module, x: Images, y: Labels, confirm: int):
        self.model, self.y, self.confirm = model, y, confirm
        self.failed = x.new_full((len(x),), float("-inf"))
        self.wait = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.pause = torch.ones_like(self.wait)

    def __call__(
        self, x: Images, value: Float[Tensor, " r"], wrong: Float[Tensor, " r"], rows: Int[Tensor, " r"]
    ) -> Bool[Tensor, " r"]:
        """Which points x of the images numbered `rows` are broken, by their loss and their share of wrong draws."""
        broken = wrong == 1
        if not self.confirm:
            return broken
        tried = broken & ((value > self.failed[rows]) | (self.wait[rows] <= 0))
        self.wait[rows] -= 1
        broken = torch.zeros_like(tried)
        at = tried.nonzero()[:, 0]
        if len(at):
            broken[at] = confirm_broken(self.model, x[at], self.y[rows[at]], wrong[at], self.confirm)
            self.failed[rows[at]] = value[at]
            self.wait[rows[at]] = self.pause[rows[at]]
            self.pause[rows[at]] *= 2
        return broken


class _Counted:
    """Numbers that the device computes, on their way to the CPU: `read`, some steps later, hardly waits for them."""

    def __init__(self, value: Tensor):
        # (Only CUDA has events to wait for a copy, and mps would hand out the memory before it is written.)
        self.value = value.to("cpu", non_blocking=value.device.type != "mps")
        self.arrived = torch.cuda.Event() if value.is_cuda else None
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.value.tolist()


class Remaining:
    """Which images of a run are still worked on.

    On a CPU an image leaves the attack's state with the step that breaks it, and a loss that is not finite is an error
    at once. On an accelerator the CPU would wait for both, at every step. There images are only marked as finished.
    Every `READ_EVERY` steps the marks are counted, the count of the time before is read, and the state is cut to one of
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
        self.counted: _Counted | None = None
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

    def reads(self, last: bool = False) -> bool:
        """Whether this is a step at which the CPU may wait for the device."""
        return not self.marked or last or (self.steps + 1) % READ_EVERY == 0

    def broken(
        self,
        x: Tensor,
        value: Float[Tensor, " r"],
        wrong: Float[Tensor, " r"],
        by: Callable[[Tensor, Tensor, Tensor], Bool[Tensor, " r"]],
        *,
        confirm: int,
        last: bool,
    ) -> tuple[Bool[Tensor, " r"], Tensor, Float[Tensor, " r"]]:
        """Which images are broken, where, and the loss there.

        Args:
            by: decides for points, their losses and shares of wrong draws. If that takes more draws (`confirm`), for
                which the CPU would wait, it is asked every `READ_EVERY` steps, about the highest of the points since.
            last: whether this is the last step.
        """
        if not (self.marked and confirm):
            return by(x, value, wrong) & self.live, x, value
        former, high = self.held or (x, torch.full_like(value, float("-inf")))
        new = (wrong == 1) & (value > high) & self.live
        each = (-1, *[1] * (x.ndim - 1))
        point, high = torch.where(new.view(each), x, former), torch.where(new, value, high)
        broken = torch.zeros_like(new)
        if self.reads(last):
            broken = by(point, high, (high > float("-inf")).to(wrong.dtype)) & self.live
            self.held = None
        else:
            self.held = point, high
        return broken, torch.where(broken.view(each), point, x), torch.where(broken, high, value)

    def record(self, result: Tensor, found: Tensor, which: Bool[Tensor, " r"] | None = None) -> None:
        """Write those of the state's points `found` (default: all) into the run's `result`, but for finished images."""
        if self.marked:
            mask = (self.live if which is None else which & self.live).view(-1, *[1] * (found.ndim - 1))
            result[self.place] = torch.where(mask, found, result[self.place])
        elif which is None:
            result[self.place] = found
        elif bool(which.any()):
            result[self.place[which]] = found[which]

    def drop(self, done: Bool[Tensor, " r"] | None = None) -> Tensor | None:
        """Work on these images ends. To be called at every step.

        Returns:
            the rows to which the caller cuts its state (a mask or numbers); None to leave it as it is.
        """
        if not self.marked:
            return None if done is None or not bool(done.any()) else self._cut(~done)
        if done is not None:
            self.live = self.live & ~done
        self.steps += 1
        if self.steps % READ_EVERY:
            return None
        former, counts = self.counted, torch.stack([self.live.sum(), (~self.finite).sum()])
        self.counted = _Counted(counts)
        if former is None:
            return None
        live, infinite = former.read()  # of READ_EVERY steps before: no fewer than are left now
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
