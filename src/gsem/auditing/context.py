"""What the checks share: the model, its images, the audited attacks, and their points and accuracies."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsem.attacks import Step
from gsem.attacks._checks import check_result
from gsem.attacks._types import Norm, OnStep
from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Finding
from gsem.auditing.partial import Partial
from gsem.distributed import current
from gsem.evaluation.statistics import Interval, bootstrap_mean
from gsem.evaluation.work import shared_out
from gsem.nn.folded import fold
from gsem.nn.predict import predict_draws
from gsem.rng import derive_seed

T = TypeVar("T")
RESAMPLES = 2000
# By how much an accuracy must fall to count as lower at all, and for the verdict INVALID.
SLIGHTLY, GREATLY = 0.003, 0.05

WHITE_BOX = ("apgd", "pgd", "cw", "fgsm", "fab")
PRIMARY = ("apgd", "pgd", "cw", "fgsm")
BLACK_BOX = ("square", "rays", "transfer")


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


@dataclass(frozen=True)
class Trace:
    """The path of an attack on all images; every value is averaged over the attack's draws."""

    x_adv: Float[Tensor, "n c h w"]
    """What the attack returned."""
    best: Float[Tensor, "n c h w"]
    """The iterate that most draws got wrong, then that of the highest loss."""
    loss: Float[np.ndarray, "n steps"]
    """The loss of each iterate; NaN after the attack stopped working on an image."""
    broken: Float[np.ndarray, " n"]
    """The largest share of draws of the search that an iterate was wrong in."""

    def to(self, device: torch.device | str) -> "Trace":
        return replace(self, x_adv=self.x_adv.to(device), best=self.best.to(device))


def joined_traces(parts: Sequence[Trace]) -> Trace:
    """The traces of consecutive batches as one."""
    steps = max(part.loss.shape[1] for part in parts)
    losses = [np.pad(p.loss, ((0, 0), (0, steps - p.loss.shape[1])), constant_values=np.nan) for p in parts]
    x_adv, best = (torch.cat([getattr(part, name) for part in parts]) for name in ("x_adv", "best"))
    return Trace(x_adv, best, np.concatenate(losses), np.concatenate([part.broken for part in parts]))


def trace(images: int, run: Callable[[OnStep], Tensor]) -> Trace:
    """Run an attack on so many images and record its path.

    Args:
        run: (on_step) → x_adv [n, c, h, w].
    """
    best: dict[int, tuple[float, float, Tensor]] = {}
    losses: list[list[float]] = [[] for _ in range(images)]

    def record(step: Step) -> None:
        live = torch.ones_like(step.rows) if step.live is None else step.live
        figures = torch.stack([part.double() for part in (live, step.rows, step.wrong, step.loss)], 1)
        for at, (works, number, wrong, loss) in enumerate(figures.tolist()):  # (one copy from the device)
            if not works:
                continue
            row = int(number)
            losses[row].append(loss)
            if row not in best or (wrong, loss) > best[row][:2]:
                best[row] = (wrong, loss, step.x[at].detach().clone())

    x_adv = run(record)
    table = np.full((images, max(map(len, losses), default=0)), np.nan)
    for row, values in enumerate(losses):
        table[row, : len(values)] = values
    # (An attack that reports no steps, like FGSM, has no point but the one that it returned.)
    points = [best[row][2] if row in best else x_adv[row] for row in range(images)]
    return Trace(x_adv, torch.stack(points), table, np.array([best[r][0] if r in best else 0.0 for r in range(images)]))


