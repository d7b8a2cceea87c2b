"""Attacks on the remaining images: when an image counts as broken, and how attacks run one after the other."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem.attacks._checks import require_finite
from gsem.attacks._core import expected
from gsem.attacks._types import Images, Labels, OnStep
from gsem.losses import margin
from gsem.nn.contract import NotFinite
from gsem.nn.predict import is_stochastic
from gsem.rng import derive_seed, seeded

# One lucky draw breaks nothing: an image of a stochastic model is broken when a point of it is misclassified in all
# draws of the search and in so many more.
CONFIRM = 100
# Images of the two forward passes that show whether the model is stochastic.
PROBED = 32

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


def select(state: State, rows: Bool[Tensor, " b"]) -> State:
    """An attack's state, a dataclass whose tensors have one row per image, for these images only."""
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
    while done < confirm and bool(broken.any()):
        rows = broken.nonzero()[:, 0]
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
    misclassifies already is not attacked. Of points that are not broken, the one with the highest margin, averaged
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
            worst.update(found, values, confirm_broken(model, found, y[rows], wrong, confirm or 0), rows)

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
