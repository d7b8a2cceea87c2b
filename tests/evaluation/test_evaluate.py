"""The evaluator on models whose accuracy is planted, deterministic and not."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gsem
from gsem.attacks import pgd, suite
from gsem.evaluation.evaluate import Progress, _chosen, evaluate, undefended
from gsem.evaluation.partial import AnotherQuestion
from gsem.nn.predict import correct_draws, is_stochastic
from planted import Flipper, Halves, halves, rng, small_net


def replace_pgd(monkeypatch: pytest.MonkeyPatch, function) -> None:
    monkeypatch.setitem(suite.ATTACKS, "pgd", replace(suite.ATTACKS["pgd"], function=function))


# --- planted accuracy --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fold runs Flipper")
def test_a_flipper_that_no_image_influences_gives_an_attack_nothing():
    x, y = halves(500)
    result = evaluate(Flipper(), x, y, ["clean", "pgd:steps=10:eot=10:loss=margin"], eps=0.1)
    clean, attacked = (result.expected(s.name).mean for s in result.scores)
    assert result.metadata["stochastic"] and result.draws == 100
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
    x = 0.4 + 0.2 * torch.rand((400, 1, 4, 4), generator=rng())
    x += 0.5 - x.mean((1, 2, 3), keepdim=True)
    y = torch.zeros(400, dtype=torch.int64)
    result = evaluate(Rising(), x, y, ["clean", f"pgd:steps=10:eot=10:loss={loss}"], eps=0.1)
    assert result.expected("clean").mean == pytest.approx(0.95, abs=0.01)
    assert result.expected(result.scores[1].name).mean == pytest.approx(0.60, abs=0.02)


def test_a_deterministic_model_has_one_draw_and_the_plain_accuracy():
    x, y = halves(300, contrast=0.15)
    y = torch.where(torch.arange(300) < 30, 1 - y, y)  # a tenth of the labels is wrong
    result = evaluate(Halves(), x, y, ["clean", "pgd:steps=5"], eps=0.05)
    assert not result.metadata["stochastic"] and result.draws == 1
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
    result = evaluate(model, x, y, ["clean", "pgd:steps=3"], eps=0.05, batch_size=16, save_adv=True)
    for s in result.scores:
        x_adv = torch.from_numpy(s.x_adv)
        with torch.no_grad():
            assert (s.correct == (model(x_adv).argmax(1) == y).numpy()).all()
        np.testing.assert_allclose(s.linf, (x_adv - x).abs().flatten(1).amax(1).numpy())
        np.testing.assert_allclose(s.l2, (x_adv - x).flatten(1).norm(dim=1).numpy(), rtol=1e-6)
    assert (result["clean"].linf == 0).all()
    assert 0 < result["pgd3-eot1"].linf.max() <= 0.05 + 1e-6
    # Three steps at most, on the images that are not broken; clean is no attack.
    (_, none), (_, gradients) = [(s.forwards, s.gradients) for s in result.scores]
    assert none == 0 and 0 < gradients <= 120


def test_the_l2_threat_model_is_kept():
    x, y = halves(20)
    result = evaluate(small_net(), x, y, ["pgd:steps=4"], eps=0.3, norm="L2")
    attacked = result["pgd4-eot1"]
    assert 0.15 < attacked.l2.max() <= 0.3 * (1 + 1e-4)
    assert attacked.linf.max() < 0.3


def test_gsem_is_noticed_and_scored_over_its_draws():
    torch.manual_seed(2)
    model = gsem.create_model("gsem-resnet10x16", num_classes=3, in_channels=1).eval()
    x, y = halves(12)
    result = evaluate(model, x, y, ["clean", "pgd:steps=2"], eps=0.1, draws=7)
    known = [f"{label}@{mode}" for mode in ("frozen", "off") for label in ("clean", "pgd2-eot1")]
    assert [s.name for s in result.scores] == ["clean", "pgd2-eot20", *known]
    assert max(result[name].correct.max() for name in known) == 1  # one draw is enough
    alone = evaluate(model, x, y, ["clean"], eps=0.1, draws=7, frozen=False)
    assert [s.name for s in alone.scores] == ["clean"]
    assert result.draws == 7 and max(s.correct.max() for s in result.scores) <= 7
    with gsem.noise(model, "frozen"):
        assert evaluate(model, x, y, ["clean"], eps=0.1).draws == 1


def test_a_gsem_network_is_attacked_also_through_itself_without_noise_and_without_its_quantiser():
    torch.manual_seed(2)
    model = gsem.create_model("gsem-resnet10x16", num_classes=3, in_channels=1).eval()
    x, y = halves(6)
    copies = undefended(model)
    (bare,) = [m for m in copies["quantiser off"].modules() if isinstance(m, gsem.GSeM)]
    (quiet,) = [m for m in copies["noise off"].modules() if isinstance(m, gsem.GSeM)]
    z = torch.rand(2, 16, 4, 4)
    torch.testing.assert_close(bare.quantise(z), z)
    torch.testing.assert_close(quiet.quantise(z), (6 * z).round() / 6)
    (own,) = [m for m in model.modules() if isinstance(m, gsem.GSeM)]
    assert own.quantiser and own.offsets.mode == "fresh"
    assert undefended(small_net()) == {}
    result = evaluate(model, x, y, ["transfer:steps=3"], eps=0.1, draws=5, frozen=False)
    label = "transfer3-eot20"
    assert [s.name for s in result.scores] == ["clean", label]
    # The gradients are of the sources; the network itself only predicts.
    assert result[label].gradients == 0 and result[label].forwards > 0


def test_transfer_without_a_source_is_refused_before_anything_is_computed(tmp_path):
    x, y = halves(6)
    with pytest.raises(ValueError, match="transfer needs at least one source"):
        evaluate(Halves(), x, y, "clean,transfer", eps=0.1, save=tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_a_source_that_does_not_fit_is_named():
    x, y = halves(6)
    y[1] = 2
    two = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2))
    with pytest.raises(ValueError, match=r"source 'two': image 1 \(row 8 of the data set\) has label 2"):
        evaluate(Halves(), x, y, "transfer", eps=0.1, source_models={"two": two}, rows=[7, 8, 9, 10, 11, 12])


def test_the_suites_add_transfer_where_there_is_something_to_transfer_from():
    for attacks, transferable, found in (("standard", True, True), ("standard", False, False), ("quick", True, False)):
        names = [a.name for a in _chosen(attacks, transferable=transferable)]
        assert (names[-1] == "transfer") == found and names[0] == "clean"


@pytest.mark.filterwarnings("ignore:fold runs Flipper")
def test_noise_known_to_the_attacker_is_only_for_gsem():
    x, y = halves(8)
    assert {s.noise for s in evaluate(Flipper(), x, y, "clean", eps=0.1).scores} == {"fresh"}
    torch.manual_seed(2)
    model = gsem.create_model("gsem-resnet10x16", num_classes=3, in_channels=1).eval()
    known = evaluate(model, x, y, "clean", eps=0.1, draws=3, seed=4)
    with gsem.noise(model, "frozen", seed=4), torch.no_grad():
        assert (known["clean@frozen"].correct == (model(x).argmax(1) == y).numpy()).all()
    with gsem.noise(model, "off"), torch.no_grad():
        assert (known["clean@off"].correct == (model(x).argmax(1) == y).numpy()).all()


# --- draws and chance --------------------------------------------------------------------------------------------


def test_correct_draws_counts_the_planted_share():
    x, y = halves(200)
    counts = correct_draws(Flipper(0.25), x, y, draws=200, seed=0, batch_size=64)
    assert counts.double().mean() / 200 == pytest.approx(0.75, abs=0.01)
    spread = counts.double().var() / (200 * 0.75 * 0.25)
    assert 0.7 < spread < 1.4  # binomial: every image has draws of its own
    assert (correct_draws(Halves(), x, 1 - y, draws=3, seed=0) == 0).all()


def test_is_stochastic_tells_them_apart_and_leaves_chance_alone():
    x, _ = halves(50)
    before = torch.get_rng_state()
    assert is_stochastic(Flipper(), x) and not is_stochastic(Halves(), x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:fold runs Flipper")
def test_the_same_seed_gives_the_same_result_and_the_callers_chance_is_left():
    x, y = halves(30)
    kwargs = {"attacks": ["clean", "pgd:steps=2:eot=2"], "eps": 0.1, "draws": 20, "save_adv": True}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = evaluate(Flipper(), x, y, **kwargs)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (evaluate(Flipper(), x, y, **kwargs, seed=seed) for seed in (0, 1))
    for a, b, c in zip(first.scores, again.scores, other.scores, strict=True):
        assert (a.correct == b.correct).all() and (a.x_adv == b.x_adv).all()
        assert (a.correct != c.correct).any()
    assert (first.scores[1].x_adv != other.scores[1].x_adv).any()


@pytest.mark.filterwarnings("ignore:fold runs Flipper")
def test_scoring_draws_do_not_depend_on_the_search(monkeypatch):
    x, y = halves(60)

    def another(model, x, y, **kwargs):
        torch.rand(5, generator=rng(kwargs["seed"]))
        for _ in range(3):
            model(x)
        return x.clone()

    attacks = ["pgd:steps=3:eot=2"]
    first = evaluate(Flipper(), x, y, attacks, eps=0.1, draws=50)
    replace_pgd(monkeypatch, another)
    second = evaluate(Flipper(), x, y, attacks, eps=0.1, draws=50)
    for a, b in zip(first.scores, second.scores, strict=True):
        assert (a.correct == b.correct).all() and (a.selection == b.selection).all()
    assert first.scores[1].gradients != second.scores[1].gradients  # it was another search


@pytest.mark.filterwarnings("ignore:fold runs Recorder")
def test_no_scoring_draw_was_seen_by_a_search():
    class Recorder(Flipper):
        drawn: list[tuple[bool, Tensor]]

        def forward(self, x: Tensor) -> Tensor:
            assert x.max() <= 1  # a condition on values, so that the folded model runs this code and no trace of it
            noise = torch.rand(len(x))
            Recorder.drawn.append((x.requires_grad, noise))
            return Halves()(x) + 0.01 * noise[:, None]

    Recorder.drawn = []
    x, y = halves(8)
    evaluate(Recorder(), x, y, ["pgd:steps=3:eot=1:keep=last"], eps=0.1, draws=30)
    searched = {float(v) for of_search, noise in Recorder.drawn if of_search for v in noise}
    scored = {float(v) for _, noise in Recorder.drawn[-30:] for v in noise}
    # (Before the three steps, the gradient of the first eight images is looked at once.)
    assert len(searched) == 8 + 8 * 3 and len(scored) == 8 * 30
    assert not searched & scored


# --- arguments ---------------------------------------------------------------------------------------------------


def test_options_reach_the_attack(monkeypatch):
    seen = []

    def spy(model, x, y, **kwargs):
        seen.append(kwargs)
        return pgd(model, x, y, **kwargs)

    replace_pgd(monkeypatch, spy)
    x, y = halves(6)
    options = {"steps": 3, "step": 0.02, "restarts": 2, "eot": 1, "loss": "dlr", "keep": "last"}
    text = "pgd:" + ":".join(f"{k}={v}" for k, v in options.items())
    result = evaluate(small_net(), x, y, [text], eps=0.1, batch_size=4)
    assert len(seen) == 2 and all(kwargs.items() >= options.items() for kwargs in seen)
    assert seen[0]["seed"] != seen[1]["seed"]
    _, label = result.metadata["options"]
    assert label == "pgd3-eot1-dlr-x2-last-step0.02" and result.metadata["options"][label] == options
    seen.clear()
    evaluate(small_net(), x, y, ["pgd:steps=1"], eps=0.1)
    assert seen[0]["step"] == 0.1 / 4 and set(seen[0]) >= set(suite.ATTACKS["pgd"].options)


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        (["deepfool"], "attack 'deepfool' is unknown: it is one of clean, fgsm, pgd"),
        ([""], "attack '' is unknown"),
        (["pgd:stepz=3"], "attack 'pgd' has no option 'stepz': it has steps, eot"),
        (["pgd:steps"], "'steps' is not of the form option=value"),
        (["clean:steps=3"], "attack 'clean' has no option 'steps': it has none"),
        (["pgd:steps=many"], "steps = 'many' is neither a number"),
        (["pgd:steps=2.5"], "steps must be an integer, not '2.5'"),
        (["pgd:step=1/0"], "step = '1/0' is neither a number"),
        (["pgd:step=1/2/3"], "is neither a number nor a fraction"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros((0, 1, 4, 4)), "y": torch.zeros(0, dtype=torch.int64)}, "no images to evaluate on"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"norm": "L0"}, "norm 'L0' is unknown"),
        ({"draws": 0}, "draws must be an integer"),
        ({"batch_size": 0}, "batch_size must be an integer"),
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
        evaluate(Poisoned(), x, y, ["clean"], eps=0.1, batch_size=4)


def test_errors_name_the_row_in_the_data_set(monkeypatch):
    x, y = halves(10)
    rows = np.arange(10) * 11
    with pytest.raises(ValueError, match=r"^image 7 \(row 77 of the data set\) has label 5"):
        evaluate(Halves(), x, torch.where(torch.arange(10) == 7, 5, y), ["clean"], eps=0.1, rows=rows)

    def broken(model, x, y, **kwargs):
        return torch.where((torch.arange(len(x)) == 2)[:, None, None, None], torch.nan, x)

    replace_pgd(monkeypatch, broken)
    with pytest.raises(ValueError, match=r"^attack 'pgd100-eot1': image 2 \(row 22 of the data set\): the attack re"):
        evaluate(Halves(), x, y, ["pgd"], eps=0.1, batch_size=4, rows=rows.tolist())


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2, -3], [0.0, 1.0, 2.0, 3.0], [[0, 1, 2, 3]]])
def test_rows_that_are_none_are_refused(rows):
    x, y = halves(4)
    with pytest.raises(ValueError, match="rows must be the rows of the 4 images in their data set"):
        evaluate(Halves(), x, y, ["clean"], eps=0.1, rows=rows)


def test_a_finished_result_is_returned_and_not_computed_again(tmp_path, monkeypatch):
    x, y = halves(10)
    kwargs = {"attacks": ["clean", "pgd:steps=2"], "eps": 0.1, "save": tmp_path / "r"}
    first = evaluate(Halves(), x, y, **kwargs, rows=range(5, 15))
    assert first.rows.tolist() == list(range(5, 15)) and evaluate(Halves(), x, y, "clean", eps=0.1).rows[-1] == 9
    reports: list[Progress] = []
    again = evaluate(Halves(), x, y, **kwargs, on_progress=reports.append)
    assert reports == [] and again.to_dict() == first.to_dict() and again.rows.tolist() == first.rows.tolist()
    evaluate(Halves(), x, y, **kwargs, rows=range(5, 15), on_progress=reports.append, again=True)
    assert [p.name for p in reports] == ["clean", "pgd2-eot1"]
    for change, different in (({"seed": 1}, "seed"), ({"rows": range(10)}, "the rows of the images")):
        with pytest.raises(AnotherQuestion, match=rf"r\.npz is there already.*{different}"):
            evaluate(Halves(), x, y, **kwargs | change, again=True)


def test_an_attack_that_cheats_is_caught(monkeypatch):
    replace_pgd(monkeypatch, lambda model, x, y, **kwargs: (x + 1.01 * kwargs["eps"]).clamp(0, 1))
    x, y = halves(4)
    with pytest.raises(ValueError, match=r"farther than eps = 0\.1"):
        evaluate(Halves(), x, y, ["pgd"], eps=0.1)


def test_the_model_is_left_as_it_was_and_progress_is_reported():
    model = small_net()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    x, y = halves(10)
    reports: list[Progress] = []
    result = evaluate(model, x, y, ["clean", "pgd:steps=1"], eps=0.1, batch_size=4, on_progress=reports.append)
    ends = [p for p in reports if p.remaining == 0]
    assert [(p.name, p.done, p.images) for p in ends] == [
        (label, done, 10) for label in ("clean", "pgd1-eot1") for done in (4, 8, 10)
    ]
    assert ends[2].accuracy == result.expected("clean").mean
    assert ends[5].accuracy == result.expected("pgd1-eot1").mean
    assert ends[5].seconds_left == 0.0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_labels_that_the_model_does_not_know_are_refused():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="image 1 has label 3, but the model has 3 classes"):
        evaluate(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 3]), "clean", eps=0.1)


@pytest.mark.filterwarnings("ignore:fold runs")
def test_a_model_that_is_random_only_off_the_images_is_stochastic():
    class Flickers(torch.nn.Module):
        def forward(self, x):
            noise = torch.rand(len(x), 2) * (x.flatten(1).amax(1, keepdim=True) > 0.6)
            return x.flatten(1)[:, :2] + noise

    x = torch.full((3, 1, 2, 2), 0.5)
    result = evaluate(Flickers(), x, torch.zeros(3, dtype=torch.int64), "clean", eps=0.2, draws=7)
    assert result.metadata["stochastic"]
    assert result.draws == 7
