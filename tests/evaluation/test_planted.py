"""Defences whose true worth is planted, through the whole evaluation."""

import math

import pytest
import torch
from torch import Tensor, nn

import gsem
from gsem.evaluation.evaluate import evaluate
from planted import Flipper, Killed, halves

SIDE = torch.tensor([1.0, 1.0, -1.0, -1.0])  # of a 4 × 4 image
SEVERAL = "clean,pgd:steps=5,apgd:steps=5,apgd:steps=5:targets=2,square:queries=15"


@pytest.fixture(autouse=True)
def _coarse_intervals(monkeypatch):
    """Only means are looked at: intervals from 10,000 resamples of 2000 images would take most of the time."""
    monkeypatch.setattr("gsem.evaluation.result.BOOTSTRAP", 500)


# --- noise that no perturbation influences, or only up to a limit ------------------------------------------------


@pytest.mark.filterwarnings("ignore:fold runs Flipper", "ignore:the targeted DLR loss needs 4 classes")
def test_the_worst_of_many_attacks_on_a_flipper_gains_nothing_and_a_persistent_attacker_needs_none():
    """2000 images: the standard error of the mean of 100 draws each is 0.1 points."""
    x, y = halves(2000)
    result = evaluate(Flipper(), x, y, SEVERAL, eps=0.1, batch_size=2000)
    assert result.metadata["stochastic"] and len(result.scores) == 5
    clean, worst = (result.expected(name).mean for name in ("clean", "worst"))
    assert worst == pytest.approx(0.70, abs=0.01)
    assert clean - worst == pytest.approx(0, abs=0.01)
    for name in ("clean", "worst"):
        assert result.persistent(name, 1).mean == pytest.approx(0.70, abs=0.01)
        assert result.persistent(name, 10).mean == pytest.approx(0.70**10, abs=0.01)
        assert result.persistent(name, 100).mean == pytest.approx(0, abs=1e-3)
    # The same choice on the draws that score it would find a gain where there is none.
    chosen = min(s.correct.mean() for s in result.scores) / 100
    lucky = torch.stack([torch.from_numpy(s.correct) for s in result.scores]).amin(0).double().mean() / 100
    assert lucky < 0.66 < chosen


class Limited(nn.Module):
    """Wrong with a probability that rises with the contrast of the halves, from 0 to 0.4 and no further."""

    def forward(self, x: Tensor) -> Tensor:
        lean = x[..., 2:].mean((1, 2, 3)) - x[..., :2].mean((1, 2, 3))
        p = (0.1 + 3 * lean).clamp(0, 0.4)  # 0.1 at the image; the cap is reached at half of eps
        u = torch.rand_like(lean)
        return torch.stack([u - p, p - u, -torch.ones_like(u)], dim=1)


@pytest.mark.filterwarnings("ignore:fold runs Limited", "ignore:the targeted DLR loss needs 4 classes")
def test_a_best_perturbation_that_flips_four_draws_of_ten_leaves_60_percent():
    x, _ = halves(800, contrast=0)
    x -= (x[..., :2].mean((1, 2, 3), keepdim=True) - x[..., 2:].mean((1, 2, 3), keepdim=True)) / 2 * SIDE
    y = torch.zeros(800, dtype=torch.int64)
    result = evaluate(Limited(), x, y, SEVERAL, eps=0.1, batch_size=800)
    assert result.expected("clean").mean == pytest.approx(0.90, abs=0.01)
    assert result.expected("worst").mean == pytest.approx(0.60, abs=0.02)
    assert result.persistent("worst", 100).mean == pytest.approx(0, abs=1e-3)


# --- gradients that are taken away from a network that is not robust ---------------------------------------------


FRAGILE = 0.2


@pytest.fixture(scope="module")
def fragile() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained on digits without any defence, and 100 test digits that it gets right."""
    source = gsem.data.load("digits")
    train, test = source.training()[0], source.test()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(300):
            rows = torch.randint(len(train.x), (128,))
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(gsem.data.to_float(train.x[rows])), train.y[rows]).backward()
            optimiser.step()
    model.eval().requires_grad_(False)
    x, y = gsem.data.to_float(test.x), test.y
    right = (model(x).argmax(1) == y).nonzero()[:100, 0]
    return model, x[right], y[right]


def test_a_killed_gradient_stops_pgd_and_neither_random_search_nor_labels_only(fragile):
    network, x, y = fragile
    kwargs = {"eps": FRAGILE, "batch_size": 100}
    assert evaluate(network, x, y, "pgd:steps=20", **kwargs).expected("worst").mean < 0.05  # it is not robust at all
    result = evaluate(Killed(network), x, y, "pgd:steps=20,square:queries=1000,rays:queries=1500", **kwargs)
    clean, pgd, square, rays = (result.expected(s.name).mean for s in result.scores)
    assert clean == 1 and pgd > 0.9
    assert square < 0.05 and rays < 0.05
    assert result.expected("worst").mean <= min(square, rays)


class Quantised(nn.Module):
    """Images rounded to a few levels, which has no gradient, and a little noise on top, in front of a network."""

    def __init__(self, network: nn.Module, levels: int = 5, noise: float = 0.03):
        super().__init__()
        self.network, self.levels, self.noise = network, levels, noise

    def forward(self, x: Tensor) -> Tensor:
        x = (x * (self.levels - 1)).round() / (self.levels - 1)
        return self.network(x + self.noise * torch.randn_like(x))


@pytest.mark.filterwarnings("ignore:fold runs Quantised")
def test_quantise_and_noise_holds_against_plain_pgd_only(fragile):
    network, x, y = fragile
    kwargs = {"eps": FRAGILE, "batch_size": 100}
    listed = "pgd:steps=20:eot=1,square:queries=300:eot=5,transfer:steps=30:eot=5"
    result = evaluate(Quantised(network).eval(), x, y, listed, **kwargs, source_models={"bare": network})
    assert result.metadata["stochastic"]
    _, pgd, square, transfer = (result.expected(s.name).mean for s in result.scores)
    assert pgd > 0.9 and transfer < 0.05 and square < 0.15
    assert result.expected("worst").mean < 0.05


# --- no noise at all ---------------------------------------------------------------------------------------------


def test_the_accuracies_of_a_deterministic_model_are_one(fragile):
    network, x, y = fragile
    y = torch.where(torch.arange(len(y)) < 7, (y + 1) % 10, y)
    result = evaluate(network, x, y, "clean,pgd:steps=5,square:queries=50", eps=0.05)
    assert not result.metadata["stochastic"] and result.metadata["noise"] == ["fresh"]
    for name in (*(s.name for s in result.scores), "worst"):
        expected = result.expected(name)
        assert 0 < expected.mean < 1 and math.isfinite(expected.low)
        assert result.vote(name) == expected == result.as_published(name)
        assert all(result.persistent(name, sends) == expected for sends in (1, 10, 100))
    assert result.expected("clean").mean == 0.93
    assert result.expected("worst").mean <= min(result.expected(s.name).mean for s in result.scores)
