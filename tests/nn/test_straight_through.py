"""A straight-through copy answers as the model does, and its gradient is that without the layer."""

import pytest
import torch
from torch import nn

import gsem
from audited_models import Fronted, Quantise, digits, mlp


def grad(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x)[:, 0].sum(), x)[0]


def test_forward_is_the_models_and_backward_the_identity():
    x, _ = digits(10)
    model = Fronted(Quantise(5, 0.0), mlp()).eval()
    through = gsem.straight_through(model, "front")
    assert torch.equal(through(x), model(x))
    assert torch.equal(grad(through, x), grad(mlp(), Quantise(5, 0.0)(x)))
    assert grad(model, x).abs().max() == 0 and isinstance(model.front, Quantise)
    assert torch.equal(grad(gsem.fold(through), x), grad(through, x))


def test_noise_is_drawn_as_before():
    x, _ = digits(10)
    model = Fronted(Quantise(), mlp()).eval()
    answers = []
    for one in (model, gsem.straight_through(model, "front")):
        torch.manual_seed(3)
        answers.append(one(x))
    assert torch.equal(*answers)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="no layer 'fron'"):
        gsem.straight_through(Fronted(Quantise(), mlp()), "fron")
    with pytest.raises(ValueError, match="layer must name a layer inside the model"):
        gsem.straight_through(mlp(), "")
    x, _ = digits(2)
    with pytest.raises(ValueError, match=r"layer '1' turns \[2, 64\] into \[2, 48\]"):
        gsem.straight_through(mlp(), "1")(x)
