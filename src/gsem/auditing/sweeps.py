"""Accuracy against eps, steps, draws and restarts: it must fall to chance with eps, and not change with more effort."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from gsem.attacks._core import random_start
from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import SLIGHTLY, Finding, check
from gsem.auditing.context import AuditContext, Points
from gsem.evaluation.statistics import Interval
from gsem.rng import generator

FACTORS = (0.5, 1.0, 2.0, 4.0)
LESS = (4, 2)  # parts of the effort, for the curves only

Curve = list[tuple[float, Points]]
"""A radius, and the worst points within it."""
_NOTHING = (Interval(0.0, 0.0, 0.0), None)


@check(
    name="sweeps",
    question="Does accuracy fall with eps to chance, and not with effort?",
    threshold=f"over {SLIGHTLY:.3f} beyond noise; not falling with eps; over chance at the widest eps",
    reference="Carlini et al., 2019 (On Evaluating Adversarial Robustness), sections 4 and 5",
)
def sweeps(ctx: AuditContext) -> Finding:
    """One figure: by how much the accuracy falls with twice the effort, of whichever kind, or with other losses."""
    details: dict[str, Any] = {"eps": [], "steps": [], "eot": [], "restarts": [], "queries": [], "random": {}}
    curve = _curve(ctx)
    details["eps"] = [{"eps": eps, **ctx.accuracy(points).as_accuracy()} for eps, points in curve]
    details["chance"] = 1 / ctx.classes
    problems = _not_falling(ctx, curve)
    random = _random_noise(ctx, "random noise")
    details["random"] = ctx.accuracy(random).as_accuracy()
    luck = ctx.gain(ctx.baseline, ctx.baseline.worse_of(random))
    if _counts(luck):
        problems.append(f"random noise breaks {luck.mean:.1%} of the images that the attacks do not")
    gains = _against_effort(ctx, details)
    effort, (gain, attack) = max(gains.items(), key=lambda item: item[1][0].mean, default=("", _NOTHING))
    figure = gain.mean + 0.0  # (no minus zero)
    if _counts(gain):
        problems.append(f"{effort} lower the accuracy by another {100 * gain.mean:.1f} points")
        advice = "Increase the effort until the accuracy no longer falls: more steps, draws, restarts and losses."
    else:
        advice = "The attack does not optimise: look at the checks gradient and unavailable."
    if problems:
        finding = Finding(figure, "flag", "; ".join(problems), advice, details=details)
        return _asked_again(ctx, finding, curve, attack if _counts(gain) else None)
    if gain.mean > SLIGHTLY:
        reason = f"{effort} lower the accuracy by {100 * gain.mean:.1f} points, which may be chance"
        return Finding(figure, "inconclusive", reason, "Give more images.", details=details)
    reason = (
        f"twice the effort lowers the accuracy by at most {100 * gain.mean:z.1f} points; it falls with eps to "
        f"{details['eps'][-1]['accuracy']:.1%}"
    )
    return Finding(figure, "pass", reason, details=details)


def _counts(gain: Interval) -> bool:
    """Whether an accuracy falls by more than slightly, and beyond noise."""
    return gain.mean > SLIGHTLY and gain.low > 0


def _asked_again(ctx: AuditContext, finding: Finding, curve: Curve, more: AttackSpec | None) -> Finding:
    """The questions again, of all that was tried so far: the curve with the repaired attacks, random noise, and twice
    the effort that lowered the accuracy."""
    now = ctx.merged(ctx.baseline)
    attacks: list[AttackSpec] = []
    problems: list[str] = []
    if _not_falling(ctx, curve):
        wider = [(eps, ctx.repaired_at(points, eps)) for eps, points in curve if eps > ctx.eps]
        problems = _not_falling(ctx, [(0.0, ctx.clean), (ctx.eps, now), *wider])
    luck = ctx.gain(now, now.worse_of(_random_noise(ctx, "random noise again")))
    gain = Interval(0.0, 0.0, 0.0)
    if more is not None:
        key = "steps" if "steps" in ctx.options(more) else "queries"
        attacks = [more, replace(more, options=more.options | {key: 2 * ctx.options(more)[key]})]
        gain = ctx.gain(now, now.worse_of(ctx.on_remaining(attacks[1], now, "twice again")))
    answered = not (problems or _counts(luck) or _counts(gain))
    how = "all that was tried" if more is None else f"{', '.join(map(str, attacks))}"
    return ctx.mitigated(finding, how, attacks, now, again=gain.mean + 0.0, answered=answered)


def _curve(ctx: AuditContext) -> Curve:
    """The worst points at 0, at multiples of eps, and at the widest radius."""
    curve = [(0.0, ctx.clean)]
    for eps in (ctx.eps * factor for factor in FACTORS):
        if eps >= ctx.widest:
            continue
        if eps == ctx.eps:
            curve.append((eps, ctx.baseline))
        else:
            points = ctx.on_remaining(ctx.primary_attack, ctx.clean, "eps", eps=eps)
            curve.append((eps, ctx.clean.worse_of(points)))
    return [*curve, (ctx.widest, ctx.unbounded)]


def _not_falling(ctx: AuditContext, curve: Curve) -> list[str]:
    """The faults of the curve: where it rises, and that it ends over chance."""
    problems = []
    for (_, before), (eps, points) in pairwise(curve):
        rise = ctx.gain(points, before)
        if _counts(rise):
            problems.append(f"the accuracy rises by {100 * rise.mean:.1f} points up to eps = {eps:.3g}")
    last, chance_level = ctx.accuracy(curve[-1][1]), 1 / ctx.classes
    if last.low > chance_level:
        problems.append(f"with eps = {ctx.widest:g} it is {last.mean:.1%}, over the {chance_level:.1%} of chance")
    return problems


def _random_noise(ctx: AuditContext, name: str) -> Points:
    """The worst of some random points in the ball."""
    points, count = ctx.clean, 3 if ctx.quick else 10
    # `evaluate` tries random points by this attack, which also goes a step from each.
    attack = AttackSpec("pgd", {"steps": 1, "restarts": count})
    for number in range(count):
        x_adv = random_start(ctx.x, ctx.eps, ctx.norm, generator(ctx.seed, name, number, device=ctx.x.device))
        points = points.worse_of(ctx.score(x_adv, name, number, by=str(attack)))
    if ctx.no_gradient is None:
        ctx.tried.append((False, points.shares))
    return points


def _against_effort(ctx: AuditContext, details: dict[str, Any]) -> dict[str, tuple[Interval, AttackSpec]]:
    """Add the curves to `details`. Returns by how much the accuracy falls with twice the effort of each kind, and with
    other losses, and the attack.

    The primary attack with twice the effort works on the images not broken before. The points of the curves with less
    effort are of all white-box attacks; nothing is flagged for them.
    """
    primary, options = ctx.primary_attack, ctx.options(ctx.primary_attack)
    gains = {}
    for key in ("steps", "eot", "restarts", "queries"):
        if key not in options or (key == "eot" and not ctx.stochastic):
            continue
        for part in LESS:
            if options[key] >= part and primary in ctx.white:
                ctx.on_progress(f"1/{part} of the {key}")
                points = ctx.cascade(_with_less(ctx, key, part), ctx.clean, "less", key)
                details[key].append({key: options[key] // part, **ctx.accuracy(points).as_accuracy()})
        details[key].append({key: options[key], **ctx.accuracy(ctx.baseline).as_accuracy()})
        # (As many restarts again, from other starts, are twice the restarts.)
        more = replace(primary, options=primary.options | {key: options[key] * (1 if key == "restarts" else 2)})
        ctx.on_progress(f"twice the {key}")
        after = ctx.cascade([more], ctx.baseline, "twice", key)
        details[key].append({key: 2 * options[key], **ctx.accuracy(after).as_accuracy()})
        gains[f"twice the {'draws' if key == 'eot' else key}"] = ctx.gain(ctx.baseline, after), more
    if others := ctx.other_losses:
        ctx.on_progress("other losses")
        after = ctx.cascade(others, ctx.baseline, "losses")
        details["losses"] = {"attacks": [str(a) for a in others], **ctx.accuracy(after).as_accuracy()}
        gains[f"other losses ({', '.join(ctx.label(a) for a in others)})"] = ctx.gain(ctx.baseline, after), others[-1]
    return gains


def _with_less(ctx: AuditContext, key: str, part: int) -> list[AttackSpec]:
    """The audited attacks, those that can with one part in so many of the steps, draws or restarts."""
    known = ((attack, ctx.options(attack)) for attack in ctx.repeated)
    return [
        replace(attack, options=attack.options | {key: max(1, options[key] // part)}) if key in options else attack
        for attack, options in known
    ]
