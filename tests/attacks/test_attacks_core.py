"""What every attack shares: the geometry, the worst point, the checks, the counts."""

import pytest
import torch
from torch import Tensor, nn

from gsem.attacks import NotFinite, counting
from gsem.attacks._active import WorstSoFar
from gsem.attacks._checks import check_result, require_finite, resolve_loss
from gsem.attacks._core import FOLDED_PIXELS, FOLDED_PIXELS_GPU, ascend, distances, draw_chunks, project, random_start
from gsem.losses import LOSSES


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def interior(b: int = 4, c: int = 2, side: int = 3) -> Tensor:
    """Images so far from 0 and 1 that nothing is clipped."""
    return 0.45 + 0.1 * torch.rand((b, c, side, side), generator=rng(1), dtype=torch.float64)


def length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


# --- geometry ----------------------------------------------------------------------------------------------------


def test_projection_linf_is_a_clamp_of_every_pixel():
    x = torch.rand((4, 2, 3, 3), generator=rng(1), dtype=torch.float64)
    y = x + torch.randn(x.shape, generator=rng(2), dtype=torch.float64)
    low, high = (x - 0.2).clamp_min(0), (x + 0.2).clamp_max(1)
    torch.testing.assert_close(project(y, x, 0.2, "Linf"), torch.minimum(torch.maximum(y, low), high))


def test_projection_l2_is_the_nearest_point_of_the_ball():
    x = interior()
    offset = torch.randn(x.shape, generator=rng(2), dtype=torch.float64)
    offset *= torch.tensor([0.01, 0.1, 0.5, 3.0])[:, None, None, None]
    expected = torch.stack([o * min(1.0, 0.3 / float(o.norm())) for o in offset])
    torch.testing.assert_close(project(x + offset, x, 0.3, "L2") - x, expected)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_projecting_twice_is_projecting_once_and_the_centre_stays(norm):
    x = torch.rand((4, 2, 3, 3), generator=rng(1), dtype=torch.float64)
    once = project(x + torch.randn(x.shape, generator=rng(2), dtype=torch.float64), x, 0.3, norm)
    torch.testing.assert_close(project(once, x, 0.3, norm), once)
    assert torch.equal(project(x, x, 0.3, norm), x)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_step_is_the_steepest_ascent_of_its_length(norm):
    x = interior()
    grad = torch.randn(x.shape, generator=rng(2), dtype=torch.float64)
    moved = ascend(x, x, grad, 0.05, 0.3, norm) - x
    linf, l2 = distances(x + moved, x)
    torch.testing.assert_close(linf if norm == "Linf" else l2, torch.full((4,), 0.05, dtype=torch.float64))
    gain = (moved * grad).sum((1, 2, 3))
    steepest = grad.abs().sum((1, 2, 3)) if norm == "Linf" else length(grad)
    torch.testing.assert_close(gain, 0.05 * steepest)


def test_a_start_linf_is_uniform_in_the_box():
    x = torch.full((1000, 1, 4, 4), 0.5, dtype=torch.float64)
    offset = random_start(x, 0.2, "Linf", rng()) - x
    assert offset.abs().max() <= 0.2 + 1e-12
    assert abs(offset.mean()) < 0.004  # 16,000 draws, four standard errors
    assert offset.var().sqrt() == pytest.approx(0.2 / 3**0.5, rel=0.02)
    assert (offset.flatten(1).T.corrcoef() - torch.eye(16)).abs().max() < 0.15


def test_a_start_l2_is_uniform_in_the_ball():
    x = torch.full((4000, 1, 2, 2), 0.5, dtype=torch.float64)
    offset = random_start(x, 0.2, "L2", rng()) - x
    # The share of a ball's volume within the radius of a uniform point is uniform in [0, 1].
    share = (length(offset) / 0.2) ** 4
    assert share.max() <= 1 + 1e-9
    assert ((share.sort().values - (torch.arange(4000) + 0.5) / 4000).abs() < 0.03).all()  # Kolmogorov–Smirnov
    assert (offset.mean(0).abs() < 0.01).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_starts_stay_in_the_cube(norm):
    x = (torch.rand((50, 1, 4, 4), generator=rng()) > 0.5).float()
    start = random_start(x, 0.3, norm, rng(1))
    assert start.min() == 0 and start.max() == 1 and not torch.equal(start, x)


def test_distances():
    x = torch.zeros((2, 1, 2, 2))
    y = torch.tensor([[[[0.3, 0.0], [0.0, -0.4]]], [[[0.0, 0.0], [0.0, 0.1]]]])
    linf, l2 = distances(y, x)
    torch.testing.assert_close(linf, torch.tensor([0.4, 0.1]))
    torch.testing.assert_close(l2, torch.tensor([0.5, 0.1]))


# --- the worst point ---------------------------------------------------------------------------------------------


def test_the_worst_point_is_that_of_sorting_all_of_them():
    x = torch.zeros((200, 1, 1, 1))
    worst = WorstSoFar(x)
    loss = torch.randint(-3, 4, (9, 200), generator=rng()).float()
    wrong = torch.tensor([0.0, 0.5, 0.9, 1.0])[torch.randint(0, 4, (9, 200), generator=rng(1))]
    for number in range(9):
        worst.update(torch.full_like(x, number), loss[number], wrong[number] == 1)
    for image in range(200):
        keys = [(bool(wrong[n, image] == 1), float(loss[n, image]), -n) for n in range(9)]
        first = max(range(9), key=lambda n: keys[n])  # of equals the earliest
        assert (worst.x[image], worst.value[image], worst.broken[image]) == (first, keys[first][1], keys[first][0])


