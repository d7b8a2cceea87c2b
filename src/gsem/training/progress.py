"""The progress of a training, as a callback gets it, and the place of a step among rounds and epochs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from gsem.data import mixed_order
from gsem.rng import generator
from gsem.training.recipe import Recipe


@dataclass(frozen=True)
class Progress:
    """The progress of a run, for a callback."""

    epoch: int
    epochs: int
    step: int
    steps: int
    """Done and to do, over all rounds."""
    loss: float
    images_per_second: float
    seconds_left: float
    clean: float | None
    robust: float | None
    """Accuracies of the last validation, 0 to 1."""
    best_robust: float | None
    """The best of all validations so far: above `robust`, it shows robust overfitting."""
    epoch_ended: bool
    device: str
    precision: dict[str, str]
    """`precision` and `attack_precision` as chosen for this device: float32, bf16 or fp16."""


@dataclass(frozen=True)
class Schedule:
    """Rounds of epochs of steps. Steps are numbered from 0 over all rounds."""

    recipe: Recipe
    steps_per_epoch: int

    @property
    def epochs(self) -> int:
        """Epochs of all rounds together."""
        return self.recipe.epochs * self.recipe.rounds

    @property
    def steps(self) -> int:
        """Steps of all rounds together."""
        return self.steps_per_epoch * self.epochs

    def place(self, step: int) -> tuple[int, int, int]:
        """(round, epoch of the round, step of the epoch), each from 0."""
        epochs, index = divmod(step, self.steps_per_epoch)
        return *divmod(epochs, self.recipe.epochs), index

    def epoch(self, step: int) -> float:
        """The epoch of its round at which `step` begins, fractional."""
        return step % (self.steps_per_epoch * self.recipe.epochs) / self.steps_per_epoch

    def averaged(self, step: int) -> int | None:
        """Steps of the round that are averaged before `step`; None where the average does not include `step`."""
        in_round = step % (self.steps_per_epoch * self.recipe.epochs)
        count = in_round - (self.recipe.swa_from or 0) * self.steps_per_epoch
        return count if count >= 0 else None


def epoch_order(recipe: Recipe, real: int, extra: int, batch: int, round_: int, epoch: int) -> Int64[Tensor, "steps b"]:
    """The places of the images of an epoch's batches: `mixed_order`, as often as steps_per_epoch needs it."""

    def once(*names: int) -> Tensor:
        rng = generator(recipe.seed, "order", round_, epoch, *names)
        return mixed_order(real, extra, batch, recipe.extra_share, rng)

    orders = [once()]
    steps = recipe.steps_per_epoch or len(orders[0])
    while len(orders) * len(orders[0]) < steps:
        orders.append(once(len(orders)))
    return torch.cat(orders)[:steps]


def batch_rows(
    schedule: Schedule, order: Callable[[int, int], Int64[Tensor, "steps b"]], first: int
) -> Iterator[Int64[Tensor, " b"]]:
    """The rows of each batch from step `first` to the end of the run; `order` gives those of an epoch of a round."""
    rows: Tensor | None = None
    for step in range(first, schedule.steps):
        round_, epoch, index = schedule.place(step)
        if index == 0 or rows is None:
            rows = order(round_, epoch)
        yield rows[index]
