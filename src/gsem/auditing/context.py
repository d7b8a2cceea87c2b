"""What the checks share: the model, its images, the audited attacks, and their points."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsem.attacks import Step
from gsem.attacks._checks import check_result
from gsem.attacks._types import Norm, OnStep
from gsem.attacks.suite import AttackSpec
from gsem.auditing.partial import Partial
from gsem.auditing.trace import Trace, trace
from gsem.evaluation.statistics import Interval, binomial_quantile, bootstrap_mean
from gsem.nn.folded import fold
from gsem.nn.predict import predict_draws
from gsem.rng import derive_seed

T = TypeVar("T")
RESAMPLES = 2000
# How much lower an accuracy must be, to be called lower at all, and to be called another accuracy altogether.
SLIGHTLY, GREATLY = 0.003, 0.05

WHITE = ("apgd", "pgd", "cw", "fgsm", "fab")
LEADING = ("apgd", "pgd", "cw", "fgsm")
BLACK = ("square", "rays", "transfer")


@dataclass(frozen=True)
class Points:
    """A point of each image, and how often the model gets it wrong."""

    x_adv: Float[Tensor, "n c h w"]
    selection: Float[np.ndarray, " n"]
    """Share of wrong draws by which points are chosen."""
    wrong: Float[np.ndarray, " n"]
    """Share of wrong draws that no choice has seen."""

    def worse_of(self, other: "Points") -> "Points":
        """Per image the point that more selection draws get wrong."""
        pick = other.selection > self.selection
        rows = torch.from_numpy(pick).to(self.x_adv.device)[:, None, None, None]
        return Points(
            torch.where(rows, other.x_adv, self.x_adv),
            np.where(pick, other.selection, self.selection),
            np.where(pick, other.wrong, self.wrong),
        )

    @property
    def shares(self) -> Float[np.ndarray, "2 n"]:
        """`selection` and `wrong`."""
        return np.stack([self.selection, self.wrong])


def lowest(parts: Sequence[Float[np.ndarray, "2 n"]]) -> Float[np.ndarray, "2 n"]:
    """Shares of wrong selection and of wrong scoring draws, per image of the first of the worst by selection draws."""
    found = parts[0]
    for other in parts[1:]:
        found = np.where(other[0] > found[0], other, found)
    return found


class AuditContext:
    """The model under audit. Nothing here is computed before a check asks for it, and nothing twice."""

    def __init__(
        self,
        model: nn.Module,
        x: Float[Tensor, "n c h w"],
        y: Tensor,
        attacks: Sequence[AttackSpec],
        *,
        eps: float,
        norm: Norm,
        seed: int,
        draws: int,
        batch_size: int,
        stochastic: bool,
        quick: bool,
        source_models: Mapping[str, nn.Module],
        surrogate: nn.Module | None,
        say: Callable[[str], None],
        on_step: OnStep | None = None,
        partial: Partial | None = None,
    ):
        self.model, self.x, self.y = model, x, y
        self.eps, self.norm, self.seed, self.batch_size, self.quick = eps, norm, seed, batch_size, quick
        self.stochastic, self.draws = stochastic, draws if stochastic else 1
        self.source_models, self.surrogate, self.say = source_models, surrogate, say
        # Sees the steps of attacks that it costs nothing, for whoever shows that they advance.
        self.on_step, self.partial = on_step, partial
        bounded = [a for a in attacks if a.bounded]
        self.white = [a for a in bounded if a.name in WHITE]
        self.black = [a for a in bounded if a.name in BLACK]
        self.folded = fold_quietly(model)
        # What the attacks differentiate: the model's folded model, unless the caller attacks through another network.
        self.search = self.folded if surrogate is None else fold_quietly(surrogate)
        # What the current check found: the lowest accuracy of all is reported with the others.
        self.found: list[Points] = []

    def known(self, model: nn.Module) -> "AuditContext":
        """The same questions to a deterministic relative of the model."""
        return AuditContext(
            model,
            self.x,
            self.y,
            self.white,
            eps=self.eps,
            norm=self.norm,
            seed=self.seed,
            draws=1,
            batch_size=self.batch_size,
            stochastic=False,
            quick=self.quick,
            source_models={},
            surrogate=None,
            say=self.say,
            on_step=self.on_step,
        )

    @property
    def primary_attack(self) -> AttackSpec:
        """The attack whose path is looked at."""
        return next(a for a in self.white if a.name in LEADING)

    @property
    def effort(self) -> dict[str, Any]:
        """Steps and draws of the leading attack, for another attack in its place."""
        options = self.options(self.primary_attack)
        return {"steps": options.get("steps", 20), "eot": options["eot"]}

    @cached_property
    def classes(self) -> int:
        with torch.no_grad():
            return self.folded(self.x[:1]).shape[1]

    def options(self, attack: AttackSpec) -> dict[str, Any]:
        return attack.resolved(eps=self.eps, stochastic=self.stochastic)

    def label(self, attack: AttackSpec) -> str:
        return attack.label(eps=self.eps, stochastic=self.stochastic)

    def points(
        self,
        attack: AttackSpec,
        *names: str | int,
        rows: Tensor | None = None,
        through: nn.Module | None = None,
        eps: float | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """x_adv [r, c, h, w] of the images numbered `rows` (default: all).

        Args:
            names: of the random stream.
            through: the model that the attack sees, already a folded model; default: `self.search`.
            on_step: called with every iterate, also by attacks that it costs passes; rows are numbers in `rows`.
        """
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        found = []
        for first in range(0, len(x), self.batch_size):
            part = slice(first, first + self.batch_size)
            self.say(f"{self.label(attack)}, image {first + len(x[part])} of {len(x)}")
            x_adv = attack.run(
                through or self.search,
                x[part],
                y[part],
                eps=eps or self.eps,
                norm=self.norm,
                stochastic=self.stochastic,
                seed=derive_seed(self.seed, "search", self.label(attack), *names, first),
                source_models=dict(self.source_models),
                on_step=self.on_step if on_step is None else _numbered_from(first, on_step),
                on_step_always=on_step is not None,
            )
            found.append(check_result(x_adv, x[part], eps=eps or self.eps, norm=self.norm))
        return torch.cat(found) if found else x

    def wrong(
        self,
        x_adv: Tensor,
        *names: str | int,
        rows: Tensor | None = None,
        model: nn.Module | None = None,
    ) -> Float[np.ndarray, " r"]:
        """Share of draws in which the true model (or `model`) misclassifies each point."""
        y = self.y if rows is None else self.y[rows]
        if not len(y):
            return np.zeros(0)
        seed = derive_seed(self.seed, "scoring", *names)
        found = predict_draws(model or self.model, x_adv, draws=self.draws, seed=seed, batch_size=self.batch_size)
        return (found != y).double().mean(0).cpu().numpy()

    def score(self, x_adv: Tensor, *names: str | int) -> Points:
        """What the points of all images are worth."""
        return Points(x_adv, self.wrong(x_adv, "selection", *names), self.wrong(x_adv, *names))

    # --- what several checks look at -------------------------------------------------------------------------

    def _shared(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        return make() if self.partial is None else self.partial.shared(name, kind, make)

    @cached_property
    def clean(self) -> Points:
        return self._shared("clean", Points, lambda: self.score(self.x, "clean"))

    @cached_property
    def white_box(self) -> Points:
        """The worst that the white-box attacks in question reach: the robust accuracy under audit."""

        def reached() -> Points:
            self.say("the evaluation itself")
            first = self.clean.worse_of(self.score(self.path.x_adv, "returned"))
            return self.cascade([a for a in self.white if a is not self.primary_attack], first, "base")

        return self._shared("base", Points, reached)

    @property
    def attacked(self) -> bool:
        """Whether any check asked for `base`."""
        return "white_box" in vars(self) or (self.partial is not None and self.partial.has("base"))

    @cached_property
    def path(self) -> Trace:
        """What the leading attack did."""
        return self._shared(
            "path",
            Trace,
            lambda: trace(len(self.x), lambda on_step: self.points(self.primary_attack, "path", on_step=on_step)),
        )

    @property
    def widest(self) -> float:
        """A radius that holds every image."""
        return 1.0 if self.norm == "Linf" else float(self.x[0].numel()) ** 0.5

    @cached_property
    def unbounded(self) -> Points:
        """The worst that the attacks in question reach without a bound."""

        def reached() -> Points:
            points = self.clean
            for attack in self.white:
                points = points.worse_of(self.on_standing(attack, points, "unconstrained", eps=self.widest))
            return points

        return self._shared("unbounded", Points, reached)

    def cascade(
        self, attacks: Sequence[AttackSpec], start: Points, *names: str | int, through: nn.Module | None = None
    ) -> Points:
        """Attacks one after the other, each on the images that `start` and those before it leave standing."""
        points = start
        for attack in attacks:
            points = points.worse_of(self.on_standing(attack, points, *names, through=through))
        self.found.append(points)
        return points

    def on_standing(
        self,
        attack: AttackSpec,
        points: Points,
        *names: str | int,
        through: nn.Module | None = None,
        eps: float | None = None,
    ) -> Points:
        """The attack's points for the images that `points` leave standing, and those of the others as they are."""
        at = np.flatnonzero(points.selection < 1)
        if not len(at):
            return points
        rows = torch.from_numpy(at).to(self.x.device)
        x_adv, selection, wrong = points.x_adv.clone(), points.selection.copy(), points.wrong.copy()
        x_adv[rows] = found = self.points(attack, *names, rows=rows, through=through, eps=eps)
        selection[at] = self.wrong(found, "selection", self.label(attack), *names, rows=rows)
        wrong[at] = self.wrong(found, self.label(attack), *names, rows=rows)
        return Points(x_adv, selection, wrong)

    # --- accuracies ------------------------------------------------------------------------------------------

    def accuracy(self, points: Points | Float[np.ndarray, " n"]) -> Interval:
        """Expected accuracy, of points or of shares of wrong draws."""
        wrong = points.wrong if isinstance(points, Points) else points
        return self.interval(1 - wrong)

    def gain(self, before: Points, after: Points) -> Interval:
        """By how much the accuracy falls, image by image."""
        return self.interval(after.wrong - before.wrong)

    def interval(self, values: Float[np.ndarray, " n"]) -> Interval:
        return bootstrap_mean(values, resamples=RESAMPLES, seed=self.seed)

    def broken_beyond_noise(self, before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"]) -> np.ndarray:
        """[n] whether a point is misclassified by most draws where another was not, beyond the noise of the draws."""
        # The standard deviation of the difference of two shares is at most √(1/2m).
        margin = 3 * (0.5 / self.draws) ** 0.5 if self.draws > 1 else 0.5
        return (after > 0.5) & (before <= 0.5) & (after - before > margin)


def most_by_chance(images: int) -> int:
    """How many of so many images one attack may break and another miss, although both search equally well.

    By its random start and its finite effort an attack misses up to 0.003 of the images that another try breaks: the
    tolerance of the sweeps too. A binomial count with that share exceeds the number in at most 2.5% of cases.
    """
    return binomial_quantile(images, SLIGHTLY)


def _numbered_from(first: int, on_step: OnStep) -> OnStep:
    return lambda s: on_step(Step(s.rows + first, s.step, s.x, s.loss, s.wrong))


def fold_quietly(model: nn.Module) -> nn.Module:
    """A folded model, without the warning that a network cannot be folded: an audit folds it many times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fold(model)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def several(count: int, what: str) -> str:
    return f"{count} {what}" if count != 1 else f"1 {what.removesuffix('s')}"
