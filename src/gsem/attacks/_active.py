"""Work on the images that remain: when an image is broken for good, and attacks run one after the other."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem.attacks._core import NOT_FINITE, Images, Labels, NotFinite, OnStep, WorstSoFar, expected
from gsem.losses import margin
from gsem.nn.predict import is_stochastic
from gsem.rng import derive_seed, seeded

# One lucky draw breaks nothing: a point of a stochastic model is given up only when it was wrong in all draws of
# the search and in so many more.
CONFIRM = 100
# Images on which an attack finds out whether the model is stochastic.
PROBED = 32

Run = Callable[[Int[Tensor, " r"], int, OnStep | None], Images]
"""One run of an attack: (rows, seed, on_step) → x_adv [r, c, h, w] of the images with these numbers, which stand."""


def confirmation(model: nn.Module, x: Images) -> int:
    """How many more draws confirm a broken point: none for a deterministic model."""
    return CONFIRM if len(x) and is_stochastic(model, x[:PROBED]) else 0


def confirm_broken(
    model: nn.Module, x: Images, y: Labels, wrong: Float[Tensor, " b"], confirm: int
) -> Bool[Tensor, " b"]:
    """Which points are broken for good: wrong in every draw so far (`wrong` is 1) and in `confirm` more."""
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
    """`confirm_broken` along a path, for many points of each image: after a failure the next is tried where the loss is
    higher than it was there, and in any case after 1, 2, 4, … more points. Else an image that flips in 95 draws of
    100 would cost more than all the others."""

    def __init__(self, model: nn.Module, x: Images, y: Labels, confirm: int):
        self.model, self.y, self.confirm = model, y, confirm
        self.failed = x.new_full((len(x),), float("-inf"))
        self.wait = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.pause = torch.ones_like(self.wait)

    def __call__(
        self, x: Images, value: Float[Tensor, " r"], wrong: Float[Tensor, " r"], rows: Int[Tensor, " r"]
    ) -> Bool[Tensor, " r"]:
        """For points x of the images numbered `rows`, with their loss and share of wrong draws."""
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
    """Few draws first, more for survivors only: 5, then 20, then up to `eot`."""
    return [draws for draws in (5, 20) if draws < eot] + [eot]


def shifted(on_step: OnStep | None, rows: Int[Tensor, " r"]) -> OnStep | None:
    """An observer of some rows of a batch, told the numbers that they have in the whole."""
    if on_step is None:
        return None
    return lambda step: on_step(replace(step, rows=rows[step.rows]))


def cascade(
    model: nn.Module,
    x: Images,
    y: Labels,
    runs: Iterable[Run],
    *,
    eot: int,
    confirm: int,
    seed: int,
    batch_size: int | None = None,
    settle: bool = True,
    on_step: OnStep | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Images:
    """Run attacks one after the other, each on the images that still stand; keep the worst point of each image.

    Restarts, target classes, a suite, and the same attack with more draws are all this. An image is worked on until
    a point of it is broken for good (`confirm_broken`). An image that the model already gets wrong is not attacked. Of
    points that are not broken, the one with the highest margin, averaged over `eot` draws, is kept.

    Args:
        settle: False attacks every image in every run.
        batch_size: images attacked at once, of those that remain; default: all.
        on_progress: called after each run with its number and how many images stand.
    """
    worst = WorstSoFar(x)
    everything = torch.arange(len(x), device=x.device)

    def judge(found: Images, rows: Tensor, *names: int) -> None:
        with seeded(derive_seed(seed, "judge", *names), x.device):
            values, wrong = expected(model, found, y[rows], margin, eot)
            bad = (~values.isfinite()).nonzero()
            if len(bad):
                raise NotFinite(f"image {int(rows[bad[0, 0]])} of the attacked batch: {NOT_FINITE}")
            worst.update(found, values, confirm_broken(model, found, y[rows], wrong, confirm), rows)

    for part, rows in enumerate(everything.split(batch_size or max(1, len(x)))):
        judge(x[rows], rows, part)
    for number, run in enumerate(runs):
        remaining = (~worst.broken).nonzero()[:, 0] if settle else everything
        if not len(remaining):
            break
        for part, rows in enumerate(remaining.split(batch_size or len(remaining))):
            found = run(rows, derive_seed(seed, "run", number, part), shifted(on_step, rows))
            judge(found, rows, number, part)
        if on_progress is not None:
            on_progress(number, int((~worst.broken).sum()))
    return worst.x
