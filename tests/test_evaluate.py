"""The evaluator on models whose accuracy is planted, deterministic and not."""

import copy
import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import gsem
from gsem.attacks import pgd
from gsem.evaluate import ATTACKS, Attack, Interval, Result, Scores, evaluate, parse_attacks
from gsem.predict import correct_draws, is_stochastic

# `gsem.evaluate` is the function; this is its module.
module = importlib.import_module("gsem.evaluate")


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Halves(nn.Module):
    """Class 0 where the left half is brighter, 1 where the right is; a third class never wins."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., :2].mean((1, 2, 3)), x[..., 2:].mean((1, 2, 3))
        return torch.stack([left, right, left * 0 - 1], dim=1)


class Flipper(nn.Module):
    """`Halves`, which answers 1 for 0 and 0 for 1 in a share of the draws, whatever the image is."""

    def __init__(self, share: float = 0.3):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        logits = Halves()(x)
        flipped = torch.rand(len(x)) < self.share
        return torch.where(flipped[:, None], logits[:, [1, 0, 2]], logits)


def halves(n: int, *, contrast: float = 0.6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images that `Halves` classifies rightly, with a difference of `contrast` between the halves."""
    y = torch.arange(n) % 2
    x = 0.5 + 0.1 * (torch.rand((n, 1, 4, 4), generator=chance(seed)) - 0.5)
    side = torch.where(y == 0, 1.0, -1.0)[:, None, None]
    x[:, 0, :, :2] += side * contrast / 2
    x[:, 0, :, 2:] -= side * contrast / 2
    return x.clamp(0, 1), y


def small_net() -> nn.Module:
    torch.manual_seed(2)
    return gsem.create_model("resnet10x16", num_classes=3, in_channels=1).eval()


# --- planted accuracy --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:search_twin runs Flipper")
def test_a_flipper_that_no_image_influences_gives_an_attack_nothing():
    x, y = halves(500)
    result = evaluate(Flipper(), x, y, ["clean", "pgd:steps=10:eot=10:loss=margin"], eps=0.1)
    clean, attacked = (result.expected(s.label).mean for s in result.scores)
    assert result.facts["stochastic"] and result.draws == 100
    assert clean == pytest.approx(0.70, abs=0.01)
    assert clean - attacked == pytest.approx(0.0, abs=0.015)


class Rising(nn.Module):
    """Wrong with probability 0.05 where the mean pixel is 0.5, rising to 0.4 where it is eps = 0.1 away."""

    def forward(self, x: Tensor) -> Tensor:
        p = 0.05 + 0.35 * (x.mean((1, 2, 3)) - 0.5).abs() / 0.1
        u = torch.rand_like(x[:, 0, 0, 0])
        return torch.stack([u - p, p - u], dim=1)


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_a_flip_that_attacks_make_likelier_is_measured_and_not_rounded(loss):
    x = 0.4 + 0.2 * torch.rand((400, 1, 4, 4), generator=chance())
    x += 0.5 - x.mean((1, 2, 3), keepdim=True)
    y = torch.zeros(400, dtype=torch.int64)
    result = evaluate(Rising(), x, y, ["clean", f"pgd:steps=10:eot=10:loss={loss}"], eps=0.1)
    assert result.expected("clean").mean == pytest.approx(0.95, abs=0.01)
    assert result.expected(result.scores[1].label).mean == pytest.approx(0.60, abs=0.02)


