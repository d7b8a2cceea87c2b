"""The model's noise: is the model stochastic, and does its robustness remain when the noise is known?"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsem.attacks import pgd
from gsem.auditing.check import Check
from gsem.auditing.context import AuditContext, Points, percent
from gsem.nn.gsem import GSeM, NoiseMode
from gsem.nn.gsem import noise as noise_of
from gsem.rng import derive_seed, seeded

VANISHED = 0.5


def randomness(s: AuditContext) -> Check:
    """Repeated forward passes; with torch's random state put back, too."""
    x = s.x[: s.batch_size]
    with torch.no_grad(), seeded(derive_seed(s.seed, "randomness"), x.device):
        one, other = s.model(x), s.model(x)
        flips = float((one.argmax(1) != other.argmax(1)).double().mean())
        differ = float((one != other).any(1).double().mean())
    with torch.no_grad():
        fixed = []
        for _ in range(2):
            with seeded(derive_seed(s.seed, "randomness", "again"), x.device):
                fixed.append(s.model(x))
    repeatable = torch.equal(*fixed)
    single = [s.label(a) for a in s.white if s.options(a).get("eot", 1) == 1]
    check = Check(
        name="randomness",
        title="Does the model answer twice alike?",
        figure=differ,
        threshold="outputs differ, and an attack does not average over draws",
        outcome="pass",
        reason="two passes over the same images give the same logits: one draw is used",
        advice="",
        reference="Athalye et al., ICML 2018, section 4.2 (EOT)",
        details={"class_flips": flips, "repeatable": repeatable, "stochastic": s.stochastic},
    )
    if not s.stochastic:
        return check
    reason = (
        f"the logits of {percent(differ)} of the images differ between two passes, the class of {percent(flips)}: "
        f"attacks average over draws, and each point is scored on {s.draws}"
    )
    if not repeatable:
        advice = "Draw the noise from torch's own random stream: checks that need the same noise twice say less now."
        reason += "; a seed of torch does not repeat them"
        return replace(check, outcome="inconclusive", reason=reason, advice=advice)
    if single:
        reason = f"{reason}; but {', '.join(single)} use one draw"
        return replace(check, outcome="flag", reason=reason, advice="Give the attacks eot=20 (EOT).")
    return replace(check, reason=reason)


def ablation(s: AuditContext) -> Check:
    """The same weights with the noise known, without it, and without the quantiser."""
    check = Check(
        name="noise",
        title="Does robustness outlive knowing the noise?",
        figure=None,
        threshold=f"under {VANISHED:.2f} of it left",
        outcome="pass",
        reason="the model has neither noise nor a quantiser that could be taken away",
        advice="",
        reference="Athalye et al., ICML 2018, section 4.2; this project's ablation",
    )
    defended = any(isinstance(m, GSeM) for m in s.model.modules())
    if not s.stochastic and not defended:
        return check
    fresh = _robustness(s.clean, s.white_box)
    details: dict[str, Any] = {"fresh": _row(s, s.clean, s.white_box)}
    left: dict[str, float] = {}

    def take(name: str, told: str, clean: Points, worst: Points) -> None:
        s.say(told)
        details[name] = _row(s, clean, worst)
        # Without the quantiser it is another network: told, not judged.
        if name != "quantiser":
            left[told] = _robustness(clean, worst) / max(fresh, 1e-12)

    if defended:
        for name, told, changed in _variants(s):
            with changed as other:
                take(name, told, other.clean, other.white_box)
    else:
        take("frozen", "noise frozen by a known seed", *_frozen_stranger(s))
    told, figure = min(left.items(), key=lambda item: item[1], default=("", 1.0))
    attacked = {name: details[name]["attacked"]["accuracy"] for name in details}
    reason = ", ".join(f"{name} {percent(value)}" for name, value in attacked.items())
    check = replace(check, figure=figure, details=details, reason=f"accuracy under attack: {reason}")
    if fresh < 0.02:
        return replace(check, figure=None, reason=f"{check.reason}: there is no robustness that could vanish")
    if figure >= VANISHED:
        return check
    reason = f"{check.reason}: with {told}, {percent(figure)} of the robustness is left"
    advice = "What holds is the noise, not the network: report the accuracy with the noise known beside it."
    return replace(check, outcome="flag", reason=reason, advice=advice)


def _robustness(clean: Points, worst: Points) -> float:
    """Accuracy under attack as a share of that without."""
    return float((1 - worst.wrong).mean() / max((1 - clean.wrong).mean(), 1e-12))


def _row(s: AuditContext, clean: Points, worst: Points) -> dict[str, Any]:
    return {"clean": s.accuracy(clean).as_accuracy(), "attacked": s.accuracy(worst).as_accuracy()}


def _variants(s: AuditContext) -> list[tuple[str, str, AbstractContextManager[AuditContext]]]:
    """(name, in words, a block in which the changed model can be asked) of a GSeM model."""
    found = []
    if s.stochastic:
        found.append(("frozen", "the noise frozen by a known seed", _with_noise(s, "frozen")))
        found.append(("off", "the noise off", _with_noise(s, "off")))
    return [*found, ("quantiser", "noise and quantiser off", _without_quantiser(s))]


@contextmanager
def _with_noise(s: AuditContext, mode: NoiseMode) -> Iterator[AuditContext]:
    with noise_of(s.model, mode, seed=derive_seed(s.seed, "known noise") if mode == "frozen" else None):
        yield s.known(s.model)


@contextmanager
def _without_quantiser(s: AuditContext) -> Iterator[AuditContext]:
    bare = copy.deepcopy(s.model)
    for module in bare.modules():
        if isinstance(module, GSeM):
            module.quantiser = False
    with noise_of(bare, "off"):
        yield s.known(bare)


class _Reseeded(nn.Module):
    """A stranger with its noise known: torch's stream starts at the same seed for every pass.

    What the noise is for an image depends on the image's place in the batch, so that batches must stay as they are.
    """

    def __init__(self, model: nn.Module, seed: int):
        super().__init__()
        self.model, self.seed = model, seed
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        with seeded(self.seed, x.device):
            return self.model(x)


def _frozen_stranger(s: AuditContext) -> tuple[Points, Points]:
    known = _Reseeded(s.model, derive_seed(s.seed, "known noise"))
    steps = s.options(s.primary_attack).get("steps", 20)
    found = []
    for first in range(0, len(s.x), s.batch_size):
        x, y = s.x[first : first + s.batch_size], s.y[first : first + s.batch_size]
        x_adv = pgd(known, x, y, eps=s.eps, step=s.eps / 4, steps=steps, norm=s.norm, stop_broken=False, seed=s.seed)
        with torch.no_grad():
            found.append([(known(at).argmax(1) != y).double().cpu().numpy() for at in (x, x_adv)])
    clean, wrong = (np.concatenate(each) for each in zip(*found, strict=True))
    return Points(s.x, clean, clean), Points(s.x, wrong, np.maximum(clean, wrong))
