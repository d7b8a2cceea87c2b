"""The progress of a training: the place of a step in the schedule, what is counted, and what a callback gets."""

from dataclasses import asdict, dataclass, field
from typing import Any

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


def rank(recipe: Recipe, metrics: dict[str, Any]) -> tuple[float, float]:
    """The key by which epochs are compared: the most robust is best, among equals the one of highest clean accuracy.

    Many tie on a small validation set. A training without attacks is judged by its clean accuracy: its robust one
    is highest where nothing was learnt yet.
    """
    robust, clean = metrics["robust"], metrics["clean"]
    return (robust, clean) if recipe.adversarial_fraction > 0 else (clean, robust)


@dataclass
class Counters:
    """What is counted in a run, beside its tensors: JSON-able, and kept in every checkpoint."""

    step: int = 0
    """Steps done, over all rounds."""
    round: int = 0
    best_robust: float = -1.0
    best_rank: tuple[float, float] = (-1.0, -1.0)
    stale: int = 0
    """Validations since the one of `best_robust`."""
    watched: tuple[float, float] = (-1.0, -1.0)
    """The best robust validation accuracy of the raw weights, and the accuracy on the training batches then."""
    collapsed: bool = False
    """Whether catastrophic overfitting was found."""
    latest: dict[str, float] = field(default_factory=dict)
    """The last loss and validation accuracies."""
    seconds: float = 0.0

    to_dict = asdict

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Counters":
        pairs = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**values | pairs)

    def count_validation(self, recipe: Recipe, metrics: dict[str, Any]) -> bool:
        """Count a validation. Returns whether it is the best so far (see `rank`)."""
        self.stale = 0 if metrics["robust"] > self.best_robust else self.stale + 1
        self.best_robust = max(self.best_robust, metrics["robust"])
        found = rank(recipe, metrics)
        better = found > self.best_rank
        self.best_rank = max(found, self.best_rank)
        if recipe.collapse > 0:
            now = (metrics.get("raw_robust", metrics["robust"]), metrics["training_robust"])
            best, then = self.watched
            self.collapsed = now[0] < (1 - recipe.collapse) * best and now[1] >= then
            self.watched = max(now, self.watched)
        return better

    def stops_early(self, recipe: Recipe) -> bool:
        return self.collapsed or 0 < recipe.patience <= self.stale
