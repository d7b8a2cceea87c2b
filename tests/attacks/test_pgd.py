"""PGD against its peers, against closed forms, and on planted landscapes whose answer is known."""

from itertools import pairwise

import foolbox as fb
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gsem
from gsem.attacks import NotFinite, Step, counting, pgd
from gsem.attacks._core import expected, expected_gradient
from gsem.attacks.suite import AttackSpec
from gsem.losses import LOSSES, margin
from gsem.rng import seeded
from landscapes import Landscape, Linear, images, pixel, rng, zeros

CPU = torch.device("cpu")


def small(name: str = "resnet10x16") -> nn.Module:
    """A network whose gradient is not the same everywhere; its noise follows `gsem.noise`."""
    torch.manual_seed(2)
    return gsem.create_model(name, in_channels=1).eval()


NETWORKS = ["resnet10x16", "gsem-resnet10x16", "gsem-wideresnet10x2"]
HOW = {"eps": 0.1, "step": 0.03, "steps": 7}


# --- peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_foolbox_bit_by_bit_from_the_image_itself(name):
    model, x, y = small(name), images(), torch.arange(16) % 10
    attack = fb.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=0.03, steps=7, random_start=False)
    with gsem.noise(model, "frozen", seed=1):
        reference, _, _ = attack(fb.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=0.1)
        assert torch.equal(pgd(model, x, y, **HOW, init=x, keep="last"), reference)
    assert not torch.equal(reference, x)


@pytest.mark.parametrize("name", NETWORKS[:2])
def test_equal_to_foolbox_bit_by_bit_from_the_same_random_start(name):
    import eagerpy as ep

    model, x, y = small(name), images(), torch.arange(16) % 10
    start = (x + 0.2 * (torch.rand(x.shape, generator=rng(3)) - 0.5)).clamp(0, 1)

    class FromOurs(fb.attacks.LinfProjectedGradientDescentAttack):
        def get_random_start(self, x0, epsilon):
            return ep.astensor(start)

    attack = FromOurs(abs_stepsize=0.03, steps=7, random_start=True)
    with gsem.noise(model, "frozen", seed=1):
        reference, _, _ = attack(fb.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=0.1)
        assert torch.equal(pgd(model, x, y, **HOW, init=start, keep="last"), reference)


