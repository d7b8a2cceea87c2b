"""Noise that attacks do not average over, and robustness that vanishes once the noise is known."""

import torch
from torch import nn

import gsem
from audited_models import EPS, Fronted, Quantise, digits, mlp


def test_noise_that_an_attack_does_not_average_over_is_flagged():
    model = Fronted(Quantise(noise=0.1), mlp()).eval()
    x, y = digits()
    how = {"eps": EPS, "quick": True, "only": ["randomness"]}
    assert gsem.audit(model, x, y, "pgd:steps=5:eot=1", **how)["randomness"].outcome == "flag"
    assert gsem.audit(model, x, y, "pgd:steps=5", **how)["randomness"].outcome == "pass"
    assert gsem.audit(mlp(), x, y, "pgd:steps=5:eot=1", **how)["randomness"].outcome == "pass"


class Hidden(nn.Module):
    """A network behind large secret shifts: what breaks it under one draw does not under another."""

    def __init__(self, network: nn.Module, noise: float):
        super().__init__()
        self.network, self.noise = network, noise

    def forward(self, x):
        return self.network(x + self.noise * torch.randn_like(x))


def test_robustness_that_is_not_knowing_the_noise_vanishes_with_it():
    x, y = digits()
    how = {"eps": 0.2, "quick": True, "only": ["noise"]}
    check = gsem.audit(Hidden(mlp(), 0.35).eval(), x, y, "apgd:steps=20:eot=5", **how)["noise"]
    fresh, frozen = (check.details[key]["attacked"]["accuracy"] for key in ("fresh", "frozen"))
    assert frozen < fresh and check.figure < 1
    assert check.outcome == ("flag" if check.figure < 0.5 else "pass")
