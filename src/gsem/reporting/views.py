"""The data of a report: a run, its verdict and checks, and its pictures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gsem.auditing import Audit
from gsem.evaluation.result import EvaluationResult


@dataclass(frozen=True, eq=False)
class Shown:
    """An image of the gallery, before and after the attack."""

    x: Float[np.ndarray, "c h w"]
    """In [0, 1]."""
    x_adv: Float[np.ndarray, "c h w"]
    label: int
    clean: int | None
    """The most frequent answer to `x`; None where only is known how often it was right."""
    clean_right: float
    """Share of draws, 0 to 1, that answered the label to `x`."""
    attacked: int | None
    """The most frequent answer to `x_adv`."""
    attacked_right: float
    row: int | None = None
    """Of the data set, from 0, where it is known."""


@dataclass(frozen=True, eq=False)
class Surface:
    """The margin of the loss around an image, on a plane through it."""

    number: int
    """Of the image in the gallery, from 0."""
    along: Float[np.ndarray, " k"]
    """Coordinates of the grid, the same in both directions, in units of eps."""
    margin: Float[np.ndarray, "k k"]
    """Highest other logit less the label's, averaged over draws, [across, towards x_adv]: above 0 it is broken."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What only the model itself can tell."""

    how: str
    """Whose points these are, in words: `apgd20-eot5, kept by the evaluation`."""
    images: int
    draws: int
    eps: float
    confusion: Float[np.ndarray, "classes classes"] | None
    """Row: label, column: answer. Images, each counted with the share of draws that gave the answer. None where the
    answers are not known."""
    gallery: tuple[Shown, ...]
    surfaces: tuple[Surface, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class RunReport:
    """A run as a report reads it. What is not there is None, or empty."""

    path: Path
    name: str
    spec: str
    """As commands name it."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """recipe.json: recipe, model, data, versions, machine."""
    metrics: tuple[dict[str, Any], ...] = ()
    """One per epoch (see `gsem.Run`)."""
    result: EvaluationResult | None = None
    summary: dict[str, Any] | None = None
    """`result.to_dict()`: each attack's accuracies with intervals, and the worst cases."""
    file: str = ""
    """Of the result."""
    others: tuple[str, ...] = ()
    """Evaluations of this run that are not shown."""
    audit: Audit | None = None
    unmatched: tuple[str, ...] = ()
    """Files beside it that are of something else, and not shown: `audit.json: it is of another network`."""
    pictures: Pictures | None = None
    missing: str = ""
    """Why there are no pictures, or not all of them, a sentence."""
    named: tuple[str, ...] = ()
    """Names of the classes of a network that gsem did not train, if its data tell them."""

    @property
    def recipe(self) -> dict[str, Any]:
        return self.metadata.get("recipe", {})

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels; numbers where the run does not tell."""
        named = self.metadata.get("data", {}).get("classes") or self.named
        if named:
            return tuple(named)
        known = [] if self.result is None else [int(self.result.y.max()) + 1]
        known += [] if self.pictures is None or self.pictures.confusion is None else [len(self.pictures.confusion)]
        return tuple(str(number) for number in range(max(known, default=0)))

    @property
    def eps(self) -> float | None:
        """Radius of the evaluation, else of the audit, else of the data."""
        for metadata in (
            None if self.result is None else self.result.metadata,
            None if self.audit is None else self.audit.metadata,
            self.metadata.get("data"),
        ):
            if metadata and "eps" in metadata:
                return float(metadata["eps"])
        return None
