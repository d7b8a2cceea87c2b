"""Accuracy against eps, steps, draws and restarts: it must fall to chance with eps, and not change with more effort."""

from dataclasses import replace
from typing import Any

import numpy as np

from gsem.attacks._core import random_start
from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Check
from gsem.auditing.context import GREATLY, SLIGHTLY, AuditContext, Points, most_by_chance, percent, several
from gsem.evaluation.statistics import Interval
from gsem.rng import generator

FACTORS = (0.5, 1.0, 2.0, 4.0)
LESS = (4, 2)  # parts of the effort, for the curves only


def sweeps(s: AuditContext) -> Check:
    """One figure: by how much the accuracy falls with twice the effort, of whichever kind."""
    details: dict[str, Any] = {"eps": [], "steps": [], "eot": [], "restarts": [], "random": {}}
    problems, rises = _against_eps(s, details)
    chance_level = _random_noise(s)
    details["random"] = s.accuracy(chance_level).as_accuracy()
    luck = s.gain(s.white_box, s.white_box.worse_of(chance_level))
    if luck.mean > SLIGHTLY and luck.low > 0:
        problems.append(f"random noise breaks {percent(luck.mean)} of the images that the attacks do not")
    gains = _against_effort(s, details)
    name, gain = max(gains.items(), key=lambda item: item[1].mean, default=("", Interval(0.0, 0.0, 0.0)))
    significant = gain.mean > SLIGHTLY and gain.low > 0
    if significant:
        problems.append(f"{name} lower the accuracy by another {100 * gain.mean:.1f} points")
    told = f"twice the effort lowers the accuracy by at most {100 * gain.mean:z.1f} points"
    check = Check(
        name="sweeps",
        title="Does accuracy fall with eps to chance, and not with effort?",
        figure=gain.mean + 0.0,  # (no minus zero)
        threshold=f"over {SLIGHTLY:.3f} beyond noise; not falling with eps; over chance at the widest eps",
        outcome="flag" if problems else "pass",
        reason="; ".join(problems) or f"{told}; it falls with eps to {percent(details['eps'][-1]['accuracy'])}",
        advice="Spend more until it no longer pays: more steps, draws and restarts." if significant else "",
        reference="Carlini et al., 2019 (On Evaluating Adversarial Robustness), sections 4 and 5",
        invalidates=bool(rises) or (gain.mean > GREATLY and gain.low > 0) or (luck.mean > GREATLY and luck.low > 0),
        details=details,
    )
    if problems and not check.advice:
        check = replace(check, advice="The attack does not optimise: look at the checks gradient and unavailable.")
    if not problems and gain.mean > SLIGHTLY:
        reason = f"{name} lower the accuracy by {100 * gain.mean:.1f} points, which may be chance"
        return replace(check, outcome="inconclusive", reason=reason, advice="Give more images.")
    return check


def _against_eps(s: AuditContext, details: dict[str, Any]) -> tuple[list[str], bool]:
    """Fills in the curve; what is wrong with it, and whether it rises greatly or stays far above chance."""
    before, curve = s.clean, [(0.0, s.clean)]
    for factor in FACTORS:
        eps = s.eps * factor
        if eps >= s.widest:
            continue
        points = (
            s.white_box if factor == 1 else s.clean.worse_of(s.on_standing(s.primary_attack, s.clean, "eps", eps=eps))
        )
        curve.append((eps, points))
    curve.append((s.widest, s.unbounded))
    problems, greatly = [], False
    for eps, points in curve:
        details["eps"].append({"eps": eps, **s.accuracy(points).as_accuracy()})
        rise = s.gain(points, before)
        if rise.mean > SLIGHTLY and rise.low > 0:
            problems.append(f"the accuracy rises by {100 * rise.mean:.1f} points up to eps = {eps:.3g}")
            greatly |= rise.mean > GREATLY
        before = points
    last, chance_level = s.accuracy(curve[-1][1]), 1 / s.classes
    details["chance"] = chance_level
    if last.low > chance_level:
        problems.append(
            f"with eps = {s.widest:g} it is {percent(last.mean)}, over the {percent(chance_level)} of chance"
        )
        greatly |= last.mean - chance_level > GREATLY
    return problems, greatly


def _random_noise(s: AuditContext) -> Points:
    """The worst of some random points in the ball."""
    points = s.clean
    for number in range(3 if s.quick else 10):
        x_adv = random_start(s.x, s.eps, s.norm, generator(s.seed, "random noise", number, device=s.x.device))
        points = points.worse_of(s.score(x_adv, "random noise", number))
    return points


