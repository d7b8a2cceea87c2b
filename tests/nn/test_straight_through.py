"""A straight-through copy answers as the model does, and its gradient is that without the layer."""

import numpy as np
import pytest
import torch
from torch import nn

import gsem
from audited_models import Fronted, Quantise, digits, mlp
from gsem.attacks.suite import AttackSpec
from gsem.nn.surrogate import SmoothedGradient, repaired


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


class Half(nn.Module):
    """Every second row and column, black and white: it changes the shape and has no gradient."""

    def forward(self, x):
        return (x[..., ::2, ::2] > 0.5).float()


def test_several_layers_at_once():
    x, _ = digits(10)
    model = nn.Sequential(Quantise(5, 0.0), Quantise(9, 0.0), mlp()).eval()
    through = gsem.straight_through(model, ["0", "1"])
    assert torch.equal(through(x), model(x))
    assert torch.equal(grad(through, x), grad(mlp(), Quantise(9, 0.0)(Quantise(5, 0.0)(x))))
    with pytest.raises(ValueError, match=r"layer '2.1' lies inside layer '2'"):
        gsem.straight_through(model, ["2", "2.1"])


def test_a_surrogate_has_the_layers_output_and_the_modules_gradient():
    x, _ = digits(10)
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    model = Fronted(Half(), head).eval()
    passed = gsem.surrogate(model, "front", nn.AvgPool2d(2))
    assert torch.equal(passed(x), model(x)) and isinstance(model.front, Half)
    assert torch.allclose(grad(passed, x), grad(Fronted(nn.AvgPool2d(2), head), x))
    assert torch.equal(grad(gsem.fold(passed), x), grad(passed, x))
    with pytest.raises(ValueError, match=r"surrogate of layer 'front' returns \[10, 1, 8, 8\], the layer itself"):
        gsem.surrogate(model, "front", nn.Identity())(x)


def test_a_smoothed_gradient_is_that_of_the_smoothed_function():
    """E[(x + σε)³]' = 3 (x² + σ²); the output is the model's own."""

    class Cubed(nn.Module):
        def forward(self, x):
            return (x**3).sum((2, 3))

    x, std = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64), 0.3
    smoothed = SmoothedGradient(Cubed(), std, offsets=40_000)
    assert torch.equal(smoothed(x), Cubed()(x))
    assert torch.allclose(grad(smoothed, x), torch.full_like(x, 3 * (0.25 + std**2)), rtol=0.02)


def test_repairs_of_a_folded_model():
    x, _ = digits(10)
    model = Fronted(Quantise(5, 0.0), mlp()).eval()
    found = repaired(gsem.fold(model), through=["front"], smooth=0.0)
    assert torch.equal(grad(found, x), grad(gsem.straight_through(model, "front"), x))
    masked = nn.Sequential(gsem.GSeM(1, gradient="semi-masked"), mlp()).eval()
    assert repaired(masked, through=["0"])[0].gradient == "corrected" and masked[0].gradient == "semi-masked"


class Dead(nn.Module):
    """Features below 0.3 become 0."""

    def forward(self, x):
        return torch.where(x > 0.3, x, 0.0)


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 5), (4, 6, 3)])
def test_a_secant_is_the_slope_of_each_feature_on_its_own(shape):
    x, step = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.2
    model = nn.Sequential(Dead(), nn.Flatten(), nn.Linear(x[0].numel(), 3).double()).eval()
    found = repaired(model, through=["0"], secant=step)
    assert torch.equal(found(x), model(x))
    behind = x.clone().requires_grad_()
    (weights,) = torch.autograd.grad(model[1:](behind)[:, 0].sum(), behind)
    for image, out, weight in zip(x, grad(found, x), weights, strict=True):
        h = step * float(image.std())
        for at in np.ndindex(*image.shape):
            low, high = (value if value > 0.3 else 0.0 for value in (float(image[at]) - h, float(image[at]) + h))
            assert float(out[at]) == pytest.approx(float(weight[at]) * (high - low) / (2 * h))
    if x.ndim == 4:
        folded = repaired(gsem.fold(model, torch.float64), through=["0"], secant=step)
        assert torch.allclose(grad(folded, x).double(), grad(found, x), rtol=1e-4)


def test_a_secant_of_equal_features_is_finite_and_needs_layers():
    x = torch.full((2, 1, 4, 4), 0.5)
    model = nn.Sequential(Dead(), nn.Flatten(), nn.Linear(16, 3)).eval()
    assert grad(repaired(model, through=["0"], secant=0.1), x).isfinite().all()
    with pytest.raises(ValueError, match="secant is for the layers of through"):
        repaired(model, secant=0.1)
    attack = AttackSpec.parse("apgd:through=0:secant=0.1")
    assert str(attack) == "apgd:through=0:secant=0.1" and "secant0.1" in attack.label(eps=0.1, stochastic=False)