def test_a_deterministic_model_has_one_draw_and_the_plain_accuracy():
    x, y = halves(300, contrast=0.15)
    y = torch.where(torch.arange(300) < 30, 1 - y, y)  # a tenth of the labels is wrong
    result = evaluate(Halves(), x, y, ["clean", "pgd:steps=5"], eps=0.05)
    assert not result.facts["stochastic"] and result.draws == 1
    assert result.expected("clean").mean == pytest.approx(0.9)
    assert (result["clean"].correct == (Halves()(x).argmax(1) == y).numpy()).all()
    # PGD lowers the difference of the halves by 2 · eps at most: short of the contrast.
    assert (result["pgd5-eot1"].correct == result["clean"].correct).all()
    # With twice that eps it is enough; a pixel that starts at the far end needs 8 steps of eps / 4.
    broken = evaluate(Halves(), x, y, ["pgd:steps=9"], eps=0.1)
    assert broken.expected("pgd9-eot1").mean == 0.0


def test_the_score_is_the_true_models_on_the_images_that_are_kept():
    model = small_net()
    x, y = halves(40)
    result = evaluate(model, x, y, ["clean", "pgd:steps=3"], eps=0.05, batch=16, keep_images=True)
    for s in result.scores:
        x_adv = torch.from_numpy(s.x_adv)
        with torch.no_grad():
            assert (s.correct == (model(x_adv).argmax(1) == y).numpy()).all()
        np.testing.assert_allclose(s.linf, (x_adv - x).abs().flatten(1).amax(1).numpy())
        np.testing.assert_allclose(s.l2, (x_adv - x).flatten(1).norm(dim=1).numpy(), rtol=1e-6)
    assert (result["clean"].linf == 0).all()
    assert 0 < result["pgd3-eot1"].linf.max() <= 0.05 + 1e-6
    # Three steps and the judgement of the last iterate; clean is no attack.
    costs = [(s.forwards, s.gradients) for s in result.scores]
    assert costs == [(0, 0), (40, 120)]


def test_the_l2_threat_model_is_kept():
    x, y = halves(20)
    result = evaluate(small_net(), x, y, ["pgd:steps=4"], eps=0.3, norm="L2")
    assert 0.15 < result.scores[0].l2.max() <= 0.3 * (1 + 1e-4)
    assert result.scores[0].linf.max() < 0.3


def test_gsem_is_noticed_and_scored_over_its_draws():
    torch.manual_seed(2)
    model = gsem.create_model("gsem-resnet10x16", num_classes=3, in_channels=1).eval()
    x, y = halves(12)
    result = evaluate(model, x, y, ["clean", "pgd:steps=2"], eps=0.1, draws=7)
    assert [s.label for s in result.scores] == ["clean", "pgd2-eot20"]
    assert result.draws == 7 and max(s.correct.max() for s in result.scores) <= 7
    with gsem.noise(model, "frozen"):
        assert evaluate(model, x, y, ["clean"], eps=0.1).draws == 1


# --- draws and chance --------------------------------------------------------------------------------------------


def test_correct_draws_counts_the_planted_share():
    x, y = halves(200)
    counts = correct_draws(Flipper(0.25), x, y, draws=200, seed=0, batch=64)
    assert counts.double().mean() / 200 == pytest.approx(0.75, abs=0.01)
    spread = counts.double().var() / (200 * 0.75 * 0.25)
    assert 0.7 < spread < 1.4  # binomial: every image has draws of its own
    assert (correct_draws(Halves(), x, 1 - y, draws=3, seed=0) == 0).all()


