"""Carlini & Wagner and FGSM against closed forms and planted models; transfer by planted sources."""

import pytest
import torch
from torch import Tensor, nn

from gsem.attacks import Step, apgd, counting, cw, fgsm, pgd, transfer
from gsem.losses import margin
from landscapes import Linear


def wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


def linear(classes: int = 4) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear classifier, images in the middle of the cube, their predictions, and their L2 distance to the
    nearest other class."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn((classes, 48), generator=rng)
    x = 0.2 + 0.6 * torch.rand((60, 3, 4, 4), generator=rng)
    model = Linear(w, -w.mean(1) * 24)
    z = model(x)
    y = z.argmax(1)
    gap = z.gather(1, y[:, None]) - z
    length = (w[y][:, None] - w[None]).norm(dim=2)
    distance = torch.where(length > 0, gap / length, torch.inf).amin(1)
    rows = ((distance > 0.1) & (distance < 0.6)).nonzero()[:12, 0]  # nothing is clipped on the way
    assert len(rows) == 12
    return model, x[rows], y[rows], distance[rows]


# --- the L2 form -------------------------------------------------------------------------------------------------


def test_it_lands_within_five_hundredths_of_the_nearest_point():
    # (Of more classes it may follow the likeliest, which need not be the nearest.)
    model, x, y, distance = linear(2)
    x_adv = cw(model, x, y, steps=300, c=1.0, searches=9)
    assert wrong(model, x_adv, y).all()
    found = (x_adv - x).flatten(1).norm(dim=1)
    assert (found <= 1.05 * distance).all() and (found >= distance * (1 - 1e-4)).all()


def test_with_a_bound_it_breaks_what_can_be_broken_in_it_and_stays_there():
    model, x, y, distance = linear(2)
    eps = float(distance.median() * 1.1)
    x_adv = cw(model, x, y, eps=eps, steps=300, searches=9)
    length = (x_adv - x).flatten(1).norm(dim=1)
    assert (length <= eps * (1 + 1e-5) + 1e-6).all()
    broken = wrong(model, x_adv, y)
    assert broken[distance < 0.95 * eps].all() and not broken[distance > eps].any()
    # Where nothing is broken, the worst point is returned: its margin is higher than the image's.
    with torch.no_grad():
        remain = ~broken
        assert remain.any()
        assert (margin(model(x_adv), y)[remain] > margin(model(x), y)[remain]).all()


def test_one_search_is_the_papers_adam_in_tanh_space():
    """The first step of Adam moves every w by lr against the sign of the slope: a closed form."""
    model, x, y, _ = linear()
    seen: list[Step] = []
    cw(model, x, y, steps=1, c=0.5, lr=0.02, on_step=seen.append)
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(margin(model(z), y).sum(), z)
    w = torch.atanh((2 * x - 1) * (1 - 1e-6))
    torch.testing.assert_close(seen[-1].x, (torch.tanh(w + 0.02 * grad.sign()) + 1) / 2, rtol=0, atol=1e-5)


def test_what_cannot_be_broken_is_returned_as_it_is_and_what_is_wrong_already_too():
    model, x, y, _ = linear()
    y = torch.where(torch.arange(12) < 3, (y + 1) % 4, y)
    x_adv = cw(model, x, y, steps=1)
    assert torch.equal(x_adv, x)


def test_bounded_images_leave_once_broken():
    model, x, y, distance = linear()
    counted = counting(model)
    cw(counted, x, y, eps=10 * float(distance.max()), steps=200, c=10.0)
    assert counted.gradients < 12 * 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "Linf"}, "the L∞ form of C&W is bounded: give eps"),
        ({"c": 0.0}, "c must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"kappa": -1.0}, "kappa must be at least 0"),
        ({"eps": -1.0}, "eps must be positive"),
    ],
)
def test_what_cw_refuses(change, message):
    model, x, y, _ = linear()
    with pytest.raises(ValueError, match=message):
        cw(model, x, y, **change)


# --- the bounded forms -------------------------------------------------------------------------------------------


def test_the_linf_form_is_pgd_on_the_margin(attacked):
    model, x, y = attacked
    ours = cw(model, x, y, eps=0.1, norm="Linf", steps=10, seed=4)
    assert torch.equal(ours, pgd(model, x, y, eps=0.1, step=0.025, steps=10, loss="margin", keep="best", seed=4))
    assert wrong(model, ours, y).double().mean() > 0.3


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fgsm_is_one_step_of_full_length(attacked, norm):
    model, x, y = attacked
    x = 0.3 + 0.4 * x
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
    way = grad.sign() if norm == "Linf" else grad / grad.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(fgsm(model, x, y, eps=0.05, norm=norm), (x + 0.05 * way).clamp(0, 1))


# --- transfer ----------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """The network without a gradient."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 255).round() / 255)


def test_points_of_a_source_break_a_model_that_hides_its_gradient(attacked):
    model, x, y = attacked
    hidden = Masked(model)
    own = wrong(hidden, apgd(hidden, x, y, eps=0.1, steps=20), y)
    theirs = wrong(hidden, transfer(hidden, x, y, source_models=[model], eps=0.1, steps=20), y)
    white = wrong(model, apgd(model, x, y, eps=0.1, steps=20), y)
    assert own.double().mean() < 0.2  # no better than its random start
    assert theirs.double().mean() >= white.double().mean() - 0.02


def test_every_source_model_works_on_the_remaining_images_and_the_worst_is_kept(attacked):
    model, x, y = attacked
    sources = [counting(model), counting(model)]
    x_adv = transfer(model, x, y, source_models=sources, eps=0.1, steps=5, losses=["ce"])
    assert sources[0].gradients == 120 * 5 > sources[1].gradients > 0
    assert (wrong(model, x_adv, y).sum() * 5 + sources[1].gradients) <= 120 * 5 + 120


def test_transfer_needs_a_source(attacked):
    model, x, y = attacked
    with pytest.raises(ValueError, match="transfer needs at least one source"):
        transfer(model, x, y, source_models=[], eps=0.1)
