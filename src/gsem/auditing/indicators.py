"""The six Indicators of Attack Failure (Pintor et al., NeurIPS 2022), all on draw-averaged quantities."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gsem.attacks._checks import resolve_loss
from gsem.attacks._core import expected, expected_gradient, random_start
from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Check
from gsem.auditing.context import GREATLY, AuditContext, Points, percent, several
from gsem.auditing.trace import Trace
from gsem.losses import margin
from gsem.rng import derive_seed, generator, seeded

UNSTABLE, UNFINISHED = 0.10, 0.05
RADIUS = 8 / 255
LAST = 10  # steps, at whose beginning an attack should have been done
SOURCE = "Pintor et al., NeurIPS 2022, indicator "


def unavailable(s: AuditContext) -> Check:
    """1: no gradient, or one that is zero in all of an image."""
    check = Check(
        name="unavailable",
        title="Is there a gradient for every image?",
        figure=None,
        threshold="any image without one",
        outcome="pass",
        reason="",
        advice="",
        reference=SOURCE + "1",
    )
    named = s.options(s.primary_attack).get("loss", "margin")
    loss = resolve_loss(named)
    zero = np.zeros(len(s.x), dtype=bool)
    of_loss = 0  # images whose margin has a gradient, so that the loss is what lost it
    try:
        for first in range(0, len(s.x), s.batch_size):
            x, y = s.x[first : first + s.batch_size], s.y[first : first + s.batch_size]
            seed = derive_seed(s.seed, "unavailable", first)
            start = random_start(x, s.eps, s.norm, generator(seed, "start", device=x.device))
            with seeded(seed, x.device):
                _, _, grad = expected_gradient(s.search, start, y, loss, s.options(s.primary_attack)["eot"])
            none = (grad == 0).flatten(1).all(1)
            zero[first : first + len(x)] = none.cpu().numpy()
            if none.any():
                with seeded(seed, x.device):
                    _, _, other = expected_gradient(
                        s.search, start[none], y[none], margin, s.options(s.primary_attack)["eot"]
                    )
                of_loss += int((other != 0).flatten(1).any(1).sum())
    except RuntimeError as error:  # autograd's: no path from the logits to the images
        reason = f"differentiating the model fails: {str(error).split('.')[0]}"
        return replace(check, figure=1.0, outcome="flag", invalidates=True, reason=reason, advice=_UNAVAILABLE)
    count, share = int(zero.sum()), float(zero.mean())
    reason = f"{several(count, 'images')} of {len(zero)} have a gradient of zero"
    details: dict[str, Any] = {"images": np.flatnonzero(zero).tolist()}
    check = replace(check, figure=share, reason=reason, details=details)
    if not count:
        return check
    advice = _UNAVAILABLE
    if named == "ce" and of_loss > count / 2:
        # The logits have a gradient: no layer is to blame.
        advice = _SATURATED
        details["where"] = "the softmax of the loss"
        reason += f", and in {of_loss} of them the margin of the logits has one: it vanishes in the loss's softmax, "
        reason += f"because the logits are large (the highest leads by {_lead(s):.0f}), and in no layer"
        check = replace(check, reason=reason)
    # Other losses do not saturate where the cross-entropy does.
    after = s.cascade([AttackSpec("apgd", s.effort | {"loss": "margin"})], s.white_box, "margin")
    check = mitigated(s, check, "the margin as the loss", after)
    return replace(check, outcome="flag", invalidates=share > GREATLY, advice=advice)


@torch.no_grad()
def _lead(s: AuditContext) -> float:
    """Median difference of the two highest logits."""
    with seeded(derive_seed(s.seed, "lead"), s.x.device):
        highest = s.model(s.x[: s.batch_size]).topk(2, dim=1).values
    return float((highest[:, 0] - highest[:, 1]).median())


_SATURATED = "Attack with loss=margin or loss=dlr, which have no softmax, or divide the logits by a constant."
_UNAVAILABLE = (
    "Attack the logits with loss=margin or loss=dlr; if the gradient stays zero, the check gradient says where it is "
    "lost, and gsem.straight_through passes a layer."
)


def unstable(s: AuditContext) -> Check:
    """2: a loss that changes much within a few grey levels, so that a gradient tells nothing about a step."""
    draws = min(s.draws, 2 if s.quick else 5)
    total = np.zeros(len(s.x))
    samples = 100
    for first in range(0, len(s.x), s.batch_size):
        x, y = s.x[first : first + s.batch_size], s.y[first : first + s.batch_size]
        rng = generator(s.seed, "unstable", first, device=x.device)
        s.say(f"the loss around {several(len(x), 'images')}")

        def loss(x: torch.Tensor, y: torch.Tensor = y, first: int = first) -> torch.Tensor:
            with seeded(derive_seed(s.seed, "unstable", "draws", first), x.device), torch.no_grad():
                return expected(s.search, x, y, margin, draws)[0]

        middle = loss(x)
        for _ in range(samples):
            offset = (torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype) - 0.5) * RADIUS
            change = (loss((x + offset).clamp(0, 1)) - middle).abs() / middle.abs().clamp_min(1e-12)
            total[first : first + len(x)] += change.clamp_max(1).cpu().numpy() / samples
    figure = float(total.mean())
    check = Check(
        name="unstable",
        title="Does the loss stay itself within a few grey levels?",
        figure=figure,
        threshold=f"over {UNSTABLE:.2f}",
        outcome="pass",
        reason=f"the margin changes by {percent(figure)} of itself, on average, within 4/255",
        advice="",
        reference=SOURCE + "2",
        details={"per_image": [float(v) for v in total], "draws": draws, "radius": RADIUS},
    )
    if figure <= UNSTABLE:
        return check
    after = s.cascade([AttackSpec("square", {"queries": 500 if s.quick else 5000})], s.white_box, "unstable")
    check = mitigated(s, check, "Square, which asks for no gradient", after)
    return replace(
        check,
        outcome="flag",
        advice="Average the gradient over more draws, and over points around each "
        "iterate; add Square, which needs none.",
    )


def silent_success(s: AuditContext) -> Check:
    """3: the attack passed through a point that breaks the image, and returned one that does not."""
    returned = s.score(s.path.x_adv, "returned")
    best = s.score(s.path.best, "best")
    lost = s.broken_beyond_noise(returned.wrong, best.wrong)
    check = Check(
        name="silent_success",
        title="Does the attack return the worst point it found?",
        figure=float(lost.mean()),
        threshold="any image lost",
        outcome="pass",
        reason=f"{s.label(s.primary_attack)} passed a point that breaks {several(int(lost.sum()), 'images')} of "
        f"{len(lost)}, and returned one that does not",
        advice="",
        reference=SOURCE + "3",
        details={"images": np.flatnonzero(lost).tolist()},
    )
    if not lost.any():
        return check
    after = s.white_box.worse_of(best)
    s.found.append(after)
    check = mitigated(s, check, "the best point of the path", after)
    return replace(check, outcome="flag", advice="Keep the best point of the path (keep=best).")


def incomplete(s: AuditContext) -> Check:
    """4: the loss still rises when the attack ends."""
    figure, curve, images = progress_at_end(s.path)
    check = Check(
        name="incomplete",
        title="Had the attack converged when it ended?",
        figure=figure,
        threshold=f"over {UNFINISHED:.2f}",
        outcome="pass",
        reason=f"{percent(figure)} of the loss gained by {s.label(s.primary_attack)} came in its last {LAST} steps, on "
        f"average over {several(images, 'images')} that stand",
        advice="",
        reference=SOURCE + "4",
        details={"curve": curve},
    )
    if figure <= UNFINISHED:
        return check
    if "steps" not in s.options(s.primary_attack):
        return replace(check, outcome="flag", advice="One step is no optimisation: use pgd or apgd.")
    steps = s.options(s.primary_attack)["steps"]
    more = replace(s.primary_attack, options=s.primary_attack.options | {"steps": max(5 * steps, 20)})
    after = s.cascade([more], s.white_box, "more steps")
    check = mitigated(s, check, f"{more.options['steps']} steps", after)
    return replace(check, outcome="flag", advice=f"Give the attack more steps than {steps}.")


def progress_at_end(path: Trace) -> tuple[float, list[float], int]:
    """Share of the gained loss that came in the last steps; the mean running best, rescaled to [0, 1]; images.

    Of images that the search never broke: a broken one is left alone, and its path ends by success.
    """
    loss = path.loss[path.broken < 1]
    if loss.size:
        # (A restart goes on where the last ended: its path is one of as many steps again.)
        loss = loss[np.isfinite(loss[:, 0])]
    if not loss.size:
        return 0.0, [], 0
    best = np.maximum.accumulate(np.where(np.isnan(loss), -np.inf, loss), axis=1)
    span = best[:, -1] - best[:, 0]
    scaled = (best - best[:, :1]) / np.where(span > 0, span, 1)[:, None]
    scaled[span <= 0] = 1.0
    at = max(0, scaled.shape[1] - 1 - LAST)
    return float((scaled[:, -1] - scaled[:, at]).mean()), [float(v) for v in scaled.mean(0)], len(loss)


def transfer_failure(s: AuditContext) -> Check:
    """5: the points break the model that the attack saw, not the one that is judged."""
    seen = s.wrong(s.path.x_adv, "surrogate", model=s.search)
    judged = s.wrong(s.path.x_adv, "returned")
    lost = s.broken_beyond_noise(judged, seen)
    through = "the search twin" if s.surrogate is None else "the surrogate"
    check = Check(
        name="transfer",
        title="Does what breaks the attacked copy break the model?",
        figure=float(lost.mean()),
        threshold="any image",
        outcome="pass",
        reason=f"{several(int(lost.sum()), 'images')} of {len(lost)} are broken on {through} and not on the model",
        advice="",
        reference=SOURCE + "5",
        details={"images": np.flatnonzero(lost).tolist()},
    )
    if not lost.any():
        return check
    after = s.cascade(s.white, s.white_box, "directly", through=s.folded)
    check = mitigated(s, check, "the model itself, attacked directly", after)
    return replace(check, outcome="flag", advice="Attack the model itself, or a surrogate that answers as it does.")


def unconstrained(s: AuditContext) -> Check:
    """6: an attack without a bound must break everything."""
    stands = s.unbounded.wrong <= 0.5
    share = float(stands.mean())
    check = Check(
        name="unconstrained",
        title="Does the attack break everything once eps = 1?",
        figure=share,
        threshold="any image stands",
        outcome="pass",
        reason=f"with eps = {s.widest:g}, {several(int(stands.sum()), 'images')} of {len(stands)} stand",
        advice="",
        reference=SOURCE + "6",
        invalidates=False,
        details={"images": np.flatnonzero(stands).tolist()},
    )
    if not stands.any():
        return check
    advice = "The optimisation fails, not the bound: look at the checks gradient and unavailable first."
    return replace(check, outcome="flag", invalidates=share > GREATLY, advice=advice)


def mitigated(s: AuditContext, check: Check, how: str, after: Points) -> Check:
    """The accuracy with a mitigation, in the check's words, its details and its weight."""
    before, now, gain = s.accuracy(s.white_box), s.accuracy(after), s.gain(s.white_box, after)
    found: dict[str, Any] = {"how": how, "before": before.as_accuracy(), "after": now.as_accuracy()}
    return replace(
        check,
        reason=f"{check.reason}; with {how} the accuracy is {percent(now.mean)}, not {percent(before.mean)}",
        invalidates=check.invalidates or (gain.mean > GREATLY and gain.low > 0),
        details=(check.details or {}) | {"mitigation": found},
    )
