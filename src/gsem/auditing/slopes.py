"""Is autograd's gradient that of the loss? Directional derivatives against central differences, with common noise.

With L the loss averaged over draws of the noise, d a direction and g what autograd returns:

    a = (L(x + h·d) − L(x − h·d)) / 2h,      b = ⟨g(x), d⟩,      slope = Σ ab / Σ b²

The loss is the margin: the cross-entropy of a few misclassified images would outweigh that of all others.
A slope of 1 says that the gradient is the loss's; one of 1.3, that three tenths more change than it tells; b = 0
with a ≠ 0, that it is blocked. Each draw of the noise is the same on both sides of the difference and in b.

A loss that is bent within h moves a away from b too. There b is averaged over the segment from x − h·d to x + h·d
(Gauss–Legendre, 3 points): for a differentiable loss that average equals a, however bent it is (the fundamental
theorem of calculus), and for a masked gradient it does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gsem.evaluation.statistics import bootstrap
from gsem.losses import margin
from gsem.rng import derive_seed, generator, seeded

# How far from 1 the interval of a slope may lie.
WITHIN = 0.07
NEARLY = 0.04
# An interval wider than this says neither that the gradient is the loss's nor that it is not.
WIDE = 1.0
# Below so small a share of the differences, the derivative counts as none.
NOTHING = 0.01
# Relative rounding error of a float32 loss; differences that are not well above it say nothing.
ROUNDING = 1e-6
RESAMPLES = 2000

Answer = Callable[[Tensor], Tensor]
"""From an offset [b, …] of what is probed to logits [b, k]."""


@dataclass(frozen=True)
class Slope:
    """The comparison at one h."""

    h: float
    a: Float[np.ndarray, "n d"]
    """Central differences, of n images in d directions."""
    b: Float[np.ndarray, "n d"]
    """Derivatives by autograd."""
    rounding: float
    """What of a may be rounding."""
    slope: float | None = None
    low: float = 0.0
    high: float = 0.0
    """The slope's 95% bootstrap interval over images; no slope where b is nothing."""

    @property
    def silent(self) -> bool:
        """Whether the loss does not change at all, as far as float32 tells."""
        return _rms(self.a) < 10 * self.rounding and _rms(self.b) < 10 * self.rounding

    @property
    def blocked(self) -> bool:
        """Whether the loss changes and the gradient says that it does not."""
        return not self.silent and _rms(self.b) < NOTHING * _rms(self.a)

    @property
    def unclear(self) -> bool:
        """Whether the interval is too wide for an answer: a few images of many carry all of the gradient."""
        return self.slope is not None and self.high - self.low > WIDE

    def outside(self, by: float) -> bool:
        """Whether the interval lies outside [1 − by, 1 + by], or there is no derivative at all."""
        return self.blocked or (self.slope is not None and (self.high < 1 - by or self.low > 1 + by))

    def to_dict(self) -> dict[str, Any]:
        interval = {"low": self.low, "high": self.high} if self.slope is not None else {"low": None, "high": None}
        return {"h": self.h, "slope": self.slope, **interval, "blocked": self.blocked}


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def slopes(
    answer: Answer,
    zero: Float[Tensor, "b ..."],
    y: Tensor,
    hs: Sequence[float],
    *,
    draws: int,
    seed: int,
    directions: int = 2,
    along: bool = False,
) -> list[Slope]:
    """Compare derivative and differences at one batch.

    Args:
        answer: logits where the probed images (or features) are offset by its argument.
        zero: an offset of none.
        hs: half lengths of the differences, in the unit of the offset.
        draws: of the noise, common to everything.
        directions: random ±1 directions, beside the sign of the averaged gradient.
        along: average b over the segment, instead of taking it in its middle.
    """
    losses = _Losses(answer, y, draws, seed)
    grad, value = losses.gradient(zero)
    rng = generator(seed, "directions", device=zero.device)
    signs = [
        (torch.randint(0, 2, zero.shape, generator=rng, device=zero.device) * 2 - 1).to(zero.dtype)
        for _ in range(directions + 1)
    ]
    # Where the gradient is zero its sign is no direction: a random one stands in.
    signs[0] = torch.where(grad == 0, signs[0], grad.sign())
    found = []
    for h in hs:
        a, b = [], []
        for d in signs:
            a.append((losses(h * d) - losses(-h * d)) / (2 * h))
            b.append(losses.derivative(h, d) if along else _dot(grad, d))
        one, other = (torch.stack(each, 1).cpu().numpy() for each in (a, b))
        found.append(joined([Slope(h, one, other, ROUNDING * (1 + float(value.abs().mean())) / h)]))
    return found


def joined(parts: Sequence[Slope], *, beside: bool = False, seed: int = 0) -> Slope:
    """The comparison at the same h over the images of all parts, or (`beside`) over more points of the same images.

    The interval resamples images, each with all its points and directions.
    """
    axis = 1 if beside else 0
    a, b = np.concatenate([p.a for p in parts], axis), np.concatenate([p.b for p in parts], axis)
    found = Slope(parts[0].h, a, b, max(p.rounding for p in parts))
    if found.silent or found.blocked:
        return found
    ab, bb = (a * b).sum(1), (b * b).sum(1)

    def ratio(counts: np.ndarray) -> np.ndarray:
        return (counts @ ab) / np.maximum(counts @ bb, 1e-300)

    low, high = bootstrap(ratio, len(a), resamples=RESAMPLES, seed=seed, stream="slope")
    return replace(found, slope=float(ab.sum() / bb.sum()), low=low, high=high)


class _Losses:
    """The averaged loss and its gradient, every time on the same draws."""

    def __init__(self, answer: Answer, y: Tensor, draws: int, seed: int):
        self.answer, self.y, self.draws, self.seed = answer, y, draws, seed

    @torch.no_grad()
    def __call__(self, offset: Tensor) -> Tensor:
        total = torch.zeros(len(self.y), dtype=torch.float64, device=offset.device)
        for draw in range(self.draws):
            with seeded(derive_seed(self.seed, "draw", draw), offset.device):
                total += margin(self.answer(offset), self.y).double()
        return total / self.draws

    def gradient(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        grad, total = torch.zeros_like(offset), torch.zeros(len(self.y), device=offset.device)
        for draw in range(self.draws):
            probe = offset.detach().clone().requires_grad_()
            with seeded(derive_seed(self.seed, "draw", draw), offset.device), torch.enable_grad():
                value = margin(self.answer(probe), self.y)
                if value.requires_grad:
                    (part,) = torch.autograd.grad(value.sum(), probe, allow_unused=True)
                    grad += 0 if part is None else part
            total += value.detach()
        return grad / self.draws, total / self.draws

    def derivative(self, h: float, d: Tensor) -> Tensor:
        """⟨g, d⟩ averaged over the segment from −h·d to h·d."""
        nodes, weights = np.polynomial.legendre.leggauss(3)
        parts = [w / 2 * _dot(self.gradient(t * h * d)[0], d) for t, w in zip(nodes, weights, strict=True)]
        return torch.stack(parts).sum(0)


def _dot(grad: Tensor, d: Tensor) -> Tensor:
    return (grad * d).flatten(1).double().sum(1)
