"""Models and results whose accuracy is planted, and tiny data."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import gsem
from gsem.data import Dataset, Split
from gsem.evaluation.result import AttackScores, EvaluationResult


def small_digits() -> Dataset:
    """120 training digits, twelve of each class, and 40 test digits."""
    source = gsem.data.load("digits")
    train, test = source.read_train(), source.read_test()
    order = torch.argsort(train.y, stable=True)
    first = torch.cat([order[train.y[order] == k][:12] for k in range(10)])
    few = Split(train.x[first], train.y[first])
    return replace(source, read_train=lambda: few, read_test=lambda: Split(test.x[:40], test.y[:40]))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Halves(nn.Module):
    """Class 0 where the left half is brighter, 1 where the right is; a third class never wins."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., :2].mean((1, 2, 3)), x[..., 2:].mean((1, 2, 3))
        return torch.stack([left, right, left * 0 - 1], dim=1)


class Flipper(nn.Module):
    """`Halves`, which answers 1 for 0 and 0 for 1 in a share of the draws, whatever the image is."""

    def __init__(self, share: float = 0.3):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        logits = Halves()(x)
        flipped = torch.rand(len(x)) < self.share
        return torch.where(flipped[:, None], logits[:, [1, 0, 2]], logits)


class Killed(nn.Module):
    """A network whose gradient is zero everywhere."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.detach()) + 0 * x.sum((1, 2, 3))[:, None]


def halves(n: int, *, contrast: float = 0.6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images that `Halves` classifies rightly, with a difference of `contrast` between the halves."""
    y = torch.arange(n) % 2
    x = 0.5 + 0.1 * (torch.rand((n, 1, 4, 4), generator=rng(seed)) - 0.5)
    side = torch.where(y == 0, 1.0, -1.0)[:, None, None]
    x[:, 0, :, :2] += side * contrast / 2
    x[:, 0, :, 2:] -= side * contrast / 2
    return x.clamp(0, 1), y


def small_net() -> nn.Module:
    torch.manual_seed(2)
    return gsem.create_model("resnet10x16", num_classes=3, in_channels=1).eval()


def scores(correct: np.ndarray, label: str = "clean", **change) -> AttackScores:
    """Scores of images whose points were never moved."""
    n = len(correct)
    none = np.zeros(n)
    how = {"votes": none, "selection": correct, "single": np.zeros((n, 2), dtype=bool), "linf": none, "l2": none}
    cost = {"forwards": 0, "gradients": 0, "seconds": 0.0}
    return AttackScores(**{"name": label, "correct": correct} | how | cost | change)


def planted(correct: np.ndarray, draws: int, label: str = "clean", seed: int = 0) -> EvaluationResult:
    """A result of one attack."""
    return EvaluationResult([scores(correct, label)], np.zeros(len(correct), dtype=int), {"draws": draws, "seed": seed})
