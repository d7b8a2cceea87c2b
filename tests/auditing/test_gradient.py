"""The comparison of differences with derivatives: what is healthy passes, what is masked is found and named."""

import sys

import pytest
import torch
from torch import Tensor, nn

import gsem
from audited_models import EPS, Fronted, Quantise, Sharp, Threshold, convolutional, digits, mlp
from gsem.auditing.check import Check
from gsem.auditing.gradient import joined, slopes
from known_defences import Temperature
from planted import Killed


def gradient(model: nn.Module, attacks: str = "apgd:steps=20:eot=5", **how) -> Check:
    x, y = digits()
    audit = gsem.audit(model, x, y, attacks, eps=EPS, only=["gradient"], quick=True, **how)
    return audit["gradient"]


class Curved(nn.Module):
    """A margin that is a polynomial of the mean pixel: its slope is known at any h."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([0 * mean, mean + 40 * mean**3], dim=1)


def test_the_slope_is_the_closed_form_and_the_averaged_derivative_is_the_difference():
    """(f(m + h) − f(m − h)) / 2h = 1 + 120 m² + 40 h², f' = 1 + 120 m²; along the segment both are equal."""
    middle, h = 0.1, 0.2
    x = torch.full((3, 1, 4, 4), middle, dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.int64)
    how = {"draws": 1, "seed": 0, "directions": 0}
    (found,) = slopes(lambda offset: Curved()(x + offset), torch.zeros_like(x), y, [h], **how)
    derivative = 1 + 120 * middle**2
    assert found.slope == pytest.approx((derivative + 40 * h**2) / derivative)
    assert found.b == pytest.approx(derivative)
    (along,) = slopes(lambda offset: Curved()(x + offset), torch.zeros_like(x), y, [h], **how, along=True)
    assert along.slope == pytest.approx(1)


def test_more_points_of_the_same_images_are_no_more_images_for_the_interval():
    x, y = digits(20)
    (one,) = slopes(lambda o: mlp()(x + o), torch.zeros_like(x), y, [1 / 255], draws=1, seed=0)
    twice = joined([one, one], beside=True)
    assert (twice.slope, twice.low, twice.high) == pytest.approx((one.slope, one.low, one.high))
    more = joined([one, one])
    assert more.slope == pytest.approx(one.slope) and more.high - more.low < one.high - one.low


@pytest.mark.parametrize("robust", [False, True])
def test_a_healthy_network_passes(robust: bool):
    check = gradient(mlp(robust=robust))
    assert check.outcome == "pass" and 0.9 < check.figure < 1.1 and check.advice == ""
    assert [p["h"] * 255 for p in check.details["points"]] == pytest.approx([1, 2, 4])


class Steep(nn.Module):
    """Bent so strongly that differences over 1/255 differ from the derivative: no mask."""

    def __init__(self, network: nn.Module, steepness: float = 3.0):
        super().__init__()
        self.network, self.steepness = network, steepness

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.steepness * self.network(x)) * 5


def test_curvature_is_no_mask():
    x, y = digits()
    model = Steep(mlp())
    (bare,) = slopes(lambda o: model(x + o), torch.zeros_like(x), y, [4 / 255], draws=1, seed=0)
    assert bare.outside(0.07)  # by itself the difference deceives
    check = gradient(model)
    assert check.outcome == "pass"


def test_a_pass_reports_the_slope_at_the_image_and_where_else_it_is_outside():
    check = gradient(Steep(mlp(), 0.5))
    at_1, at_2, at_4 = (p["slope"] for p in check.details["points"])
    assert check.outcome == "pass" and check.figure == at_1 > at_2 > at_4
    assert "at h = 1/255" in check.reason and "outside at 4/255 alone" in check.reason


@pytest.mark.parametrize(("levels", "noise"), [(5, 0.03), (9, 0.0)])
def test_a_quantiser_is_found_named_and_passed(levels: int, noise: float):
    model = Fronted(Quantise(levels, noise), mlp()).eval()
    check = gradient(model)
    assert check.outcome == "flag" and check.figure is None
    assert check.details["layer"] == "front" and 'straight_through(model, "front")' in check.advice
    mitigation = check.details["mitigation"]
    assert mitigation["after"]["accuracy"] < mitigation["before"]["accuracy"] - 0.3


