"""Model selection: which epoch's weights are kept as the best checkpoint, and when a training stops early."""

from dataclasses import asdict, dataclass, field
from typing import Any

from gsem.training.recipe import Recipe


def rank(recipe: Recipe, metrics: dict[str, Any]) -> tuple[float, float]:
    """The key by which epochs are compared: robust validation accuracy, then clean validation accuracy.

    Ties are frequent on a small validation set. In a training without attacks the clean accuracy comes first, because
    there the robust accuracy is highest at the start, where nothing has been learnt.
    """
    robust, clean = metrics["robust"], metrics["clean"]
    return (robust, clean) if recipe.adversarial_fraction > 0 else (clean, robust)


@dataclass
class Counters:
    """What a run counts: steps, the best validation so far, and the signs to stop. Checkpoints hold it as JSON."""

    step: int = 0
    """Steps done, over all rounds."""
    round: int = 0
    best_robust: float = -1.0
    best_rank: tuple[float, float] = (-1.0, -1.0)
    stale: int = 0
    """Validations since the one with the best robust accuracy."""
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
