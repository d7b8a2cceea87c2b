"""Auto-PGD against a slow transcription of the paper in float64, closed forms, and pyautoattack."""

import copy
import logging

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from gsem.attacks import NotFinite, Step, apgd, counting
from gsem.attacks._core import nearest_wrong_classes, strongest_wrong_classes
from gsem.attacks.apgd import checkpoints
from gsem.losses import LOSSES, dlr_towards
from landscapes import Linear, images, rng


def wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


# --- the algorithm -----------------------------------------------------------------------------------------------


def test_the_checkpoints_are_the_papers():
    # w_j of section 3.1: p_1 = 0.22, p_(j+1) = p_j + max(p_j − p_(j−1) − 0.03, 0.06).
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert all(0 < mark < 7 for mark in checkpoints(7))


def slow_apgd(f, x: Tensor, start: Tensor, eps: float, steps: int, norm: str) -> tuple[list[Tensor], Tensor]:
    """Algorithm 1 of the paper for one image; its iterates and the best."""

    def look(z: Tensor) -> tuple[float, Tensor]:
        z = z.clone().requires_grad_()
        value = f(z)
        return float(value), torch.autograd.grad(value, z)[0]

    def project(z: Tensor) -> Tensor:
        d = z - x
        d = d.clamp(-eps, eps) if norm == "Linf" else d * min(1.0, eps / max(float(d.norm()), 1e-12))
        return (x + d).clamp(0, 1)

    def along(g: Tensor) -> Tensor:
        return g.sign() if norm == "Linf" else g / max(float(g.norm()), 1e-12)

    marks, eta = list(checkpoints(steps)), 2 * eps
    values, points = [], [start]
    best, best_value, best_grad = start, -float("inf"), None
    rises, since, checked, halved = 0, 0, -float("inf"), True
    now, before = start, start
    for k in range(steps + 1):
        value, grad = look(now)
        if values:
            rises, since = rises + (value > values[-1]), since + 1
        values.append(value)
        if value > best_value:
            best, best_value, best_grad = now, value, grad
        if k == steps:
            break
        if k in marks:
            condition1 = rises <= 0.75 * since
            condition2 = not halved and checked >= best_value
            halved, checked, rises, since = condition1 or condition2, best_value, 0, 0
            if halved:
                eta, now, grad = eta / 2, best, best_grad
        ahead = project(now + eta * along(grad))
        if k:
            ahead = project(now + 0.75 * (ahead - now) + 0.25 * (now - before))
        before, now = now, ahead
        points.append(now)
    return points, best


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", "pm"])
def test_every_iterate_is_that_of_the_paper(attacked, norm, loss):
    model, x, y = copy.deepcopy(attacked[0]).double(), attacked[1][:8].double(), attacked[2][:8]
    eps = 0.1 if norm == "Linf" else 0.6
    start = (x + eps * (torch.rand(x.shape, dtype=x.dtype) * 2 - 1) / (1 if norm == "Linf" else 8)).clamp(0, 1)
    seen: list[Step] = []
    how = {"eps": eps, "norm": norm, "steps": 40, "loss": loss, "stop_broken": False, "init": start}
    x_adv = apgd(model, x, y, **how, on_step=seen.append)
    assert [s.step for s in seen] == list(range(41))
    for image in range(8):
        label = y[image][None]

        def objective(z: Tensor, label: Tensor = label) -> Tensor:
            return LOSSES[loss](model(z[None]), label).sum()

        points, best = slow_apgd(objective, x[image], seen[0].x[image], eps, 40, norm)
        for s, point in zip(seen, points, strict=True):
            torch.testing.assert_close(s.x[image], point, rtol=0, atol=1e-9)
        torch.testing.assert_close(x_adv[image], best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eps", [0.02, 0.3])
def test_two_linear_classes(eps):
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 2
    best = (x + eps * (w[1 - y] - w[y]).sign().view_as(x)).clamp(0, 1)
    x_adv = apgd(Linear(w), x, y, eps=eps, steps=30, loss="margin", stop_broken=False)
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-6)


# --- targets -----------------------------------------------------------------------------------------------------


