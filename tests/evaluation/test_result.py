"""Accuracies, intervals and files of a result, against closed forms and planted answers."""

import importlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from rich.console import Console

from gsem.cli.display import show_result
from gsem.evaluation.evaluate import evaluate
from gsem.evaluation.result import ARRAYS, EvaluationResult, attack_name
from gsem.evaluation.statistics import Interval
from gsem.nn.predict import vote_accuracy
from planted import halves, planted, rng, scores, small_net

module = importlib.import_module("gsem.evaluation.result")

# --- the interval ------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean_over_images():
    correct = np.random.default_rng(0).binomial(100, np.random.default_rng(1).beta(2, 1, size=800))
    mean, low, high = planted(correct, 100).expected("clean")
    assert mean == pytest.approx(correct.mean() / 100, abs=1e-12)
    sem = scipy.stats.sem(correct / 100)
    assert (low, high) == pytest.approx(scipy.stats.norm.interval(0.95, mean, sem), abs=0.001)
    theirs = scipy.stats.bootstrap((correct / 100,), np.mean, n_resamples=3000, method="percentile", rng=1)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.0015)


def test_where_all_images_agree_the_interval_has_no_width():
    assert planted(np.full(20, 7), 10).expected("clean") == Interval(*[pytest.approx(0.7)] * 3)


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_adv", [True, False])
@pytest.mark.parametrize("name", ["result", "result.json", "result.npz", "deeper/pgd-eps0.15", "v1.2.json"])
def test_a_result_is_read_back_as_it_was(tmp_path, save_adv, name):
    x, y = halves(10)
    result = evaluate(small_net(), x, y, ["clean", "pgd:steps=2"], eps=0.1, save_adv=save_adv)
    result.save(tmp_path / name)
    again = EvaluationResult.load(tmp_path / name)
    assert again.to_dict() == result.to_dict()
    assert (again.y == result.y).all() and again.y.dtype == np.int64
    for a, b in zip(again.scores, result.scores, strict=True):
        assert (a.name, a.forwards, a.gradients, a.seconds) == (b.name, b.forwards, b.gradients, b.seconds)
        assert all((getattr(a, key) == getattr(b, key)).all() for key in ARRAYS)
        assert (a.x_adv is None) if not save_adv else (a.x_adv == b.x_adv).all()
    stem = name.removesuffix(".json").removesuffix(".npz")
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {f"{stem}.json", f"{stem}.npz"}  # nothing half-written is left
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == result.to_dict()


def test_results_whose_names_differ_behind_a_dot_do_not_overwrite_each_other(tmp_path):
    for share in (10, 90):
        planted(np.full(5, share), 100).save(tmp_path / f"accuracy-0.{share}")
    assert EvaluationResult.load(tmp_path / "accuracy-0.10").expected("clean").mean == pytest.approx(0.1)
    assert EvaluationResult.load(tmp_path / "accuracy-0.90").expected("clean").mean == pytest.approx(0.9)


def with_noises(draws: int = 20) -> EvaluationResult:
    """Two attacks on 30 images, with the noise fresh, frozen and off."""
    rng, each = np.random.default_rng(0), []
    for noise in ("fresh", "frozen", "off"):
        for label, share in (("clean", 0.9), ("pgd5-eot2" if noise == "fresh" else "pgd5-eot1", 0.5)):
            m = draws if noise == "fresh" else 1
            each.append(scores(rng.binomial(m, share, 30), attack_name(label, noise), noise=noise))
    each.append(scores(np.zeros(30, dtype=int), "cw9-unbounded", bounded=False))
    return EvaluationResult(
        each, np.arange(30) % 3, {"draws": draws, "seed": 0, "eps": 8 / 255, "norm": "Linf"}, np.arange(30)
    )


NAMES = ["clean", "pgd5-eot2", "clean@frozen", "pgd5-eot1@frozen", "clean@off", "pgd5-eot1@off", "cw9-unbounded"]