def test_equal_to_art_but_for_rounding():
    """ART adds up perturbations, we move points: pixels differ in the last bit, and rarely by a step."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    model, x, y = small(), images(96), torch.arange(96) % 10
    metadata = {"input_shape": (1, 8, 8), "nb_classes": 10, "clip_values": (0, 1), "device_type": "cpu"}
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), **metadata)
    attack = ProjectedGradientDescent(
        classifier, np.inf, eps=0.1, eps_step=0.03, max_iter=7, num_random_init=0, batch_size=96, verbose=False
    )
    reference = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    x_adv = pgd(model, x, y, **HOW, init=x, keep="last")
    assert ((x_adv - reference).abs() < 1e-6).double().mean() >= 0.9999
    with torch.no_grad():
        assert torch.equal(model(x_adv).argmax(1), model(reference).argmax(1))


# --- closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("eps", [0.02, 0.3])
def test_two_linear_classes_linf(loss, eps):
    w = torch.randn((2, 64), generator=rng())
    x, y = images(), torch.arange(16) % 2
    best = (x + eps * (w[1 - y] - w[y]).sign().view_as(x)).clamp(0, 1)
    x_adv = pgd(Linear(w), x, y, eps=eps, step=eps / 2, steps=5, loss=loss, keep="last")
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-6)


def test_many_linear_classes_linf():
    """The margin is a maximum of linear functions: its optimum over the box is the best of their optima."""
    w, b = torch.randn((4, 4), generator=rng()), 0.1 * torch.randn(4, generator=rng(1))
    model, x, y = Linear(w, b), images(side=2), torch.arange(16) % 4
    best = torch.full((16,), float("-inf"))
    with torch.no_grad():
        for k in range(4):
            corner = (x + 0.2 * (w[k] - w[y]).sign().view_as(x)).clamp(0, 1)
            best = torch.maximum(best, margin(model(corner), y))
        x_adv = pgd(model, x, y, eps=0.2, step=0.1, steps=5, restarts=40, loss="margin", keep="last")
        reached = margin(model(x_adv), y)
    remain = best < 0  # the search stops for an image once it is broken
    assert remain.any() and (~remain).any()
    torch.testing.assert_close(reached[remain], best[remain])
    assert (reached[~remain] > 0).all()


@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_two_linear_classes_l2(eps):
    w = torch.randn((2, 64), generator=rng())
    x, y = 0.4 + 0.2 * images(), torch.arange(16) % 2
    direction = (w[1 - y] - w[y]).view_as(x)
    best = x + eps * direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
    assert best.min() > 0 and best.max() < 1  # nothing is clipped
    x_adv = pgd(Linear(w), x, y, eps=eps, step=eps / 2, steps=60, norm="L2", keep="last")
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-5)


def test_a_zero_gradient_moves_nothing():
    x = images()
    for norm in ("Linf", "L2"):
        x_adv = pgd(Linear(torch.zeros(3, 64)), x, zeros(x), eps=0.1, step=0.1, steps=2, norm=norm, init=x)
        assert torch.equal(x_adv, x)


# --- which point is kept -----------------------------------------------------------------------------------------


def test_best_finds_the_iterate_that_the_last_has_left():
    # The gradient leads right everywhere, but only [0.64, 0.66] is wrong.
    def f(x: Tensor) -> Tensor:
        return x[:, 0] - x[:, 0].detach() + ((x[:, 0] - 0.65).abs() < 0.01).float() - 0.5

    model, x = Landscape(f), pixel(0.5, 0.5)
    how = {"eps": 0.4, "step": 0.05, "steps": 6, "loss": "margin", "init": x}
    torch.testing.assert_close(pgd(model, x, zeros(x), **how, keep="last"), pixel(0.8, 0.8))
    torch.testing.assert_close(pgd(model, x, zeros(x), **how, keep="best"), pixel(0.65, 0.65))


def test_the_defaults_are_those_of_the_suite():
    model, x, y = small(), images(), torch.arange(16) % 10
    how = {"eps": 0.1, "norm": "Linf", "stochastic": False, "seed": 3, "source_models": {}}
    suites = AttackSpec.parse("pgd:steps=7").run(model, x, y, **how)
    ours = pgd(model, x, y, eps=0.1, step=0.025, steps=7, seed=3)
    assert torch.equal(ours, suites)
    assert not torch.equal(ours, pgd(model, x, y, eps=0.1, step=0.025, steps=7, seed=3, keep="last"))


def test_best_judges_the_final_iterate_and_the_start_too():
    def rising(x: Tensor) -> Tensor:
        return x[:, 0]

    def falling(x: Tensor) -> Tensor:
        return 2 * x[:, 0].detach() * -1 + x[:, 0]  # its gradient lies

    x = pixel(0.5)
    how = {"eps": 0.2, "step": 0.1, "steps": 2, "loss": "margin", "keep": "best", "stop_broken": False, "init": x}
    torch.testing.assert_close(pgd(Landscape(rising), x, zeros(x), **how), pixel(0.7))
    torch.testing.assert_close(pgd(Landscape(falling), x, zeros(x), **how), x)


def test_wrong_in_every_draw_comes_before_a_higher_mean_loss():
    # At 0.6 half the draws are wrong by far; at 0.7 every draw is wrong, barely; elsewhere none is.
    def f(x: Tensor) -> Tensor:
        x = x[:, 0]
        lucky = torch.where(torch.rand(len(x)) < 0.5, 10.0, -1.0)
        value = torch.where((x - 0.6).abs() < 0.01, lucky, torch.where((x - 0.7).abs() < 0.01, 0.1, -1.0))
        return x - x.detach() + value

    x = pixel(0.5, 0.5)
    how = {"eps": 0.4, "step": 0.1, "steps": 4, "loss": "margin", "eot": 16, "keep": "best", "init": x}
    seen: list[Step] = []
    x_adv = pgd(Landscape(f), x, zeros(x), **how, on_step=seen.append)
    assert (seen[1].loss > 1).all() and (seen[1].wrong < 1).all()
    torch.testing.assert_close(seen[2].loss, torch.full((2,), 0.1))
    torch.testing.assert_close(x_adv, pixel(0.7, 0.7))


@pytest.mark.parametrize("name", NETWORKS[:2])
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_more_effort_is_never_worse(name, loss):
    model, x, y = small(name), images(), torch.arange(16) % 10

    def quality(**how) -> Tensor:
        """Loss of the result; misclassified first, as the attack orders points."""
        logits = model(pgd(model, x, y, eps=0.1, step=0.08, steps=4, loss=loss, seed=5, stop_broken=False, **how))
        return LOSSES[loss](logits, y) + 1000.0 * (logits.argmax(1) != y)

    with gsem.noise(model, "frozen", seed=1), torch.no_grad():
        last, best = quality(keep="last"), quality(keep="best")
        two, five = quality(restarts=2, keep="last"), quality(restarts=5, keep="last")
        five_best = quality(restarts=5, keep="best")
    for lower, higher in ((last, best), (last, two), (two, five), (five, five_best), (best, five_best)):
        assert (higher >= lower).all()
    assert (five_best > last).any()


def test_the_search_model_gives_directions_only():
    w = torch.randn((2, 64), generator=rng())
    x, y = images(), torch.arange(16) % 2
    model, reverse = Linear(w), Linear(-w)
    how = {"eps": 0.1, "step": 0.1, "steps": 3, "init": x, "loss": "margin", "stop_broken": False}
    last = how | {"keep": "last"}
    towards = pgd(model, x, y, **last)
    away = pgd(model, x, y, **last, search=reverse)
    assert torch.equal(away, pgd(reverse, x, y, **last))
    assert (margin(model(towards), y) > margin(model(x), y)).all()
    assert (margin(model(away), y) < margin(model(x), y)).all()
    # The search model takes each of its points for better than the last; by the model none beats the start.
    seen: list[Step] = []
    assert torch.equal(pgd(model, x, y, **how, search=reverse, keep="best", on_step=seen.append), x)
    for step in seen:
        torch.testing.assert_close(step.loss, margin(model(step.x), y))


def test_a_broken_image_is_left_alone_and_the_others_go_on_as_if_alone():
    model, x = small(), images()
    with torch.no_grad():
        y = model(x).argmax(1)
    how = {"eps": 0.05, "step": 0.01, "steps": 12, "init": x, "keep": "best", "loss": "margin"}
    paths: list[Step] = []
    full = pgd(model, x, y, **how, stop_broken=False, on_step=paths.append)
    wrong = torch.stack([s.wrong for s in paths]) == 1
    assert wrong.any(0).any() and not wrong.any(0).all()
    seen: list[Step] = []
    x_adv = pgd(model, x, y, **how, on_step=seen.append)
    first = torch.where(wrong.any(0), wrong.int().argmax(0), 12)
    for s in seen:  # an image is seen until the step that breaks it
        assert s.rows.tolist() == (first >= s.step).nonzero()[:, 0].tolist()
    for image in range(len(x)):
        kept = paths[first[image]].x[image] if wrong[:, image].any() else full[image]
        torch.testing.assert_close(x_adv[image], kept, rtol=0, atol=0)


def test_one_lucky_draw_does_not_break_an_image():
    # Wrong in nine draws of ten at 0.6, the first point reached, and in every draw at 0.8.
    def f(x: Tensor) -> Tensor:
        x, rng = x[:, 0], torch.rand(len(x))
        wrong = (x > 0.75) | ((x > 0.55) & (rng < 0.9))
        return x - x.detach() + torch.where(wrong, 1.0, -1.0) + 0.01 * rng

    x = pixel(*[0.5] * 20)
    how = {"eps": 0.4, "step": 0.1, "steps": 12, "loss": "margin", "keep": "best", "init": x}
    for eot in (1, 3):
        assert (pgd(Landscape(f), x, zeros(x), **how, eot=eot) > 0.75).all()


# --- the expectation ---------------------------------------------------------------------------------------------


class SignNoise(nn.Module):
    """Margin Σ s·w·x, with a fresh s = ±1 for every pixel and image that is −1 in 40% of the draws."""

    def __init__(self, w: Tensor):
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        s = torch.where(torch.rand(x.flatten(1).shape) < 0.4, -1.0, 1.0)
        value = (s * self.w * x.flatten(1)).sum(1)
        return torch.stack([torch.zeros_like(value), value], dim=1)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("b", [1, 7, 300])
def test_the_gradient_is_the_mean_of_the_draws(b, k):
    model, x = SignNoise(torch.randn(64, generator=rng())), images(b)
    y = torch.arange(b) % 2
    losses, wrongs, grads = [], [], []
    with seeded(4, CPU):
        for _ in range(k):
            z = x.clone().requires_grad_()
            logits = model(z)
            loss = margin(logits, y)
            losses.append(loss.detach())
            wrongs.append((logits.argmax(1) != y).float())
            grads.append(torch.autograd.grad(loss.sum(), z)[0])
    with seeded(4, CPU):
        value, wrong, grad = expected_gradient(model, x, y, margin, k)
    with seeded(4, CPU):
        value_alone, wrong_alone = expected(model, x, y, margin, k)
    pairs = ((value, losses), (value_alone, losses), (wrong, wrongs), (wrong_alone, wrongs), (grad, grads))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, torch.stack(theirs).mean(0))


def test_averaging_finds_the_direction_that_one_draw_misses():
    w = torch.randn(64, generator=rng())
    model, x = SignNoise(w), 0.4 + 0.2 * images()
    right = {}
    for eot in (1, 400):
        x_adv = pgd(model, x, zeros(x), eps=0.1, step=0.1, steps=1, eot=eot, init=x, loss="margin", keep="last")
        right[eot] = ((x_adv - x).sign().flatten(1) == w.sign()).double().mean()
    assert 0.55 < right[1] < 0.65  # 60% of the draws show the true sign
    assert right[400] > 0.999  # a mean of 400 draws is 4 standard errors from zero


# --- costs, and what the observer sees -----------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_start_outside_the_ball_is_brought_into_it_before_it_is_judged(norm):
    x, seen = 0.4 + 0.2 * images(), []
    how = {"eps": 0.05, "step": 0.01, "steps": 1, "norm": norm, "keep": "best"}
    pgd(Linear(torch.ones(2, 64)), x, zeros(x), **how, init=x + 0.3, on_step=seen.append)
    share = 1.0 if norm == "Linf" else 1 / 8  # of eps, on each of 64 pixels
    torch.testing.assert_close(seen[0].x, x + 0.05 * share)


def test_it_attacks_inside_no_grad_and_leaves_its_arguments():
    model, x = small(), images()
    copies = x.clone()
    with torch.no_grad():
        inside = pgd(model, x, zeros(x), **HOW)
    assert torch.equal(inside, pgd(model, x, zeros(x), **HOW))
    assert torch.equal(x, copies) and not inside.requires_grad


@pytest.mark.parametrize(
    ("how", "forwards", "gradients"),
    [
        ({}, 1, 7),
        ({"eot": 3}, 3, 21),
        ({"keep": "last"}, 0, 7),
        ({"keep": "last", "eot": 3}, 0, 21),
        ({"keep": "last", "restarts": 2}, 2, 14),
        ({"restarts": 2, "eot": 5}, 10, 70),
        ({"keep": "last", "on_step": lambda step: None}, 1, 7),
    ],
)
def test_the_cost_is_exact(how, forwards, gradients):
    x = images(5)
    counted = counting(small())
    pgd(counted, x, zeros(x), **HOW, **how, stop_broken=False)
    assert (counted.forwards, counted.gradients) == (5 * forwards, 5 * gradients)


def test_the_cost_with_a_search_model_is_exact():
    x, model = images(5), small()
    for keep, forwards in (("last", 0), ("best", 8)):
        counted, search = counting(model), counting(model)
        pgd(counted, x, zeros(x), **HOW, search=search, eot=2, keep=keep, stop_broken=False)
        assert (counted.forwards, counted.gradients) == (5 * 2 * forwards, 0)
        assert (search.forwards, search.gradients) == (0, 5 * 2 * 7)


def test_the_observer_sees_every_iterate_as_it_is():
    model, x, y = small(), images(5), torch.tensor([0, 3, 5, 1, 2])
    seen: list[Step] = []
    how = {"restarts": 2, "loss": "margin", "keep": "best", "stop_broken": False}
    x_adv = pgd(model, x, y, **HOW, **how, on_step=seen.append)
    assert [s.step for s in seen] == [*range(8), *range(8)]
    assert torch.equal(x_adv, pgd(model, x, y, **HOW, **how))
    with torch.no_grad():
        for s in seen:
            assert s.rows.tolist() == [0, 1, 2, 3, 4]
            logits = model(s.x)
            torch.testing.assert_close(s.loss, margin(logits, y))
            assert torch.equal(s.wrong, (logits.argmax(1) != y).float())
    best = torch.stack([s.loss for s in seen]).amax(0)
    torch.testing.assert_close(margin(model(x_adv), y), best)
    for s, after in pairwise(seen[:8]):
        assert 0 < (after.x - s.x).abs().max() <= 0.03 + 1e-6


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0.0}, "step must be positive"),
        ({"step": float("nan")}, "step must be positive"),
        ({"keep": "first"}, "keep 'first' is unknown"),
        ({"loss": "hinge"}, "loss 'hinge' is unknown.*ce, margin, dlr"),
        ({"init": images(15)}, "init must have x's shape"),
        ({"init": images(), "restarts": 2}, "restarts must be 1"),
    ],
)
def test_what_it_refuses(change, message):
    x = images()
    with pytest.raises(ValueError, match=message):
        pgd(small(), **({"x": x, "y": zeros(x)} | HOW | change))


def test_a_search_model_in_train_mode_is_refused():
    x, model = images(), small()
    model.layer1[0].bn1.train()
    for attacked, search in ((counting(model), None), (small(), model)):
        with pytest.raises(ValueError, match="is in train mode"):
            pgd(attacked, x, zeros(x), **HOW, search=search)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_logits_that_are_not_finite_are_an_error_that_names_the_image(value, keep):
    x, clean = images(), small()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = clean(x)
            poison = torch.zeros_like(logits)
            poison[11::16] = value
            return logits + poison

    with pytest.raises(NotFinite, match=r"image 11 of the attacked batch.*NaN or infinite"):
        pgd(Broken(), x, zeros(x), **HOW, keep=keep)
    if keep == "best":
        # The model decides what a point is worth: its NaN may not pass for the worst point of the path.
        with pytest.raises(NotFinite, match="image 11"):
            pgd(Broken(), x, zeros(x), **HOW, keep=keep, search=clean)


def test_a_gradient_that_cannot_be_taken_raises():
    x = images()
    with pytest.raises(RuntimeError):
        pgd(Landscape(lambda x: x.detach().sum(1)), x, zeros(x), **HOW)
