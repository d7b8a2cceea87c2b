"""Square Attack against its peer, and on models whose answer is known."""

from importlib import import_module

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from gsem.attacks import NotFinite, Step, counting
from gsem.attacks.square import _bumps, _share, square
from gsem.losses import margin
from gsem.nn.predict import correct_draws
from landscapes import Landscape, Quantised, images, rng, size, zeros

module = import_module("gsem.attacks.square")  # in gsem.attacks the name is the function's


# --- how strong it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.08), ("L2", 0.45)])
def test_it_breaks_as_many_as_its_peer_with_as_many_queries(digits, norm, eps):
    model, x, y = digits
    peer = SquareAttack(model, norm=norm, n_queries=400, eps=eps, resc_schedule=False, device="cpu")
    theirs = model(peer.perturb(x, y)).argmax(1) != y
    ours = model(square(model, x, y, eps=eps, norm=norm, queries=401)).argmax(1) != y
    assert 0.1 < theirs.double().mean() < 0.9
    assert ours.double().mean() >= theirs.double().mean() - 0.01


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.3), ("L2", 2.0)])
def test_a_network_without_gradient_is_broken(digits, norm, eps):
    model, x, y = digits
    masked = Quantised(model)
    x_adv = square(masked, x, y, eps=eps, norm=norm, queries=600)
    assert (masked(x_adv).argmax(1) == y).double().mean() < 0.05


def test_the_linear_optimum_is_reached_linf():
    w = torch.randn(64, generator=rng())
    x = images()
    x_adv = square(Landscape(lambda x: x @ w - 1000), x, zeros(x), eps=0.1, queries=3000)
    best = (x + 0.1 * w.sign().view(1, 1, 8, 8)).clamp(0, 1)
    # Single pixels come after 500 proposals: each of 64 is met about forty times.
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-6)


def test_the_linear_optimum_is_near_l2():
    w = torch.randn(64, generator=rng())
    x = 0.4 + 0.2 * images()
    x_adv = square(Landscape(lambda x: x @ w - 1000), x, zeros(x), eps=0.15, norm="L2", queries=3000)
    gain = (x_adv - x).flatten(1) @ w
    # A square of three pixels or more is a bump and its negative, which fits no random w.
    assert (gain > 0.7 * 0.15 * w.norm()).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_restarts_work_on_the_remaining_images_and_are_never_worse(digits, norm):
    model, x, y = digits
    eps = 0.08 if norm == "Linf" else 0.45
    seen: list[Step] = []
    value = {}
    for restarts in (1, 3):
        how = {"eps": eps, "norm": norm, "queries": 60, "restarts": restarts}
        x_adv = square(model, x, y, **how, on_step=seen.append if restarts == 3 else None)
        logits = model(x_adv)
        value[restarts] = margin(logits, y) + 1000.0 * (logits.argmax(1) != y)
    assert (value[3] >= value[1]).all() and (value[3] > value[1]).any()
    starts = [s.rows for s in seen if s.step == 0]
    assert len(starts) == 3 and len(starts[0]) > len(starts[1]) > len(starts[2])


# --- proposals ---------------------------------------------------------------------------------------------------


def test_the_schedule_of_the_paper():
    halved = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    for k, (before, after) in enumerate(zip(halved, [*halved[1:], 9999], strict=True)):
        assert _share(0.8, before) == 0.8 / 2**k
        assert _share(0.8, before + 1) == _share(0.8, after) == 0.8 / 2 ** (k + 1)
    assert _share(0.8, 0) == 0.8


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_schedule_is_the_peers(norm):
    peer = SquareAttack(None, n_queries=5000, eps=1, p_init=0.3, resc_schedule=False)
    assert all(_share(0.3, i) == peer.p_selection(i) for i in range(10000))


@pytest.mark.parametrize("side", range(1, 12))
def test_bumps_are_the_peers(side):
    peer = SquareAttack(None, norm="L2", eps=1, device="cpu")
    ours, theirs = _bumps(side), peer.eta(side)
    alike = [torch.allclose(ours, other) for other in (theirs, theirs.T)]
    assert any(alike)


def test_it_starts_with_stripes_of_eps():
    x = 0.2 + 0.6 * images(200, 3)
    seen: list[Step] = []
    square(Landscape(lambda x: -1 - x[:, 0]), x, zeros(x), eps=0.1, queries=1, on_step=seen.append)
    offset = seen[0].x - x
    torch.testing.assert_close(offset.abs(), torch.full_like(x, 0.1))
    torch.testing.assert_close(offset, offset[:, :, :1].expand_as(x))
    up = (offset[:, :, 0] > 0).double()  # [b, c, w], independent signs
    assert 0.45 < up.mean() < 0.55 and up.mean(0).min() > 0.35 and up.mean(0).max() < 0.65


