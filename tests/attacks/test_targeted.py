"""Targeted attacks: towards classes, against foolbox, against closed forms, and against the untargeted attack."""

import foolbox as fb
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import gsem
from gsem.attacks import Step, apgd, cw, fab, fgsm, pgd, square
from landscapes import Linear, images, rng, size, zeros

PGD = {"step": 0.03, "steps": 7}


@pytest.mark.parametrize("name", ["resnet10x16", "gsem-resnet10x16"])
def test_pgd_is_equal_to_foolbox_bit_by_bit(name):
    torch.manual_seed(2)
    model, x = gsem.create_model(name, in_channels=1).eval(), images()
    y, target = torch.arange(16) % 10, (torch.arange(16) + 3) % 10
    attack = fb.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=0.03, steps=7, random_start=False)
    with gsem.noise(model, "frozen", seed=1):
        goal = fb.criteria.TargetedMisclassification(target)
        reference, _, _ = attack(fb.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, goal, epsilons=0.1)
        x_adv = pgd(model, x, y, eps=0.1, **PGD, init=x, target=target, keep="last")
        assert torch.equal(x_adv, reference)
        assert not torch.equal(x_adv, pgd(model, x, y, eps=0.1, **PGD, init=x, keep="last"))
        search = gsem.fold(model)
        torch.testing.assert_close(
            pgd(model, x, y, eps=0.1, step=0.03, steps=1, init=x, target=target, search=search),
            pgd(model, x, y, eps=0.1, step=0.03, steps=1, init=x, target=target),
        )


ATTACKS = {
    "fgsm": (fgsm, {}),
    "pgd": (pgd, PGD | {"keep": "best"}),
    "pgd-margin": (pgd, PGD | {"loss": "margin", "restarts": 2}),
    "apgd": (apgd, {"steps": 8, "loss": "margin"}),
    "fab": (fab, {"steps": 6, "restarts": 2}),
    "square": (square, {"queries": 60}),
    "cw": (cw, {"steps": 8, "lr": 0.05}),
}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_of_two_classes_towards_the_other_is_away_from_the_label(name, norm):
    attack, how = ATTACKS[name]
    model, x, y = Linear(torch.randn((2, 64), generator=rng())), images(), torch.arange(16) % 2
    how = how | {"eps": 0.05 if norm == "Linf" else 0.4, "norm": norm}
    away, towards = attack(model, x, y, **how), attack(model, x, y, **how, target=1 - y)
    assert not torch.equal(away, x)
    torch.testing.assert_close(towards, away, rtol=0, atol=1e-5)


def least(model: Linear, x: Tensor, target: int) -> float:
    """The L∞ distance of the nearest image in [0, 1] that a linear model takes for the target: a linear program."""
    w, b = model.weight.detach().double().numpy(), model.bias.detach().double().numpy()
    flat, d = x.flatten().double().numpy(), x.numel()
    others = [k for k in range(len(w)) if k != target]
    # Of (offset, radius): the radius is minimised; −radius ≤ offset ≤ radius; no other logit is above the target's.
    box = np.vstack([np.hstack([sign * np.eye(d), -np.ones((d, 1))]) for sign in (1, -1)])
    behind = np.hstack([w[others] - w[target], np.zeros((len(others), 1))])
    room = (w[target] - w[others]) @ flat + b[target] - b[others]
    bounds = [*zip(-flat, 1 - flat, strict=True), (0, None)]
    found = linprog(np.eye(d + 1)[d], np.vstack([box, behind]), np.concatenate([np.zeros(2 * d), room]), bounds=bounds)
    return float(found.fun)


