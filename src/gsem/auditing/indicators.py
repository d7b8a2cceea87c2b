"""The six Indicators of Attack Failure (Pintor et al., NeurIPS 2022), all on draw-averaged quantities."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsem.attacks._checks import resolve_loss
from gsem.attacks._core import expected, expected_gradient, random_start
from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Finding, check
from gsem.auditing.context import AuditContext, Points, Trace, several
from gsem.losses import margin
from gsem.nn.surrogate import OFFSETS
from gsem.rng import derive_seed, generator, seeded

UNSTABLE, UNFINISHED = 0.10, 0.05
RADIUS = 8 / 255
ENOUGH = 100  # steps of a repaired attack, at least
LAST = 10  # steps, at whose beginning an attack should have been done
PAPER = "Pintor et al., NeurIPS 2022, indicator "

_SATURATED = "Attack with loss=margin or loss=dlr, which have no softmax, or divide the logits by a constant."
_UNAVAILABLE = (
    "Attack the logits with loss=margin or loss=dlr; if the gradient stays zero, the check gradient names the layer "
    "that blocks it, and gsem.straight_through passes that layer."
)


@check(
    name="unavailable",
    question="Is there a gradient for every image?",
    threshold="any image without one",
    reference=PAPER + "1",
)
def unavailable(ctx: AuditContext) -> Finding:
    """1: no gradient, or one that is zero in all of an image."""
    if ctx.no_gradient is not None:
        finding = Finding(1.0, "flag", f"differentiating the model fails: {ctx.no_gradient}", _UNAVAILABLE)
        return _without_any(ctx, finding, ctx.white_box, 1.0)
    named = ctx.options(ctx.primary_attack).get("loss", "margin")
    zero, by_loss = _without_gradient(ctx, named)
    count, share = int(zero.sum()), float(zero.mean())
    reason = f"{several(count, 'images')} of {len(zero)} have a gradient of zero"
    details: dict[str, Any] = {"images": np.flatnonzero(zero).tolist()}
    if not count:
        return Finding(share, "pass", reason, details=details)
    advice = _UNAVAILABLE
    if named == "ce" and by_loss > count / 2:
        # The logits have a gradient: no layer is to blame.
        advice = _SATURATED
        details["where"] = "the softmax of the loss"
        reason += f", and in {by_loss} of them the margin of the logits has one: it vanishes in the loss's softmax, "
        reason += f"because the logits are large (the highest leads by {_logit_gap(ctx):.0f}), and in no layer"
    finding = Finding(share, "flag", reason, advice, details=details)
    # Other losses do not saturate where the cross-entropy does, and an earlier check may have passed a layer.
    attacks = [AttackSpec("apgd", ctx.effort | {"loss": "margin"}), *(a for a in ctx.repairs if "through" in a.options)]
    after = ctx.cascade(attacks, ctx.white_box, "margin", skip_known=True)
    shares = [float(_without_gradient(ctx, "margin", ctx.network(attack))[0].mean()) for attack in attacks]
    again, attack = min(zip(shares, attacks, strict=True), key=lambda each: each[0])
    if again > 0:
        return _without_any(ctx, finding, after, again)
    how = "the margin as the loss" if attack is attacks[0] else f"the gradient through {attack.options['through']}"
    return ctx.mitigated(finding, how, attacks, after, again=again, answered=True)


def _without_any(ctx: AuditContext, finding: Finding, after: Points, again: float) -> Finding:
    """The flag of a model whose gradient nothing repairs: attacked by black-box attacks, and not answered."""
    for attack in ctx.black_box:
        after = after.worse_of(ctx.without_gradient(attack))
    how = "black-box attacks, which need no gradient,"
    return ctx.mitigated(finding, how, ctx.black_box, after, again=again, answered=False)


def _without_gradient(ctx: AuditContext, loss: str, network: nn.Module | None = None) -> tuple[np.ndarray, int]:
    """[n] whether the loss has no gradient where an attack starts; in how many of these the margin has one.

    Args:
        network: the folded model that the attack sees; default: `ctx.search`.
    """
    network = network or ctx.search
    zero, by_loss = np.zeros(len(ctx.x), dtype=bool), 0
    eot = ctx.options(ctx.primary_attack)["eot"]
    for first, x, y in ctx.batches():
        seed = derive_seed(ctx.seed, "unavailable", first)
        start = random_start(x, ctx.eps, ctx.norm, generator(seed, "start", device=x.device))
        with seeded(seed, x.device):
            _, _, grad = expected_gradient(network, start, y, resolve_loss(loss), eot)
        none = (grad == 0).flatten(1).all(1)
        zero[first : first + len(x)] = found = none.cpu().numpy()
        if found.any():
            with seeded(seed, x.device):
                _, _, other = expected_gradient(network, start[none], y[none], margin, eot)
            by_loss += int((other != 0).flatten(1).any(1).sum())
    return zero, by_loss


@torch.no_grad()
def _logit_gap(ctx: AuditContext) -> float:
    """Median difference of the two highest logits."""
    with seeded(derive_seed(ctx.seed, "lead"), ctx.x.device):
        highest = ctx.model(ctx.x[: ctx.batch_size]).topk(2, dim=1).values
    return float((highest[:, 0] - highest[:, 1]).median())


@check(
    name="unstable",
    question="Is the loss nearly constant within a few grey levels?",
    threshold=f"over {UNSTABLE:.2f}",
    reference=PAPER + "2",
    needs="gradient",
)
def unstable(ctx: AuditContext) -> Finding:
    """2: a loss that changes much within a few grey levels, so that a gradient does not predict a step."""
    total = _changes(ctx, ctx.search, samples=100)
    figure = float(total.mean())
    reason = f"the margin changes by {figure:.1%} of its value, on average, within 4/255"
    details = {"per_image": [float(v) for v in total], "draws": ctx.few_draws, "radius": RADIUS}
    if figure <= UNSTABLE:
        return Finding(figure, "pass", reason, details=details)
    attacks = [ctx.smoothed, AttackSpec("square", {"queries": 500 if ctx.quick else 5000})]
    after = ctx.cascade(attacks, ctx.white_box, "unstable", skip_known=True)
    again = float(_changes(ctx, Smoothed(ctx.search, ctx.smoothed.options["smooth"]), samples=20).mean())
    advice = "Average the gradient over points around each iterate (smooth=STD), and over more draws; add Square."
    finding = Finding(figure, "flag", reason, advice, details=details)
    how = "a gradient averaged over Gaussian offsets, and Square, which needs none,"
    return ctx.mitigated(finding, how, attacks, after, again=again, answered=again <= UNSTABLE)


def _changes(ctx: AuditContext, network: nn.Module, *, samples: int) -> np.ndarray:
    """[n] relative change of the margin within a few grey levels, averaged over random points."""
    total = np.zeros(len(ctx.x))
    for first, x, y in ctx.batches():
        rng = generator(ctx.seed, "unstable", first, device=x.device)
        ctx.on_progress(f"the loss around {several(len(x), 'images')}")

        def loss(x: torch.Tensor, y: torch.Tensor = y, first: int = first) -> torch.Tensor:
            with seeded(derive_seed(ctx.seed, "unstable", "draws", first), x.device), torch.no_grad():
                return expected(network, x, y, margin, ctx.few_draws)[0]

        middle, changes = loss(x), []
        for _ in range(samples):
            offset = (torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype) - 0.5) * RADIUS
            change = (loss((x + offset).clamp(0, 1)) - middle).abs() / middle.abs().clamp_min(1e-12)
            changes.append(change.clamp_max(1))
        for change in torch.stack(changes).cpu().numpy():  # (one copy from the device a batch)
            total[first : first + len(x)] += change / samples
    return total


class Smoothed(nn.Module):
    """A model whose logits are averaged over Gaussian offsets of the image: what a smoothed gradient is that of."""

    def __init__(self, model: nn.Module, std: float):
        super().__init__()
        self.model, self.std = model, std
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        # (The same offsets at every point, as for the noise of a stochastic model.)
        return torch.stack([self.model(x + self.std * torch.randn_like(x)) for _ in range(OFFSETS)]).mean(0)


@check(
    name="silent_success",
    question="Does the attack return the worst point it found?",
    threshold="any image lost",
    reference=PAPER + "3",
    needs="path",
)
def silent_success(ctx: AuditContext) -> Finding:
    """3: the attack passed through a point that breaks the image, and returned one that does not."""
    primary = ctx.primary_attack
    keeps = replace(primary, options=primary.options | {"keep": "best"}) if "keep" in primary.known else primary
    returned = ctx.score(ctx.path.x_adv, "returned", by=str(primary))
    best = ctx.score(ctx.path.best, "best", by=str(keeps))
    lost = ctx.broken_beyond_noise(returned.wrong, best.wrong)
    figure, details = float(lost.mean()), {"images": np.flatnonzero(lost).tolist()}
    reason = (
        f"{ctx.label(ctx.primary_attack)} passed a point that breaks {several(int(lost.sum()), 'images')} of "
        f"{len(lost)}, and returned one that does not"
    )
    if not lost.any():
        return Finding(figure, "pass", reason, details=details)
    after = ctx.white_box.worse_of(best)
    ctx.record(keeps, after)
    again = float(ctx.broken_beyond_noise(after.wrong, best.wrong).mean())
    finding = Finding(figure, "flag", reason, "Keep the best point of the path (keep=best).", details=details)
    how = "the best point of the path"
    return ctx.mitigated(finding, how, [keeps], after, again=again, answered=again == 0)


@check(
    name="incomplete",
    question="Had the attack converged when it ended?",
    threshold=f"over {UNFINISHED:.2f}",
    reference=PAPER + "4",
    needs="path",
)
def incomplete(ctx: AuditContext) -> Finding:
    """4: the loss still rises when the attack ends."""
    primary, options = ctx.primary_attack, ctx.options(ctx.primary_attack)
    figure, curve, images = progress_at_end(ctx.path)
    reason = (
        f"{figure:.1%} of the loss gained by {ctx.label(primary)} came in its last {LAST} steps, on average over "
        f"{several(images, 'images')} that it did not break"
    )
    if figure <= UNFINISHED:
        return Finding(figure, "pass", reason, details={"curve": curve})
    steps = options.get("steps", 1)
    settings = {key: primary.options[key] for key in ("loss", "targets", "eot") if key in primary.options}
    more = AttackSpec("apgd", {"steps": max(5 * steps, ENOUGH)} | settings)
    after, again = ctx.white_box, 0.0
    if len(at := ctx.remaining(after, skip_known=True)):
        followed = ctx.traced(more, "more steps", rows=torch.from_numpy(at).to(ctx.x.device))
        after = after.worse_of(ctx.on_remaining(more, after, "more steps", skip_known=True, found=followed.x_adv))
        again = progress_at_end(followed)[0]
    advice = f"Give the attack more steps than {steps}; apgd finds its own step size."
    finding = Finding(figure, "flag", reason, advice, details={"curve": curve})
    how = f"{more.options['steps']} steps of APGD"
    return ctx.mitigated(finding, how, [more], after, again=again, answered=again <= UNFINISHED)


def progress_at_end(path: Trace) -> tuple[float, list[float], int]:
    """Share of the gained loss that came in the last steps; the mean running best, rescaled to [0, 1]; images.

    Only images that the search never broke in every draw count: the attack stops at the others when it succeeds.
    """
    loss = path.loss[path.broken < 1]
    if loss.size:
        # (A restart continues the path of the attack before it: one path of as many steps again.)
        loss = loss[np.isfinite(loss[:, 0])]
    if not loss.size:
        return 0.0, [], 0
    best = np.maximum.accumulate(np.where(np.isnan(loss), -np.inf, loss), axis=1)
    span = best[:, -1] - best[:, 0]
    scaled = (best - best[:, :1]) / np.where(span > 0, span, 1)[:, None]
    scaled[span <= 0] = 1.0
    at = max(0, scaled.shape[1] - 1 - LAST)
    return float((scaled[:, -1] - scaled[:, at]).mean()), [float(v) for v in scaled.mean(0)], len(loss)


@check(
    name="transfer",
    question="Does what breaks the attacked copy break the model?",
    threshold="any image",
    reference=PAPER + "5",
    needs="path",
)
def transfer_failure(ctx: AuditContext) -> Finding:
    """5: the points break the network that the attack saw, and not the model that is scored."""
    on_copy = ctx.wrong(ctx.path.x_adv, "surrogate", model=ctx.search)
    lost = ctx.broken_beyond_noise(ctx.wrong(ctx.path.x_adv, "returned"), on_copy)
    figure, details = float(lost.mean()), {"images": np.flatnonzero(lost).tolist()}
    copy = "the folded model" if ctx.surrogate is None else "the surrogate"
    reason = f"{several(int(lost.sum()), 'images')} of {len(lost)} are broken on {copy} and not on the model"
    if not lost.any():
        return Finding(figure, "pass", reason, details=details)
    after = ctx.cascade(ctx.white, ctx.white_box, "directly", through=ctx.folded, skip_known=True)
    on_folded = ctx.wrong(after.x_adv, "directly", model=ctx.folded)
    again = float(ctx.broken_beyond_noise(ctx.wrong(after.x_adv, "again"), on_folded).mean())
    advice = "Attack the model itself, or a surrogate whose predictions are the model's."
    finding = Finding(figure, "flag", reason, advice, details=details)
    how = "the model itself, attacked directly"
    return ctx.mitigated(finding, how, ctx.white, after, again=again, answered=again == 0)


@check(
    name="unconstrained",
    question="Does the attack break everything once eps = 1?",
    threshold="any image not broken",
    reference=PAPER + "6",
)
def unconstrained(ctx: AuditContext) -> Finding:
    """6: an attack without a bound must break everything."""
    remaining = ctx.unbounded.wrong <= 0.5
    share, count = float(remaining.mean()), int(remaining.sum())
    reason = f"with eps = {ctx.widest:g}, the attacks do not break {several(count, 'images')} of {len(remaining)}"
    details = {"images": np.flatnonzero(remaining).tolist()}
    if not count:
        return Finding(share, "pass", reason, details=details)
    advice = "The optimisation fails, not the bound: look at the checks gradient and unavailable first."
    again = float((ctx.repaired_at(ctx.unbounded, ctx.widest).wrong <= 0.5).mean())
    reason += f"; repaired and black-box attacks do not break {again:.1%}"
    return Finding(share, "flag", reason, advice, again=again, answered=again == 0, details=details)
