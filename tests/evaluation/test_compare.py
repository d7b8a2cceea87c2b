"""Two networks compared image by image: planted probabilities, matched attacks, and what cannot be compared."""

import json
from dataclasses import replace

import numpy as np
import pytest

import gsem
from gsem.evaluation.compare import Comparison
from gsem.evaluation.result import EvaluationResult
from gsem.evaluation.statistics import mcnemar, paired_interval
from planted import Flipper, Halves, halves, scores

N = 40
PRINT = {"structure": "s", "weights": "w", "images": "i", "labels": "l"}


def result(right: dict[str, np.ndarray], draws: int = 20, **change) -> EvaluationResult:
    """A result of these attacks, from the share of right draws of each image."""
    each = [scores(np.rint(share * draws).astype(int), name) for name, share in right.items()]
    metadata = {"draws": draws, "seed": 0, "eps": 8 / 255, "norm": "Linf", "fingerprint": PRINT}
    metadata |= {"stochastic": draws > 1, "options": {name: {"steps": 9, "eot": draws} for name in right}}
    return EvaluationResult(each, np.arange(N) % 2, metadata | change, 100 + np.arange(N))


def shares(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 21, N) / 20


def test_the_difference_is_that_of_the_probabilities_of_each_image():
    p, q = shares(0), shares(1)
    found = gsem.compare(result({"clean": p, "pgd9-eot20": q}), result({"clean": q, "pgd9-eot20": q}))
    clean, same = found["clean"], found["pgd9-eot20"]
    assert clean.difference == pytest.approx(paired_interval(p - q))
    assert clean.difference.mean == pytest.approx(p.mean() - q.mean())
    assert clean.one == result({"clean": p}).expected("clean") and clean.two == result({"clean": q}).expected("clean")
    assert clean.only_one.tolist() == np.nonzero((p < 0.5) & (q >= 0.5))[0].tolist() != []
    assert clean.only_two.tolist() == np.nonzero((q < 0.5) & (p >= 0.5))[0].tolist() != []
    assert clean.p == mcnemar(len(clean.only_one), len(clean.only_two))
    assert same.difference.mean == 0 and same.p == 1 and not len(same.only_one) and not len(same.only_two)
    assert same.difference.low < 0 < same.difference.high
    assert found["worst"].two.mean == result({"clean": q}).expected("clean").mean
    with pytest.raises(KeyError, match="no attack 'fgsm' in this comparison: clean, pgd9"):
        found["fgsm"]


def test_the_two_change_places():
    p, q = result({"clean": shares(0)}), result({"clean": shares(1)})
    one, other = gsem.compare(p, q)["clean"], gsem.compare(q, p)["clean"]
    assert one.difference == pytest.approx((-other.difference.mean, -other.difference.high, -other.difference.low))
    assert one.only_one.tolist() == other.only_two.tolist() and one.p == other.p


def test_attacks_of_a_deterministic_network_match_those_with_draws():
    p, q = shares(0), (shares(1) > 0.5) * 1.0
    stochastic = result({"clean": p, "pgd9-eot20": p, "fgsm-eot20": p})
    plain = result({"clean": q, "pgd9-eot1": q, "square9-eot1": q}, draws=1)
    found = gsem.compare(stochastic, plain)
    assert [d.name for d in found.differences] == ["clean", "pgd9-eot20"]
    assert found["pgd9-eot20"].difference == pytest.approx(paired_interval(p - q))
    # The worst of other attacks is no comparison.
    assert found.left_out == ["fgsm-eot20", "worst", "square9-eot1"]
    # Of two stochastic networks, other numbers of draws are other attacks.
    assert gsem.compare(stochastic, result({"clean": q, "pgd9-eot5": q})).left_out[0] == "pgd9-eot20"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eps": 0.1}, r"eps \(8/255 of one, 0.1 of two\)"),
        ({"norm": "L2"}, r"norm \(Linf of one, L2 of two\)"),
        ({"fingerprint": PRINT | {"images": "j"}}, "the images$"),
        ({"options": {"clean": {}, "pgd9-eot20": {"steps": 9, "loss": "margin", "eot": 20}}}, "options of pgd9$"),
    ],
)
def test_what_differs_is_named(change, named):
    one = result({"clean": shares(0), "pgd9-eot20": shares(1)}, options={"clean": {}, "pgd9-eot20": {"steps": 9}})
    two = replace(one, metadata=one.metadata | change)
    with pytest.raises(ValueError, match=rf"one and two cannot be compared. They differ in: .*{named}"):
        gsem.compare(one, two)
    assert gsem.compare(one, one)["clean"].p == 1


def test_other_images_are_refused_without_fingerprints_too():
    one = result({"clean": shares(0)})
    bare = replace(one, metadata={k: v for k, v in one.metadata.items() if k != "fingerprint"})
    assert gsem.compare(one, bare)["clean"].difference.mean == 0
    with pytest.raises(ValueError, match="rows of the images"):
        gsem.compare(one, replace(bare, rows=np.arange(N)))
    with pytest.raises(ValueError, match="the labels"):
        gsem.compare(one, replace(bare, y=1 - one.y))
    with pytest.raises(ValueError, match="no attack that both one and two"):
        gsem.compare(one, result({"fgsm-eot20": shares(0)}))


@pytest.mark.filterwarnings("ignore:fold runs Flipper")
def test_saved_evaluations_of_two_networks(tmp_path):
    """A network that answers wrongly in 30% of the draws, and itself without that."""
    x, y = halves(60)
    for name, model in (("flips", Flipper(0.3)), ("plain", Halves())):
        gsem.evaluate(model, x, y, ["clean", "pgd:steps=3"], eps=0.05, draws=40, save=tmp_path / name)
    found = gsem.compare(tmp_path / "plain.npz", str(tmp_path / "flips.npz"), ("P", "F"))
    assert isinstance(found, Comparison) and [d.name for d in found.differences] == ["clean", "pgd3-eot1", "worst"]
    for d in found.differences:
        assert d.difference.low < 0.3 < d.difference.high and d.difference.mean == pytest.approx(0.3, abs=0.05)
        assert d.p == mcnemar(len(d.only_one), len(d.only_two))
    text = json.loads(found.save(tmp_path / "c").read_text())
    assert text == json.loads(json.dumps(found.to_dict()))
    assert [n["name"] for n in text["metadata"]["networks"]] == ["P", "F"]
    assert text["attacks"][0]["difference"]["mean"] == found["clean"].difference.mean
    assert text["attacks"][0].keys() == {
        *("attack", "one", "two", "difference", "lost_by_one_only", "lost_by_two_only", "p")
    }
    assert max(len(line) for line in str(found).splitlines()) <= 80


def test_images_are_named_by_their_rows():
    p, q = result({"clean": np.ones(N)}), result({"clean": (np.arange(N) != 7) * 1.0})
    assert gsem.compare(p, q).to_dict()["attacks"][0]["lost_by_two_only"] == [107]
