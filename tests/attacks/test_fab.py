"""FAB against closed forms, slow references and its peer, and on planted models whose answer is known."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import gsem
from gsem.attacks import NotFinite, Step, counting
from gsem.attacks._core import distances
from gsem.attacks.fab import _look, _Path, _Task, fab, gradients, onto_plane
from gsem.losses import margin
from gsem.rng import seeded
from landscapes import Landscape, Linear, images, rng, zeros

NORMS = ["Linf", "L2"]


@torch.no_grad()
def predicted(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def length(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    return distances(x_adv, x)[norm == "L2"]


@cache
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small convolutional network, trained for a few seconds, and test digits that it classifies correctly."""
    digits = gsem.data.load("digits")
    train, test = digits.read_train(), digits.read_test()
    with seeded(1, torch.device("cpu")):
        model = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10)),
        )
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        x, y = gsem.data.to_float(train.x), train.y
        for _ in range(6):
            for part in torch.randperm(len(x)).split(64):
                noisy = (x[part] + 0.2 * torch.randn_like(x[part])).clamp(0, 1)
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(noisy), y[part]).backward()
                optimiser.step()
    model.eval()
    x, y = gsem.data.to_float(test.x), test.y
    right = predicted(model, x) == y
    assert right.double().mean() > 0.9
    return model, x[right][:100], y[right][:100]


# --- the projection ----------------------------------------------------------------------------------------------


def slow_offset(point: np.ndarray, normal: np.ndarray, gap: float, norm: str) -> np.ndarray:
    """By bisection in float64: pixels move along ±normal until the plane, or the end of the cube, is reached."""
    sign = np.sign(normal) * np.sign(gap)
    speed = np.ones_like(normal) if norm == "Linf" else np.abs(normal)
    room = np.where(sign > 0, 1 - point, point)
    low, high = 0.0, 1e40
    for _ in range(250):
        time = (low + high) / 2
        short = (np.abs(normal) * np.minimum(time * speed, room)).sum() < abs(gap)
        low, high = (time, high) if short else (low, time)
    return sign * np.minimum(high * speed, room)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e12])
@pytest.mark.parametrize("pixels", [1, 7, 300])
def test_the_projection_is_exact(norm, scale, pixels):
    points = torch.rand((200, pixels), generator=rng())
    points[::3] = points[::3].round()  # corners of the cube
    normal = torch.randn((200, pixels), generator=rng(1)) ** 3
    normal[1::4, ::2] = 0
    gap = torch.randn(200, generator=rng(2)) * normal.abs().sum(1) * 0.5
    gap[5] = 0
    ours = onto_plane(points, scale * normal, scale * gap, norm)
    slow = [
        slow_offset(*row, norm)
        for row in zip(points.double().numpy(), normal.double().numpy(), gap.double().numpy(), strict=True)
    ]
    torch.testing.assert_close(ours.double(), torch.from_numpy(np.stack(slow)), rtol=2e-5, atol=2e-6)
    assert ((points + ours) >= 0).all() and ((points + ours) <= 1 + 1e-6).all()
    reached = (normal * ours).sum(1)
    feasible = torch.where(normal * gap[:, None] > 0, 1 - points, points).mul(normal.abs()).sum(1) > gap.abs() * 1.0001
    assert pixels == 1 or (feasible.any() and not feasible.all())
    torch.testing.assert_close(reached[feasible], gap[feasible], rtol=1e-4, atol=1e-5)


def linear_programme(point: np.ndarray, normal: np.ndarray, gap: float) -> float | None:
    """The least L∞ length of d with ⟨normal, d⟩ = gap and point + d in [0, 1]; None where there is none."""
    n = len(point)
    within = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
    bounds = [*zip(-point, 1 - point, strict=True), (0, None)]
    found = linprog(np.eye(n + 1)[n], within, np.zeros(2 * n), [[*normal, 0.0]], [gap], bounds)
    return found.fun if found.status == 0 else None


def test_the_linf_projection_solves_the_linear_programme():
    points, normal = torch.rand((40, 12), generator=rng()), torch.randn((40, 12), generator=rng(1))
    gap = 3 * torch.randn(40, generator=rng(2))
    ours = onto_plane(points, normal, gap, "Linf").abs().amax(1)
    solved = 0
    for p, w, g, size in zip(points, normal, gap, ours, strict=True):
        if (best := linear_programme(p.double().numpy(), w.double().numpy(), g.item())) is not None:
            assert size.item() == pytest.approx(best, rel=1e-4, abs=1e-6)
            solved += 1
    assert solved > 20


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_normal_moves_nothing(norm):
    points = torch.rand((3, 5), generator=rng())
    for gap in (torch.zeros(3), torch.tensor([1.0, -1.0, 1e30])):
        assert torch.equal(onto_plane(points, torch.zeros(3, 5), gap, norm).abs(), torch.zeros(3, 5))


