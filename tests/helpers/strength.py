"""A fixed network on digits, and the images that each attack of pyautoattack, run alone, breaks: strength.npz.

    python tests/attacks/strength.py

makes the fixture anew (seeds are fixed; needs `pip install pyautoattack`). The network is trained to be robust, and
then its input passes through a map that goes up on the whole and down in between: signs of gradients mislead, and
some images are broken by FAB or by Square only.
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsem

FIXTURE = Path(__file__).with_name("strength.npz")
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
# Both sides': L∞ radius, steps of APGD and FAB (towards each of 9 classes in the targeted ones), queries of Square.
EPS, STEPS, QUERIES = 0.1, 60, 1000
IMAGES = 300


class Wavy(nn.Module):
    """x + a·sin(w·x)/w: its slope at the 17 grey levels of the digits is 1 + a, and between two of them 1 − a < 0."""

    def __init__(self, a: float = 1.2, w: float = 32 * math.pi):
        super().__init__()
        self.a, self.w = a, w

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a * torch.sin(self.w * x) / self.w


def network() -> nn.Sequential:
    """5,130 parameters, without training."""
    layers = [Wavy(), nn.Conv2d(1, 16, 3, 2), nn.Softplus(8), nn.Flatten(), nn.Linear(144, 32), nn.Softplus(8)]
    return nn.Sequential(*layers, nn.Linear(32, 10)).eval().requires_grad_(False)


def trained() -> nn.Sequential:
    """Adversarially, without the map: it would be learnt."""
    train = gsem.data.load("digits").training()[0]
    images = gsem.data.to_float(train.x)
    torch.manual_seed(0)
    whole = network().requires_grad_(True)
    model = whole[1:]
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(500):
        rows = torch.randint(len(images), (128,))
        x, y = images[rows], train.y[rows]
        offset = (torch.rand_like(x) * 2 - 1) * EPS
        for _ in range(4):
            offset.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model((x + offset).clamp(0, 1)), y), offset)
            offset = (offset.detach() + EPS / 2 * grad.sign()).clamp(-EPS, EPS)
        optimiser.zero_grad()
        F.cross_entropy(model((x + offset).clamp(0, 1)), y).backward()
        optimiser.step()
    return whole.requires_grad_(False)


def wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


def reference(model: nn.Module, x: Tensor, y: Tensor, part: str) -> Tensor:
    """Which images pyautoattack's attack breaks alone."""
    from pyautoattack import AutoAttack

    peer = AutoAttack(model, norm="Linf", eps=EPS, seed=0, version="custom", attacks=[part], device="cpu")
    peer.verbose = False
    peer.apgd.n_restarts = peer.fab.n_restarts = 1
    peer.apgd.n_iter = peer.apgd_targeted.n_iter = peer.fab.n_iter = STEPS
    peer.square.n_queries = QUERIES
    return wrong(model, peer.run_standard_evaluation(x, y, batch_size=IMAGES)[0], y)


def make() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, test = trained(), gsem.data.load("digits").test()
    x, y = gsem.data.to_float(test.x), test.y
    numbers = (~wrong(model, x, y)).nonzero()[:IMAGES, 0]
    assert len(numbers) == IMAGES
    x, y = x[numbers], y[numbers]
    broken = {part: reference(model, x, y, part) for part in PARTS}
    for part, which in broken.items():
        print(f"{part}: {int(which.sum())} of {IMAGES}")
    weights = {f"weight.{name}": value.numpy() for name, value in model.state_dict().items()}
    sets = {f"broken.{part}": which.numpy() for part, which in broken.items()}
    np.savez_compressed(FIXTURE, numbers=numbers.numpy(), **weights, **sets)


def load() -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """The network, the images [300, 1, 8, 8] that it classifies rightly, labels, and which each reference breaks."""
    test = gsem.data.load("digits").test()
    model = network()
    with np.load(FIXTURE, allow_pickle=False) as file:
        kept = {name: torch.from_numpy(file[name]) for name in file.files}
    model.load_state_dict({name.removeprefix("weight."): v for name, v in kept.items() if name.startswith("weight.")})
    numbers = kept["numbers"]
    return model, gsem.data.to_float(test.x)[numbers], test.y[numbers], {p: kept[f"broken.{p}"] for p in PARTS}


if __name__ == "__main__":
    make()
