"""The model's noise: is the model stochastic, and does its robustness remain when the noise is known?"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsem.attacks import pgd
from gsem.attacks.suite import EOT
from gsem.auditing.check import Finding, check
from gsem.auditing.context import AuditContext, Points
from gsem.evaluation.work import shared_out
from gsem.nn.gsem import GSeM, NoiseMode
from gsem.nn.gsem import noise as noise_of
from gsem.rng import derive_seed, seeded

VANISHED = 0.5
QUICK_EOT = 5


@check(
    name="randomness",
    question="Do two passes give the same logits?",
    threshold="outputs differ, and an attack does not average over draws",
    reference="Athalye et al., ICML 2018, section 4.2 (EOT)",
)
def randomness(ctx: AuditContext) -> Finding:
    """Repeated forward passes; with torch's random state put back, too."""
    x = ctx.x[: ctx.batch_size]
    with torch.no_grad(), seeded(derive_seed(ctx.seed, "randomness"), x.device):
        one, other = ctx.model(x), ctx.model(x)
        flips = float((one.argmax(1) != other.argmax(1)).double().mean())
        differ = float((one != other).any(1).double().mean())
    with torch.no_grad():
        fixed = []
        for _ in range(2):
            with seeded(derive_seed(ctx.seed, "randomness", "again"), x.device):
                fixed.append(ctx.model(x))
    details = {"class_flips": flips, "repeatable": torch.equal(*fixed), "stochastic": ctx.stochastic}
    if not ctx.stochastic:
        reason = "two passes over the same images give the same logits: one draw is used"
        return Finding(differ, "pass", reason, details=details)
    reason = (
        f"the logits of {differ:.1%} of the images differ between two passes, the class of {flips:.1%}: "
        f"attacks average over draws, and each point is scored on {ctx.draws}"
    )
    if not details["repeatable"]:
        reason += "; a seed of torch does not repeat them"
        advice = "Draw the noise from torch's own random stream: checks that need the same noise twice are inexact now."
        return Finding(differ, "inconclusive", reason, advice, details=details)
    single = [ctx.label(a) for a in ctx.white if ctx.options(a).get("eot", 1) == 1]
    if single:
        reason += f"; but {', '.join(single)} use one draw"
        finding = Finding(differ, "flag", reason, "Give the attacks eot=20 (EOT).", details=details)
        draws = QUICK_EOT if ctx.quick else EOT
        averaging = [replace(a, options=a.options | {"eot": draws}) for a in ctx.white if ctx.label(a) in single]
        after = ctx.cascade(averaging, ctx.white_box, "averaging")
        how = f"{draws} draws for every gradient, loss and decision"
        return ctx.mitigated(finding, how, averaging, after, again=None, answered=True)
    return Finding(differ, "pass", reason, details=details)


@check(
    name="noise",
    question="Does robustness remain when the noise is known?",
    threshold=f"under {VANISHED:.2f} of it left",
    reference="Athalye et al., ICML 2018, section 4.2; this project's ablation",
    needs="path",
)
def ablation(ctx: AuditContext) -> Finding:
    """The same weights with the noise known, without it, and without the quantiser."""
    variants = _variants(ctx)
    if not variants:
        return Finding(None, "pass", "the model has neither noise nor a quantiser that could be taken away")
    fresh = _robustness(ctx.clean, ctx.white_box)
    details: dict[str, Any] = {"fresh": _row(ctx, ctx.clean, ctx.white_box)}
    remaining: dict[str, float] = {}
    for name, words, measure in variants:
        ctx.on_progress(words)
        clean, worst = measure()
        details[name] = _row(ctx, clean, worst)
        # Without the quantiser it is another network: its accuracy is reported, and nothing is flagged for it.
        if name != "quantiser":
            remaining[words] = _robustness(clean, worst) / max(fresh, 1e-12)
    words, figure = min(remaining.items(), key=lambda item: item[1], default=("", 1.0))
    attacked = ", ".join(f"{name} {row['attacked']['accuracy']:.1%}" for name, row in details.items())
    reason = f"accuracy under attack: {attacked}"
    if fresh < 0.02:
        return Finding(None, "pass", f"{reason}: there is no robustness that could vanish", details=details)
    if figure >= VANISHED:
        return Finding(figure, "pass", reason, details=details)
    reason += f": with {words}, {figure:.1%} of the robustness is left"
    advice = "The noise makes the model robust, not the network: report the accuracy with the noise known beside it."
    return Finding(figure, "flag", reason, advice, details=details)