def test_one_name_is_the_key_in_the_api_in_the_files_and_in_the_table(tmp_path):
    result = with_noises()
    keys = [*NAMES, "worst", "worst@frozen", "worst@off"]
    assert result.names == keys
    for name in keys:
        assert result[name].name == name and 0 <= result.expected(name).mean <= 1
    assert result["clean"] is result.scores[0]
    for unknown in ("pgd", "pgd5-eot1", "worst@of", "worstfrozen"):
        with pytest.raises(KeyError) as error:
            result[unknown]
        assert error.value.args[0] == f"no attack {unknown!r} in this result: {', '.join(keys)}"
    with pytest.raises(KeyError, match="in this result: clean, worst"):
        planted(np.full(5, 1), 1)["worst@frozen"]
    saved = json.loads(result.save(tmp_path / "r").with_suffix(".json").read_text())
    assert [row["attack"] for row in saved["attacks"]] == NAMES
    assert list(saved["worst"]) == ["worst", "worst@frozen", "worst@off"]
    with np.load(tmp_path / "r.npz") as file:
        assert (file["pgd5-eot1@frozen.correct"] == result["pgd5-eot1@frozen"].correct).all()
    shown = io.StringIO()
    show_result(Console(file=shown, width=80), replace(result, metadata=result.metadata | {"images": 30}), "x")
    first_words = [line.split(" ")[0] for line in shown.getvalue().splitlines() if "worst case:" not in line]
    assert [word for word in first_words if word in keys] == [
        *("clean", "pgd5-eot2", "worst", "cw9-unbounded"),
        *(f"{label}@{noise}" for noise in ("frozen", "off") for label in ("clean", "pgd5-eot1", "worst")),
    ]


def test_a_loaded_result_draws_no_resamples_again(tmp_path, monkeypatch):
    result = with_noises()
    result.save(tmp_path / "saved")
    summary = result.to_dict()

    def drawn(*args, **kwargs):
        raise AssertionError("the interval is in the file")

    monkeypatch.setattr(module, "bootstrap_mean", drawn)
    assert EvaluationResult.load(tmp_path / "saved").to_dict() == summary


# --- as text -----------------------------------------------------------------------------------------------------


def test_a_result_prints_as_a_short_table():
    result = with_noises()
    lines = repr(result).splitlines()
    assert str(result) == repr(result) and len(lines) <= 12 and max(map(len, lines)) <= 80
    assert lines[0] == "30 images, eps = 8/255 (Linf), 20 scoring draws, seed 0"
    for name in ("clean", "pgd5-eot2", "worst", "worst@frozen", "worst@off"):
        mean, low, high = (f"{100 * v:.1f}" for v in result.expected(name))
        assert re.search(rf"^{name} +{mean}% +{low} – {high}$", repr(result), re.M)
    assert re.search("^cw9-unbounded +– +no bound$", repr(result), re.M)
    assert repr(result.scores[1]) == "Scores('pgd5-eot2', 30 images)"


def test_a_result_of_many_attacks_prints_as_short_a_table():
    one = with_noises()
    many = replace(one, scores=[*one.scores, *(replace(one.scores[1], name=f"pgd{i}-eot2") for i in range(20, 60))])
    lines = repr(many).splitlines()
    assert len(lines) <= 12 and lines[-1].startswith("worst@off ")
    assert "and 37 more (result.names lists all)" in lines


def test_a_result_is_a_value():
    result = planted(np.full(5, 1), 2)
    assert replace(result, metadata={"draws": 1, "seed": 0}).expected("clean").mean == 1.0
    assert result.expected("clean") == result.expected("clean")


# --- the four accuracies -----------------------------------------------------------------------------------------


def test_the_persistent_attacker_is_the_chance_that_n_draws_without_replacement_are_all_right():
    correct = np.array([0, 1, 9, 10, 50, 99, 100])
    result = planted(correct, 100)
    for n in (1, 10, 100):
        closed = [scipy.stats.hypergeom(100, c, n).pmf(n) for c in correct]
        assert result.persistent("clean", n).mean == pytest.approx(np.mean(closed), rel=1e-12, abs=1e-15)
    assert result.persistent("clean", 1).mean == pytest.approx(result.expected("clean").mean)
    assert result.persistent("clean", 101) is None


def test_the_persistent_attacker_is_not_biased_as_the_plug_in_is(monkeypatch):
    monkeypatch.setattr(module, "BOOTSTRAP", 500)  # the interval is not asked for
    rng = np.random.default_rng(0)
    p = 0.905  # right in 0.905 of the draws: 0.905^10 = 0.369
    correct = rng.binomial(20, p, size=40_000)
    result = planted(correct, 20)
    assert result.persistent("clean", 10).mean == pytest.approx(p**10, abs=0.005)
    assert np.mean((correct / 20) ** 10) > p**10 + 0.03


