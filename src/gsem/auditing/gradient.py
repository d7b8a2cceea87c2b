"""The gradient check: is the gradient that attacks follow masked, wholly or in part?"""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsem.attacks._core import random_start
from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Check
from gsem.auditing.context import AuditContext, fold_quietly, percent
from gsem.auditing.layers import Blocking, Logarithm, blocking, ending_softmax
from gsem.auditing.slopes import WITHIN, Slope, joined, slopes
from gsem.nn.gsem import GSeM
from gsem.nn.insert import straight_through
from gsem.rng import derive_seed, generator

HS = (1 / 255, 2 / 255, 4 / 255)
LEAST = 100  # images, for an interval to mean something
SHOWN = 200  # pairs (a, b) kept for a chart


def gradient(s: AuditContext) -> Check:
    """Slope of central differences on autograd's derivative, at points from which attacks start."""
    found = compare(s, HS)
    bent: list[Slope] = []
    suspicious = _consecutive(found)
    if suspicious and not all(f.blocked for f in found):
        s.say("again, with the derivative averaged along the way")
        bent = compare(s, HS, along=True)
        suspicious = _consecutive(bent)
    told = bent or found
    outside = [f for f in told if f.outside(WITHIN)]
    one = outside[0] if suspicious else told[0]
    check = Check(
        name="gradient",
        title="Is the gradient that attacks follow the loss's own?",
        figure=one.slope,
        threshold=f"interval outside [{1 - WITHIN:.2f}, {1 + WITHIN:.2f}] at two consecutive h; no derivative",
        outcome="pass",
        reason=f"{_told(one)} on {len(s.x)} images",
        advice="",
        reference="section 3 of Athalye et al., ICML 2018 (gradient masking); the comparison is this project's",
        details=_details(found, bent),
    )
    if outside and not suspicious:
        at = " and ".join(map(_distance, outside))
        check = replace(check, reason=f"{check.reason}; outside at {at} alone, as a bent loss may be")
    if all(f.silent for f in found):
        reason = "the loss does not change at all within 4/255 of the images, so there is nothing to compare"
        return replace(check, figure=None, outcome="inconclusive", reason=reason, advice=_SILENT)
    ending = _ending(s) if suspicious or one.unclear else None
    if suspicious or ending is not None:
        return _flagged(s, check, ending)
    if one.unclear:
        return replace(check, outcome="inconclusive", reason=f"{check.reason}: too wide to tell", advice=_SILENT)
    if len(s.x) < LEAST:
        reason = f"{check.reason}; the check needs {LEAST}"
        return replace(check, outcome="inconclusive", reason=reason, advice=f"Give --images {LEAST} or more.")
    return check


_SILENT = (
    "Look at the logits: a saturated or constant output leaves nothing to attack. Attack the logits before the last "
    "non-linearity."
)


