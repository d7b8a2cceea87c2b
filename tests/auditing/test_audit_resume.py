"""An interrupted audit resumes after its last finished check, to the same audit; how long it will take."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gsem
from audited_models import Fronted, Quantise, mlp
from gsem.auditing import Audit
from gsem.auditing.audit import CHECKS
from gsem.auditing.context import Points
from gsem.auditing.progress import Progress, TimeLeft
from gsem.auditing.shares import lowest

ATTACKS = "apgd:steps=3:eot=2,apgd:steps=3:eot=2:loss=margin,square:queries=5:eot=2"
HOW = {"eps": 0.1, "quick": True, "draws": 3}


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    test = gsem.data.load("digits").test()
    return Fronted(Quantise(noise=0.05), mlp()).eval(), gsem.data.to_float(test.x[:12]), test.y[:12]


@pytest.fixture(scope="module")
def undisturbed(small) -> Audit:
    return gsem.audit(*small, ATTACKS, **HOW)


def interrupting(after: int, message: str = ""):
    """Reports that end an audit: behind so many checks, at the first line that holds the message."""
    ended = 0

    def report(p: Progress) -> None:
        nonlocal ended
        if ended == after and p.ended is None and message in p.doing:
            raise KeyboardInterrupt
        ended += p.ended is not None

    return report


def same(one: Audit, other: Audit) -> bool:
    """All but the time it took."""
    plain = [json.loads(json.dumps(a.to_dict())) for a in (one, other)]
    for audit in plain:
        del audit["metadata"]["seconds"]
    return plain[0] == plain[1]


@pytest.mark.parametrize(
    ("after", "message"),
    [(2, ""), (1, "apgd3-eot2, image"), (5, ""), (9, "twice the steps"), (10, ""), (11, "")],
    ids=["gradient made", "in the path", "path known", "in the sweeps", "before blackbox", "before the last"],
)
def test_an_interrupted_audit_ends_as_an_undisturbed_one(small, undisturbed, tmp_path, monkeypatch, after, message):
    out = tmp_path / "audit"
    with pytest.raises(KeyboardInterrupt):
        gsem.audit(*small, ATTACKS, **HOW, save=out, on_progress=interrupting(after, message))
    assert not out.with_suffix(".json").exists() and out.with_suffix(".unfinished").is_dir()
    made = []
    for name, check in CHECKS.items():
        monkeypatch.setitem(CHECKS, name, lambda s, name=name, check=check: (made.append(name), check(s))[1])
    reports: list[Progress] = []
    found = gsem.audit(*small, ATTACKS, **HOW, save=out, on_progress=reports.append)
    assert made == list(CHECKS)[after:]
    assert same(found, undisturbed) and same(Audit.load(tmp_path / "audit.json"), undisturbed)
    assert [p.earlier for p in reports if p.ended] == [True] * after + [False] * (12 - after)
    assert [path.name for path in tmp_path.iterdir()] == ["audit.json"]


def test_what_checks_share_is_not_computed_again(small, tmp_path):
    """An interruption behind the evaluation itself: neither the path nor the other attacks run again."""
    with pytest.raises(KeyboardInterrupt):
        gsem.audit(*small, ATTACKS, **HOW, save=tmp_path / "a", on_progress=interrupting(9, "1/2 of the steps"))
    kept = sorted(path.stem for path in (tmp_path / "a.unfinished").glob("*.npz"))
    assert kept == ["clean", "path", "unbounded", "white_box"]
    doing: list[str] = []
    gsem.audit(*small, ATTACKS, **HOW, save=tmp_path / "a", on_progress=lambda p: doing.append(p.doing))
    assert "the evaluation itself" not in doing


def test_an_unfinished_audit_of_something_else_is_not_touched(small, tmp_path):
    model, x, y = small
    out = tmp_path / "audit.json"
    with pytest.raises(KeyboardInterrupt):
        gsem.audit(model, x, y, ATTACKS, **HOW, save=out, on_progress=interrupting(1))
    other = Fronted(Quantise(noise=0.05), mlp(1)).eval()
    for change, message in (
        ({"model": other}, "the model's weights"),
        ({"x": x * 0.5}, "the images"),
        ({"draws": 4}, r"draws \(3 then, 4 now\)"),
        ({"seed": 1}, "seed"),
        ({"attacks": "apgd:steps=4"}, "the attacks"),
        ({"only": ["randomness"]}, "the checks"),
        ({"surrogate": mlp()}, "surrogate"),
    ):
        how = {"model": model, "x": x, "y": y, "attacks": ATTACKS} | HOW | change
        with pytest.raises(ValueError, match=f"audit.unfinished holds an unfinished audit.*{message}"):
            gsem.audit(**how, save=out)
    assert [path.name for path in (tmp_path / "audit.unfinished").glob("check-*")] == ["check-randomness.json"]


def test_a_saved_audit_of_something_else_is_not_overwritten(small, tmp_path):
    how = HOW | {"only": ["randomness"]}
    first = gsem.audit(*small, ATTACKS, **how, save=tmp_path / "audit")
    with pytest.raises(ValueError, match=r"audit.json is there already, and is a different audit.*seed"):
        gsem.audit(*small, ATTACKS, **how, seed=1, save=tmp_path / "audit")
    assert Audit.load(tmp_path / "audit.json") == first


def test_nothing_is_left_where_nothing_was_finished(small, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        gsem.audit(*small, ATTACKS, **HOW, save=tmp_path / "audit", on_progress=interrupting(0))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_piece_is_computed_again(small, undisturbed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        gsem.audit(*small, ATTACKS, **HOW, save=tmp_path / "audit", on_progress=interrupting(6))
    for file in (tmp_path / "audit.unfinished").iterdir():
        if file.name in ("path.npz", "check-gradient.json"):
            file.write_bytes(file.read_bytes()[:40])
    assert same(gsem.audit(*small, ATTACKS, **HOW, save=tmp_path / "audit"), undisturbed)


@pytest.mark.parametrize("name", ["strict", "strict.json", "strict.txt", "eps0.15"])
def test_an_audits_file_ends_in_json(undisturbed, tmp_path, name):
    saved = undisturbed.save(tmp_path / name)
    assert saved.name == f"{name.removesuffix('.json')}.json" and saved.is_file()


def test_the_lowest_of_parts_is_the_lowest_of_all():
    """Ties go to the first, however the points are grouped."""
    random = np.random.default_rng(0)
    x = torch.zeros(50, 1, 1, 1)
    points = [Points(x, random.integers(0, 3, 50) / 2, random.random(50), np.full(50, str(n))) for n in range(6)]
    one = points[0]
    for other in points[1:]:
        one = one.worse_of(other)
    shares = [p.shares for p in points]
    grouped = lowest([shares[0], lowest(shares[1:4]), lowest(shares[4:])])
    assert grouped.to_dict() == lowest(shares).to_dict() == one.shares.to_dict()


def test_the_time_left_is_that_of_the_planned_work():
    time = TimeLeft({"a": 1.0, "b": 3.0, "c": 6.0}, {})
    assert time.left("a", 5.0) is None  # nothing is finished
    time.ended("a", 10.0)
    assert time.left(None, 0.0) == time.left("b", 0.0) == pytest.approx(90)
    assert time.left("b", 12.0) == pytest.approx(78)
    assert time.left("b", 1000.0) == pytest.approx(60)  # it takes longer than planned: the rest is still to come
    time.ended("b", 60.0)
    assert time.left("c", 0.0) == pytest.approx(6 * 70 / 4)
    time.ended("c", 50.0)
    assert time.left(None, 0.0) == 0


def test_an_audit_reports_the_time_left_and_the_reports_change_nothing(small, undisturbed):
    reports: list[Progress] = []
    found = gsem.audit(*small, ATTACKS, **HOW, on_progress=reports.append)
    assert same(found, undisturbed)
    left = [p.seconds_left for p in reports if p.ended]
    assert left[-1] == 0 and all(s is None or s >= 0 for s in left) and sum(s is None for s in left) < 4
    assert replace(reports[-1], ended=None).check == "noise"