def test_the_worst_of_nothing_is_the_image():
    x = interior()
    assert torch.equal(WorstSoFar(x).x, x)


# --- draws and losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 2, 20, 1000])
@pytest.mark.parametrize("side", [8, 32, 224])
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_folds_share_out_all_draws_without_overflowing_a_pass(draws, rows, side):
    passes, pixels = draw_chunks(draws, torch.empty(1).expand(rows, 3, side, side)), rows * side * side
    assert sum(passes) == draws
    assert all(fold == 1 or fold * pixels <= FOLDED_PIXELS for fold in passes)
    assert len(passes) <= draws * pixels / FOLDED_PIXELS * 2 + 1  # and no pass is nearly empty without need


@pytest.mark.parametrize(
    ("draws", "rows", "on_cpu", "elsewhere"),
    [
        (10, 18, [7, 3], [10]),
        (10, 292, [1] * 10, [5, 5]),  # at most 7 in a pass of 2,048 rows
        (10, 600, [1] * 10, [3, 3, 2, 2]),
        (10, 5000, [1] * 10, [1] * 10),
        (1, 16, [1], [1]),
    ],
)
def test_draws_are_folded_evenly_on_an_accelerator(draws, rows, on_cpu, elsewhere):
    assert draw_chunks(draws, torch.empty(1).expand(rows, 3, 32, 32)) == on_cpu
    assert draw_chunks(draws, torch.empty(rows, 3, 32, 32, device="meta")) == elsewhere


@pytest.mark.parametrize("draws", [1, 2, 20, 1000])
@pytest.mark.parametrize("side", [8, 32, 224])
@pytest.mark.parametrize("rows", [1, 7, 256, 2049])
def test_folds_of_an_accelerator_are_full_and_equal(draws, rows, side):
    passes, most = draw_chunks(draws, torch.empty(rows, 3, side, side, device="meta")), FOLDED_PIXELS_GPU // side**2
    assert sum(passes) == draws
    assert max(passes) - min(passes) <= 1
    assert max(passes) == 1 or max(passes) * rows <= most
    assert len(passes) == max(1, -(-draws // max(1, most // rows)))  # no fewer passes would do


def test_a_loss_is_a_name_or_a_function():
    for name, function in LOSSES.items():
        assert resolve_loss(name) is function
    assert resolve_loss(length) is length
    with pytest.raises(ValueError, match="loss 'kl' is unknown"):
        resolve_loss("kl")


# --- counts ------------------------------------------------------------------------------------------------------


def test_rows_are_counted_with_and_without_gradient():
    model = counting(nn.Flatten())
    x = torch.zeros((3, 1, 2, 2))
    model(x)
    assert (model.forwards, model.gradients) == (3, 0)
    model(x[:2].clone().requires_grad_())
    assert (model.forwards, model.gradients) == (3, 2)
    with torch.no_grad():
        model(x.clone().requires_grad_())
    assert (model.forwards, model.gradients) == (6, 2)


def test_counting_leaves_every_mode_as_it_is():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout()).eval()
    model[0].train()
    assert counting(model).training is False
    assert [m.training for m in model.modules()] == [False, True, False]


# --- what an attack returns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_farther_than_eps_is_an_error_that_names_the_image(norm):
    x = torch.full((5, 1, 2, 2), 0.5)
    offset = torch.full_like(x, 0.1 if norm == "Linf" else 0.05)
    assert check_result(x + offset, x, eps=0.1, norm=norm) is not None
    assert check_result(x - offset, x, eps=0.1, norm=norm) is not None
    offset[3] *= 1.01
    with pytest.raises(ValueError, match=rf"image 3 .*farther than eps = 0\.1 \({norm}\)"):
        check_result(x + offset, x, eps=0.1, norm=norm)


def test_l2_is_not_checked_as_linf():
    x = torch.full((1, 1, 2, 2), 0.5)
    with pytest.raises(ValueError, match="farther"):
        check_result(x + 0.1, x, eps=0.1, norm="L2")  # of length 0.2


def test_the_smallest_field_standard_is_not_lost_in_the_tolerance():
    x = torch.full((1, 1, 2, 2), 0.5)
    for eps in (1 / 255, 8 / 255):
        check_result(x + eps, x, eps=eps, norm="Linf")
        with pytest.raises(ValueError, match="farther"):
            check_result(x + 1.01 * eps, x, eps=eps, norm="Linf")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), NotFinite, "image 2 .*NaN or infinite pixels"),
        (float("inf"), NotFinite, "image 2 .*NaN or infinite pixels"),
        (1.0001, ValueError, r"image 2 .*left \[0, 1\]"),
        (-1e-5, ValueError, r"image 2 .*left \[0, 1\]"),
    ],
)
def test_pixels_that_cannot_be_are_an_error(value, error, message):
    x = torch.full((4, 1, 2, 2), 0.5)
    x_adv = x.clone()
    x_adv[2, 0, 1, 0] = value
    with pytest.raises(error, match=message):
        check_result(x_adv, x, eps=0.6, norm="Linf")


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_image():
    require_finite(torch.tensor([True, True]))
    with pytest.raises(NotFinite, match=r"image 1 .*loss is NaN or infinite"):
        require_finite(torch.tensor([True, False, False, True]))
    with pytest.raises(NotFinite, match="image 7 of the attacked batch"):
        require_finite(torch.tensor([True, False, False]), torch.tensor([3, 7, 9]))