def test_is_stochastic_tells_them_apart_and_leaves_chance_alone():
    x, _ = halves(50)
    before = torch.get_rng_state()
    assert is_stochastic(Flipper(), x) and not is_stochastic(Halves(), x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:search_twin runs Flipper")
def test_the_same_seed_gives_the_same_result_and_the_callers_chance_is_left():
    x, y = halves(30)
    how = {"attacks": ["clean", "pgd:steps=2:eot=2"], "eps": 0.1, "draws": 20, "keep_images": True}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = evaluate(Flipper(), x, y, **how)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (evaluate(Flipper(), x, y, **how, seed=seed) for seed in (0, 1))
    for a, b, c in zip(first.scores, again.scores, other.scores, strict=True):
        assert (a.correct == b.correct).all() and (a.x_adv == b.x_adv).all()
        assert (a.correct != c.correct).any()
    assert (first.scores[1].x_adv != other.scores[1].x_adv).any()


@pytest.mark.filterwarnings("ignore:search_twin runs Flipper")
def test_scoring_draws_do_not_depend_on_the_search(monkeypatch):
    x, y = halves(60)

    def another(model, x, y, **how):
        torch.rand(5, generator=chance(how["seed"]))
        for _ in range(3):
            model(x)
        return x.clone()

    attacks = ["pgd:steps=3:eot=2"]
    first = evaluate(Flipper(), x, y, attacks, eps=0.1, draws=50)
    monkeypatch.setattr(module, "pgd", another)
    second = evaluate(Flipper(), x, y, attacks, eps=0.1, draws=50)
    assert (first.scores[0].correct == second.scores[0].correct).all()
    assert first.scores[0].gradients != second.scores[0].gradients  # it was another search


@pytest.mark.filterwarnings("ignore:search_twin runs Recorder")
def test_no_scoring_draw_was_seen_by_a_search():
    class Recorder(Flipper):
        drawn: list[tuple[bool, Tensor]]

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.rand(len(x))
            Recorder.drawn.append((x.requires_grad, noise))
            return Halves()(x) + 0.01 * noise[:, None]

    Recorder.drawn = []
    x, y = halves(8)
    evaluate(Recorder(), x, y, ["pgd:steps=3:eot=1:keep=last"], eps=0.1, draws=30)
    searched = {float(v) for of_search, noise in Recorder.drawn if of_search for v in noise}
    scored = {float(v) for _, noise in Recorder.drawn[-30:] for v in noise}
    assert len(searched) == 8 * 3 and len(scored) == 8 * 30
    assert not searched & scored


# --- the interval ------------------------------------------------------------------------------------------------


def planted(correct: np.ndarray, draws: int, label: str = "clean", seed: int = 0) -> Result:
    none = np.zeros(len(correct))
    return Result([Scores(label, correct, none, none, 0, 0, 0.0)], none.astype(int), {"draws": draws, "seed": seed})


def test_the_interval_is_that_of_the_mean_over_images():
    correct = np.random.default_rng(0).binomial(100, np.random.default_rng(1).beta(2, 1, size=800))
    mean, low, high = planted(correct, 100).expected("clean")
    assert mean == pytest.approx(correct.mean() / 100, abs=1e-12)
    sem = scipy.stats.sem(correct / 100)
    assert (low, high) == pytest.approx(scipy.stats.norm.interval(0.95, mean, sem), abs=0.001)
    theirs = scipy.stats.bootstrap((correct / 100,), np.mean, n_resamples=3000, method="percentile", rng=1)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.0015)


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(module, "BOOTSTRAP", 1000)  # the time of the full one is not needed for this
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        _, low, high = planted(rng.binomial(1, 0.7, size=60), 1).expected("clean")
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 200 <= 0.99  # a standard error of the share is 0.015


def test_where_all_images_agree_the_interval_has_no_width():
    assert planted(np.full(20, 7), 10).expected("clean") == Interval(*[pytest.approx(0.7)] * 3)


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_images", [True, False])
@pytest.mark.parametrize("name", ["result", "result.json", "result.npz", "deeper/pgd-eps0.15", "v1.2.json"])
def test_a_result_is_read_back_as_it_was(tmp_path, keep_images, name):
    x, y = halves(10)
    result = evaluate(small_net(), x, y, ["clean", "pgd:steps=2"], eps=0.1, keep_images=keep_images)
    result.save(tmp_path / name)
    again = Result.load(tmp_path / name)
    assert again.to_dict() == result.to_dict()
    assert (again.y == result.y).all() and again.y.dtype == np.int64
    for a, b in zip(again.scores, result.scores, strict=True):
        assert (a.label, a.forwards, a.gradients, a.seconds) == (b.label, b.forwards, b.gradients, b.seconds)
        assert all((getattr(a, key) == getattr(b, key)).all() for key in ("correct", "linf", "l2"))
        assert (a.x_adv is None) if not keep_images else (a.x_adv == b.x_adv).all()
    stem = name.removesuffix(".json").removesuffix(".npz")
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {f"{stem}.json", f"{stem}.npz"}  # nothing half-written is left
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == result.to_dict()


