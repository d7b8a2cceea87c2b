"""Certificates of a linear classifier against its true radii, and Clopper-Pearson's bound against published values."""

import json
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import gsem
from gsem.cli.main import main
from gsem.evaluation import certify as module
from gsem.evaluation.certify import AnotherCertification, CertificationResult, certify
from gsem.evaluation.statistics import clopper_pearson_lower


class Linear(nn.Module):
    """Two classes with the margin w · x + b between them. Its smoothed classifier has the same boundary."""

    def __init__(self, flipped: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("w", torch.randn(16, generator=generator))
        self.flipped = flipped
        """Probability of the other answer, whatever the image is."""

    def margin(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.w

    def forward(self, x: Tensor) -> Tensor:
        margin = self.margin(x)
        if self.flipped:
            margin = torch.where(torch.rand(len(x)) < self.flipped, -margin, margin)
        return torch.stack([-margin, margin], 1)


def images(n: int = 6) -> tuple[Tensor, Tensor, np.ndarray]:
    """Images, the labels that `Linear` gives them, and their distances from its boundary: |margin| / ‖w‖."""
    x = torch.rand((60, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    x = x[Linear().margin(x).abs() > 0.15 * Linear().w.norm()][:n]
    margin = Linear().margin(x)
    return x, (margin > 0).long(), (margin.abs() / Linear().w.norm()).numpy().astype(float)


@pytest.mark.parametrize(
    ("count", "n", "alpha", "bound"),
    # One-sided bounds at alpha are the lower ends of two-sided intervals at 2 alpha: Clopper and Pearson 1934, and the
    # rule that 0 failures in n trials leave alpha^(1/n).
    [
        (10, 10, 0.025, 0.6915),
        (5, 10, 0.025, 0.1871),
        (1, 10, 0.025, 0.0025),
        (0, 10, 0.025, 0.0),
        (29, 30, 0.025, 0.8278),
        (59, 59, 0.05, 0.9505),
        (100_000, 100_000, 0.001, 0.999931),
    ],
)
def test_the_bound_is_clopper_and_pearsons(count, n, alpha, bound):
    found = clopper_pearson_lower(count, n, alpha)
    assert found == pytest.approx(bound, abs=6e-5 if n < 100 else 6e-7)
    if count:  # by definition: so many successes or more have the probability alpha
        assert scipy.stats.binom.sf(count - 1, n, found) == pytest.approx(alpha, rel=1e-9)


def test_radii_of_a_linear_classifier_approach_the_true_ones_from_below():
    x, y, true = images()
    few, many = (certify(Linear(), x, y, sigma=0.5, n=n, batch_size=n) for n in (500, 20_000))
    for result in (few, many):
        assert (result.predicted == y.numpy()).all() and (result.radius <= true).all()
    assert (many.radius > few.radius).all()
    assert (true - many.radius).max() < 0.03 < (true - few.radius).max()
    # The count gives the radius, and both accuracies: closed forms.
    p = [clopper_pearson_lower(int(count), 20_000, 0.001) for count in many.counts]
    assert many.radius == pytest.approx([0.5 * NormalDist().inv_cdf(one) for one in p], abs=1e-12)
    assert many.mean_radius == pytest.approx(many.radius.mean())
    half = float(np.median(many.radius))
    assert many.accuracy(half).mean == (many.radius >= half).mean() == 0.5 and many.accuracy(0).mean == 1.0
    assert certify(Linear(), x, 1 - y, sigma=0.5, n=500).mean_radius == 0.0  # certified, and wrong


def test_a_certificate_is_wrong_as_often_as_alpha_allows():
    """A wrong one exceeds the true radius. By the margin of one draw in 200, alpha is nearly reached."""
    x, y, true = images(1)
    alpha, trials = 0.2, 400
    found = [certify(Linear(), x, y, sigma=0.4, n0=20, n=200, alpha=alpha, seed=s).radius[0] for s in range(trials)]
    wrong = np.mean(np.array(found) > true[0])
    spread = (alpha * (1 - alpha) / trials) ** 0.5
    assert alpha / 2 < wrong < alpha + 3 * spread


@pytest.mark.filterwarnings("ignore:all logits of the first")
def test_it_abstains_where_no_class_is_clear():
    x = torch.full((3, 1, 4, 4), 0.5)  # on the boundary: both logits are 0
    result = certify(Linear(), x, torch.tensor([0, 1, 1]), sigma=0.25, n=1000, batch_size=500)
    assert result.predicted.tolist() == [-1] * 3 and result.radius.tolist() == [0.0] * 3
    assert result.abstained == 1.0 and result.accuracy(0).mean == 0.0
    assert result.counts.min() > 400 and result.counts.max() < 600


def test_the_models_own_noise_lowers_the_certified_radius():
    """With a share of flipped answers f, the smoothed probability is p (1 − f) + (1 − p) f."""
    x, y, true = images(2)
    result = certify(Linear(flipped=0.2), x, y, sigma=0.5, n=20_000, batch_size=20_000)
    assert result.metadata["stochastic"] and not certify(Linear(), x, y, sigma=0.5, n=20).metadata["stochastic"]
    p = np.array([NormalDist().cdf(t / 0.5) for t in true])
    expected = p * 0.8 + (1 - p) * 0.2
    assert result.counts / 20_000 == pytest.approx(expected, abs=0.015)
    assert (result.radius < true).all()


def test_the_noise_of_a_gsem_is_fresh_for_every_draw():
    torch.manual_seed(0)
    net = gsem.create_model("gsem-resnet10x16", in_channels=1).eval()
    x, y = torch.rand(1, 1, 8, 8), torch.tensor([0])
    stochastic = certify(net, x, y, sigma=0.01, n=60, batch_size=60)
    with gsem.noise(net, "off"):
        still = certify(net, x, y, sigma=0.01, n=60, batch_size=60)
    assert stochastic.metadata["stochastic"] and not still.metadata["stochastic"]
    assert stochastic.metadata["fingerprint"]["structure"] != still.metadata["fingerprint"]["structure"]


def test_an_image_has_its_own_stream_and_the_callers_is_kept():
    x, y, _ = images(4)
    before = torch.random.get_rng_state()
    one, again = (certify(Linear(), x, y, sigma=0.5, n=300) for _ in range(2))
    first = certify(Linear(), x[:2], y[:2], sigma=0.5, n=300)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (one.counts == again.counts).all() and (one.counts[:2] == first.counts).all()
    assert (one.counts != certify(Linear(), x, y, sigma=0.5, n=300, seed=1).counts).any()


def test_an_interrupted_certification_resumes_to_the_same_figures(tmp_path, monkeypatch):
    x, y, _ = images(5)
    whole, seen = certify(Linear(), x, y, sigma=0.5, n=100), []

    def stop(done, of):
        seen.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify(Linear(), x, y, sigma=0.5, n=100, save=tmp_path / "c", on_progress=stop)
    with pytest.raises(ValueError, match="unfinished"):
        CertificationResult.load(tmp_path / "c.json")
    rest = []
    resumed = certify(Linear(), x, y, sigma=0.5, n=100, save=tmp_path / "c", on_progress=lambda d, of: rest.append(d))
    assert (seen, rest) == ([1, 2, 3], [4, 5])
    loaded = CertificationResult.load(tmp_path / "c")
    for found in (resumed, loaded):
        for name in module.PER_IMAGE:
            assert (getattr(found, name) == getattr(whole, name)).all(), name
    assert repr(loaded) == repr(whole)
    monkeypatch.setattr(module, "_certified", list)  # a finished one computes nothing
    assert (certify(Linear(), x, y, sigma=0.5, n=100, save=tmp_path / "c").counts == whole.counts).all()
    with pytest.raises(AnotherCertification, match=r"sigma \(0.5 then, 0.25 now\)"):
        certify(Linear(), x, y, sigma=0.25, n=100, save=tmp_path / "c")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(AnotherCertification, match="holds no certification"):
        certify(Linear(), x, y, sigma=0.5, n=100, save=tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0}, "sigma must be positive"),
        ({"sigma": "a"}, "neither a number"),
        ({"alpha": 0.5}, "between 0 and 0.5"),
        ({"n": 9}, "at least 10"),
        ({"n0": 0}, "n0 must be an integer"),
    ],
)
def test_arguments_out_of_range_are_named(change, message):
    x, y, _ = images(1)
    with pytest.raises(ValueError, match=message):
        certify(Linear(), x, y, **{"sigma": 0.5} | change)


def test_logits_that_are_not_finite_name_the_image():
    class Bad(Linear):
        def forward(self, x):
            return super().forward(x) / (x.amax((1, 2, 3)) < 1.5)[:, None]

    x, y, _ = images(1)
    with pytest.raises(ValueError, match="image 0: the model's logits are not finite"):
        certify(Bad(), x * 0.5, y, sigma=1.0, n=100)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linear_here.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    words = ["certify", "linear_here:net", "--data", "digits", "--images", "10", "--n", "100", "--n0", "10"]
    assert main([*words, "--sigma", "0.25"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "certification.json").read_text())
    assert found["metadata"]["about"]["data"] == "digits" and len(found["images"]["rows"]) == 10
    assert "certification.json" in out and f"{found['mean_radius']:.3f}" in out
    assert main([*words, "--sigma", "1/8"]) == 0
    assert json.loads((tmp_path / "certification-2.json").read_text())["metadata"]["sigma"] == 0.125
    assert main([*words, "--sigma", "0.25"]) == 0  # shown again
    assert not (tmp_path / "certification-3.json").exists()
    capsys.readouterr()
    assert main(words) == 2
    assert "sigma" in capsys.readouterr().err
