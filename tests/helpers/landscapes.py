"""Models whose answer is known, and images to attack them with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Logits W·x + b of the flat image."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


class Landscape(nn.Module):
    """Two classes whose margin, for label 0, is f(x): wrong where f > 0."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        value = self.f(x.flatten(1))
        return torch.stack([torch.zeros_like(value), value], dim=1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(b: int = 16, c: int = 1, side: int = 8, seed: int = 1) -> Tensor:
    return torch.rand((b, c, side, side), generator=rng(seed))


def pixel(*values: float) -> Tensor:
    """Images of one pixel."""
    return torch.tensor(values)[:, None, None, None]


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64)


class Quantised(nn.Module):
    """What is in front of `model` has no gradient, and hardly changes an image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x.detach() * 31).round() / 31)


def size(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    offset = (x_adv - x).flatten(1).double()
    return offset.abs().amax(1) if norm == "Linf" else offset.norm(dim=1)
