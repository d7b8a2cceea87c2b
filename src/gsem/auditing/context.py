"""What the checks share: the model, its images, the audited attacks, and their points and accuracies."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsem.attacks import Step
from gsem.attacks._checks import check_result
from gsem.attacks._types import Norm, OnStep
from gsem.attacks.suite import REPAIRS, AttackSpec
from gsem.auditing.check import NOT_THE_MODELS_FAULT, SLIGHTLY, Figures, Finding, Needs
from gsem.auditing.partial import Finished, Partial
from gsem.auditing.shares import Shares, lowest
from gsem.distributed import current
from gsem.evaluation.statistics import Interval, bootstrap_mean
from gsem.evaluation.work import shared_out
from gsem.nn.contract import NoGradient, check_gradient
from gsem.nn.folded import fold
from gsem.nn.predict import predict_draws
from gsem.rng import derive_seed

T = TypeVar("T")
RESAMPLES = 2000
WHITE_BOX = ("apgd", "pgd", "cw", "fgsm", "fab")
PRIMARY = ("apgd", "pgd", "cw", "fgsm")
BLACK_BOX = ("square", "rays", "transfer")
EFFORT = ("steps", "queries", "eot", "restarts")  # options of attacks


@dataclass(frozen=True)
class Points:
    """A point of each image, how often the model gets it wrong, and what found it. See `Shares`."""

    x_adv: Float[Tensor, "n c h w"]
    selection: Float[np.ndarray, " n"]
    wrong: Float[np.ndarray, " n"]
    by: np.ndarray

    def worse_of(self, other: "Points") -> "Points":
        """Per image the point that more selection draws get wrong."""
        pick = other.selection > self.selection
        rows = torch.from_numpy(pick).to(self.x_adv.device)[:, None, None, None]
        worst = self.shares.worse_of(other.shares)
        return Points(torch.where(rows, other.x_adv, self.x_adv), worst.selection, worst.wrong, worst.by)

    @property
    def shares(self) -> Shares:
        return Shares(self.selection, self.wrong, self.by)


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
        self.folded = fold_quietly(self.model)
        # What the attacks differentiate: the folded model, unless the caller attacks through another network.
        self.search = self.folded if self.surrogate is None else fold_quietly(self.surrogate)
        self.no_gradient = _without_gradient(self.search, self.x)
        white = [a for a in self.attacks if a.bounded and a.name in WHITE_BOX]
        self.white = white if self.no_gradient is None else []
        """The audited attacks that follow the gradient; none where there is no gradient."""
        self.black = [a for a in self.attacks if a.bounded and a.name in BLACK_BOX]
        self.networks: dict[tuple, nn.Module] = {}

    def lacks(self, needs: Needs | None) -> str | None:
        """Why a check with these needs does not apply; None where it does."""
        if needs is not None and self.no_gradient is not None:
            return f"the model has no gradient that an attack could follow ({self.no_gradient})"
        if needs == "path" and not any(a.name in PRIMARY for a in self.white):
            return f"none of the audited attacks is one of {', '.join(PRIMARY)}, whose path could be looked at"
        return None

    @property
    def primary_attack(self) -> AttackSpec:
        """The attack whose path is looked at, and whose effort is changed; a black-box attack where there is none."""
        return next((a for a in self.white if a.name in PRIMARY), self.black_box[0])

    @property
    def black_box(self) -> list[AttackSpec]:
        """The black-box attacks: the audited ones, or else Square, RayS and, with source models, transfer."""
        if self.black:
            return self.black
        eot = {"eot": min(3, self._eot)} if self.quick and self.stochastic else {}
        found = [AttackSpec("square", {"queries": 300 if self.quick else 5000} | eot)]
        found.append(AttackSpec("rays", {"queries": 300 if self.quick else 10000} | eot))
        if self.source_models:
            found.append(AttackSpec("transfer", {"steps": 20 if self.quick else 100} | eot))
        return found

    @property
    def _eot(self) -> int:
        """Draws of the first audited attack."""
        return self.options([*self.white, *self.black, AttackSpec("apgd")][0])["eot"]

    @property
    def effort(self) -> dict[str, Any]:
        """Steps, and of a stochastic model draws, of the primary attack, for another attack in its place."""
        options = self.options(self.primary_attack)
        steps = {"steps": options.get("steps", 50 if self.quick else 100)}
        return steps | ({"eot": options["eot"]} if self.stochastic else {})

    @property
    def other_losses(self) -> list[AttackSpec]:
        """APGD on the margin and towards the other classes, which most published evaluations lack, where the audited
        attacks do not have them."""
        if self.no_gradient is not None:
            return []
        eot = {"eot": self._eot} if self.stochastic else {}
        wanted = [AttackSpec("apgd", {"steps": 50 if self.quick else 100, "loss": "margin"} | eot)]
        if self.classes >= 4:  # fewer leave no targeted DLR, and a margin that is the targeted one
            steps, targets = 20 if self.quick else 100, min(9, self.classes - 1)
            few = {"eot": min(3, self._eot)} if self.quick and self.stochastic else eot
            wanted.append(AttackSpec("apgd", {"steps": steps, "targets": targets} | few))
        return [a for a in wanted if not any(self._covers(own, a) for own in self.white)]

    def _covers(self, own: AttackSpec, other: AttackSpec) -> bool:
        """Whether one APGD has the objective of another and no fewer steps."""
        one, two = self.options(own), self.options(other)
        same = ("loss",) if not two["targets"] else ("targets",)
        return own.name == "apgd" and one["steps"] >= two["steps"] and all(one[key] == two[key] for key in same)

    @property
    def repeated(self) -> list[AttackSpec]:
        """The audited attacks that are repeated for other budgets and for known noise: in the quick form without those
        towards several classes, which take longer than all others."""
        return [a for a in self.white if not (self.quick and a.options.get("targets") and a is not self.primary_attack)]

    @property
    def following(self) -> list[AttackSpec]:
        """Attacks that follow the gradient, to be repaired: the audited ones, or else APGD on the usual losses."""
        return self.white or self.other_losses

    @property
    def smoothed(self) -> AttackSpec:
        """APGD on the margin with a gradient averaged over Gaussian offsets of half the radius."""
        std = self.eps / 2 if self.norm == "Linf" else self.eps / 2 / self.x[0].numel() ** 0.5
        return AttackSpec("apgd", self.effort | {"loss": "margin", "smooth": std})

    def network(self, attack: AttackSpec, through: nn.Module | None = None) -> nn.Module:
        """The folded model that an attack sees, with the gradient that its options ask for.

        Args:
            through: the model that it sees otherwise, already a folded model; default: `self.search`.
        """
        repairs = tuple(attack.options.get(option) for option in REPAIRS)
        if not any(repairs):
            return through or self.search
        if repairs not in self.networks:
            # (The layers are the model's, and may be none of a surrogate's.)
            self.networks[repairs] = attack.network(self.folded if repairs[0] else self.search)
        return self.networks[repairs]

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


def _without_gradient(model: nn.Module, x: Tensor) -> str | None:
    """Why no attack can differentiate the model; None where one can. (The gradient may be zero.)"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_gradient(model, x)
    except NOT_THE_MODELS_FAULT:
        raise
    except NoGradient:
        return "no path of autograd leads from the logits to the images"
    except RuntimeError as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


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
    tried: list[tuple[bool, Shares]] = field(default_factory=list, init=False)
    """What the current check tried: whether the attack followed a gradient, and what it left."""
    earlier: list[Finished] = field(default_factory=list, init=False)
    """The checks before the current one, with what they tried."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._black: dict[str, Points] = {}
        self._repaired: dict[tuple, Points] = {}

    def deterministic(self, model: nn.Module) -> "AuditContext":
        """The same for a deterministic variant of the model, under the white-box attacks."""
        return replace(
            self,
            model=model,
            attacks=self.repeated,
            draws=1,
            stochastic=False,
            source_models={},
            surrogate=None,
            partial=None,
        )

    # --- what several checks look at -------------------------------------------------------------------------

    @_shared
    def clean(self) -> Points:
        return self.score(self.x, "clean", by="clean")

    @_shared
    def path(self) -> Trace:
        """The path of the primary attack."""
        return self.traced(self.primary_attack, "path")

    @_shared
    def white_box(self) -> Points:
        """The worst that the audited attacks which follow a gradient reach; the image itself where there are none."""
        self.on_progress("the evaluation itself")
        points = self.clean
        if self.lacks("path") is None:
            points = points.worse_of(self.score(self.path.x_adv, "returned", by=str(self.primary_attack)))
        return self.cascade([a for a in self.white if a is not self.primary_attack], points, "base")

    @property
    def baseline(self) -> Points:
        """What the primary attack with more effort is compared with: `white_box`, or else the black-box attack."""
        return self.white_box if self.white else self.without_gradient(self.primary_attack)

    def without_gradient(self, attack: AttackSpec) -> Points:
        """The worst of `white_box` and a black-box attack."""
        name = f"black-{self.label(attack)}"
        if name not in self._black:
            make = partial(self.on_remaining, attack, self.white_box, "black box")
            self._black[name] = make() if self.partial is None else self.partial.shared(name, Points, make)
        self.record(attack, self._black[name])
        return self._black[name]

    @cached_property
    def claimed(self) -> Points | None:
        """The worst that all audited attacks reach; None where none of them can be run."""
        if not self.white and not self.black:
            return None
        return reduce(Points.worse_of, map(self.without_gradient, self.black), self.white_box)

    def figures(self) -> Figures:
        """The claimed and the lowest accuracy, once all checks are made."""
        claimed = self.claimed
        start = (self.white_box if claimed is None else claimed).shares
        worst = lowest([start, *(part.tried for part in self.earlier if part.tried is not None)])
        # Chosen on selection draws, the merged points may score higher by the noise of the scoring draws.
        if worst.wrong.mean() < start.wrong.mean():
            worst = start
        gap = (
            None
            if claimed is None
            else bootstrap_mean(worst.wrong - claimed.wrong, resamples=RESAMPLES, seed=self.seed)
        )
        claim = None if claimed is None else self.accuracy(claimed)
        return Figures(claim, self.accuracy(worst.wrong), gap, ",".join(_reaching(worst)))

    @property
    def attacked(self) -> bool:
        """Whether any check needed `white_box`."""
        return "white_box" in vars(self) or (self.partial is not None and self.partial.has("white_box"))

    @_shared
    def unbounded(self) -> Points:
        """The worst that the audited attacks reach without a bound."""
        points = self.clean
        for attack in self.white or [self.primary_attack]:
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
            through: see `network`.
        """
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])

        def of_batch(first: int) -> Tensor:
            part = slice(first, first + self.batch_size)
            x_adv = self._attacked(attack, names, first, len(x), x[part], y[part], through=through, eps=eps)
            return x_adv.cpu()

        firsts = range(0, len(x), self.batch_size)
        found = shared_out(f"{self.label(attack)} {names}", [partial(of_batch, first) for first in firsts])
        return torch.cat(found).to(x.device) if found else x

    def traced(self, attack: AttackSpec, *names: str | int, rows: Tensor | None = None) -> Trace:
        """The path of an attack on the images numbered `rows` (default: all; not none). See `points`."""
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])

        def of_batch(first: int) -> Trace:
            batch = x[first : first + self.batch_size], y[first : first + self.batch_size]
            run = partial(self._attacked, attack, names, first, len(x), *batch)
            return trace(len(batch[0]), run).to("cpu")

        firsts = range(0, len(x), self.batch_size)
        parts = shared_out(f"the path of {self.label(attack)}", [partial(of_batch, first) for first in firsts])
        return joined_traces(parts).to(self.x.device)

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
            self.network(attack, through),
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
        self,
        attacks: Sequence[AttackSpec],
        start: Points,
        *names: str | int,
        through: nn.Module | None = None,
        eps: float | None = None,
        skip_known: bool = False,
    ) -> Points:
        """Attacks one after the other, each on the images that neither `start` nor those before it broke.

        Args:
            skip_known: leave out the images that an earlier check has broken, too.
        """
        points = start
        for attack in attacks:
            found = self.on_remaining(attack, points, *names, through=through, eps=eps, skip_known=skip_known)
            points = points.worse_of(found)
        return points

    def on_remaining(
        self,
        attack: AttackSpec,
        points: Points,
        *names: str | int,
        through: nn.Module | None = None,
        eps: float | None = None,
        skip_known: bool = False,
        found: Tensor | None = None,
    ) -> Points:
        """The attack's points for the images that `points` do not break in every draw; the others' as they are.

        Args:
            skip_known: see `remaining`.
            found: the attack's points of these images, where they are known already.
        """
        at = self.remaining(points, skip_known=skip_known)
        if not len(at):
            return points
        rows = torch.from_numpy(at).to(self.x.device)
        x_adv, selection, wrong = points.x_adv.clone(), points.selection.copy(), points.wrong.copy()
        if found is None:
            found = self.points(attack, *names, rows=rows, through=through, eps=eps)
        x_adv[rows] = found
        selection[at] = self.wrong(found, "selection", self.label(attack), *names, rows=rows)
        wrong[at] = self.wrong(found, self.label(attack), *names, rows=rows)
        own = np.isin(np.arange(len(wrong)), at)
        points = Points(x_adv, selection, wrong, np.where(own, str(attack), points.by))
        if eps is None:
            # (What it did not attack counts as right: another record holds it.)
            self.tried.append((attack.follows_gradient, Shares(selection * own, wrong * own, points.by)))
        return points

    def remaining(self, points: Points, *, skip_known: bool = False) -> np.ndarray:
        """Numbers of the images that `points` do not break in every draw; with `skip_known` without those
        that an earlier check has broken."""
        known = self.known if skip_known else None
        return np.flatnonzero((points.selection < 1) & (True if known is None else known.selection < 1))

    def repaired_at(self, points: Points, eps: float) -> Points:
        """The worst of `points`, of all that was found so far, and of repaired and black-box attacks at a wider eps."""
        margin = [] if self.no_gradient else [AttackSpec("apgd", self.effort | {"loss": "margin"})]
        attacks = [*margin, *self.repairs, *self.black_box]
        key = (eps, *map(str, attacks))
        if key not in self._repaired:
            self._repaired[key] = self.cascade(attacks, self.merged(points), "repaired", eps=eps)
        return self._repaired[key]

    # --- what was tried --------------------------------------------------------------------------------------

    def record(self, attack: AttackSpec, points: Points) -> None:
        """Keep what an attack within eps found, for the lowest accuracy of all."""
        self.tried.append((attack.follows_gradient, points.shares))

    @property
    def known(self) -> Shares | None:
        """The worst that earlier checks found; None where they tried nothing."""
        parts = [part.tried for part in self.earlier if part.tried is not None]
        return lowest(parts) if parts else None

    def merged(self, points: Points) -> Points:
        """`points` with the shares of the worst that was found so far; their x_adv stays."""
        found = [points.shares, *([] if self.known is None else [self.known]), *(shares for _, shares in self.tried)]
        return replace(points, **vars(lowest(found)))

    @property
    def known_by_gradient(self) -> Shares:
        """The worst that audited and repaired attacks which follow a gradient found so far."""
        return lowest([self.white_box.shares, *(p.by_gradient for p in self.earlier if p.by_gradient is not None)])

    @property
    def repairs(self) -> list[AttackSpec]:
        """The repaired attacks of earlier checks that follow a gradient."""
        mitigations = ((part.check.details or {}).get("mitigation", {}) for part in self.earlier)
        texts = dict.fromkeys(text for each in mitigations for text in each.get("attacks", ()))
        return [a for a in map(AttackSpec.parse, texts) if a.follows_gradient]

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

    def score(self, x_adv: Tensor, *names: str | int, by: str) -> Points:
        """Points of all images, with their selection and scoring draws."""
        selection, wrong = self.wrong(x_adv, "selection", *names), self.wrong(x_adv, *names)
        return Points(x_adv, selection, wrong, np.full(len(x_adv), by))

    def accuracy(self, points: Points | Float[np.ndarray, " n"]) -> Interval:
        """Expected accuracy, of points or of shares of wrong draws."""
        wrong = points.wrong if isinstance(points, Points) else points
        return bootstrap_mean(1 - wrong, resamples=RESAMPLES, seed=self.seed)

    def gain(self, before: Points, after: Points) -> Interval:
        """By how much the accuracy falls, image by image."""
        return bootstrap_mean(after.wrong - before.wrong, resamples=RESAMPLES, seed=self.seed)

    def mitigated(
        self,
        finding: Finding,
        mitigation: str,
        attacks: Sequence[AttackSpec],
        after: Points,
        *,
        again: float | None,
        answered: bool,
    ) -> Finding:
        """The finding with the accuracy that repaired attacks leave, and what the check finds of them.

        Args:
            mitigation: the repair in words.
            after: the worst of the audited and the repaired attacks; what earlier checks found is merged here.
            again: the check's figure for the repaired attacks.
            answered: whether the check passes with it.
        """
        known = self.known
        merged = after.shares if known is None else lowest([after.shares, known])
        before, now = self.accuracy(self.white_box), self.accuracy(merged.wrong)
        figure = "" if again is None else f" ({again:.3f})"
        same = f"{now.mean:.1%}" == f"{before.mean:.1%}"
        change = f"stays {now.mean:.1%}" if same else f"is {now.mean:.1%}, not {before.mean:.1%}"
        outcome = f"passes{figure}" if answered else f"is flagged again{figure}"
        return replace(
            finding,
            reason=f"{finding.reason}; with {mitigation} the accuracy {change}, and the check {outcome}",
            again=again,
            answered=answered,
            details=(finding.details or {})
            | {
                "mitigation": {
                    "how": mitigation,
                    "attacks": [str(a) for a in attacks],
                    "before": before.as_accuracy(),
                    "after": now.as_accuracy(),
                }
            },
        )

    def broken_beyond_noise(self, before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"]) -> np.ndarray:
        """[n] whether a point is misclassified by most draws where another was not, beyond the noise of the draws."""
        # The standard deviation of the difference of two shares is at most √(1/2m).
        margin = 3 * (0.5 / self.draws) ** 0.5 if self.draws > 1 else 0.5
        return (after > 0.5) & (before <= 0.5) & (after - before > margin)


def _reaching(worst: Shares) -> list[str]:
    """The attacks that found these points: of those that differ in effort only the one with the most, and without those
    whose share in it is below what counts as lower."""
    shares: dict[tuple, float] = {}
    strongest: dict[tuple, AttackSpec] = {}
    for by in sorted(set(worst.by.tolist()) - {"clean"}):
        attack = AttackSpec.parse(by)
        kind = (attack.name, *((key, v) for key, v in sorted(attack.options.items()) if key not in EFFORT))
        shares[kind] = shares.get(kind, 0.0) + float(worst.wrong[worst.by == by].sum())
        strongest[kind] = max(strongest.get(kind, attack), attack, key=_effort)
    kept, missing = [], sum(shares.values())
    for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
        if missing <= SLIGHTLY * len(worst.by):
            break
        kept.append(str(strongest[kind]))
        missing -= share
    return kept or ["clean"]


def _effort(attack: AttackSpec) -> float:
    return math.prod(attack.options.get(key, attack.known.get(key, 1)) for key in EFFORT)


def fold_quietly(model: nn.Module) -> nn.Module:
    """A folded model, without the warning that a network cannot be folded: an audit folds it many times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fold(model)


def several(count: int, what: str) -> str:
    """`1 image`, `3 images`."""
    return f"{count} {what}" if count != 1 else f"1 {what.removesuffix('s')}"
