"""Attacks on the remaining images: confirmation, cascades, and the schedule of draws."""

import pytest
import torch
from torch import Tensor, nn

from gsem.attacks import Step, counting, pgd
from gsem.attacks._active import cascade, draw_schedule
from gsem.attacks._checks import require_finite
from gsem.attacks._confirm import CONFIRM, Confirmer, confirm_broken, confirmation
from gsem.attacks._core import Targeted
from gsem.nn.contract import NotFinite
from gsem.nn.folded import fold
from gsem.rng import seeded

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above 0.5; there it answers so in a share of the draws only."""

    def __init__(self, share: float = 1.0):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        value = x.mean((1, 2, 3)) - 0.5
        if self.share < 1:
            value = torch.where((value > 0) & (torch.rand(len(x)) > self.share), -value, value)
        return torch.stack([torch.zeros_like(value), value], dim=1)


def flat(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2).clone()


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64)


def test_a_deterministic_model_needs_no_confirmation():
    x = flat(0.2, 0.8)
    assert confirmation(Brightness(), x) == 0
    assert confirmation(Brightness(0.5), x) == CONFIRM
    counted = counting(Brightness())
    assert confirm_broken(counted, x, zeros(x), torch.tensor([0.0, 1.0]), 0).tolist() == [False, True]
    assert counted.forwards == 0


def test_only_what_is_wrong_in_every_draw_is_broken():
    x = flat(*[0.8] * 200)
    ones = torch.ones(200)
    with seeded(0, CPU):
        sure = confirm_broken(Brightness(0.9999999), x, zeros(x), ones, CONFIRM)
        rare = confirm_broken(Brightness(0.99), x, zeros(x), ones, CONFIRM)
        never = confirm_broken(Brightness(0.9), x, zeros(x), ones, CONFIRM)
    assert sure.all()
    assert 0.2 < rare.double().mean() < 0.55  # 0.99^100 = 0.37
    assert never.sum() <= 1


def test_a_point_that_could_not_be_confirmed_is_tried_again_where_it_is_worse_and_ever_more_rarely():
    model = counting(Brightness(0.5))
    x = flat(0.8)
    confirmer = Confirmer(model, x, zeros(x), CONFIRM)
    tried = []
    with seeded(0, CPU):
        for _ in range(16):
            before = model.forwards
            assert not confirmer(x, torch.tensor([0.3]), torch.ones(1), torch.tensor([0])).any()
            tried.append(model.forwards > before)
        assert tried == [number in (0, 2, 5, 10) for number in range(16)]
        before = model.forwards
        confirmer(x, torch.tensor([0.4]), torch.ones(1), torch.tensor([0]))
        assert model.forwards > before  # a higher loss than where it failed


def test_a_cascade_runs_each_attack_on_the_remaining_images_and_keeps_the_worst():
    x = flat(0.9, 0.45, 0.3, 0.1)  # the first is wrong already
    asked: list[list[int]] = []

    def adding(amount: float):
        def run(rows, seed, on_step):
            asked.append(rows.tolist())
            return x[rows] + amount

        return run

    left: list[tuple[int, int]] = []
    x_adv = cascade(
        Brightness(),
        x,
        zeros(x),
        [adding(0.1), adding(0.15), adding(-0.05), adding(0.3)],
        eot=1,
        confirm=0,
        seed=0,
        on_progress=lambda *news: left.append(news),
    )
    assert asked == [[1, 2, 3], [2, 3], [2, 3], [2, 3]]
    assert left == [(0, 2), (1, 2), (2, 2), (3, 1)]
    torch.testing.assert_close(x_adv, flat(0.9, 0.55, 0.6, 0.4))


def test_a_cascade_regroups_the_remaining_images_into_batches_and_numbers_them():
    x = flat(0.9, 0.2, 0.9, 0.2, 0.2)
    batches, seen = [], []

    def run(rows, seed, on_step):
        batches.append(rows.tolist())
        on_step(Step(torch.tensor([0]), 0, x[:1], torch.zeros(1), torch.zeros(1)))
        return x[rows]

    cascade(Brightness(), x, zeros(x), [run], eot=1, confirm=0, seed=0, batch_size=2, on_step=seen.append)
    assert batches == [[1, 3], [4]]
    assert [s.rows.tolist() for s in seen] == [[1], [4]]


def test_a_nan_is_named_by_the_number_of_its_image():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = Brightness()(x)
            return torch.where(x.flatten(1)[:, :1] > 0.75, torch.nan, logits)

    x = flat(0.6, 0.2, 0.3)
    with pytest.raises(NotFinite, match="image 2 of the attacked batch"):
        cascade(Broken(), x, zeros(x), [lambda r, s, o: flat(0.3, 0.8)], eot=1, confirm=0, seed=0)


def test_a_nan_within_a_run_is_named_by_the_number_in_the_batch():
    def run(rows, seed, on_step):
        require_finite(torch.tensor([True, False]))
        return x[rows]

    x = flat(0.9, 0.2, 0.3)  # the first is not attacked
    with pytest.raises(NotFinite, match=r"^image 2 of the attacked batch"):
        cascade(Brightness(), x, zeros(x), [run], eot=1, confirm=0, seed=0)


def test_more_draws_are_for_survivors_only():
    assert draw_schedule(1) == [1]
    assert draw_schedule(5) == [5]
    assert draw_schedule(20) == [5, 20]
    assert draw_schedule(100) == [5, 20, 100]


class Bright(nn.Module):
    """Class 1 where the mean exceeds a threshold, which a layer holds."""

    def __init__(self, threshold: float):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 4)
        with torch.no_grad():
            self.layer.weight[:] = torch.tensor([0.0, 1 / 16]).view(2, 1, 1, 1)
            self.layer.bias[:] = torch.tensor([threshold, 0.0])
        self.eval()

    def forward(self, x):
        return self.layer(x).flatten(1)


def stale(folded: float, itself: float) -> nn.Module:
    """A folded model that is broken above `folded`, of a network that is broken above `itself`."""
    network = Bright(folded)
    stand_in = fold(network)
    network.layer.bias.data[0] = itself
    return stand_in


def test_a_point_that_only_the_folded_model_misclassifies_breaks_no_image():
    x = torch.full((3, 1, 4, 4), 0.5)
    runs = [lambda rows, *_, to=to: torch.full((len(rows), 1, 4, 4), to) for to in (0.62, 0.7, 0.9)]
    how = {"eot": 1, "confirm": 0, "seed": 0}
    for model in (stale(0.6, 0.65), counting(stale(0.6, 0.65))):
        assert torch.equal(cascade(model, x, zeros(x), runs, **how), torch.full_like(x, 0.7))
    assert torch.equal(cascade(stale(0.6, 0.6), x, zeros(x), runs, **how), torch.full_like(x, 0.62))
    # Towards class 1: reached on the folded model at 0.62, on the network at 0.7.
    targeted = Targeted(stale(0.6, 0.65))
    assert torch.equal(cascade(targeted, x, zeros(x) + 1, runs, **how), torch.full_like(x, 0.7))


def test_pgd_restarts_where_only_the_folded_model_was_broken():
    x = torch.full((2, 1, 4, 4), 0.5)
    how = {"eps": 0.2, "step": 0.1, "steps": 1, "restarts": 3}
    counts = []
    for itself in (0.4, 0.9):  # the second is never broken
        model = counting(stale(0.3, itself))
        pgd(model, x, zeros(x), **how)
        counts.append(model.gradients)
    assert counts[1] == 6 > counts[0]