def test_it_starts_with_tiles_of_length_eps():
    x = 0.3 + 0.4 * images(50, 3, 11)
    seen: list[Step] = []
    square(Landscape(lambda x: -1 - x[:, 0]), x, zeros(x), eps=0.5, norm="L2", queries=1, on_step=seen.append)
    offset = seen[0].x - x
    torch.testing.assert_close(offset.flatten(1).norm(dim=1), torch.full((50,), 0.5))
    tiles = offset[..., :10, :10].unflatten(3, (5, 2)).unflatten(2, (5, 2)).transpose(3, 4)  # [b, c, 5, 5, 2, 2]
    bumps = _bumps(2) * 0.5 / 75**0.5
    kinds = torch.stack([bumps, bumps.T, -bumps, -bumps.T])
    matches = ((tiles[..., None, :, :] - kinds).abs() < 1e-5).all(-1).all(-1)
    assert (matches.sum(-1) == 1).all() and (matches.double().mean((0, 1, 2, 3)) > 0.2).all()
    assert not offset[..., 10, :].any() and not offset[..., 10].any()


def test_a_proposal_repaints_one_square_of_one_colour_in_each_image():
    x = 0.3 + 0.4 * images(64, 2, 9)
    seen: list[Step] = []
    how = {"eps": 0.1, "queries": 700, "on_step": seen.append}
    square(Landscape(lambda x: -9 - x.sum(1)), x, zeros(x), **how)
    kept, value = seen[0].x, seen[0].loss
    corners, shrunk = set(), set()
    for s in seen[1:]:
        painted = (s.x != kept).any(1)  # [b, h, w]
        assert painted.flatten(1).any(1).all(), "a square that changes nothing is a query lost"
        side = max(1, round((_share(0.8, s.step - 1) * 81) ** 0.5))
        for extent in (painted.any(1), painted.any(2)):
            places = torch.arange(9).expand_as(extent)
            low = torch.where(extent, places, 9).amin(1)
            high = torch.where(extent, places, -1).amax(1)
            assert (high - low < side).all()
            if side == 1:
                corners |= set(low.tolist())
        shrunk.add(side)
        torch.testing.assert_close((s.x - x).abs(), torch.full_like(x, 0.1))
        better = s.loss > value
        kept = torch.where(better[:, None, None, None], s.x, kept)
        value = torch.where(better, s.loss, value)
    assert shrunk == {8, 6, 4, 3, 2} | ({1} & shrunk) and (1 not in shrunk or corners == set(range(9)))


def test_an_l2_proposal_has_length_eps_where_nothing_is_clipped():
    x = 0.4 + 0.2 * images(32, 3, 9)
    seen: list[Step] = []
    how = {"eps": 0.3, "norm": "L2", "queries": 400, "on_step": seen.append}
    square(Landscape(lambda x: -9 - x[:, :40].sum(1)), x, zeros(x), **how)
    for s in seen:
        torch.testing.assert_close(size(s.x, x, "L2"), torch.full((32,), 0.3).double(), rtol=1e-5, atol=0)


# --- which point is kept, and what it costs ----------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.06), ("L2", 0.3)])
def test_the_kept_point_is_the_best_that_was_asked_for_and_broken_images_leave(digits, norm, eps):
    model, x, y = digits
    seen: list[Step] = []
    x_adv = square(model, x, y, eps=eps, norm=norm, queries=200, on_step=seen.append)
    best, point = margin(model(x), y), x.clone()
    remaining = torch.ones(len(x), dtype=torch.bool)
    for s in seen:
        assert torch.equal(s.rows, remaining.nonzero()[:, 0])
        torch.testing.assert_close(s.loss, margin(model(s.x), y[s.rows]))
        better = s.loss > best[s.rows]
        best[s.rows] = torch.where(better, s.loss, best[s.rows])
        point[s.rows] = torch.where(better[:, None, None, None], s.x, point[s.rows])
        remaining[s.rows] = s.wrong < 1
    assert remaining.any() and not remaining.all()
    assert torch.equal(x_adv, point)