def test_results_whose_names_differ_behind_a_dot_do_not_overwrite_each_other(tmp_path):
    for share in (10, 90):
        planted(np.full(5, share), 100).save(tmp_path / f"accuracy-0.{share}")
    assert Result.load(tmp_path / "accuracy-0.10").expected("clean").mean == pytest.approx(0.1)
    assert Result.load(tmp_path / "accuracy-0.90").expected("clean").mean == pytest.approx(0.9)


def test_a_result_names_its_attacks():
    result = planted(np.full(5, 1), 1)
    assert result["clean"] is result.scores[0]
    with pytest.raises(KeyError, match="no attack 'pgd' in this result: clean"):
        result["pgd"]


# --- attacks as text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stochastic", "label"),
    [
        ("clean", True, "clean"),
        ("pgd", False, "pgd100-eot1"),
        ("pgd", True, "pgd100-eot20"),
        ("pgd:steps=7:eot=3", True, "pgd7-eot3"),
        ("pgd:loss=margin:restarts=4:keep=last", False, "pgd100-eot1-margin-x4-last"),
        ("pgd:step=2/255", False, "pgd100-eot1-step0.007843"),
        (" pgd:step=0.01 ", False, "pgd100-eot1-step0.01"),
    ],
)
def test_labels_are_made_of_the_arguments_that_run(text, stochastic, label):
    assert Attack.parse(text).label(eps=0.1, stochastic=stochastic) == label


def test_options_reach_the_attack(monkeypatch):
    seen = []

    def spy(model, x, y, **how):
        seen.append(how)
        return pgd(model, x, y, **how)

    monkeypatch.setattr(module, "pgd", spy)
    x, y = halves(6)
    options = {"steps": 3, "step": 0.02, "restarts": 2, "eot": 2, "loss": "dlr", "keep": "last"}
    text = "pgd:" + ":".join(f"{k}={v}" for k, v in options.items())
    result = evaluate(small_net(), x, y, [text], eps=0.1, batch=4)
    assert len(seen) == 2 and all(how.items() >= options.items() for how in seen)
    assert seen[0]["seed"] != seen[1]["seed"]
    (label,) = result.facts["options"]
    assert label == "pgd3-eot2-dlr-x2-last-step0.02" and result.facts["options"][label] == options
    seen.clear()
    evaluate(small_net(), x, y, ["pgd:steps=1"], eps=0.1)
    assert seen[0]["step"] == 0.1 / 4 and set(seen[0]) >= set(ATTACKS["pgd"])


def test_parse_attacks():
    assert parse_attacks("clean, pgd:steps=5") == [Attack("clean"), Attack("pgd", {"steps": 5})]


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        (["fgsm"], "attack 'fgsm' is unknown: it is one of clean, pgd"),
        ([""], "attack '' is unknown"),
        (["pgd:stepz=3"], r"'stepz=3' is no option=value; options of pgd: steps, step"),
        (["pgd:steps"], "'steps' is no option=value"),
        (["clean:steps=3"], "options of clean: none"),
        (["pgd:steps=many"], "steps = 'many' is not a number"),
        (["pgd:steps=2.5"], "steps = '2.5' is not a number"),
        (["pgd:step=1/0"], "step = '1/0' is not a number"),
        (["pgd:step=1/2/3"], "is not a number"),
        (["pgd:steps=0"], "steps must be an integer of at least 1"),
        (["pgd:step=nan"], "step must be positive"),
        (["pgd:loss=hinge"], "loss 'hinge' is unknown"),
        (["pgd:keep=first"], "keep 'first' is unknown"),
        (["clean", "clean"], "the same attack twice: clean, clean"),
        (["pgd", "pgd:steps=100"], "the same attack twice"),
    ],
)
def test_attacks_it_refuses(attacks, message):
    x, y = halves(4)
    with pytest.raises(ValueError, match=message):
        evaluate(Halves(), x, y, attacks, eps=0.1)


