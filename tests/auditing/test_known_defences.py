"""The modules of known defences against slow direct formulas, their gradients and their randomness."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn, idctn
from scipy.ndimage import median_filter
from scipy.optimize import minimize
from torch import Tensor, nn

from known_defences import (
    CosineRounding,
    GaussianNoise,
    KWinners,
    MeanSparse,
    Median,
    OneHot,
    PartlyDetached,
    Ramps,
    RandomMember,
    ResizedAndPadded,
    Temperature,
    Thermometer,
    TotalVariation,
    WrongBackward,
    sparsified,
)


def images(b: int = 3, c: int = 2, h: int = 8, w: int = 8, seed: int = 0) -> Tensor:
    return torch.rand((b, c, h, w), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Of the sum of the outputs' squares; None where there is no path from them to x."""
    x = x.clone().requires_grad_()
    out = layer(x)
    return torch.autograd.grad((out**2).sum(), x)[0] if out.requires_grad else None


@pytest.mark.parametrize("side", [(8, 8), (16, 8), (11, 13)])
def test_cosine_rounding_is_that_of_scipys_dct(side):
    x, layer = images(h=side[0], w=side[1]), CosineRounding(0.05).double()
    found = layer(x).numpy()
    h, w = (8 * -(-s // 8) for s in side)
    step = 0.05 * (1 + np.arange(8)[:, None] + np.arange(8))
    for image, out in zip(x.flatten(0, 1).numpy(), found.reshape(-1, *side), strict=True):
        padded = np.pad(image, ((0, h - side[0]), (0, w - side[1])), mode="edge")
        for i in range(0, h, 8):
            for j in range(0, w, 8):
                block = dctn(padded[i : i + 8, j : j + 8], norm="ortho")
                padded[i : i + 8, j : j + 8] = idctn(np.round(block / step) * step, norm="ortho")
        np.testing.assert_allclose(out, padded[: side[0], : side[1]].clip(0, 1), atol=1e-6)


def test_a_thermometer_has_a_bit_for_each_level_below_the_pixel():
    x = images(2, 2, 3, 3)
    bits = Thermometer(5)(x)
    assert bits.shape == (2, 10, 3, 3) and gradient(Thermometer(5), x) is None
    for b, c, i, j in np.ndindex(*x.shape):
        assert bits[b, 5 * c : 5 * c + 5, i, j].tolist() == [float(x[b, c, i, j] > k / 5) for k in range(5)]
    ramps = Ramps(5)(x)
    torch.testing.assert_close(ramps[:, 5:10], (x[:, 1:2] - torch.arange(5)[:, None, None] / 5).clamp(0, 1))
    assert ((ramps > 0) == (bits > 0)).all()
    model = nn.Sequential(Thermometer(5), nn.Flatten(), nn.Linear(90, 3).double())
    assert model(x).isfinite().all()


def test_the_median_is_scipys_and_has_no_gradient():
    x = images(2, 1, 7, 9)
    for size in (2, 3):
        found = Median(size)(x)
        for image, out in zip(x[:, 0].numpy(), found[:, 0].numpy(), strict=True):
            np.testing.assert_array_equal(out, median_filter(image, size, mode="nearest"))
        assert gradient(Median(size), x) is None


def test_total_variation_minimises_what_it_says():
    x, weight = images(1, 1, 4, 5), 0.1

    def value(u: np.ndarray) -> float:
        u = u.reshape(4, 5)
        down, right = np.zeros_like(u), np.zeros_like(u)
        down[:-1], right[:, :-1] = np.diff(u, axis=0), np.diff(u, axis=1)
        return ((u - x[0, 0].numpy()) ** 2).sum() / 2 + weight * np.sqrt(down**2 + right**2 + 1e-12).sum()

    slow = minimize(value, x.numpy().ravel(), method="L-BFGS-B", options={"maxiter": 2000, "maxfun": 100_000})
    found = TotalVariation(weight, steps=500)(x)
    assert value(found.numpy().ravel()) <= slow.fun + 1e-4
    np.testing.assert_allclose(found.numpy().ravel(), slow.x, atol=5e-3)
    assert gradient(TotalVariation(weight), x) is None
    flat = torch.full((1, 3, 6, 6), 0.3)
    torch.testing.assert_close(TotalVariation(weight)(flat), flat)


def test_k_winners_are_the_largest_of_an_image():
    x = images(4, 3, 5, 5) - 0.5
    found = KWinners(0.2)(x)
    for image, out in zip(x.flatten(1).numpy(), found.flatten(1).numpy(), strict=True):
        kept = np.argsort(image)[::-1][: int(0.2 * image.size)]
        expected = np.zeros_like(image)
        expected[kept] = image[kept]
        np.testing.assert_array_equal(out, expected)
    torch.testing.assert_close(gradient(KWinners(0.2), x), 2 * found)  # right almost everywhere


def test_mean_sparse_blocks_exactly_the_features_near_the_mean():
    x, mean, std = images() - 0.5, torch.tensor([0.1, -0.2]).double(), torch.tensor([0.5, 1.0]).double()
    layer = MeanSparse(mean, std, 0.3)
    found = layer(x)
    for b, c, i, j in np.ndindex(*x.shape):
        near = abs(x[b, c, i, j] - mean[c]) <= 0.3 * std[c]
        assert found[b, c, i, j] == (mean[c] if near else x[b, c, i, j])
    near = (x - mean[:, None, None]).abs() <= 0.3 * std[:, None, None]
    grad = gradient(layer, x)
    assert (grad[near] == 0).all() and torch.equal(grad[~near], 2 * x[~near])


def test_a_sparsified_network_has_one_behind_each_normalisation_with_the_statistics_of_its_output():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
    net, x = net.double().eval(), images(20)
    changed = sparsified(net, x, 0.25)
    assert [name for name, m in changed.named_modules() if isinstance(m, MeanSparse)] == ["1.1", "4.1"]
    first = net[:2](x)
    torch.testing.assert_close(changed[1][1].mean.flatten(), first.mean((0, 2, 3)))
    torch.testing.assert_close(changed[1][1].std.flatten(), first.std((0, 2, 3)))
    assert torch.equal(sparsified(net, x, -1.0)(x), net(x)) and not torch.equal(changed(x), net(x))
    assert not any(isinstance(m, MeanSparse) for m in net.modules())


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_images_are_resized_to_the_nearest_pixel_and_padded(source):
    x, layer = images(5, 2, 6, 6), ResizedAndPadded(9, source)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    sizes, top, left = layer.draw(x)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    found = layer(x)
    for image, out, size, i, j in zip(x, found, sizes.tolist(), top.tolist(), left.tolist(), strict=True):
        resized = F.interpolate(image[None], size=(size, size), mode="nearest")
        torch.testing.assert_close(out[None], F.pad(resized, (j, 10 - size - j, i, 10 - size - i)))
    sizes, top, left = layer.draw(images(400, 1, 6, 6))
    assert set(sizes.tolist()) == {6, 7, 8, 9}
    assert set(top[sizes == 6].tolist()) == set(left[sizes == 6].tolist()) == {0, 1, 2, 3, 4}


def test_a_random_member_answers_for_each_image():
    def constant(value: float) -> nn.Module:
        class Constant(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return value + 0 * x.flatten(1)[:, :3]

        return Constant()

    for source in ("torch", "numpy", "python"):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        model = RandomMember([constant(1), constant(2)], source)
        first, second = model(images(200))[:, 0], model(images(200))[:, 0]
        assert set(first.tolist()) == {1.0, 2.0} and not torch.equal(first, second)
        assert 60 < (first == 1).sum() < 140


def test_gaussian_noise_has_its_standard_deviation_and_torchs_stream():
    x = torch.zeros(1, 1, 200, 200)
    torch.manual_seed(0)
    first = GaussianNoise(0.2)(x)
    torch.manual_seed(0)
    assert torch.equal(first, GaussianNoise(0.2)(x)) and not torch.equal(first, GaussianNoise(0.2)(x))
    assert float(first.std()) == pytest.approx(0.2, rel=0.02)


def test_gradients_that_are_cut_or_reversed_leave_the_features_as_they_are():
    x, some = images(c=4), torch.tensor([True, False, True, False])
    for layer, kept in ((PartlyDetached(some), ~some), (WrongBackward(torch.where(some, -1.0, 1.0)), None)):
        assert torch.equal(layer(x), x)
        factor = kept.double() if kept is not None else torch.where(some, -1.0, 1.0).double()
        torch.testing.assert_close(gradient(layer, x), 2 * x * factor[:, None, None])


def test_outputs_that_saturate_or_say_only_the_class():
    network = nn.Sequential(nn.Flatten(), nn.Linear(128, 3).double())
    x = images()
    assert torch.equal(nn.Sequential(network, Temperature(500.0))(x), 500 * network(x))
    hard = OneHot(network)(x)
    assert torch.equal(hard.argmax(1), network(x).argmax(1)) and torch.equal(hard.sum(1), torch.ones(3).double())
    assert hard.dtype == x.dtype and not hard.requires_grad
