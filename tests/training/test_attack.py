"""The attack of a training step: against foolbox in L2, and against the closed form of N-FGSM."""

from dataclasses import replace

import foolbox as fb
import pytest
import torch
import torch.nn.functional as F

import gsem
from gsem.nn.folded import fold
from gsem.rng import derive_seed, generator
from gsem.training import attack
from gsem.training.attack import adversarial_examples
from gsem.training.recipe import Recipe


@pytest.fixture
def task():
    model = gsem.create_model("resnet10x16", in_channels=1).double().eval()
    return fold(model, torch.float64), torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)


def test_steps_and_projection_in_l2_are_foolboxs(task, monkeypatch):
    folded, x, y = task
    monkeypatch.setattr(attack, "random_start", lambda x, eps, norm, rng, shard: x)
    recipe = Recipe(norm="L2", steps=5)
    for eps in (0.5, 3.0):
        x_adv, finite = adversarial_examples(recipe, folded, x, y, eps=eps, number=0)
        peer = fb.attacks.L2ProjectedGradientDescentAttack(abs_stepsize=eps / 4, steps=5, random_start=False)
        wanted = peer.run(fb.PyTorchModel(folded, bounds=(0, 1)), x, y, epsilon=eps)
        torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-12)
        assert bool(finite.all()) and (x_adv - x).flatten(1).norm(dim=1).max() <= eps * (1 + 1e-9)


def test_the_noise_start_is_the_closed_form_and_may_leave_the_ball(task):
    folded, x, y = task
    eps, recipe = 0.1, Recipe(attack_init="noise", steps=1, noise_radius=2.0)
    x_adv, _ = adversarial_examples(recipe, folded, x, y, eps=eps, number=3)
    seed = derive_seed(recipe.seed, "attack", 3)
    noise = torch.rand(x.shape, generator=generator(seed, "start", 0), dtype=x.dtype) * 2 - 1
    start = (x + 2 * eps * noise).clamp(0, 1).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(folded(start), y, reduction="sum"), start)
    wanted = (start + eps * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, wanted.detach(), rtol=0, atol=1e-12)
    far = (x_adv - x).abs().max()
    assert 2 * eps < far <= 3 * eps + 1e-12
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize(("norm", "init"), [("L2", "uniform"), ("L2", "gaussian"), ("Linf", "gaussian")])
@pytest.mark.parametrize("objective", ["ce", "trades"])
def test_other_starts_stay_in_the_ball(task, norm, init, objective):
    folded, x, y = task
    recipe = Recipe(norm=norm, attack_init=init, steps=3, objective=objective, adversarial_fraction=1.0)
    x_adv, _ = adversarial_examples(recipe, folded, x, y, eps=0.2, number=0)
    offset = (x_adv - x).flatten(1)
    length = offset.norm(dim=1) if norm == "L2" else offset.abs().amax(1)
    assert length.min() > 0.1 and length.max() <= 0.2 * (1 + 1e-9)


def test_validation_is_pgd_in_the_recipes_norm_also_after_training_from_noise(few_digits):
    from gsem.data import Split
    from gsem.training.step import Stepper
    from gsem.training.validation import Validator

    images = few_digits.read_test()
    for changes in ({"norm": "L2"}, {"attack_init": "noise", "steps": 1, "step": 0.3}, {"objective": "mart"}):
        recipe = replace(Recipe(model="resnet10x16", adversarial_fraction=1.0, precision="float32"), **changes)
        model = gsem.create_model(recipe.model, in_channels=1)
        stepper = Stepper(recipe, few_digits, 0.1, model, None)
        used = Validator(stepper, Split(images.x, images.y)).recipe
        assert (used.norm, used.attack_init, used.objective, used.steps) == (recipe.norm, "uniform", "ce", 10)
        assert used.attack_step(0.1) == pytest.approx(0.025)
