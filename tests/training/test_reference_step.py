"""The fast training step against the slow reference of benchmarks/: the same mathematics in float64."""

import importlib.util
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gsem
from gsem.attacks._core import random_start
from gsem.data import Dataset, Split
from gsem.nn.folded import fold
from gsem.rng import derive_seed, generator
from gsem.training.step import Stepper

spec = importlib.util.spec_from_file_location("reference", Path(__file__).parents[2] / "benchmarks" / "reference.py")
assert spec is not None and spec.loader is not None
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

EPS = 8 / 255
RECIPE = replace(
    gsem.RECIPES["gcat-published"],
    model="gsem-resnet10x16",
    steps=3,
    eot=4,
    draws=3,
    precision="float32",
    attack_precision="float32",
    augment="none",
)


@pytest.fixture
def coloured() -> Dataset:
    x = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    images = Split(x, torch.arange(8))
    return replace(gsem.data.load("digits"), shape=(3, 8, 8), read_train=lambda: images, read_test=lambda: images)


@pytest.mark.parametrize(("noise", "compiled"), [("frozen", False), ("off", False), ("frozen", True)])
def test_the_step_is_the_slow_references(coloured, noise, compiled, monkeypatch):
    # (What is compiled is captured and differentiated as on a GPU, but no code is generated: that takes minutes.)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    images = coloured.read_train()
    fast, slow = (gsem.create_model("gsem-resnet10x16").double() for _ in range(2))
    slow.load_state_dict(fast.state_dict())
    stepper = Stepper(RECIPE, coloured, EPS, fast, None, compile="on" if compiled else "off")
    # In float64 throughout, the folded model's gradients too.
    stepper.folded = fold(fast, torch.float64)
    if compiled:
        stepper.folded.compile_graph()
    stepper._augmented = lambda pixels, *_: pixels.double() / 255
    optimizer = torch.optim.SGD(
        slow.parameters(), RECIPE.learning_rate(0.0), momentum=RECIPE.momentum, weight_decay=RECIPE.weight_decay
    )
    for number in range(2):
        x, seed = images.x.double() / 255, derive_seed(RECIPE.seed, "attack", number)
        start = random_start(x[1::2], EPS, "Linf", generator(seed, "start", 0))
        with gsem.noise(fast, noise, seed=5):
            stepper(images.x, images.y, step=number, epoch=0.0, averaged=None)
        with gsem.noise(slow, noise, seed=5):
            reference.step(slow, optimizer, x, images.y, start, eps=EPS, steps=3, eot=4, draws=3)
    for (name, one), other in zip(fast.state_dict().items(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_the_reference_differentiates_the_expected_loss():
    model = gsem.create_model("gsem-resnet10x16").double().eval()
    x, y = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.arange(3)
    with gsem.noise(model, "frozen"):
        z = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
        assert torch.equal(reference.attack_gradient(model, x, y, nullcontext), expected)