class Holding(nn.Sequential):
    """A Sequential that returns a dict."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


@pytest.mark.filterwarnings("ignore:.*taken for the logits")
def test_a_layer_keeps_its_name_where_logits_are_taken_from_a_dict():
    check = gradient(Holding(Quantise(5, 0.03), *mlp()).eval())
    assert check.details["layer"] == "0" and 'straight_through(model, "0")' in check.advice
    mitigation = check.details["mitigation"]
    assert mitigation["after"]["accuracy"] < mitigation["before"]["accuracy"] - 0.3


def test_a_quantiser_between_layers_is_named_too():
    flat, first, relu, last = mlp()
    model = nn.Sequential(flat, first, nn.Sequential(relu, Threshold(0.5)), last).eval()
    assert gradient(model).details["layer"] == "2.1"


def test_a_gradient_killed_in_the_forward_itself():
    check = gradient(Killed(mlp()))
    assert check.outcome == "flag" and check.details["layer"] == ""
    assert check.details["where"] == "the forward of Killed itself, before its layer 'network'"
    assert not check.answered and check.details["mitigation"]["attacks"] == ["square:queries=300", "rays:queries=300"]


def test_large_logits_are_the_losss_affair_and_no_layers():
    """×1000: the cross-entropy's softmax has no gradient left, the margin of the logits has all of it."""
    x, y = digits()
    names = ["unavailable", "gradient"]
    audit = gsem.audit(nn.Sequential(mlp(), Temperature(1000)), x, y, "apgd:steps=5", eps=EPS, only=names, quick=True)
    assert audit["gradient"].outcome == "pass"
    check = audit["unavailable"]
    assert check.outcome == "flag" and check.details["where"] == "the softmax of the loss"
    assert "the logits are large" in check.reason and "loss=margin" in check.advice
    assert "layer" not in check.advice
    # A gradient that is gone from the logits too is not the loss's.
    audit = gsem.audit(Killed(mlp()), x, y, "apgd:steps=5", eps=EPS, only=["unavailable"], quick=True)
    assert "where" not in audit["unavailable"].details


@pytest.mark.filterwarnings("ignore:the model returns probabilities")
@pytest.mark.parametrize("scale", [50, 1000])
def test_of_a_saturated_softmax_no_layer_of_the_network_is_named(scale: float):
    check = gradient(Sharp(mlp(), scale), "apgd:steps=5")
    assert check.outcome == "flag" and check.details["layer"] == ""
    where = "the softmax that ends Sharp: its logits are so large that it is saturated"
    assert check.details["where"] == where and where in check.reason
    assert "loss=margin" in check.advice
    # As a layer it is that layer.
    check = gradient(nn.Sequential(mlp(), Temperature(scale), nn.Softmax(1)), "apgd:steps=5")
    assert check.outcome == "flag" and check.details["layer"] == "2"


@pytest.mark.filterwarnings("ignore:the model returns probabilities")
def test_an_ordinary_softmax_at_the_end_is_no_mask_and_hides_none():
    assert gradient(Sharp(mlp(), 1), "apgd:steps=5").outcome == "pass"
    check = gradient(Sharp(Fronted(Quantise(noise=0.0), mlp()), 1).eval(), "apgd:steps=5")
    assert check.outcome == "flag" and check.details["layer"] == "network.front"


@pytest.mark.parametrize("steepness", [10, 30])
def test_what_a_forward_does_behind_its_last_layer_is_not_the_layers(steepness: float):
    check = gradient(Steep(mlp(), steepness), "apgd:steps=5")
    assert check.outcome == "flag"
    assert check.details["where"].startswith("the forward of Steep itself, after its layer 'network")


def test_an_interval_too_wide_for_an_answer_is_no_pass():
    """Flat but near a few images, which are the whole of the slope."""
    check = gradient(Steep(mlp(), 300), "apgd:steps=5")
    assert check.outcome == "inconclusive" and "too wide for an answer" in check.reason


def test_a_constant_model_has_no_answer():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 10) * torch.arange(10.0) + 0 * x.sum((1, 2, 3))[:, None]

    assert gradient(Constant()).outcome == "inconclusive"


def test_few_images_are_inconclusive():
    x, y = digits(20)
    check = gsem.audit(mlp(), x, y, eps=EPS, only=["gradient"], quick=True)["gradient"]
    assert check.outcome == "inconclusive" and "the check needs 100" in check.reason


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("variant", [None, "corrected", "semi-masked"])
def test_trained_networks_are_flagged_where_semi_masked_and_nowhere_else(variant, seed: int, monkeypatch):
    """Slopes measured: 0.97 to 1.00 of the plain and the corrected ones, the others' well above."""
    # Only the flag matters here; the function gsem.audit hides the package from a name in dots.
    module = sys.modules["gsem.auditing.gradient"]
    monkeypatch.setattr(module, "_flagged", lambda ctx, finding, probe, ending: finding)
    check = gradient(convolutional(seed, variant))
    assert check.outcome == ("flag" if variant == "semi-masked" else "pass"), check.reason


def test_of_a_semi_masked_network_the_gsem_is_named_and_corrected():
    check = gradient(convolutional(0, "semi-masked"), "pgd:steps=3:eot=2")
    assert check.outcome == "flag" and check.details["layer"] == "3"
    assert 'gradient="corrected"' in check.advice and "mitigation" in check.details
