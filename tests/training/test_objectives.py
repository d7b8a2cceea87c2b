"""MART and TRADES against float64 transcriptions of their formulas, written with loops."""

import math

import pytest
import torch

from gsem.losses import LOSSES, cross_entropy, divergence, divergence_from, mart, trades


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return (
        3 * torch.randn(7, 5, dtype=torch.float64),
        3 * torch.randn(7, 5, dtype=torch.float64),
        torch.arange(7) % 5,
    )


def softmax(row):
    top = max(row)
    e = [math.exp(v - top) for v in row]
    return [v / sum(e) for v in e]


def mart_of(adv, clean, y, weight):
    p_adv, p = softmax(adv), softmax(clean)
    wrong = max(p_adv[k] for k in range(len(p_adv)) if k != y)
    bce = -math.log(p_adv[y]) - math.log(1.0001 - wrong + 1e-12)
    kl = sum(p[j] * (math.log(p[j]) - math.log(p_adv[j] + 1e-12)) for j in range(len(p)))
    return bce + weight * (1.0000001 - p[y]) * kl


def trades_of(adv, clean, y, weight):
    p_adv, p = softmax(adv), softmax(clean)
    return -math.log(p[y]) + weight * sum(p[j] * math.log(p[j] / p_adv[j]) for j in range(len(p)))


@pytest.mark.parametrize(("loss", "formula", "weight"), [(mart, mart_of, 5.0), (trades, trades_of, 6.0)])
def test_values_are_the_formula(logits, loss, formula, weight):
    adv, clean, y = logits
    wanted = [formula(a, c, k, weight) for a, c, k in zip(adv.tolist(), clean.tolist(), y.tolist(), strict=True)]
    assert loss(adv, clean, y, weight).tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("loss", "branch"), [(mart, 0), (trades, 1)])
def test_smoothing_enters_the_cross_entropy_of_one_branch(logits, loss, branch):
    adv, clean, y = logits
    found = loss(adv, clean, y, 3.0, 0.2) - loss(adv, clean, y, 3.0)
    # 0.2 of the target moves from the label to all five classes alike
    log_p = torch.log_softmax((adv, clean)[branch], 1)
    wanted = 0.2 * (log_p.gather(1, y[:, None])[:, 0] - log_p.mean(1))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("loss", "formula", "weight"), [(mart, mart_of, 5.0), (trades, trades_of, 6.0)])
def test_gradients_are_the_formula_s_in_both_branches(logits, loss, formula, weight):
    adv, clean, y = (t.clone() for t in logits)
    grads = torch.autograd.grad(loss(adv.requires_grad_(), clean.requires_grad_(), y, weight).sum(), (adv, clean))
    h = 1e-6
    for branch, grad in enumerate(grads):
        for i, j in [(0, 0), (3, 2), (6, 4)]:
            ends = []
            for sign in (1, -1):
                both = [adv.detach()[i].tolist(), clean.detach()[i].tolist()]
                both[branch][j] += sign * h
                ends.append(formula(*both, int(y[i]), weight))
            assert float(grad[i, j]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-8)


def test_the_default_weights_are_the_papers(logits):
    adv, clean, y = logits
    assert torch.equal(mart(adv, clean, y), mart(adv, clean, y, 5.0))
    assert torch.equal(trades(adv, clean, y), trades(adv, clean, y, 6.0))


def test_extreme_logits_stay_finite_with_finite_gradients():
    adv = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    clean = torch.tensor([[-200.0, 200.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    for loss in (mart, trades):
        grads = torch.autograd.grad(loss(adv, clean, torch.tensor([0, 1])).sum(), (adv, clean))
        assert all(g.isfinite().all() for g in grads)


def test_divergence_is_zero_where_the_predictions_agree(logits):
    adv, clean, _ = logits
    assert divergence(clean, clean + 3).abs().max() < 1e-12
    assert (divergence(clean, adv) > 0).all()


def test_the_attack_s_divergence_repeats_its_reference_draw_after_draw(logits):
    adv, clean, y = logits
    loss = divergence_from(clean)
    torch.testing.assert_close(loss(adv.repeat(3, 1), y.repeat(3)), divergence(clean, adv).repeat(3))


def test_smoothing_is_the_mixed_target(logits):
    z, _, y = logits
    p = z.log_softmax(1)
    wanted = -(0.8 * p.gather(1, y[:, None])[:, 0] + 0.2 * p.mean(1))
    torch.testing.assert_close(cross_entropy(z, y, 0.2), wanted)
    assert set(LOSSES) == {"ce", "margin", "dlr", "pm"}