def compare(s: AuditContext, hs: tuple[float, ...], *, along: bool = False) -> list[Slope]:
    """The slopes at each h over all images."""
    # Another point of an image says more than another draw of the noise; small images have few features whose
    # changes could be averaged, and need more points.
    points = (1 if s.quick else 2) * min(8, max(4, 2048 // s.x[0].numel())) // (2 if along else 1)
    draws = min(s.draws, 2 if s.quick else 5)
    by_point = []
    for point in range(points):
        parts = []
        s.say(f"central differences, {len(s.x)} images, point {point + 1} of {points}")
        for first in range(0, len(s.x), s.batch_size):
            x, y = _starts(s, first, point), s.y[first : first + s.batch_size]
            seed = derive_seed(s.seed, "gradient", first, point)

            def answer(offset: Tensor, x: Tensor = x) -> Tensor:
                return s.folded(x + offset)

            parts.append(slopes(answer, torch.zeros_like(x), y, hs, draws=draws, seed=seed, along=along))
        by_point.append([joined(same_h) for same_h in zip(*parts, strict=True)])
    return [joined(same_h, beside=True, seed=s.seed) for same_h in zip(*by_point, strict=True)]


def _starts(s: AuditContext, first: int, point: int = 0) -> Tensor:
    # As attacks start: anywhere in the ball. Pixels of 0, 128 or 255 may lie on a quantiser's very edge. Far enough
    # from black and white for both sides of the difference to be images.
    x = s.x[first : first + s.batch_size]
    rng = generator(s.seed, "gradient", "start", first, point, device=x.device)
    return random_start(x, s.eps, s.norm, rng).clamp(max(HS), 1 - max(HS))


def _consecutive(found: list[Slope]) -> bool:
    return any(one.outside(WITHIN) and next_.outside(WITHIN) for one, next_ in pairwise(found))


def _told(one: Slope) -> str:
    if one.slope is None:
        return f"the loss changes within {_distance(one)}, and its gradient is nothing,"
    form = ".3g" if one.unclear else ".2f"
    return f"slope {one.slope:{form}} [{one.low:{form}}, {one.high:{form}}] at h = {_distance(one)}"


def _distance(one: Slope) -> str:
    return f"{round(one.h * 255)}/255"


def _details(found: list[Slope], bent: list[Slope]) -> dict[str, Any]:
    pairs = np.stack([found[0].a.ravel(), found[0].b.ravel()], axis=1)
    details: dict[str, Any] = {
        "points": [f.to_dict() for f in found],
        "pairs": [[float(a), float(b)] for a, b in pairs[:: max(1, len(pairs) // SHOWN)]],
        "pairs_h": found[0].h,
    }
    return details | ({"along": [f.to_dict() for f in bent]} if bent else {})


def _ending(s: AuditContext) -> Blocking | None:
    some = slice(0, min(LEAST, s.batch_size))
    return ending_softmax(s.model, _starts(s, 0)[some], s.y[some], draws=min(4, s.draws), seed=s.seed)


def _flagged(s: AuditContext, check: Check, ending: Blocking | None) -> Check:
    """Name the place (the ending softmax, or a layer that is looked for), go around it, and attack again."""
    some = slice(0, min(LEAST, s.batch_size))
    draws = min(4, s.draws)
    where = ending or blocking(s.model, _starts(s, 0)[some], s.y[some], draws=draws, seed=s.seed, say=s.say)
    assert check.details is not None
    details = check.details | {"layer": where.layer, "where": str(where)}
    reason = f"{check.reason}; what blocks it is {where}"
    advice = "Attack without this gradient: see the check blackbox."
    around = surrogate(s, where)
    if around is not None:
        how, model, attacks = around
        advice = f"Attack through the corrected gradient: {how}." if not attacks else f"Attack {how}."
        after = s.cascade(attacks or s.white, s.white_box, "surrogate", through=fold_quietly(model))
        before, now = s.accuracy(s.white_box), s.accuracy(after)
        details["mitigation"] = {"how": how, "before": before.as_accuracy(), "after": now.as_accuracy()}
        way = "through the corrected gradient" if not attacks else "by its logarithm"
        reason += f"; attacked {way}, the accuracy is {percent(now.mean)}, not {percent(before.mean)}"
    return replace(check, outcome="flag", invalidates=True, reason=reason, advice=advice, details=details)


def surrogate(s: AuditContext, where: Blocking) -> tuple[str, nn.Module, list[AttackSpec]] | None:
    """How to get past the place, a model that decides as the audited one does and whose gradient passes, and attacks.

    The attacks are empty where those in question do.
    """
    model, layers = s.model, dict(s.model.named_modules())
    if where.softmax and not where.layer:
        # The cross-entropy would put back the softmax that the logarithm takes away.
        how = "the logits before the softmax, or the logarithm of the output with loss=margin"
        return how, Logarithm(model), [AttackSpec("apgd", s.effort | {"loss": "margin"})]
    if isinstance(layers[where.layer], GSeM):
        fixed = copy.deepcopy(model)
        layer = fixed.get_submodule(where.layer)
        assert isinstance(layer, GSeM)
        layer.gradient = "corrected"
        return f'set the layer {where.layer!r} to gradient="corrected"', fixed, []
    if not where.layer or not where.keeps_shape:
        return None
    return f'gsem.straight_through(model, "{where.layer}")', straight_through(model, where.layer), []
