"""Each loss against its formula, written out again in Python's own floats."""

import math

import pytest
import torch
from torch import Tensor

from gsem.losses import (
    LOSSES,
    cross_entropy,
    divergence,
    divergence_from,
    dlr,
    margin,
    mart,
    probability_margin,
    trades,
)


def random_logits(b: int = 6, k: int = 5, *, seed: int = 1, scale: float = 2.0) -> Tensor:
    return scale * torch.randn((b, k), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 4, 2, 1, 3, 0])


def softmax(z: list[float]) -> list[float]:
    powers = [math.exp(v) for v in z]
    return [p / sum(powers) for p in powers]


def by_hand(formula, *logits: Tensor) -> Tensor:
    """`formula(z, …, y)` for every row, one row at a time."""
    rows = zip(*(z.tolist() for z in logits), LABELS.tolist(), strict=True)
    return torch.tensor([formula(*row) for row in rows], dtype=torch.float64)


def others(z: list[float], y: int) -> list[float]:
    return [v for k, v in enumerate(z) if k != y]


def ce_of(z: list[float], y: int) -> float:
    return -math.log(softmax(z)[y])


def kl_of(z: list[float], z_adv: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(z), softmax(z_adv), strict=True))


def pm_of(z: list[float], y: int) -> float:
    p = softmax(z)
    return 1 + max(others(p, y)) - p[y]


def dlr_of(z: list[float], y: int) -> float:
    first, _, third, *_ = sorted(z, reverse=True)
    return -(z[y] - max(others(z, y))) / (first - third)


def mart_of(z_adv: list[float], z: list[float], y: int, weight: float = 5.0) -> float:
    p, p_adv = softmax(z), softmax(z_adv)
    kl = sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, p_adv, strict=True))
    boosted = -math.log(p_adv[y]) - math.log(1.0001 - max(others(p_adv, y)) + 1e-12)
    return boosted + weight * (1.0000001 - p[y]) * kl


Z, Z_ADV = random_logits(seed=1), random_logits(seed=2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (cross_entropy(Z, LABELS), by_hand(ce_of, Z)),
        (margin(Z, LABELS), by_hand(lambda z, y: max(others(z, y)) - z[y], Z)),
        (dlr(Z, LABELS), by_hand(dlr_of, Z)),
        (probability_margin(Z, LABELS), by_hand(pm_of, Z)),
        (divergence(Z, Z_ADV), by_hand(lambda z, z_adv, y: kl_of(z, z_adv), Z, Z_ADV)),
        (mart(Z_ADV, Z, LABELS), by_hand(mart_of, Z_ADV, Z)),
        (mart(Z_ADV, Z, LABELS, 2.5), by_hand(lambda a, z, y: mart_of(a, z, y, 2.5), Z_ADV, Z)),
        (trades(Z_ADV, Z, LABELS, 3.0), by_hand(lambda a, z, y: ce_of(z, y) + 3.0 * kl_of(z, a), Z_ADV, Z)),
    ],
    ids=["ce", "margin", "dlr", "pm", "divergence", "mart", "mart 2.5", "trades"],
)
def test_a_loss_is_its_formula(value, expected):
    assert value.shape == (6,)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_smoothing_spreads_its_share_over_all_classes():
    def smoothed(z: list[float], y: int) -> float:
        p = softmax(z)
        return -sum(((k == y) * 0.7 + 0.3 / 5) * math.log(p[k]) for k in range(5))

    torch.testing.assert_close(cross_entropy(Z, LABELS, smoothing=0.3), by_hand(smoothed, Z))


@pytest.mark.parametrize("name", ["margin", "dlr"])
def test_positive_exactly_where_misclassified(name):
    z = random_logits(500, 4)
    y = torch.arange(500) % 4
    assert torch.equal(LOSSES[name](z, y) > 0, z.argmax(1) != y)


def test_the_probability_margin_is_above_one_exactly_where_misclassified():
    z = random_logits(500, 4)
    y = torch.arange(500) % 4
    assert torch.equal(probability_margin(z, y) > 1, z.argmax(1) != y)