def test_targets_are_the_wrong_classes_with_the_highest_logits(attacked):
    model, x, y = attacked
    with torch.no_grad():
        ranked = model(x).scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True)
    seen: list[Step] = []
    apgd(model, x, y, eps=0.01, steps=1, targets=3, stop_broken=False, on_step=seen.append)
    starts = [s for s in seen if s.step == 0]
    assert len(starts) == 3
    for number, s in enumerate(starts):
        with torch.no_grad():
            torch.testing.assert_close(s.loss, dlr_towards(ranked[:, number])(model(s.x), y))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_malt_orders_the_classes_of_a_linear_classifier_by_their_distance(norm):
    """Rows of very different length: the class with the next highest logit is seldom the nearest."""
    w = torch.randn((12, 64), generator=rng()) * torch.logspace(-1, 1, 12)[:, None]
    model, x = Linear(w, torch.randn(12, generator=rng(1))), images(40)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    p = 1 if norm == "Linf" else 2
    steep = (w[None] - w[y][:, None]).double().norm(p=p, dim=2)
    gap = logits.gather(1, y[:, None]) - logits
    distance = (gap / steep).scatter(1, y[:, None], torch.inf)
    wanted = distance.argsort(dim=1)[:, :5]
    by_logits = torch.stack(strongest_wrong_classes(logits, y, 5), dim=1)
    for eot in (1, 3):
        found = nearest_wrong_classes(model, x, y, 5, norm=norm, eot=eot)
        assert torch.equal(torch.stack(found, dim=1), wanted)
    assert (by_logits[:, 0] != wanted[:, 0]).double().mean() > 0.3
    seen: list[Step] = []
    apgd(model, x, y, eps=1e-3, norm=norm, steps=1, targets=5, order="malt", stop_broken=False, on_step=seen.append)
    starts = [s for s in seen if s.step == 0]
    assert len(starts) == 5
    for number, s in enumerate(starts):
        with torch.no_grad():
            torch.testing.assert_close(s.loss, dlr_towards(wanted[:, number])(model(s.x), y))


def test_malt_looks_at_the_classes_with_the_highest_logits_and_a_flat_one_comes_last(monkeypatch):
    w = torch.randn((6, 64), generator=rng())
    w[3] = w[0]  # between 0 and 3 nothing changes
    model, x = Linear(w, torch.tensor([50.0, 0.0, 0.0, 49.9, 0.0, 0.0])), images(10)
    y = torch.zeros(10, dtype=torch.int64)
    assert all(torch.equal(found, y + 3) for found in nearest_wrong_classes(model, x, y, 9, norm="Linf", eot=1)[4:])
    monkeypatch.setattr("gsem.attacks._core.CANDIDATES", 2)
    counted = counting(model)
    found = torch.stack(nearest_wrong_classes(counted, x, y, 9, norm="Linf", eot=1), dim=1)
    strongest = torch.stack(strongest_wrong_classes(model(x), y, 2), dim=1)
    assert torch.equal(found.sort(1).values, strongest.sort(1).values) and found.shape == (10, 2)
    assert (counted.forwards, counted.gradients) == (10, 20)


def test_too_few_classes_for_the_loss_are_handled_and_said():
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    with pytest.warns(UserWarning, match="needs 4 classes, the model has 3: the targeted margin is used"):
        x_adv = apgd(Linear(w), x, y, eps=0.3, steps=10, targets=9)
    assert wrong(Linear(w), x_adv, y).all()
    with pytest.raises(ValueError, match="at least 3 classes, not 2: use 'margin' or 'ce'"):
        apgd(Linear(w[:2]), x, y % 2, eps=0.1, steps=2, loss="dlr")


# --- the peer ----------------------------------------------------------------------------------------------------


def peer(model: nn.Module, norm: str, eps: float, steps: int, loss: str | None, seed: int):
    how = {"n_iter": steps, "norm": norm, "n_restarts": 1, "eps": eps, "seed": seed, "eot_iter": 1, "rho": 0.75}
    how |= {"device": "cpu", "logger": logging.getLogger("peer"), "verbose": False}
    if loss is None:
        return APGDAttack_targeted(model, n_target_classes=9, **how)
    return APGDAttack(model, loss=loss, **how)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.6)])