def test_of_four_linear_classes_every_attack_reaches_what_can_be_reached_and_fab_the_nearest():
    model, x = Linear(torch.randn((4, 16), generator=rng())), images(side=4)
    y = model(x).argmax(1)
    target = (y + 1 + torch.arange(16) % 3) % 4
    nearest = torch.tensor([least(model, one, int(t)) for one, t in zip(x, target, strict=True)])
    eps = float(nearest.median())
    reachable, too_far = nearest < 0.9 * eps, nearest > eps + 1e-4
    assert reachable.sum() >= 5 and too_far.sum() >= 5
    for attack, how in (
        (pgd, {"step": eps / 10, "steps": 60, "keep": "best"}),
        (pgd, {"step": eps / 10, "steps": 60, "keep": "best", "loss": "margin"}),
        (apgd, {"steps": 60, "restarts": 2}),
        (fab, {"steps": 40}),
        (square, {"queries": 1500}),
        (cw, {"steps": 60, "norm": "Linf"}),
    ):
        x_adv = attack(model, x, y, eps=eps, target=target, **how)
        taken = model(x_adv).argmax(1) == target
        assert taken[reachable].all() and not taken[too_far].any()
        assert size(x_adv, x, "Linf").max() <= eps + 1e-6
    x_adv = fab(model, x, y, eps=None, target=target, steps=60)
    distance = size(x_adv, x, "Linf")
    assert (model(x_adv).argmax(1) == target).all() and (distance >= nearest - 1e-4).all()
    # FAB sees one plane at a time: it is exact where one plane alone is in the way.
    gaps, w = model(x).amax(1) - model(x)[torch.arange(16), target], model.weight
    alone = gaps / (w[y] - w[target]).abs().sum(1)
    one = (nearest - alone).abs() < 1e-4
    assert one.sum() >= 5 and (distance[one] <= 1.05 * nearest[one] + 1e-4).all()
    assert (distance <= 1.5 * nearest).all()


def test_an_image_that_is_taken_for_its_target_is_left_alone():
    model, x = Linear(torch.randn((4, 64), generator=rng())), images()
    there = model(x).argmax(1)
    for attack, how in list(ATTACKS.values())[3:]:
        assert torch.equal(attack(model, x, zeros(x), eps=0.1, target=there, norm="L2", **how), x)
    nearest = cw(model, x, zeros(x), target=there)  # unbounded
    assert torch.equal(nearest, x)


class Noisy(nn.Module):
    """Linear, with noise on the logits of each draw."""

    def __init__(self, noise: float):
        super().__init__()
        self.linear, self.noise = Linear(torch.randn((4, 64), generator=rng())), noise

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x)
        return logits + self.noise * torch.randn_like(logits)


def test_a_stochastic_model_is_broken_where_every_draw_is_the_target():
    model, x = Noisy(0.3), images()
    target = (model.linear(x).argmax(1) + 1) % 4
    seen: list[Step] = []
    x_adv = apgd(model, x, zeros(x), eps=0.2, target=target, steps=10, eot=4, on_step=seen.append)
    with torch.no_grad():
        share = torch.stack([model(x_adv).argmax(1) == target for _ in range(50)]).double().mean(0)
    assert share.min() > 0.9
    first = next(s for s in seen if len(s.rows) == 16)
    assert first.wrong.max() <= 1 and first.wrong.mean() < 0.8
    # The loss that is raised is that of the target, negated.
    assert (first.loss < 0).all()


def test_targets_are_labels_one_for_all_or_an_array():
    model, x = Linear(torch.randn((4, 64), generator=rng())), images()
    plain = pgd(model, x, zeros(x), eps=0.1, **PGD, target=torch.full((16,), 3))
    for target in (3, np.full(16, 3), np.full(16, 3, dtype=np.uint8)):
        assert torch.equal(pgd(model, x, zeros(x), eps=0.1, **PGD, target=target), plain)
    for target, message in (
        (4, "image 0 has target 4, but the model has 4 classes"),
        (torch.full((15,), 3), "target must be 16 int64 labels"),
        ([3] * 16, "target must be 16 labels, a tensor or a numpy array, not a list"),
    ):
        with pytest.raises(ValueError, match=message):
            square(model, x, zeros(x), eps=0.1, target=target)
    for attack in (apgd, fab):
        with pytest.raises(ValueError, match=r"give target, .*, or targets, .*not both"):
            attack(model, x, zeros(x), eps=0.1, target=3, targets=2)
    with pytest.raises(ValueError, match="attack 'pgd' has no option 'target'"):
        gsem.evaluate(model, x, zeros(x), "pgd:target=3", eps=0.1)