@pytest.mark.parametrize(("name", "options"), [("fgsm", {}), ("pgd", {"stepz": 3}), ("clean", {"steps": 3})])
def test_an_attack_that_cannot_be_is_refused_when_it_is_made(name, options):
    with pytest.raises(ValueError, match=r"unknown: it is one of|has no option"):
        Attack(name, options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros((0, 1, 4, 4)), "y": torch.zeros(0, dtype=torch.int64)}, "no images to evaluate on"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"norm": "L0"}, "norm 'L0' is unknown"),
        ({"draws": 0}, "draws must be an integer"),
        ({"batch": 0}, "batch must be an integer"),
        ({"x": 255 * halves(4)[0]}, r"must lie in \[0, 1\]"),
        ({"y": torch.zeros(4)}, "int64"),
        ({"model": gsem.create_model("resnet10x16", in_channels=1)}, "is in train mode"),
    ],
)
def test_arguments_it_refuses(change, message):
    x, y = halves(4)
    with pytest.raises(ValueError, match=message):
        evaluate(**({"model": Halves(), "x": x, "y": y, "attacks": ["clean"], "eps": 0.1} | change))


def test_logits_that_are_not_finite_name_the_image_among_all():
    class Poisoned(Halves):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return torch.where((x == 0.25).flatten(1).any(1)[:, None], torch.nan, logits)

    x, y = halves(10)
    x[7, 0, 0, 0] = 0.25
    with pytest.raises(ValueError, match=r"image 7: the model's logits are not finite"):
        evaluate(Poisoned(), x, y, ["clean"], eps=0.1, batch=4)


def test_an_attack_that_cheats_is_caught(monkeypatch):
    monkeypatch.setattr(module, "pgd", lambda model, x, y, **how: (x + 1.01 * how["eps"]).clamp(0, 1))
    x, y = halves(4)
    with pytest.raises(ValueError, match=r"farther than eps = 0\.1"):
        evaluate(Halves(), x, y, ["pgd"], eps=0.1)


def test_the_model_is_left_as_it_was_and_progress_is_reported():
    model = small_net()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    x, y = halves(10)
    told = []
    evaluate(model, x, y, ["clean", "pgd:steps=1"], eps=0.1, batch=4, report=lambda *news: told.append(news))
    assert told == [(label, done, 10) for label in ("clean", "pgd1-eot1") for done in (4, 8, 10)]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_result_is_a_value():
    result = planted(np.full(5, 1), 2)
    assert replace(result, facts={"draws": 1, "seed": 0}).expected("clean").mean == 1.0
    assert result.expected("clean") == result.expected("clean")


def test_labels_that_the_model_does_not_know_are_refused():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="image 1 has label 3, but the model tells 3 classes apart"):
        evaluate(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 3]), "clean", eps=0.1)


@pytest.mark.filterwarnings("ignore:search_twin runs")
def test_a_model_that_is_random_only_off_the_images_is_stochastic():
    class Flickers(torch.nn.Module):
        def forward(self, x):
            noise = torch.rand(len(x), 2) * (x.flatten(1).amax(1, keepdim=True) > 0.6)
            return x.flatten(1)[:, :2] + noise

    x = torch.full((3, 1, 2, 2), 0.5)
    result = evaluate(Flickers(), x, torch.zeros(3, dtype=torch.int64), "clean", eps=0.2, draws=7)
    assert result.facts["stochastic"]
    assert result.draws == 7