# --- closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 3, 9])
def test_the_nearest_point_of_a_linear_classifier(norm, targets):
    w, b = torch.randn((4, 64), generator=rng()), 0.1 * torch.randn(4, generator=rng(1))
    model, x = Linear(w, b), 0.4 + 0.2 * images(64)
    y = predicted(model, x)
    with torch.no_grad():
        logits = model(x)
        difference = w[None] - w[y][:, None]
        steep = difference.norm(p=1 if norm == "Linf" else 2, dim=2)
        best = ((logits.gather(1, y[:, None]) - logits) / steep).scatter(1, y[:, None], float("inf")).amin(1)
    x_adv = fab(model, x, y, eps=None, norm=norm, targets=targets, steps=15)
    assert x_adv.min() > 0 and x_adv.max() < 1  # nothing is clipped
    assert (predicted(model, x_adv) != y).all()
    ratio = length(x_adv, x, norm) / best
    assert ratio.min() > 0.999 and ratio.max() < 1.05


def test_the_nearest_point_where_the_cube_is_in_the_way():
    w = torch.randn((2, 16), generator=rng())
    x = images(40, side=4).round().mul(0.96).add(0.02)
    with torch.no_grad():
        gap = Linear(w)(x) @ torch.tensor([1.0, -1.0])
    y = (gap < 0).long()
    x_adv = fab(Linear(w), x, y, eps=None, steps=30)
    checked = 0
    for point, label, g, found in zip(x.flatten(1).double(), y, gap.double(), x_adv.flatten(1), strict=True):
        best = linear_programme(point.numpy(), (w[1] - w[0]).double().numpy(), g.item())
        if best is None:
            assert torch.equal(found, point.float())
            continue
        assert predicted(Linear(w), found.view(1, 1, 4, 4)).item() != label
        size = (found - point).abs().max().item()
        free = abs(g.item()) / (w[1] - w[0]).abs().sum().item()
        assert best * 0.999 < size < best * 1.05
        checked += best > 1.2 * free
    assert checked > 10


