"""Networks of digits whose robustness, and whose faults, are known."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsem

EPS = 0.15


@cache
def digits(images: int = 100) -> tuple[Tensor, Tensor]:
    """Test digits, as many of each class."""
    test = gsem.data.load("digits").test()
    rows = gsem.data.balanced(test.y, images)
    return gsem.data.to_float(test.x[rows]), test.y[rows]


@contextmanager
def streams(seed: int) -> Iterator[None]:
    """The random streams of torch, numpy and Python start at `seed`, inside the block."""
    former = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
            yield
    finally:
        random.setstate(former[0])
        np.random.set_state(former[1])


def fitted(
    make: Callable[[], nn.Module],
    train: tuple[Tensor, Tensor],
    seed: int,
    *,
    steps: int,
    rate: float,
    attack: Callable[..., Tensor] | None = None,
    decay: bool = False,
) -> nn.Module:
    """A network in eval mode, trained for so many steps of Adam on batches of 128.

    Args:
        make: a new network, its weights drawn from torch's random stream.
        train: images [n, c, h, w] in 0 … 255, and labels.
        attack: (model, x, y, seed=) → the points to train on, in place of the images.
        decay: whether the learning rate falls to 0, as half of a cosine.
    """
    with streams(seed):
        model = make()
        optimiser = torch.optim.Adam(model.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps) if decay else None
        for step in range(steps):
            rows = torch.randint(len(train[0]), (128,))
            x, y = gsem.data.to_float(train[0][rows]), train[1][rows]
            if attack is not None:
                x = attack(model.eval(), x, y, seed=step)
            optimiser.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            optimiser.step()
            if schedule is not None:
                schedule.step()
    return model.eval().requires_grad_(False)


def _training_digits() -> tuple[Tensor, Tensor]:
    train = gsem.data.load("digits").training()[0]
    return train.held(), train.y


@cache
def mlp(seed: int = 0, *, robust: bool = False, hidden: int = 48) -> nn.Module:
    """A small network of digits, trained on clean images or on those of a short PGD."""
    attack = partial(gsem.attacks.pgd, eps=EPS, step=EPS / 2, steps=4, keep="last") if robust else None

    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    return fitted(make, _training_digits(), seed, steps=300, rate=3e-3, attack=attack)


@cache
def convolutional(seed: int, gradient: str | None) -> nn.Module:
    """A small convolutional network, trained on one-step adversarial digits; with a GSeM of that gradient, or none."""

    def make() -> nn.Module:
        stem = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
        middle = [] if gradient is None else [gsem.GSeM(6, gradient=gradient)]  # type: ignore[arg-type]
        head = [nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
        return nn.Sequential(*stem, *middle, *head)

    return fitted(make, _training_digits(), seed, steps=60, rate=1e-2, attack=partial(gsem.attacks.fgsm, eps=EPS))


class Quantise(nn.Module):
    """Images rounded to a few levels, which has no gradient, and a little noise."""

    def __init__(self, levels: int = 5, noise: float = 0.03):
        super().__init__()
        self.levels, self.noise = levels, noise

    def forward(self, x: Tensor) -> Tensor:
        x = (x * (self.levels - 1)).round() / (self.levels - 1)
        return x + self.noise * torch.randn_like(x) if self.noise else x


class Fronted(nn.Module):
    """Something in front of a network."""

    def __init__(self, front: nn.Module, network: nn.Module):
        super().__init__()
        self.front, self.network = front, network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.front(x))


class Sharp(nn.Module):
    """Probabilities of a softmax at a low temperature, in the forward itself."""

    def __init__(self, network: nn.Module, scale: float):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor) -> Tensor:
        return (self.network(x) * self.scale).softmax(1)


class Rippled(nn.Module):
    """Logits with a fine ripple of the image on top."""

    def __init__(self, network: nn.Module, height: float, frequency: float, seed: int):
        super().__init__()
        self.network, self.height, self.frequency = network, height, frequency
        self.wave = torch.randn((64, 10), generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + self.height * torch.sin(self.frequency * x.flatten(1) @ self.wave)


class Threshold(nn.Module):
    """Black and white: nothing in between has a gradient."""

    def __init__(self, at: float):
        super().__init__()
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.at).to(x.dtype) + 0 * x
