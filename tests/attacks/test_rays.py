"""RayS on models whose answer is known, and against a slow, image-by-image account of its blocks."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from gsem.attacks import NotFinite, Step, counting
from gsem.attacks.rays import rays
from gsem.attacks.square import square
from gsem.nn.predict import correct_draws
from landscapes import Landscape, Quantised, images, rng, zeros

module = import_module("gsem.attacks.rays")  # in gsem.attacks the name is the function's


# --- how strong it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.3), ("L2", 2.4)])
def test_a_network_without_gradient_is_broken(digits, norm, eps):
    model, x, y = digits
    masked = Quantised(model)
    x_adv = rays(masked, x, y, eps=eps, norm=norm, queries=600)
    assert (masked(x_adv).argmax(1) == y).double().mean() < 0.05


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_shortest_ray_of_a_linear_model_is_found(norm):
    """Along a sign direction of radius r, the best gain is r·‖w‖₁ (L2: divided by √d), where nothing is clipped."""
    w = torch.randn(48, generator=rng())
    x = 0.4 + 0.2 * images(40, 3, 4)
    bias = (x.flatten(1) @ w).max() + 0.3
    depth = bias - x.flatten(1) @ w
    amount = (depth / w.abs().sum()).median().item()
    radius = amount if norm == "Linf" else amount * 48**0.5
    model = Landscape(lambda x: x @ w - bias)
    x_adv = rays(model, x, zeros(x), eps=radius, norm=norm, queries=2000)
    wrong = model(x_adv).argmax(1) == 1
    shortest = depth / w.abs().sum()
    near, far = shortest < 0.97 * amount, shortest > 1.0001 * amount
    assert near.sum() > 10 and wrong[near].all()
    assert far.sum() > 10 and not wrong[far].any()
    # Where it fails, the ray is nearly the best there is, at radius eps.
    assert ((x_adv - x).flatten(1)[far] @ w > 0.98 * amount * w.abs().sum()).all()


def test_what_square_finds_with_margins_rays_finds_with_labels(digits):
    model, x, y = digits
    by_margin = model(square(model, x, y, eps=0.1, queries=600)).argmax(1) != y
    by_label = model(rays(model, x, y, eps=0.1, queries=600)).argmax(1) != y
    assert by_label.double().mean() > 0.2 and by_label.sum() > 0.6 * by_margin.sum()


# --- blocks and binary search ------------------------------------------------------------------------------------


def test_blocks_are_halved_down_to_pixels_and_then_begin_anew_in_another_order():
    x = 0.5 * torch.ones(2, 1, 3, 4)
    seen: list[Step] = []
    rays(Landscape(lambda x: -1 - x[:, 0]), x, zeros(x), eps=0.1, queries=51, on_step=seen.append)
    assert torch.equal(seen[0].x, x)
    blocks = []
    for width in (12, 6, 3, 2, 1):
        blocks += [range(first, first + width) for first in range(0, 12, width)]
    assert len(blocks) == 25
    for s, block in zip(seen[1:26], blocks, strict=True):
        for point in s.x.flatten(1):  # nothing is known to be wrong: at radius 1, the corners of the cube
            assert [i for i in range(12) if point[i] == 0] == list(block)
            assert set(point.tolist()) <= {0.0, 1.0}
    again = torch.stack([s.x.flatten(1) == 0 for s in seen[26:]])  # [25, 2, 12]
    widths = torch.tensor([len(block) for block in blocks])
    assert torch.equal(again.sum(2), widths[:, None].expand(25, 2))
    for level in (again[1:3], again[3:7], again[13:]):
        assert (level.sum(0) == 1).all()  # blocks of a level share out the pixels
    assert not torch.equal(again[13:, 0], again[13:, 1])  # each image has an order of its own


def test_the_radius_is_found_by_halving():
    """Two pixels, wrong where the first exceeds 0.7: the radius is 0.2 where it goes up."""
    x = torch.full((1, 1, 1, 2), 0.5)
    seen: list[Step] = []
    rays(Landscape(lambda x: x[:, 0] - 0.7), x, zeros(x), eps=0.15, queries=13, on_step=seen.append)
    asked = [s.x.flatten().tolist() for s in seen]
    # The image; both flipped, the first, the second: that one is wrong at radius 1.
    assert asked[:4] == [[0.5, 0.5], [0, 0], [0, 1], [1, 0]]
    low, high = 0.0, 1.0
    for first, second in asked[4:]:
        middle = (low + high) / 2
        assert (first, second) == pytest.approx((0.5 + middle, 0.5 - middle))
        low, high = (low, middle) if first > 0.7 else (middle, high)
    assert high - low < 0.002 and low < 0.2 < high


def test_a_kept_flip_shortens_the_ray(digits):
    """A slow account, image by image, of what was asked: the final ray is the shortest wrong one."""
    model, x, y = digits
    x, y = x[:20], y[:20]
    seen: list[Step] = []
    eps = 0.04
    x_adv = rays(model, x, y, eps=eps, queries=300, on_step=seen.append)
    shortest, point = torch.full((20,), 9.0), x.clone()
    for s in seen[1:]:
        radius = (s.x - x[s.rows]).flatten(1).abs().amax(1)
        for i, row in enumerate(s.rows.tolist()):
            if s.wrong[i] == 1 and radius[i] < shortest[row]:
                shortest[row], point[row] = radius[i], s.x[i]
    broken = model(x_adv).argmax(1) != y
    assert torch.equal(broken, shortest <= eps) and not broken.all()
    assert torch.equal(x_adv[broken], point[broken])
    # Elsewhere the point lies at eps, on the side of the shortest wrong point.
    offset, towards = (x_adv - x)[~broken], (point - x)[~broken]
    assert ((offset * towards >= 0) | (towards.abs() < 1e-6)).double().mean() > 0.99
    torch.testing.assert_close(offset.abs().flatten(1).amax(1), torch.full((len(offset),), eps))


# --- what it costs, and what is left alone -----------------------------------------------------------------------


def test_broken_images_leave_as_soon_as_they_are(digits):
    model, x, y = digits
    y = y.clone()
    y[::5] = (y[::5] + 1) % 10
    seen: list[Step] = []
    x_adv = rays(model, x, y, eps=0.1, queries=200, on_step=seen.append)
    assert torch.equal(x_adv[::5], x[::5])
    remaining = torch.ones(len(x), dtype=torch.bool)
    for s in seen:
        assert torch.equal(s.rows, remaining.nonzero()[:, 0])
        assert torch.equal(s.loss, s.wrong)
        radius = (s.x - x[s.rows]).flatten(1).abs().amax(1)
        remaining[s.rows] = (s.wrong == 0) | (radius > 0.1)
    assert 0 < remaining.sum() < 0.8 * len(x)
    assert torch.equal(model(x_adv).argmax(1) == y, remaining)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("eot", [1, 4])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_cost_is_exact(norm, eot, noise):
    x = images(5)
    counted = counting(Landscape(lambda x: -9 + noise * torch.rand(len(x)) + x[:, 0]))
    rays(counted, x, zeros(x), eps=0.1, norm=norm, queries=60, eot=eot)
    probes = 2 if noise else 4  # is it stochastic?
    assert counted.forwards == 5 * (probes + eot * 60)
    assert counted.gradients == 0


def test_the_result_does_not_depend_on_neighbours_before_the_orders_are_random(digits):
    model, x, y = digits
    together = rays(model, x[:12], y[:12], eps=0.06, queries=120)
    alone = torch.cat([rays(model, x[i : i + 1], y[i : i + 1], eps=0.06, queries=120) for i in range(12)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


# --- the expectation ---------------------------------------------------------------------------------------------


def test_a_point_that_is_wrong_in_most_draws_is_not_broken():
    """Wrong in nine draws of ten from a gain of 0.5 on, in all from 0.9 on: the search stops only there."""
    w = torch.randn(64, generator=rng())
    x = 0.5 * torch.ones(12, 1, 8, 8)
    full = 0.1 * w.abs().sum()

    def f(x: Tensor) -> Tensor:
        gain = (x - 0.5) @ w / full
        return torch.where(gain > 0.9, 1.0, torch.where((gain > 0.5) & (torch.rand(len(x)) < 0.9), 1.0, -1.0))

    model = Landscape(f)
    x_adv = rays(model, x, zeros(x), eps=0.1, queries=2500, eot=5)
    correct = correct_draws(model, x_adv, zeros(x), draws=100, seed=1)
    assert (correct == 0).double().mean() > 0.8
    assert correct.double().mean() < 3


def test_a_lucky_radius_does_not_stop_the_search(monkeypatch):
    """One answer in two hundred is wrong by luck, at whatever radius."""
    w = torch.randn(64, generator=rng())
    x = 0.5 * torch.ones(16, 1, 8, 8)

    def f(x: Tensor) -> Tensor:
        lucky = torch.rand(len(x)) < 0.005
        return torch.maximum((x - 0.5) @ w - 1, 1.0 * lucky - 0.5 + 0.001 * torch.rand(len(x)))

    gain = {}
    for recheck in (module.RECHECK, 10**9):
        monkeypatch.setattr(module, "RECHECK", recheck)
        x_adv = rays(Landscape(f), x, zeros(x), eps=0.015, queries=2000)
        gain[recheck] = ((x_adv - x).flatten(1) @ w).mean() / (0.015 * w.abs().sum())
    assert gain[20] > 0.75 > 0.5 > gain[10**9]


def test_a_flipper_of_labels_gains_nothing():
    """30% of the answers are wrong whatever the image: no image is broken, none becomes worse."""
    model = Landscape(lambda x: torch.where(torch.rand(len(x)) < 0.3, 1.0, -1.0))
    x = images(40)
    seen: list[Step] = []
    x_adv = rays(model, x, zeros(x), eps=0.1, queries=60, eot=3, on_step=seen.append)
    assert len(seen[-1].rows) == 40
    accuracy = correct_draws(model, x_adv, zeros(x), draws=200, seed=3).double().mean() / 200
    assert abs(accuracy - 0.7) < 0.02


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_nan_is_an_error_that_names_the_image():
    """Only proposals are NaN, and numbers have shifted: the first images are wrong already."""
    x = images()
    x[:4, 0, 0, 0] = 1.0
    x[4:, 0, 0, 0] = 0.3
    x[11, 0, 0, 0] = 0.6

    def f(x: Tensor) -> Tensor:
        first, second = x[:, 0], x[:, 1]
        wrong = (first == 1) & (second > 0) & (second < 1)
        return torch.where(wrong, 1.0, torch.where((second == 0) & (first == 0), float("nan"), -1.0))

    x[4:, 0, 0, 1] = 0.5
    with pytest.raises(NotFinite, match=r"image 4 of the attacked batch.*NaN or infinite"):
        rays(Landscape(f), x, zeros(x), eps=0.08, queries=300)