def _robustness(clean: Points, worst: Points) -> float:
    """Accuracy under attack as a share of that without."""
    return float((1 - worst.wrong).mean() / max((1 - clean.wrong).mean(), 1e-12))


def _row(ctx: AuditContext, clean: Points, worst: Points) -> dict[str, Any]:
    return {"clean": ctx.accuracy(clean).as_accuracy(), "attacked": ctx.accuracy(worst).as_accuracy()}


Measure = Callable[[], tuple[Points, Points]]
"""Clean points and the worst points of a changed model."""


def _variants(ctx: AuditContext) -> list[tuple[str, str, Measure]]:
    """(name, in words, how it is measured) of each way to take the noise away, as far as the model has any."""
    seed = derive_seed(ctx.seed, "known noise")
    if not any(isinstance(module, GSeM) for module in ctx.model.modules()):
        reseeded = partial(_measure_reseeded, ctx, seed)
        return [("frozen", "noise frozen by a known seed", reseeded)] if ctx.stochastic else []
    bare = copy.deepcopy(ctx.model)
    for module in bare.modules():
        if isinstance(module, GSeM):
            module.quantiser = False
    found: list[tuple[str, str, Measure]] = []
    if ctx.stochastic:
        found.append(("frozen", "the noise frozen by a known seed", partial(_measure, ctx, ctx.model, "frozen", seed)))
        found.append(("off", "the noise off", partial(_measure, ctx, ctx.model, "off")))
    return [*found, ("quantiser", "noise and quantiser off", partial(_measure, ctx, bare, "off"))]


def _measure(ctx: AuditContext, model: nn.Module, mode: NoiseMode, seed: int | None = None) -> tuple[Points, Points]:
    with noise_of(model, mode, seed=seed):
        known = ctx.deterministic(model)
        return known.clean, known.white_box


class _Reseeded(nn.Module):
    """A model whose noise is known, whatever draws it: torch's stream starts at the same seed for every pass.

    What the noise is for an image depends on the image's place in the batch, so that batches must stay as they are.
    """

    def __init__(self, model: nn.Module, seed: int):
        super().__init__()
        self.model, self.seed = model, seed
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        with seeded(self.seed, x.device):
            return self.model(x)


def _measure_reseeded(ctx: AuditContext, seed: int) -> tuple[Points, Points]:
    """The accuracy of a model whose noise is not GSeM's, under PGD with the noise frozen."""
    known = _Reseeded(ctx.model, seed)
    step, steps = ctx.eps / 4, ctx.options(ctx.primary_attack).get("steps", 20)

    def of_batch(x: Tensor, y: Tensor) -> list[np.ndarray]:
        x_adv = pgd(known, x, y, eps=ctx.eps, step=step, steps=steps, norm=ctx.norm, stop_broken=False, seed=ctx.seed)
        with torch.no_grad():
            return [(known(at).argmax(1) != y).double().cpu().numpy() for at in (x, x_adv)]

    found = shared_out("known noise", [partial(of_batch, x, y) for _, x, y in ctx.batches()])
    clean, wrong = (np.concatenate(each) for each in zip(*found, strict=True))
    by = np.full(len(clean), "pgd")
    return Points(ctx.x, clean, clean, by), Points(ctx.x, wrong, np.maximum(clean, wrong), by)