def test_of_a_deterministic_model_all_accuracies_agree():
    x, y = halves(20, contrast=0.15)
    result = evaluate(small_net(), x, y, ["clean", "pgd:steps=3"], eps=0.05)
    for name in ("clean", "pgd3-eot1", "worst"):
        mean = result.expected(name).mean
        assert result.vote(name).mean == mean
        assert [result.persistent(name, n).mean for n in (1, 10, 100)] == [mean] * 3
    assert result.expected("worst").mean <= result.expected("pgd3-eot1").mean


@pytest.mark.parametrize("p", [0.3, 0.6])
def test_the_vote_is_that_of_eleven_fresh_draws(p):
    """Two classes: the vote is right where at least six of eleven draws are."""
    y = torch.zeros(5000, dtype=torch.int64)
    found = (torch.rand((100, 5000), generator=rng()) > p).long()
    share = vote_accuracy(found, y, 11)
    assert share.mean() == pytest.approx(scipy.stats.binom(11, p).sf(5), abs=0.01)
    assert set((share * 9).round().int().tolist()) <= set(range(10))


def test_a_plurality_wins_a_vote_and_a_tie_loses_it():
    votes = torch.tensor([[0] * 4 + [1] * 4 + [2] * 3, [0] * 5 + [1] * 3 + [2] * 3, [1] * 11]).T
    assert vote_accuracy(votes, torch.zeros(3, dtype=torch.int64), 11).tolist() == [0.0, 1.0, 0.0]
    assert vote_accuracy(votes[:10], torch.zeros(3, dtype=torch.int64), 11).isnan().all()
    assert vote_accuracy(votes[:1], torch.tensor([0, 1, 1]), 11).tolist() == [1.0, 0.0, 1.0]


def test_the_worst_is_chosen_by_the_selection_and_scored_by_the_score(monkeypatch):
    monkeypatch.setattr(module, "BOOTSTRAP", 500)  # the interval is not asked for
    rng = np.random.default_rng(0)
    each = [scores(rng.binomial(100, 0.5, 4000), f"a{i}", selection=rng.binomial(100, 0.5, 4000)) for i in range(6)]
    result = EvaluationResult(each, np.zeros(4000, dtype=int), {"draws": 100, "seed": 0})
    # Chosen on the draws that score it, the worst of six would flip in 0.56 instead of 0.5.
    assert np.min([s.correct for s in each], axis=0).mean() / 100 < 0.45
    assert result.expected("worst").mean == pytest.approx(0.5, abs=0.003)
    better = scores(np.full(4000, 10), "strong", selection=np.full(4000, 12))
    assert (replace(result, scores=[*each, better]).worst().correct == 10).all()


def test_unbounded_points_are_never_the_worst_and_carry_their_distance():
    far = scores(np.zeros(4, dtype=int), "cw", bounded=False, l2=np.array([3.0, 1.0, 2.0, 9.0]))
    result = EvaluationResult([scores(np.full(4, 1)), far], np.zeros(4, dtype=int), {"draws": 1, "seed": 0})
    assert result.expected("worst").mean == 1.0
    assert result.summary("cw")["median_l2_of_broken"] == 2.5
    assert result.summary("cw")["broken"] == 1.0


def test_the_published_judgement_is_one_draw_for_success_and_one_for_the_score():
    # Success was seen in the first two images; of the others the clean image is scored.
    clean = scores(np.full(4, 1), single=np.array([[1, 1], [1, 0], [1, 1], [1, 0]], dtype=bool))
    attacked = scores(np.full(4, 1), "a", single=np.array([[0, 0], [0, 1], [1, 0], [1, 0]], dtype=bool))
    result = EvaluationResult([clean, attacked], np.zeros(4, dtype=int), {"draws": 100, "seed": 0})
    assert result.as_published("a").mean == np.mean([0, 1, 1, 0])


def test_broken_and_flips_are_read_from_the_scoring_draws():
    result = planted(np.array([100, 51, 50, 49, 0]), 100)
    assert result.flips("clean").tolist() == pytest.approx([0, 0.49, 0.5, 0.51, 1])
    assert result.broken("clean").tolist() == [False, False, False, True, True]