@dataclass(kw_only=True, eq=False)
class AuditTask:
    """What is audited: the model, its images, the threat model, and the attacks whose result is checked."""

    model: nn.Module
    x: Float[Tensor, "n c h w"]
    y: Tensor
    attacks: Sequence[AttackSpec]
    eps: float
    norm: Norm
    seed: int
    draws: int
    """Scoring draws; 1 of a deterministic model."""
    batch_size: int
    stochastic: bool
    quick: bool
    source_models: Mapping[str, nn.Module]
    """Source models of the transfer attack, by name; they are folded."""
    surrogate: nn.Module | None
    """The model that the attacks differentiate, if not the model itself."""

    def __post_init__(self) -> None:
        self.white = [a for a in self.attacks if a.bounded and a.name in WHITE_BOX]
        self.black = [a for a in self.attacks if a.bounded and a.name in BLACK_BOX]
        self.folded = fold_quietly(self.model)
        # What the attacks differentiate: the folded model, unless the caller attacks through another network.
        self.search = self.folded if self.surrogate is None else fold_quietly(self.surrogate)

    @property
    def primary_attack(self) -> AttackSpec:
        """The attack whose path is looked at."""
        return next(a for a in self.white if a.name in PRIMARY)

    @property
    def effort(self) -> dict[str, Any]:
        """Steps and draws of the primary attack, for another attack in its place."""
        options = self.options(self.primary_attack)
        return {"steps": options.get("steps", 20), "eot": options["eot"]}

    @cached_property
    def classes(self) -> int:
        with torch.no_grad():
            return self.folded(self.x[:1]).shape[1]

    @property
    def widest(self) -> float:
        """A radius within which every image lies."""
        return 1.0 if self.norm == "Linf" else float(self.x[0].numel()) ** 0.5

    @property
    def few_draws(self) -> int:
        """Draws over which a check averages what it computes many times."""
        return min(self.draws, 2 if self.quick else 5)

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The number of its first image, the images and the labels of each batch."""
        for first in range(0, len(self.x), self.batch_size):
            yield first, self.x[first : first + self.batch_size], self.y[first : first + self.batch_size]

    def options(self, attack: AttackSpec) -> dict[str, Any]:
        """All options of an attack, with those that were not set."""
        return attack.resolved(eps=self.eps, stochastic=self.stochastic)

    def passes(self, attack: AttackSpec) -> float:
        """Forward passes for each image that it attacks, at most."""
        return attack.passes(eps=self.eps, stochastic=self.stochastic)

    def label(self, attack: AttackSpec) -> str:
        return attack.label(eps=self.eps, stochastic=self.stochastic)


def _shared(compute: "Callable[[AuditContext], T]") -> "cached_property[T]":
    """A property that is computed once, and kept on disk where finished checks are."""
    kind: type[T] = compute.__annotations__["return"]

    def get(ctx: "AuditContext") -> T:
        make = partial(compute, ctx)
        return make() if ctx.partial is None else ctx.partial.shared(compute.__name__, kind, make)

    return cached_property(get)


@dataclass(kw_only=True, eq=False)
class AuditContext(AuditTask):
    """The task, and what was measured for it. Nothing is computed before a check needs it, and nothing twice."""

    on_progress: Callable[[str], None]
    """Called with what is computed now, in a few words."""
    on_step: OnStep | None = None
    """Called with the steps of those attacks that report them at no cost, to show that they advance."""
    partial: Partial | None = None
    found: list[Points] = field(default_factory=list, init=False)
    """What the current check found: the lowest accuracy of all is reported with the others."""

    def deterministic(self, model: nn.Module) -> "AuditContext":
        """The same for a deterministic variant of the model, under the white-box attacks."""
        return replace(
            self,
            model=model,
            attacks=self.white,
            draws=1,
            stochastic=False,
            source_models={},
            surrogate=None,
            partial=None,
        )

    # --- what several checks look at -------------------------------------------------------------------------

    @_shared
    def clean(self) -> Points:
        return self.score(self.x, "clean")

    @_shared
    def path(self) -> Trace:
        """The path of the primary attack."""

        def of_batch(first: int) -> Trace:
            batch = self.x[first : first + self.batch_size], self.y[first : first + self.batch_size]
            run = partial(self._attacked, self.primary_attack, ("path",), first, len(self.x), *batch)
            return trace(len(batch[0]), run).to("cpu")

        parts = shared_out("the path", [partial(of_batch, first) for first, _, _ in self.batches()])
        return joined_traces(parts).to(self.x.device)

    @_shared
    def white_box(self) -> Points:
        """The worst that the white-box audited attacks reach: the robust accuracy under audit."""
        self.on_progress("the evaluation itself")
        first = self.clean.worse_of(self.score(self.path.x_adv, "returned"))
        return self.cascade([a for a in self.white if a is not self.primary_attack], first, "base")

    @property
    def attacked(self) -> bool:
        """Whether any check needed `white_box`."""
        return "white_box" in vars(self) or (self.partial is not None and self.partial.has("white_box"))

    @_shared
    def unbounded(self) -> Points:
        """The worst that the audited attacks reach without a bound."""
        points = self.clean
        for attack in self.white:
            points = points.worse_of(self.on_remaining(attack, points, "unconstrained", eps=self.widest))
        return points

    # --- points ----------------------------------------------------------------------------------------------

    def points(
        self,
        attack: AttackSpec,
        *names: str | int,
        rows: Tensor | None = None,
        through: nn.Module | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """x_adv [r, c, h, w] of the images numbered `rows` (default: all). Each batch is attacked by one process.

        Args:
            names: of the random stream.
            through: the model that the attack sees, already a folded model; default: `self.search`.
        """
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])

        def of_batch(first: int) -> Tensor:
            part = slice(first, first + self.batch_size)
            x_adv = self._attacked(attack, names, first, len(x), x[part], y[part], through=through, eps=eps)
            return x_adv.cpu()

        firsts = range(0, len(x), self.batch_size)
        found = shared_out(f"{self.label(attack)} {names}", [partial(of_batch, first) for first in firsts])
        return torch.cat(found).to(x.device) if found else x

    def _attacked(
        self,
        attack: AttackSpec,
        names: tuple[str | int, ...],
        first: int,
        images: int,
        x: Tensor,
        y: Tensor,
        on_step: OnStep | None = None,
        *,
        through: nn.Module | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """x_adv of the batch from image `first` of so many. `on_step` is called with every iterate, also by attacks
        that it costs passes."""
        self.on_progress(f"{self.label(attack)}, image {first + len(x)} of {images}")
        x_adv = attack.run(
            through or self.search,
            x,
            y,
            eps=eps or self.eps,
            norm=self.norm,
            stochastic=self.stochastic,
            seed=derive_seed(self.seed, "search", self.label(attack), *names, first),
            source_models=dict(self.source_models),
            on_step=self.on_step if on_step is None else on_step,
            on_step_always=on_step is not None,
        )
        return check_result(x_adv, x, eps=eps or self.eps, norm=self.norm)

    def cascade(
        self, attacks: Sequence[AttackSpec], start: Points, *names: str | int, through: nn.Module | None = None
    ) -> Points:
        """Attacks one after the other, each on the images that neither `start` nor those before it broke."""
        points = start
        for attack in attacks:
            points = points.worse_of(self.on_remaining(attack, points, *names, through=through))
        self.found.append(points)
        return points

    def on_remaining(
        self,
        attack: AttackSpec,
        points: Points,
        *names: str | int,
        through: nn.Module | None = None,
        eps: float | None = None,
    ) -> Points:
        """The attack's points for the images that `points` do not break in every draw; the others' as they are."""
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

    def wrong(
        self, x_adv: Tensor, *names: str | int, rows: Tensor | None = None, model: nn.Module | None = None
    ) -> Float[np.ndarray, " r"]:
        """Share of draws in which the audited model (or `model`) misclassifies each point."""
        y = self.y if rows is None else self.y[rows]
        if not len(y):
            return np.zeros(0)
        seed = derive_seed(self.seed, "scoring", *names)

        def scored() -> Float[np.ndarray, " r"]:
            found = predict_draws(model or self.model, x_adv, draws=self.draws, seed=seed, batch_size=self.batch_size)
            return (found != y).double().mean(0).cpu().numpy()

        # What is attacked next follows from these figures, so that they must be equal on all processes.
        return current().from_first(scored)

    def score(self, x_adv: Tensor, *names: str | int) -> Points:
        """Points of all images, with their selection and scoring draws."""
        return Points(x_adv, self.wrong(x_adv, "selection", *names), self.wrong(x_adv, *names))

    def accuracy(self, points: Points | Float[np.ndarray, " n"]) -> Interval:
        """Expected accuracy, of points or of shares of wrong draws."""
        wrong = points.wrong if isinstance(points, Points) else points
        return bootstrap_mean(1 - wrong, resamples=RESAMPLES, seed=self.seed)

    def gain(self, before: Points, after: Points) -> Interval:
        """By how much the accuracy falls, image by image."""
        return bootstrap_mean(after.wrong - before.wrong, resamples=RESAMPLES, seed=self.seed)

    def mitigated(self, finding: Finding, mitigation: str, after: Points) -> Finding:
        """The finding with the accuracy that a mitigation leaves, in its reason, its details and `invalidates`."""
        before, now, gain = self.accuracy(self.white_box), self.accuracy(after), self.gain(self.white_box, after)
        accuracies = {"how": mitigation, "before": before.as_accuracy(), "after": now.as_accuracy()}
        return replace(
            finding,
            reason=f"{finding.reason}; with {mitigation} the accuracy is {now.mean:.1%}, not {before.mean:.1%}",
            invalidates=finding.invalidates or (gain.mean > GREATLY and gain.low > 0),
            details=(finding.details or {}) | {"mitigation": accuracies},
        )

    def broken_beyond_noise(self, before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"]) -> np.ndarray:
        """[n] whether a point is misclassified by most draws where another was not, beyond the noise of the draws."""
        # The standard deviation of the difference of two shares is at most √(1/2m).
        margin = 3 * (0.5 / self.draws) ** 0.5 if self.draws > 1 else 0.5
        return (after > 0.5) & (before <= 0.5) & (after - before > margin)


def fold_quietly(model: nn.Module) -> nn.Module:
    """A folded model, without the warning that a network cannot be folded: an audit folds it many times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fold(model)


def several(count: int, what: str) -> str:
    """`1 image`, `3 images`."""
    return f"{count} {what}" if count != 1 else f"1 {what.removesuffix('s')}"