@pytest.mark.parametrize("norm", NORMS)
def test_within_a_ball_exactly_the_images_near_the_boundary_are_broken(norm):
    w = torch.randn((2, 64), generator=rng())
    model, x = Linear(w), 0.4 + 0.2 * images(64)
    y = predicted(model, x)
    with torch.no_grad():
        best = -margin(model(x), y) / (w[1] - w[0]).norm(p=1 if norm == "Linf" else 2)
    eps = best.median().item()
    x_adv = fab(model, x, y, eps=eps, norm=norm, steps=10)
    assert torch.equal(
        (predicted(model, x_adv) != y)[(best / eps - 1).abs() > 1e-3], (best < eps)[(best / eps - 1).abs() > 1e-3]
    )
    # What is broken is past the boundary by what eps allows, and what is not is as near to it as eps allows.
    with torch.no_grad():
        reached = margin(model(x_adv), y)
        furthest = margin(model(x), y) + eps * (w[1] - w[0]).norm(p=1 if norm == "Linf" else 2)
    torch.testing.assert_close(reached, furthest, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("targets", [0, 9])
def test_two_classes(targets):
    model, x = Landscape(lambda x: (x[:, :2] ** 2).sum(1) - 1), 0.1 + 0.3 * images(16, side=2)
    x_adv = fab(model, x, zeros(x), eps=None, norm="L2", targets=targets)
    best = 1 - x.flatten(1)[:, :2].norm(dim=1)
    inside = (x.flatten(1)[:, :2] / (1 - best)[:, None]).amax(1) < 1
    assert inside.all() and (predicted(model, x_adv) == 1).all()
    assert (length(x_adv, x, "L2") < 1.05 * best).all()


# --- what is returned --------------------------------------------------------------------------------------------


def test_what_is_misclassified_or_cannot_be_broken_is_returned_as_it_is():
    model, x, y = trained()
    wrong = (y + 1) % 10
    assert torch.equal(fab(model, x[:20], wrong[:20], eps=None, steps=2), x[:20])
    assert torch.equal(fab(model, x[:20], wrong[:20], eps=0.1, steps=2), x[:20])
    flat = Linear(torch.zeros(3, 64), torch.tensor([1.0, 0.0, 0.0]))
    for eps in (None, 0.1):
        assert torch.equal(fab(flat, x[:20], zeros(x[:20]), eps=eps, steps=2), x[:20])
    for eps in (None, 0.1):
        assert fab(model, x[:0], y[:0], eps=eps).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("targets", [0, 9])
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_never_broken_keeps_its_worst_point(norm, targets):
    model, x, y = trained()
    x, y, seen = x[:40], y[:40], []
    eps = 0.03 if norm == "Linf" else 0.15
    x_adv = fab(model, x, y, eps=eps, norm=norm, targets=targets, steps=10, on_step=seen.append)
    remain = predicted(model, x_adv) == y
    assert remain.double().mean() > 0.8
    with torch.no_grad():
        reached, clean = margin(model(x_adv), y), margin(model(x), y)
    assert (reached > clean).all()
    for step in seen:
        inside = (length(step.x, x[step.rows], norm) <= eps) & remain[step.rows]
        assert (reached[step.rows][inside] >= step.loss[inside] - 1e-4).all()
    # Not just anywhere: most of what one gradient can do.
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(margin(model(z), y).sum(), z)
    gain = grad.flatten(1).norm(p=1 if norm == "Linf" else 2, dim=1) * eps
    assert ((reached - clean) / gain)[remain].median() > 0.7


def test_more_effort_is_never_farther():
    model, x, y = trained()
    x, y = x[:40], y[:40]
    how = {"eps": None, "steps": 10, "seed": 3}
    one, three = (fab(model, x, y, **how, restarts=restarts) for restarts in (1, 3))
    first, all_of_them = (fab(model, x, y, **how, targets=targets) for targets in (1, 9))
    for far, near, gains in ((one, three, False), (first, all_of_them, True)):
        assert (predicted(model, far) != y).all() and (predicted(model, near) != y).all()
        before, after = length(far, x, "Linf"), length(near, x, "Linf")
        assert (after <= before).all() and (not gains or (after < 0.95 * before).any())


def test_points_found_survive_another_batch():
    model, x, y = trained()
    x_adv = fab(model, x[:100], y[:100], eps=0.2, targets=9, steps=20)
    broken = predicted(model, x_adv) != y[:100]
    assert broken.double().mean() > 0.5
    for other in (model, copy.deepcopy(model).double()):
        dtype = next(other.parameters()).dtype
        alone = torch.cat([predicted(other, image[None].to(dtype)) for image in x_adv])
        assert torch.equal(alone != y[:100], broken)


# --- the peer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 9])
def test_it_breaks_as_many_as_its_peer_at_no_higher_cost(norm, targets):
    from pyautoattack.fab_pt import FABAttack_PT

    model, x, y = trained()
    eps = 0.14 if norm == "Linf" else 0.7
    theirs = counting(model)
    how = {"norm": norm, "n_restarts": 1, "n_iter": 15, "eps": eps, "seed": 0, "device": "cpu", "n_target_classes": 9}
    peer = FABAttack_PT(theirs, **how, targeted=targets is not None)
    with seeded(0, torch.device("cpu")):
        reference = peer.perturb(x, y)
    ours = counting(model)
    x_adv = fab(ours, x, y, eps=eps, norm=norm, targets=targets, steps=15)
    broken = [predicted(model, x_adv) != y, (predicted(model, reference) != y) & (length(reference, x, norm) <= eps)]
    share, peers = (b.double().mean() for b in broken)
    assert 0.2 < peers < 0.95
    assert share >= peers - 0.01
    # (Few steps; images that cross at each of them pay two gradients, where the peer pays one and a forward pass.)
    assert ours.forwards + 2 * ours.gradients < 1.15 * (theirs.forwards + 2 * theirs.gradients)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_ball_it_comes_as_near_as_its_peer(norm):
    from pyautoattack.fab_pt import FABAttack_PT

    model, x, y = trained()
    peer = FABAttack_PT(model, norm=norm, n_restarts=1, n_iter=20, eps=100.0, seed=0, device="cpu")
    with seeded(0, torch.device("cpu")):
        reference = peer.perturb(x, y)
    x_adv = fab(model, x, y, eps=None, norm=norm, steps=20)
    assert (predicted(model, x_adv) != y).all() and (predicted(model, reference) != y).all()
    assert length(x_adv, x, norm).mean() <= 1.01 * length(reference, x, norm).mean()


# --- the expectation ---------------------------------------------------------------------------------------------


class SignNoise(nn.Module):
    """Three classes; every pixel's weight has a fresh sign for every image, −1 in 40% of the draws."""

    def __init__(self, w: Tensor):
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return (flat * torch.where(torch.rand(flat.shape) < 0.4, -1.0, 1.0)) @ self.w.T


@pytest.mark.parametrize("target", [None, 2])
@pytest.mark.parametrize(("b", "eot"), [(1, 1), (5, 3), (300, 5)])
def test_planes_are_the_mean_of_the_draws(b, eot, target):
    model, x, y = SignNoise(torch.randn((3, 64), generator=rng())), images(b), torch.arange(b) % 2
    towards = None if target is None else torch.full((b,), target)
    path = _Path.begin(x, x, y, towards)
    task = _Task(model, x, y, None, "L2", 1, eot, 0)
    with seeded(4, torch.device("cpu")):
        seen = _look(task, path, differentiate=True)
    total, grads = 0, 0
    with seeded(4, torch.device("cpu")):
        for _ in range(eot):
            z = x.clone().requires_grad_()
            logits = model(z)
            total = total + logits.detach() / eot
            grads = (
                grads
                + torch.stack([torch.autograd.grad(logits[:, k].sum(), z, retain_graph=True)[0] for k in range(3)])
                / eot
            )
    torch.testing.assert_close(seen.crossed, margin(total, y) > 0)
    at = torch.arange(b)
    gaps = total.T - total[at, y]
    normals = grads - grads[y, at]
    ratio = gaps.abs() / normals.flatten(2).norm(dim=2)
    ratio[y, at] = float("inf")
    nearest = ratio.argmin(0) if towards is None else towards
    torch.testing.assert_close(seen.gap, gaps[nearest, at], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(path.normal, normals[nearest, at], rtol=1e-4, atol=1e-5)


class _NoVmap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        assert isinstance(grad.abs().sum().item(), float)  # a value that a vectorised pass cannot read
        return 2 * grad


def test_a_model_whose_backward_pass_cannot_be_vectorised():
    w, x, y = torch.randn((10, 64), generator=rng()), images(4), torch.arange(4)
    classes = (torch.arange(9)[:, None] + (torch.arange(9)[:, None] >= y)).expand(9, 4)
    for model in (Linear(w), lambda x: Linear(w / 2)(_NoVmap.apply(x))):
        z = x.clone().requires_grad_()
        grads = gradients(model(z), z, classes, y, 4)
        torch.testing.assert_close(grads.flatten(2), w[classes] - w[y])


class _Full(torch.autograd.Function):
    """The first backward pass, that of all planes together, finds the device's memory full."""

    passes = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        _Full.passes += 1
        if _Full.passes == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return grad


def test_a_full_memory_is_not_taken_for_a_backward_pass_that_cannot_be_vectorised():
    w, z, y = torch.randn((10, 64), generator=rng()), images(4).requires_grad_(), torch.arange(4)
    classes = (torch.arange(9)[:, None] + (torch.arange(9)[:, None] >= y)).expand(9, 4)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(Linear(w)(_Full.apply(z)), z, classes, y, 4)


def test_one_lucky_draw_does_not_break_an_image():
    # Wrong in nine draws of ten beyond 0.55, and in every draw only beyond 0.75; the margin rises all the way.
    def f(x: Tensor) -> Tensor:
        x = x[:, 0]
        wrong = (x > 0.75) | ((x > 0.55) & (torch.rand(len(x)) < 0.9))
        return x - x.detach() + torch.where(wrong, 0.1, -0.1) * (1 + x.detach())

    x = torch.full((20, 1, 1, 1), 0.5)
    for how in ({"eot": 1}, {"eot": 3}, {"eot": 3, "targets": 1}):
        assert (fab(Landscape(f), x, zeros(x), eps=0.4, steps=10, **how) > 0.75).all()


@pytest.mark.parametrize("targets", [0, 2])
def test_a_stochastic_network_is_broken_in_almost_every_draw(targets):
    model, x, y = trained()
    x, y = x[:40], y[:40]

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x + 0.05 * torch.randn_like(x))

    x_adv = fab(Noisy(), x, y, eps=0.25, steps=10, eot=2, targets=targets)
    wrong = torch.stack([predicted(Noisy(), x_adv) != y for _ in range(100)]).double().mean(0)
    assert (wrong > 0.95).double().mean() > 0.8
    nearest = fab(Noisy(), x, y, eps=None, steps=10, eot=2, targets=targets)
    found = (nearest != x).flatten(1).any(1)
    assert found.double().mean() > 0.9
    wrong = torch.stack([predicted(Noisy(), nearest) != y for _ in range(100)]).double().mean(0)
    assert wrong[found].mean() > 0.2  # on the boundary, where two draws were wrong on average


# --- costs, and what the observer sees -----------------------------------------------------------------------


def test_later_restarts_start_at_random_points_of_the_ball():
    model, x, y = trained()
    x, y = x[:30], y[:30]
    seen: dict[int, list[Step]] = {3: [], 4: []}
    for seed, steps in seen.items():
        fab(model, x, y, eps=0.02, steps=1, restarts=3, seed=seed, on_step=steps.append)
    starts = [s for s in seen[3] if s.step == 0]
    assert len(starts) == 3
    assert torch.equal(starts[0].x, x[starts[0].rows])
    for s in starts[1:]:
        size = length(s.x, x[s.rows], "Linf")
        assert (size > 0.01).all() and (size <= 0.02 + 1e-6).all()
    others = [s for s in seen[4] if s.step == 0]
    assert not torch.equal(starts[1].x, starts[2].x[: len(starts[1].x)])
    assert not torch.equal(starts[1].x, others[1].x)


@pytest.mark.parametrize("eot", [1, 3])
def test_the_cost_is_exact(eot):
    """The cascade looks at the image; a run at the pushed start, every iterate, and the projection of what lies
    outside; the cascade at what it returns."""
    x = images(5)
    never = Linear(torch.randn((4, 64), generator=rng()), torch.tensor([1000.0, 0, 0, 0]))
    for how, runs, extra in (({}, 1, 1), ({"targets": 9}, 3, 2), ({"restarts": 2}, 2, 1)):
        counted = counting(never)
        fab(counted, x, zeros(x), eps=0.1, steps=7, eot=eot, **how)
        probes = 4 * 5  # is it stochastic?
        assert counted.gradients == 5 * eot * runs * 7
        assert counted.forwards == probes + 5 * eot * (extra + runs * (3 + 7))


def test_work_is_spent_on_remaining_images_only():
    w = torch.randn((2, 64), generator=rng())
    x = 0.5 * torch.ones(8, 1, 8, 8)
    model = Linear(w, torch.stack([torch.tensor(2.0), w[0].sum() / 2 - w[1].sum() / 2]))
    near = torch.tensor([True] * 6 + [False] * 2)
    x[~near] -= 0.4 * (w[1] - w[0]).sign().view(1, 8, 8)
    counted, seen = counting(model), []
    fab(counted, x, zeros(x), eps=0.1, steps=10, restarts=2, on_step=seen.append)
    # A linear model's images are broken by the pushed start; those far away take every step.
    assert [len(s.rows) for s in seen] == [8] + [2] * 10 + [2] * 11
    assert all(s.rows.tolist() == [6, 7] for s in seen[1:])
    # One gradient a step, also where it has crossed the boundary.
    assert any(bool((s.loss > 0).any()) for s in seen)
    assert counted.gradients == 8 + 2 * 9 + 2 * 10


def test_the_observer_sees_every_iterate_as_it_is():
    model, x, y = trained()
    x, y, seen = x[:6], y[:6], []
    fab(model, x, y, eps=None, steps=4, targets=2, on_step=seen.append)
    assert [s.step for s in seen] == [0, 1, 2, 3, 4] * 2
    with torch.no_grad():
        for s in seen:
            torch.testing.assert_close(s.loss, margin(model(s.x), y))
            assert torch.equal(s.wrong, (model(s.x).argmax(1) != y).float())
    assert torch.equal(seen[0].x, x) and torch.equal(seen[5].x, x)
    assert not torch.equal(seen[1].x, seen[6].x)  # another target


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 0.1])
@pytest.mark.parametrize("targets", [0, 2])
@pytest.mark.parametrize("on_the_way", [False, True])
def test_logits_that_are_not_finite_are_an_error_that_names_the_image(eps, targets, on_the_way):
    w, x = torch.randn((3, 64), generator=rng()), images()
    y = predicted(Linear(w), x)
    x, y = torch.cat([x, x]), torch.cat([(y + 1) % 3, y])  # the first 16 are not attacked
    bad = x[27, 0, 0, 0].item()

    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            here = x[:, 0, 0, 0] == bad
            if on_the_way:  # at points of image 27 other than itself
                here = ((x - images()[11]).flatten(1).abs().amax(1) < 0.2) & ~here
            return super().forward(x) + torch.where(here, float("nan"), 0.0)[:, None]

    with pytest.raises(NotFinite, match=r"image (11|27) of the attacked batch.*NaN or infinite"):
        fab(Broken(w), x, y, eps=eps, targets=targets, steps=3)