def _against_effort(s: AuditContext, details: dict[str, Any]) -> dict[str, Interval]:
    """Fills in the curves; what twice the effort gains, on images that stand.

    Less effort is told and not judged: all attacks in question with a part of it.
    """
    lead, options = s.primary_attack, s.options(s.primary_attack)
    gains = {}
    for key in ("steps", "eot", "restarts"):
        if key not in options or (key == "eot" and not s.stochastic):
            continue
        for part in LESS:
            if options[key] >= part:
                s.say(f"1/{part} of the {key}")
                points = s.cascade(_with_less(s, key, part), s.clean, "less", key)
                details[key].append({key: options[key] // part, **s.accuracy(points).as_accuracy()})
        details[key].append({key: options[key], **s.accuracy(s.white_box).as_accuracy()})
        more = replace(lead, options=lead.options | {key: 2 * options[key]})
        s.say(f"twice the {key}")
        after = s.cascade([more], s.white_box, "twice", key)
        details[key].append({key: 2 * options[key], **s.accuracy(after).as_accuracy()})
        told = {"steps": "twice the steps", "eot": "twice the draws", "restarts": "twice the restarts"}[key]
        gains[told] = s.gain(s.white_box, after)
    return gains


def _with_less(s: AuditContext, key: str, part: int) -> list[AttackSpec]:
    """The attacks in question, those that can with one part in so many of the steps, draws or restarts."""
    known = ((attack, s.options(attack)) for attack in s.white)
    return [
        replace(attack, options=attack.options | {key: max(1, options[key] // part)}) if key in options else attack
        for attack, options in known
    ]


def blackbox(s: AuditContext) -> Check:
    """Attacks that use no gradient of the model break hardly anything that the white-box attacks do not.

    A few images are no flag: two equally good searches do not break the same ones. They count in the lowest accuracy.
    """
    chosen = boxes(s)
    after = s.white_box
    rows: list[dict[str, Any]] = []
    for attack in chosen:
        points = s.on_standing(attack, s.white_box, "black box")
        after = after.worse_of(points)
        broken = s.broken_beyond_noise(s.white_box.wrong, points.wrong)
        rows.append(
            {
                "attack": s.label(attack),
                **s.accuracy(points).as_accuracy(),
                "merged": s.accuracy(s.white_box.worse_of(points)).mean,
                "only_here": int(broken.sum()),
            }
        )
    s.found.append(after)
    only = s.broken_beyond_noise(s.white_box.wrong, after.wrong)
    count, chance_level = int(only.sum()), most_by_chance(len(only))
    before, now, gain = s.accuracy(s.white_box), s.accuracy(after), s.gain(s.white_box, after)
    greatly = gain.mean > GREATLY and gain.low > 0
    worst = max(rows, key=lambda row: row["only_here"])
    check = Check(
        name="blackbox",
        title="Do black-box attacks break what white-box attacks do not?",
        figure=float(only.mean()),
        threshold=f"over {chance_level} of {len(only)} images: a share over {SLIGHTLY:.3f}, beyond chance",
        outcome="pass",
        reason=f"{', '.join(row['attack'] for row in rows)} break no image that the white-box attacks left",
        advice="",
        reference="Athalye et al., ICML 2018, section 3.1; Chen & Gu, KDD 2020 (RayS)",
        invalidates=greatly,
        details={
            "by_chance": chance_level,
            "attacks": rows,
            "images": np.flatnonzero(only).tolist(),
            "source_models": list(s.source_models),
        },
    )
    if not count and not greatly:
        return check
    reason = (
        f"{count} of {several(len(only), 'images')} {'is' if count == 1 else 'are'} broken only without the model's "
        f"gradient (most by {worst['attack']}): the accuracy is {percent(now.mean)}, not {percent(before.mean)}"
    )
    if count <= chance_level and not greatly:
        return replace(
            check, reason=f"{reason}; up to {chance_level} may be chance, as no two searches break the same images"
        )
    advice = f"Report the worst case with {worst['attack']}, and find out why the gradient leads past these points."
    return replace(check, outcome="flag", reason=reason, advice=advice)


def boxes(s: AuditContext) -> list[AttackSpec]:
    """The black-box attacks: those in question, or else Square, RayS and what can be transferred."""
    if s.black:
        return s.black
    eot = {"eot": min(3, s.options(s.primary_attack)["eot"])} if s.quick else {}
    found = [AttackSpec("square", {"queries": 300 if s.quick else 5000} | eot)]
    found.append(AttackSpec("rays", {"queries": 300 if s.quick else 10000} | eot))
    if s.source_models:
        found.append(AttackSpec("transfer", {"steps": 20 if s.quick else 100} | eot))
    return found