@pytest.mark.parametrize("certain_of", ["label", "other"])
@pytest.mark.parametrize("gap", [0.1, 5.0, 17.0, 30.0, 60.0, 80.0])
def test_the_probability_margin_of_certain_networks_is_exact_in_float32(gap, certain_of):
    """The gradient to a relative error in every logit, on either side; the value where it may grow."""
    single = (random_logits(200, 5, scale=0.5) + 3.0).float()
    y = torch.arange(200) % 5
    raised = y if certain_of == "label" else (y + 1) % 5
    single[torch.arange(200), raised] += gap
    logits = [z.requires_grad_() for z in (single, single.double())]
    values = [probability_margin(z, y) for z in logits]
    ours, exact = (torch.autograd.grad(v.sum(), z)[0] for v, z in zip(values, logits, strict=True))
    # Of two probabilities that are nearly equal, the difference is not exact, nor any loss of it.
    clear = (values[1] - 1).abs() > 1e-2
    assert clear.double().mean() > 0.9
    torch.testing.assert_close(ours[clear].double(), exact[clear], rtol=2e-4, atol=0)
    torch.testing.assert_close(values[0].double(), values[1], rtol=2e-5, atol=0)
    assert (ours != 0).all()


def test_steps_against_a_certain_network_are_seen_by_the_probability_margin():
    """A rise of the loss must be seen by APGD, which compares values: p_max − p_y itself would be −1 in both."""
    y = torch.zeros(1, dtype=torch.int64)
    lower, higher = (torch.tensor([[gap, 0.0, 0.0]]) for gap in (40.0, 39.9))
    assert probability_margin(higher, y) > probability_margin(lower, y) > 0


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1e4, 0.0), (1.0, 100.0), (50.0, -7.0)])
def test_dlr_does_not_see_scale_and_shift(scale, shift):
    torch.testing.assert_close(dlr(scale * Z + shift, LABELS), dlr(Z, LABELS), rtol=1e-6, atol=1e-6)


def test_dlr_wants_three_classes():
    with pytest.raises(ValueError, match=r"at least 3 classes, not 2.*'margin'"):
        dlr(Z[:, :2], LABELS.clamp(max=1))


def test_the_divergence_of_equal_predictions_is_zero_and_no_shift_changes_it():
    torch.testing.assert_close(divergence(Z, Z + 3.0), torch.zeros(6, dtype=torch.float64), atol=1e-14, rtol=0)
    assert (divergence(Z, Z_ADV) > 0).all()


def test_divergence_from_repeats_the_fixed_prediction_for_every_draw():
    z = Z.clone().requires_grad_()
    draws = torch.cat([Z_ADV, Z, 2 * Z_ADV]).requires_grad_()
    value = divergence_from(z)(draws, LABELS.repeat(3))
    expected = torch.cat([divergence(Z, Z_ADV), divergence(Z, Z), divergence(Z, 2 * Z_ADV)])
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert z.grad is None  # p is fixed


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, z: cross_entropy(a, LABELS, 0.1),
        lambda a, z: margin(a, LABELS),
        lambda a, z: dlr(a, LABELS),
        lambda a, z: probability_margin(a, LABELS),
        lambda a, z: divergence(z, a),
        lambda a, z: mart(a, z, LABELS),
        lambda a, z: trades(a, z, LABELS),
    ],
    ids=["ce", "margin", "dlr", "pm", "divergence", "mart", "trades"],
)
def test_gradients_are_those_of_the_values_in_every_branch(loss):
    a, z = Z_ADV.clone().requires_grad_(), Z.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (a, z))


@pytest.mark.parametrize("name", ["mart", "trades"])
def test_no_branch_is_detached(name):
    loss = {"mart": mart, "trades": trades}[name]
    a, z = Z_ADV.clone().requires_grad_(), Z.clone().requires_grad_()
    grads = torch.autograd.grad(loss(a, z, LABELS).sum(), (a, z))
    assert all((g.abs().amax(1) > 1e-6).all() for g in grads)


def test_mart_is_finite_where_a_probability_is_zero():
    sure = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
    value = mart(sure, sure.flip(0), torch.tensor([1, 1]))
    (grad,) = torch.autograd.grad(value.sum(), sure)
    assert value.isfinite().all() and grad.isfinite().all()
