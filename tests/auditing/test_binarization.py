"""The binarization test: a planted point is found by a real attack, and not by one step."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import gsem
from audited_models import EPS, Fronted, Quantise, digits, mlp
from gsem.auditing.binarization import Binarized, Features, distinguishing, features_of, plant
from in_memory import InMemory


def binarized(model: nn.Module, attacks: str, **how):
    x, y = digits()
    return gsem.audit(model.eval(), x, y, attacks, eps=how.pop("eps", EPS), only=["binarization"], quick=True)[
        "binarization"
    ]


def test_the_features_are_what_the_last_linear_layer_is_given():
    x, _ = digits(10)
    flat, first, relu, last = mlp()
    features = features_of(mlp(), x)
    assert features.layer is last
    assert torch.equal(features(x), relu(first(flat(x))))
    head = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    assert torch.equal(features_of(head, x)(x), head(x))  # none: the logits


def test_a_point_anywhere_in_a_ball_is_known_for_its_images():
    x, _ = digits(60)
    eps = 0.1
    pixels = distinguishing(x, eps, "Linf")
    assert len(pixels) < 64
    weight, bias = torch.zeros(len(x), 48), torch.arange(len(x)).float()
    model = Binarized(Features(nn.Flatten(), None), x, eps, "Linf", torch.zeros(len(x), 64), bias)
    shuffled = torch.randperm(len(x))
    corner = (x + eps * torch.randint(0, 2, x.shape) * 2 - eps).clamp(0, 1)
    assert torch.equal(model(corner[shuffled])[:, 1] * 2, bias[shuffled])
    assert weight.shape == (60, 48)


@pytest.mark.parametrize("robust", [False, True])
def test_the_suite_finds_what_was_planted_and_one_step_does_not(robust: bool):
    model = mlp(robust=robust)
    suite = binarized(model, "apgd,apgd:loss=margin,square:queries=300")
    assert suite.outcome == "pass" and suite.figure >= 0.95
    assert suite.details["random_search"] < 0.5 and suite.details["planted_flips"] == 1
    one = binarized(model, "pgd:steps=1")
    assert one.outcome == "flag" and one.figure < suite.figure


def test_a_blocked_gradient_finds_nothing():
    check = binarized(Fronted(Quantise(17, 0.0), mlp()), "apgd")
    assert check.outcome != "pass"


def test_the_points_of_the_ball_are_not_all_in_memory():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.rand((6, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    how = {"eps": 0.1, "norm": "Linf", "seed": 0, "draws": 1, "batch_size": 6, "stochastic": False, "quick": True}
    with InMemory() as memory:
        plant(SimpleNamespace(model=model, on_progress=lambda text: None, **how), x)
    assert memory.most < 32 * 4 * x.numel()  # of 128 points for each image


def test_losses_that_need_more_classes_give_way():
    check = binarized(mlp(), "apgd:loss=dlr,apgd:targets=9,fab")
    assert check.details["attacks"] == ["apgd100-eot1-margin"]


def test_where_chance_finds_half_there_is_no_answer(monkeypatch):
    module = sys.modules["gsem.auditing.binarization"]
    monkeypatch.setattr(module, "_random_search", lambda ctx, planted: np.arange(len(planted.x)) % 2 == 0)
    check = binarized(mlp(), "apgd")
    assert check.outcome == "inconclusive" and "random search 50.5%" in check.reason and check.advice
