"""Steps of trainings in float64, for any number of processes. Started by test_distributed_training.py.

    python distributed_steps.py FOLDER

Writes FOLDER/SIZE-RANK.pt: for each case the weights, their average and the sums after three steps, on this process.
"""

import copy
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import gsem
from gsem.data import Split
from gsem.distributed import current
from gsem.nn.folded import fold
from gsem.training.step import Average, Stepper
from gsem.training.validation import Validator

BASE = gsem.Recipe(
    steps=2,
    lr=0.05,
    batch_size=7,  # not divisible by 2 or 3
    epochs=3,
    precision="float32",
    attack_precision="float32",
    augment="autoaugment",
    flip=True,
    clip=1.0,
)
CASES = {
    "ce": replace(BASE, adversarial_fraction=0.5, draws=2, eot=2, ema=0.9, collapse=0.5),
    "one attacked row": replace(BASE, adversarial_fraction=0.2, augment="resized-crop"),
    "awp": replace(BASE, adversarial_fraction=1.0, draws=2, awp=0.01, attack_init="gaussian"),
    "mart": replace(BASE, objective="mart", adversarial_fraction=1.0, awp=0.01, draws=2, norm="L2", optimizer="adamw"),
    "trades": replace(BASE, objective="trades", adversarial_fraction=1.0, awp=0.01, swa_from=0, augment="crop"),
}


class Small(nn.Module):
    """With a GSeM whose statistics stay, and a weight that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.gsem = gsem.GSeM(4)
        self.unused = nn.Linear(2, 2)
        self.linear = nn.Linear(4, 5)

    def train(self, mode: bool = True) -> "Small":
        super().train(mode)
        self.gsem.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gsem(self.conv(x.double())).mean((2, 3)))


def images(n: int) -> Split:
    rng = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=rng)
    return Split(x, torch.randint(0, 5, (n,), generator=rng))


def after_steps(recipe: gsem.Recipe) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Small().double()
    average = Average(model, copy.deepcopy(model), recipe.ema, recipe.swa_from is not None)
    stepper = Stepper(recipe, gsem.data.load("digits"), 8 / 255, model, average)
    stepper.folded = fold(model, torch.float64)
    data = images(21)
    with gsem.noise(model, "frozen", seed=1):
        for step in range(3):
            batch = Split(data.x[step * 7 : step * 7 + 7], data.y[step * 7 : step * 7 + 7])
            rows = current().rows(7)
            stepper(batch.x[rows], batch.y[rows], step=step, epoch=1.0, averaged=step, batch=7)
    sums = {name: getattr(stepper, name) for name in ("sums", "hits", "longest", "finite")}
    return {"model": dict(model.state_dict()), "average": dict(average.model.state_dict()), "sums": sums}


class Normalised(nn.Module):
    """A BatchNorm that sees the images themselves."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(x.double()).square().mean((2, 3)))


def statistics() -> dict[str, Tensor]:
    """Of a BatchNorm after a step of two draws on unequal shares of a batch."""
    recipe = replace(BASE, adversarial_fraction=0.0, draws=2)
    model = Normalised().double()
    stepper = Stepper(recipe, gsem.data.load("digits"), 8 / 255, model, None)
    batch, rows = images(7), current().rows(7)
    stepper(batch.x[rows], batch.y[rows], step=0, epoch=1.0, averaged=None, batch=7)
    return dict(model.bn.named_buffers())


def validated() -> dict[str, float]:
    """Accuracies of an untrained stochastic network on three batches of images."""
    torch.manual_seed(0)
    model = gsem.create_model("gsem-resnet10x16", num_classes=5)
    stepper = Stepper(BASE, gsem.data.load("digits"), 0.1, model, None)
    return Validator(stepper, images(520))(model)


def everything() -> dict[str, Any]:
    return {name: after_steps(recipe) for name, recipe in CASES.items()} | {
        "statistics": statistics(),
        "validated": validated(),
    }


if __name__ == "__main__":
    found = everything()
    torch.save(found, f"{sys.argv[1]}/{current().size}-{current().rank}.pt")