@pytest.mark.parametrize("loss", ["ce", "dlr", None])
def test_it_breaks_as_many_as_the_reference(attacked, norm, eps, loss):
    model, x, y = attacked
    kind = {"targets": 9} if loss is None else {"loss": loss}
    counted = counting(model)
    ours = wrong(model, apgd(counted, x, y, eps=eps, norm=norm, steps=40, **kind), y)
    reference = counting(model)
    theirs = wrong(model, peer(reference, norm, eps, 40, loss, seed=0).perturb(x, y), y)
    assert 0.2 < theirs.double().mean() < 0.9
    assert ours.double().mean() >= theirs.double().mean() - 0.01
    assert counted.gradients < 0.95 * reference.gradients  # what is broken is left alone


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_from_the_same_start_it_reaches_the_references_loss(attacked, loss):
    model, x, y = attacked
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t = 2 * torch.rand(x.shape) - 1  # how the reference draws its start
    start = (x + 0.1 * t / t.flatten(1).abs().amax(1)[:, None, None, None]).clamp(0, 1)
    x_adv = apgd(model, x, y, eps=0.1, steps=40, loss=loss, stop_broken=False, init=start)
    best = peer(model, "Linf", 0.1, 40, loss, 0).perturb(x, y, best_loss=True)
    with torch.no_grad():
        ours, theirs = (LOSSES[loss](model(found), y) for found in (x_adv, best))
    # Rounding, and the ties of DLR, may move a few images to another maximum.
    assert ((ours - theirs).abs() < 1e-5).double().mean() >= 0.95
    assert ours.mean() >= theirs.mean() - 1e-3


# --- work and refusals ----------------------------------------------------------------------------------


def test_a_broken_image_is_left_alone_and_later_restarts_work_on_the_rest(attacked):
    model, x, y = attacked
    seen: list[Step] = []
    x_adv = apgd(model, x, y, eps=0.08, steps=10, restarts=3, on_step=seen.append)
    sizes = [len(s.rows) for s in seen]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 120
    broken = wrong(model, x_adv, y)
    assert 0 < int(broken.sum()) < 120
    assert len(seen) == 3 * 11 and len(seen[-1].rows) >= int((~broken).sum())
    counted = counting(model)
    apgd(counted, x, y, eps=0.08, steps=10, restarts=3)
    assert counted.gradients == sum(len(s.rows) for s in seen if s.step < 10)


def test_the_expectation_steers():
    """Half of the draws turn the image round; the mean still points the way."""

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flip = torch.rand(len(x)) < 0.4
            value = torch.where(flip, -1.0, 1.0) * (x - 0.5).flatten(1).sum(1)
            return torch.stack([torch.zeros_like(value), value], dim=1)

    x = torch.full((8, 1, 4, 4), 0.5)
    x_adv = apgd(Turned(), x, torch.zeros(8, dtype=torch.int64), eps=0.2, steps=10, eot=60, loss="margin")
    torch.testing.assert_close(x_adv, x + 0.2, rtol=0, atol=1e-6)


def test_a_nan_on_the_way_names_the_image(attacked):
    model, x, y = attacked

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            far = (x.flatten(1).amax(1) > 0.99)[:, None]
            return torch.where(far, torch.nan, model(0.5 * x))

    x = 0.5 * x
    x[11, 0, 0, 0] = 0.95
    with pytest.raises(NotFinite, match=r"image 11 of the attacked batch"):
        apgd(Broken(), x, y, eps=0.06, steps=5, stop_broken=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "loss 'hinge' is unknown"),
        ({"order": "distance"}, "order 'distance' is unknown: it is 'logits' or 'malt'"),
        ({"init": torch.zeros(2)}, "init must have x's shape"),
    ],
)
def test_what_it_refuses(attacked, change, message):
    model, x, y = attacked
    with pytest.raises(ValueError, match=message):
        apgd(model, x[:4], y[:4], **({"eps": 0.1, "steps": 2} | change))
