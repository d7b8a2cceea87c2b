"""Images leave an attack one by one, or are marked and cut to a few sizes, as on an accelerator: the same results."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gsem.attacks import Step, apgd, counting, cw, fab, pgd, rays, square
from gsem.attacks._active import LAG, READ_EVERY, Remaining
from gsem.attacks._confirm import CONFIRM, Confirmer, Trial
from gsem.nn.contract import NotFinite

SIZES = (64, 32, 16, 8)
ATTACKS = {
    "pgd": partial(pgd, step=0.01, steps=40, restarts=2),
    "apgd": partial(apgd, steps=40),
    "apgd-t": partial(apgd, steps=30, targets=2),
    "fab": partial(fab, steps=30),
    "fab-t": partial(fab, steps=25, targets=2, restarts=2),
    "square": partial(square, queries=120),
    "rays": partial(rays, queries=120),
    "cw": partial(cw, steps=40, searches=2, lr=0.02),
}
EPS = {"Linf": 0.1, "L2": 0.5}


def in_float64(attacked: tuple[nn.Module, Tensor, Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    """So that rounding, which depends on the number of rows, turns no decision."""
    model, x, y = attacked
    return copy.deepcopy(model).double(), x[:60].double(), y[:60]


class Rows(nn.Module):
    """Records how many rows each pass had."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.seen = model.eval(), set()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(len(x))
        return self.model(x)


@pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for name in ATTACKS for norm in EPS if (name, norm) != ("cw", "Linf")]
)
def test_few_sizes_change_no_result(name, norm, attacked, monkeypatch):
    model, x, y = in_float64(attacked)
    attack = partial(ATTACKS[name], eps=EPS[norm], norm=norm, seed=3)
    if name == "square":
        # Marked images change which square is drawn for whom; what is compared is marking alone.
        monkeypatch.setattr(Remaining, "sizes", ())
    one_by_one = Rows(model)
    expected = attack(one_by_one, x, y)
    monkeypatch.setattr(Remaining, "sizes", SIZES)
    few = Rows(model)
    found = attack(few, x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    share = (model(found).argmax(1) != y).double().mean()
    assert 0.03 < share < 0.97, share  # (images are finished, and images remain)
    if name in ("apgd", "fab", "rays"):  # (one run: it begins with all images that are right)
        assert few.seen <= {60, 8, *SIZES} and len(few.seen) > 1, few.seen


class Noisy(nn.Module):
    """A model with noise on its logits, from torch's stream."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits + torch.randn_like(logits)


@pytest.mark.parametrize("name", ["pgd", "apgd", "fab", "square"])
def test_on_a_stochastic_model_few_sizes_break_as_many_images(name, attacked, monkeypatch):
    model, x, y = attacked[0], attacked[1][:70], attacked[2][:70]
    noisy = Noisy(model)
    attack = partial(ATTACKS[name], noisy, x, y, eps=0.1, eot=2, seed=3)
    shares = []
    for sizes in (None, SIZES):
        monkeypatch.setattr(Remaining, "sizes", sizes)
        wrong = torch.stack([noisy(found).argmax(1) != y for found in [attack()] for _ in range(20)])
        shares.append(wrong.double().mean(0))
    # The same images, with other noise: the mean difference, to three of its standard errors.
    difference = shares[1] - shares[0]
    assert difference.mean().abs() < 3 * difference.std() / len(x) ** 0.5 + 0.01, (name, difference.mean())
    assert 0.1 < shares[0].mean() < 0.95


class OneNoise(nn.Module):
    """A model whose draws belong to the pass: in one draw all images have the same noise on their logits.

    So an image's results can be compared to the bit, whatever else is in its batch.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits_of_draws(x, 1)

    def logits_of_draws(self, x: Tensor, count: int) -> Tensor:
        logits = self.model(x)
        return (logits + 0.1 * torch.randn(count, 1, logits.shape[1], dtype=logits.dtype)).flatten(0, 1)


@pytest.mark.parametrize("name", ["pgd", "apgd", "apgd-t", "fab", "square", "rays", "cw"])
def test_on_a_stochastic_model_no_size_changes_a_result(name, attacked, monkeypatch):
    model, x, y = in_float64(attacked)
    # (Radii at which images are broken on the way.)
    norm, eps = ("L2", 0.9) if name == "cw" else ("Linf", 0.25 if name in ("square", "rays") else 0.18)
    found, rows = [], []
    for sizes in ((), (48,), (48, 32, 16, 8)):
        monkeypatch.setattr(Remaining, "sizes", sizes)
        noisy = counting(OneNoise(model))
        found.append(ATTACKS[name](noisy, x, y, eps=eps, norm=norm, eot=2, seed=3))
        rows.append(noisy.forwards + noisy.gradients)
    assert rows[2] <= rows[1] < rows[0], rows  # (finished images did leave)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-6)


class Planted(nn.Module):
    """Class 1 where an image has become brighter than 0.5. Images with a dark first pixel are so always, those with a
    bright one in nine draws of ten."""

    def forward(self, x: Tensor) -> Tensor:
        value, rare = 40 * (x.mean((1, 2, 3)) - 0.5), x[:, 0, 0, 0] > 0.5
        value = torch.where((value > 0) & rare & (torch.rand(len(x)) > 0.9), -value, value)
        value = value + 1e-3 * torch.randn(len(x))  # (everywhere, as that of a stochastic network)
        return torch.stack([torch.zeros_like(value), value, -20 + 0 * value, -30 + 0 * value], 1)


def planted_images() -> Tensor:
    x = torch.full((12, 1, 4, 4), 0.46)
    x[:, 0, 0, 0] = torch.tensor([0.2, 0.8]).repeat(6)
    return x


@pytest.mark.parametrize("sizes", [(), (4, 2)])
@pytest.mark.parametrize("name", ["pgd", "apgd", "fab", "square", "rays", "cw"])
def test_only_what_is_wrong_in_every_draw_is_broken_and_all_of_it_is_found(name, sizes, monkeypatch):
    monkeypatch.setattr(Remaining, "sizes", sizes)
    x, working = planted_images(), set()

    def note(step: Step) -> None:
        working.clear()
        working.update(step.rows[step.live].tolist())

    norm, eps = ("L2", 0.8) if name == "cw" else ("Linf", 0.1)
    y = torch.zeros(len(x), dtype=torch.int64)
    found = ATTACKS[name](Planted().eval(), x, y, eps=eps, norm=norm, eot=2, seed=1, on_step=note)
    # Those that are broken are worked on no more, or the whole search has ended.
    assert working == {1, 3, 5, 7, 9, 11}
    wrong = torch.stack([Planted()(found).argmax(1) == 1 for _ in range(300)]).double().mean(0)
    assert (wrong[0::2] == 1).all()
    assert (wrong[1::2] < 1).all() and (wrong[1::2] > 0.5).all()


@pytest.mark.parametrize("steps", [1, 10, 11, 12, 13, 15, 17, 24])
def test_a_search_ends_with_every_point_decided(steps, monkeypatch):
    monkeypatch.setattr(Remaining, "sizes", (8,))
    x = planted_images() + 0.1
    model = counting(Planted().eval())
    remaining, y = Remaining(torch.arange(len(x))), torch.zeros(len(x), dtype=torch.int64)
    confirmer = Confirmer(model, x, y, CONFIRM, spaced=False)
    result, points = torch.zeros(len(x)), x
    for step in range(1, steps + 1):
        # At each step the points are wrong in the draws of the search; their loss is the highest at step 3.
        high = torch.full((len(points),), -abs(step - 3.0))
        broken, at, value = remaining.broken(points, high, torch.ones(len(points)), confirmer, last=step == steps)
        assert torch.equal(at, points)
        assert bool(broken.any()) == (step == min(16, steps))
        result += torch.zeros(len(x)).index_put((remaining.rows,), torch.where(broken, value + 10, 0.0))
        before = model.forwards
        kept = remaining.drop(broken)
        points = points if kept is None else points[kept]
        assert model.forwards == before
    best = 10 - abs(min(steps, 3) - 3.0)
    assert result.tolist() == [best, 0.0] * 6
    if steps > 16:
        assert len(points) == (8 if steps >= 20 else 12)


def test_a_trial_takes_few_rows_and_stops_where_none_is_left():
    x = planted_images() + 0.1
    y = torch.zeros(len(x), dtype=torch.int64)
    model = counting(Planted().eval())
    confirmer = Confirmer(model, x, y, CONFIRM)
    for tried, rows in ((torch.arange(12) < 0, []), (torch.arange(12) % 4 == 0, [4 * 5, 4 * 20, 4 * 75])):
        trial = Trial.begin(confirmer, x, torch.zeros(12), tried)
        passed = []
        while trial.parts:
            before = model.forwards
            trial.next_part(confirmer, torch.arange(12))
            passed.append(model.forwards - before)
        assert [part for part in passed if part] == rows  # (three points, filled up to four)
        assert torch.equal(trial.broken, tried)


def test_a_loss_that_is_not_finite_names_its_image_also_when_it_is_read_late(monkeypatch):
    class Bad(nn.Module):
        """NaN for dark images with a bright first pixel, once it has moved."""

        def forward(self, x: Tensor) -> Tensor:
            first, left = x[:, 0, 0, 0], x.mean((1, 2, 3))
            bad = (first > 0.7) & ((first - 0.9).abs() > 1e-3) & (left < 0.3)
            return torch.stack([torch.where(bad, torch.nan, left + 9), left, -left], 1)

    x = torch.full((30, 1, 4, 4), 0.05)
    x[17, 0, 0, 0] = 0.9
    y = torch.zeros(30, dtype=torch.int64)
    for sizes in (None, SIZES):
        monkeypatch.setattr(Remaining, "sizes", sizes)
        for attack in (partial(apgd, steps=3), partial(square, queries=4), partial(pgd, step=0.05, steps=25)):
            with pytest.raises(NotFinite, match="image 17 of the attacked batch"):
                attack(Bad().eval(), x, y, eps=0.1, seed=1)


def test_a_state_is_cut_to_the_smallest_size_that_holds_what_is_left(monkeypatch):
    monkeypatch.setattr(Remaining, "sizes", (4, 8))
    remaining = Remaining(torch.arange(100, 110))
    state, result = torch.arange(10), torch.zeros(10)
    for step in range(5 * READ_EVERY):
        done = state == {1: 3, 4: 9, 13: 0, 14: 1, 15: 2, 18: 4}.get(step, -1)
        remaining.record(result, state + 1.0, done)
        kept = remaining.drop(done)
        if kept is not None:
            state = state[kept]
        # The count of every tenth step is that of two steps before: 8 images at first, then 5, then 4.
        size = 10 if step < READ_EVERY - 1 else 8 if step < 3 * READ_EVERY - 1 else 4
        assert len(state) == len(remaining) == size, step
        assert torch.equal(remaining.rows, state + 100)
    assert state[remaining.live].tolist() == [5, 6, 7, 8]
    remaining.record(result, state + 100.0)
    assert result.tolist() == [1, 2, 3, 4, 5, 105, 106, 107, 108, 10]


def test_a_loss_that_was_not_finite_is_not_cut_away_unread(monkeypatch):
    monkeypatch.setattr(Remaining, "sizes", (2,))

    def run() -> None:
        remaining, state = Remaining(torch.arange(100, 104)), torch.arange(4)
        for step in range(3 * READ_EVERY):
            remaining.require_finite((state != 3) | (step != READ_EVERY - LAG))
            kept = remaining.drop(state == {0: 0, 1: 2, READ_EVERY - LAG: 3, READ_EVERY - 1: 1}.get(step, -1))
            state = state if kept is None else state[kept]

    # At the count two images were left, 1 and 3; both are finished when the state is cut to two rows.
    with pytest.raises(NotFinite, match="image 103 "):
        run()
