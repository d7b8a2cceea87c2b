"""Networks of digits whose robustness, and whose faults, are known."""

from functools import cache

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


@cache
def mlp(seed: int = 0, *, robust: bool = False, hidden: int = 48) -> nn.Module:
    """A small network of digits, trained on clean images or on those of a short PGD."""
    train = gsem.data.load("digits").training()[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(300):
            rows = torch.randint(len(train.x), (128,))
            x, y = gsem.data.to_float(train.x[rows]), train.y[rows]
            if robust:
                x = gsem.attacks.pgd(model, x, y, eps=EPS, step=EPS / 2, steps=4, keep="last", seed=step)
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    return model.eval().requires_grad_(False)


@cache
def convolutional(seed: int, gradient: str | None) -> nn.Module:
    """A small convolutional network, trained on one-step adversarial digits; with a GSeM of that gradient, or none."""
    train = gsem.data.load("digits").training()[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stem = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
        middle = [] if gradient is None else [gsem.GSeM(6, gradient=gradient)]  # type: ignore[arg-type]
        head = [nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
        model = nn.Sequential(*stem, *middle, *head)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(60):
            rows = torch.randint(len(train.x), (128,))
            x, y = gsem.data.to_float(train.x[rows]), train.y[rows]
            x_adv = gsem.attacks.fgsm(model.eval(), x, y, eps=EPS, seed=step)
            optimiser.zero_grad()
            F.cross_entropy(model.train()(x_adv), y).backward()
            optimiser.step()
    return model.eval().requires_grad_(False)


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


class Scaled(nn.Module):
    """Logits so large that the cross-entropy's gradient underflows."""

    def __init__(self, network: nn.Module, scale: float):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * self.scale


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