def test_what_is_wrong_already_is_returned_unchanged_and_unasked(digits):
    model, x, y = digits
    y = y.clone()
    y[::3] = (y[::3] + 1) % 10
    seen: list[Step] = []
    x_adv = square(model, x, y, eps=0.1, queries=3, on_step=seen.append)
    assert torch.equal(x_adv[::3], x[::3])
    assert not set(seen[0].rows.tolist()) & set(range(0, len(x), 3))
    counted = counting(model)
    assert torch.equal(square(counted, x[::3], y[::3], eps=0.1, queries=9), x[::3])
    assert counted.forwards == 4 * 32 + len(x[::3])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("restarts", "eot"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_cost_is_exact(norm, restarts, eot, noise):
    x = images(5)
    counted = counting(Landscape(lambda x: -9 + noise * torch.rand(len(x)) + x[:, 0]))
    square(counted, x, zeros(x), eps=0.1, norm=norm, queries=60, restarts=restarts, eot=eot)
    probes = 2 if noise else 4  # is it stochastic?
    assert counted.forwards == 5 * (probes + eot * (1 + restarts * (60 + 1)))
    assert counted.gradients == 0


# --- the expectation ---------------------------------------------------------------------------------------------


def test_the_noise_stays_for_25_queries():
    x = images(4)
    seen: list[Step] = []
    model = Landscape(lambda x: -2 + torch.rand(len(x)))
    square(model, x, zeros(x), eps=0.1, queries=100, eot=3, on_step=seen.append)
    losses = torch.stack([s.loss for s in seen]).view(4, 25, 4)
    assert torch.equal(losses, losses[:, :1].expand_as(losses))
    assert len(losses[:, 0].unique()) == 16
    # The noise is new because the incumbent is asked again.
    assert torch.equal(seen[25].x, seen[0].x)  # no proposal was better on the same noise


class OwnNoise(nn.Module):
    """Margin f(x), or 5 more in one draw of fifty, from a source of noise that is not torch's stream."""

    def __init__(self, w: Tensor):
        super().__init__()
        self.w, self.own = w, rng(7)

    def forward(self, x: Tensor) -> Tensor:
        lucky = torch.rand(len(x), generator=self.own) < 0.02
        value = x.flatten(1) @ self.w - 40 + 5 * lucky + 0.001 * torch.rand(len(x), generator=self.own)
        return torch.stack([torch.zeros_like(value), value], dim=1)


def test_a_lucky_draw_does_not_freeze_the_search(monkeypatch):
    w, x = torch.randn(64, generator=rng()), images()
    gain = {}
    for redraw in (module.REDRAW, 10**9):
        monkeypatch.setattr(module, "REDRAW", redraw)
        x_adv = square(OwnNoise(w), x, zeros(x), eps=0.1, queries=1000)
        gain[redraw] = ((x_adv - x).flatten(1) @ w).mean()
    best = ((x + 0.1 * w.sign().view(1, 1, 8, 8)).clamp(0, 1) - x).flatten(1) @ w
    assert gain[25] > 0.7 * best.mean() > 0.6 * best.mean() > gain[10**9]


def test_one_lucky_draw_breaks_nothing():
    """Half the draws are wrong beyond a third of the best perturbation; all are near the best."""
    w = torch.randn(64, generator=rng())
    x = 0.5 * torch.ones(12, 1, 8, 8)
    full = 0.1 * w.abs().sum()

    def f(x: Tensor) -> Tensor:
        gain = (x - 0.5) @ w / full
        return torch.where(gain > 0.9, 1.0, gain - 1 + (torch.rand(len(x)) < 0.5) * (gain > 0.3))

    model = Landscape(f)
    x_adv = square(model, x, zeros(x), eps=0.1, queries=1500, eot=5)
    assert (correct_draws(model, x_adv, zeros(x), draws=100, seed=1) == 0).all()


def test_a_flipper_of_labels_gains_nothing():
    """30% of the answers are wrong whatever the image: no image is broken, none becomes worse."""
    model = Landscape(lambda x: torch.where(torch.rand(len(x)) < 0.3, 1.0, -1.0))
    x = images(40)
    seen: list[Step] = []
    x_adv = square(model, x, zeros(x), eps=0.1, queries=60, eot=2, on_step=seen.append)
    assert len(seen[-1].rows) == 40
    accuracy = correct_draws(model, x_adv, zeros(x), draws=200, seed=3).double().mean() / 200
    assert abs(accuracy - 0.7) < 0.02


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_init": 0.0}, r"p_init must be a share of the image in \(0, 1\], not 0.0"),
        ({"p_init": 1.1}, "p_init must be"),
        ({"p_init": float("nan")}, "p_init must be"),
    ],
)
def test_what_it_refuses(change, message):
    x = images()
    with pytest.raises(ValueError, match=message):
        square(Landscape(lambda x: -x[:, 0]), **({"x": x, "y": zeros(x), "eps": 0.1, "queries": 2} | change))


def test_a_nan_is_an_error_that_names_the_image():
    """Only proposals are NaN, and numbers have shifted: the first images are wrong already."""
    x = images()
    x[:4, 0, 0, 0] = 1.0
    x[4:, 0, 0, 0] = 0.3
    x[11, 0, 0, 0] = 0.6

    def f(x: Tensor) -> Tensor:
        first = x[:, 0]
        return torch.where(first == 1, 1.0, torch.where((first != 0.6) & (first > 0.5), float("nan"), -1.0))

    with pytest.raises(NotFinite, match=r"image 11 of the attacked batch.*NaN or infinite"):
        square(Landscape(f), x, zeros(x), eps=0.08, queries=300)
