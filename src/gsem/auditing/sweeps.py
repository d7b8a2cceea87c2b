"""Accuracy against eps, steps, draws and restarts: it must fall to chance with eps, and not change with more effort."""

from dataclasses import replace
from typing import Any

from gsem.attacks._core import random_start
from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Finding, check
from gsem.auditing.context import GREATLY, SLIGHTLY, AuditContext, Points
from gsem.evaluation.statistics import Interval
from gsem.rng import generator

FACTORS = (0.5, 1.0, 2.0, 4.0)
LESS = (4, 2)  # parts of the effort, for the curves only


@check(
    name="sweeps",
    question="Does accuracy fall with eps to chance, and not with effort?",
    threshold=f"over {SLIGHTLY:.3f} beyond noise; not falling with eps; over chance at the widest eps",
    reference="Carlini et al., 2019 (On Evaluating Adversarial Robustness), sections 4 and 5",
)
def sweeps(ctx: AuditContext) -> Finding:
    """One figure: by how much the accuracy falls with twice the effort, of whichever kind."""
    details: dict[str, Any] = {"eps": [], "steps": [], "eot": [], "restarts": [], "random": {}}
    problems, rises = _against_eps(ctx, details)
    random = _random_noise(ctx)
    details["random"] = ctx.accuracy(random).as_accuracy()
    luck = ctx.gain(ctx.white_box, ctx.white_box.worse_of(random))
    if luck.mean > SLIGHTLY and luck.low > 0:
        problems.append(f"random noise breaks {luck.mean:.1%} of the images that the attacks do not")
    gains = _against_effort(ctx, details)
    effort, gain = max(gains.items(), key=lambda item: item[1].mean, default=("", Interval(0.0, 0.0, 0.0)))
    figure = gain.mean + 0.0  # (no minus zero)
    if gain.mean > SLIGHTLY and gain.low > 0:
        problems.append(f"{effort} lower the accuracy by another {100 * gain.mean:.1f} points")
        advice = "Increase the effort until the accuracy no longer falls: more steps, draws and restarts."
    else:
        advice = "The attack does not optimise: look at the checks gradient and unavailable."
    if problems:
        invalidates = rises or any(fall.mean > GREATLY and fall.low > 0 for fall in (gain, luck))
        return Finding(figure, "flag", "; ".join(problems), advice, invalidates=invalidates, details=details)
    if gain.mean > SLIGHTLY:
        reason = f"{effort} lower the accuracy by {100 * gain.mean:.1f} points, which may be chance"
        return Finding(figure, "inconclusive", reason, "Give more images.", details=details)
    reason = (
        f"twice the effort lowers the accuracy by at most {100 * gain.mean:z.1f} points; it falls with eps to "
        f"{details['eps'][-1]['accuracy']:.1%}"
    )
    return Finding(figure, "pass", reason, details=details)


def _against_eps(ctx: AuditContext, details: dict[str, Any]) -> tuple[list[str], bool]:
    """Add the curve to `details`. Returns its faults, and whether it rises greatly or stays far above chance."""
    before, curve = ctx.clean, [(0.0, ctx.clean)]
    for factor in FACTORS:
        eps = ctx.eps * factor
        if eps >= ctx.widest:
            continue
        if factor == 1:
            curve.append((eps, ctx.white_box))
        else:
            points = ctx.on_remaining(ctx.primary_attack, ctx.clean, "eps", eps=eps)
            curve.append((eps, ctx.clean.worse_of(points)))
    curve.append((ctx.widest, ctx.unbounded))
    problems, greatly = [], False
    for eps, points in curve:
        details["eps"].append({"eps": eps, **ctx.accuracy(points).as_accuracy()})
        rise = ctx.gain(points, before)
        if rise.mean > SLIGHTLY and rise.low > 0:
            problems.append(f"the accuracy rises by {100 * rise.mean:.1f} points up to eps = {eps:.3g}")
            greatly |= rise.mean > GREATLY
        before = points
    last, chance_level = ctx.accuracy(curve[-1][1]), 1 / ctx.classes
    details["chance"] = chance_level
    if last.low > chance_level:
        problems.append(f"with eps = {ctx.widest:g} it is {last.mean:.1%}, over the {chance_level:.1%} of chance")
        greatly |= last.mean - chance_level > GREATLY
    return problems, greatly


def _random_noise(ctx: AuditContext) -> Points:
    """The worst of some random points in the ball."""
    points = ctx.clean
    for number in range(3 if ctx.quick else 10):
        x_adv = random_start(ctx.x, ctx.eps, ctx.norm, generator(ctx.seed, "random noise", number, device=ctx.x.device))
        points = points.worse_of(ctx.score(x_adv, "random noise", number))
    return points


def _against_effort(ctx: AuditContext, details: dict[str, Any]) -> dict[str, Interval]:
    """Add the curves to `details`. Returns by how much the accuracy falls with twice the effort of each kind.

    The primary attack with twice the effort works on the images not broken before. The points of the curves with less
    effort are of all white-box attacks; nothing is flagged for them.
    """
    primary, options = ctx.primary_attack, ctx.options(ctx.primary_attack)
    gains = {}
    for key in ("steps", "eot", "restarts"):
        if key not in options or (key == "eot" and not ctx.stochastic):
            continue
        for part in LESS:
            if options[key] >= part:
                ctx.on_progress(f"1/{part} of the {key}")
                points = ctx.cascade(_with_less(ctx, key, part), ctx.clean, "less", key)
                details[key].append({key: options[key] // part, **ctx.accuracy(points).as_accuracy()})
        details[key].append({key: options[key], **ctx.accuracy(ctx.white_box).as_accuracy()})
        more = replace(primary, options=primary.options | {key: 2 * options[key]})
        ctx.on_progress(f"twice the {key}")
        after = ctx.cascade([more], ctx.white_box, "twice", key)
        details[key].append({key: 2 * options[key], **ctx.accuracy(after).as_accuracy()})
        gains[f"twice the {'draws' if key == 'eot' else key}"] = ctx.gain(ctx.white_box, after)
    return gains


def _with_less(ctx: AuditContext, key: str, part: int) -> list[AttackSpec]:
    """The audited attacks, those that can with one part in so many of the steps, draws or restarts."""
    known = ((attack, ctx.options(attack)) for attack in ctx.white)
    return [
        replace(attack, options=attack.options | {key: max(1, options[key] // part)}) if key in options else attack
        for attack, options in known
    ]
