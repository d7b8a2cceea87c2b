"""Six attacks or networks that fail, each with parameters drawn from a seed, and ten healthy controls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from audited_models import EPS, Fronted, Rippled, Threshold, mlp
from known_defences import Temperature
from planted import Killed

VARIANTS = 10
SHORT = "apgd:steps=20"
HEALTHY = "apgd:steps=100,apgd:steps=100:loss=margin"


def forward_draws(seed: int, low: float, high: float) -> float:
    """Uniform, by the seed."""
    return low + (high - low) * float(torch.rand((), generator=torch.Generator().manual_seed(seed)))


def _unavailable(seed: int) -> dict[str, Any]:
    # Half of them: cross-entropy whose gradient underflows; the others: no gradient at all.
    network = mlp(seed % 3)
    saturated = nn.Sequential(network, Temperature(forward_draws(seed, 300, 3000)))
    return {"model": saturated if seed % 2 else Killed(network), "attacks": SHORT}


def _unstable(seed: int) -> dict[str, Any]:
    return {"model": Rippled(mlp(seed % 3), forward_draws(seed, 3, 6), forward_draws(seed + 100, 60, 200), seed)}


def _silent(seed: int) -> dict[str, Any]:
    # Steps so long on waves so short that the path's end is as good or bad as any other point of it.
    model = Rippled(mlp(seed % 3), forward_draws(seed, 2, 4), forward_draws(seed + 100, 10, 40), seed)
    step = forward_draws(seed, 1, 2) * EPS
    return {"model": model, "attacks": f"pgd:steps={6 + seed}:step={step}:keep=last", "eps": EPS / 2}


def _unfinished(seed: int) -> dict[str, Any]:
    step = EPS / forward_draws(seed, 40, 80)
    return {"model": mlp(seed % 3, robust=True), "attacks": f"pgd:steps={12 + seed}:step={step}"}


def _transfer(seed: int) -> dict[str, Any]:
    model, other = mlp(seed % 3, robust=True), mlp(seed % 2, hidden=32 + seed)
    return {"model": model, "surrogate": other, "eps": forward_draws(seed, 0.5, 1) * EPS, "attacks": SHORT}


def _unconstrained(seed: int) -> dict[str, Any]:
    return {"model": Fronted(Threshold(forward_draws(seed, 0.3, 0.7)), mlp(seed % 3)), "attacks": SHORT}


FAILURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "unavailable": _unavailable,
    "unstable": _unstable,
    "silent_success": _silent,
    "incomplete": _unfinished,
    "transfer": _transfer,
    "unconstrained": _unconstrained,
}
CONTROLS: list[Callable[[], nn.Module]] = [
    lambda seed=seed, robust=robust: mlp(seed, robust=robust)  # type: ignore[misc]
    for seed in range(5)
    for robust in (False, True)
]
