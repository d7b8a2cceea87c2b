"""The battery of known defences through the audit: a few rows here, all of them by `make test-slow`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from battery import BROKEN, CASES, CLAIM, DEFENCES, NEAR, Case, Drawn, digits_setting, make

FEW = ("dct", "temperature", "onehot", "plain")


def case(**fields) -> Case:
    nothing, x = torch.nn.Identity(), torch.zeros(1, 1, 2, 2)
    return Case(nothing, nothing, x, torch.zeros(1, dtype=torch.int64), 0.1, "apgd", **fields)


@pytest.fixture(scope="module")
def defences():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        import defences

        yield defences


def run(defences, out: Path, names: tuple[str, ...], *words: str) -> dict[str, dict]:
    torch.manual_seed(0)
    defences.main(["--only", ",".join(names), "--out", str(out), *words])
    return {row["name"]: row for row in json.loads((out / "table.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def few(defences, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    out = tmp_path_factory.mktemp("battery")
    return out, run(defences, out, FEW, "--images", "100", "--queries", "50")


@pytest.mark.parametrize("name", FEW)
def test_a_few_rows_come_out_as_expected(few, name):
    row = few[1][name]
    assert row["faults"] == []
    if name in DEFENCES:
        assert row["clean"] > 0.9 and row["found"]["accuracy"] <= BROKEN
    if name == "dct":
        assert row["verdict"] == "OVERSTATED" and row["claimed"] > 0.3 and row["layers"]["gradient"] == "front"


def test_an_interrupted_benchmark_goes_on_from_its_finished_rows(defences, few, monkeypatch):
    out, rows = few
    monkeypatch.setattr(defences, "row", None)  # nothing is left to compute
    assert run(defences, out, FEW, "--images", "100", "--queries", "50") == rows
    lines = (out / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(FEW) and lines[-1].startswith("| plain, 0 |") and "OVERSTATED" in lines[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_every_row_comes_out_as_expected(defences, tmp_path_factory, name, seed):
    out = tmp_path_factory.getbasetemp() / "every row"
    assert run(defences, out, (name,), "--seeds", str(seed))[name]["faults"] == []


def test_parameters_are_drawn_from_the_seed_alone():
    torch.manual_seed(1)
    one, again, other = Drawn("dct", 0), Drawn("dct", 0), Drawn("dct", 1)
    for drawn in (one, again, other):
        drawn.between("step", 0.03, 0.08), drawn.between("factor", 100, 1000), drawn.one_of("source", "a", "b", "c")
    assert one.values == again.values != other.values
    values = [Drawn("x", seed) for seed in range(200)]
    factors = torch.tensor([v.between("factor", 100, 1000) for v in values])
    assert factors.min() >= 100 and factors.max() <= 1000 and 250 < factors.median() < 400  # by the logarithm: 316
    assert {v.one_of("source", "a", "b", "c") for v in values} == {"a", "b", "c"}
    some = one.some("channels", 0.5, 8)
    assert some.sum() == 4 and torch.equal(some, again.some("channels", 0.5, 8))


def test_a_case_is_the_same_when_it_is_made_again(few):
    setting = digits_setting(100, few[0] / "networks")
    first, again = make("detached", 0, setting), make("detached", 0, replace(setting))
    assert first.parameters == again.parameters and torch.equal(first.model[3].cut, again.model[3].cut)
    assert all(torch.equal(*pair) for pair in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert first.model[3].cut.sum() == round(first.parameters["share"] * 8)
    torch.testing.assert_close(first.model(first.x), first.undefended(first.x))


def test_what_an_audit_must_find():
    broken, robust, blocked = case(), case(robust=True), case(overstated=True)
    assert broken.faults("TRUSTED", BROKEN, BROKEN, 0) == [] == broken.faults("OVERSTATED", 0.7, 0.0, 0)
    assert broken.faults("OVERSTATED", 0.7, BROKEN + 0.01, 0) != [] != broken.faults("SUSPECT", 0.0, 0.0, 0)
    assert broken.faults("TRUSTED", CLAIM + 0.01, 0.0, 0) != []
    assert robust.faults("OVERSTATED", 0.8, 0.6 + NEAR, 0.6) == []
    assert robust.faults("OVERSTATED", 0.8, 0.6 + NEAR + 0.01, 0.6) != []
    assert blocked.faults("TRUSTED", 0.04, 0.0, 0) != [] == blocked.faults("TRUSTED", None, 0.0, 0)
    for verdict in ("OVERSTATED", "SUSPECT", "INVALID", "INCOMPLETE"):
        assert case(control=True, robust=True).faults(verdict, 0.6, 0.6, 0.6) != []
    assert case(control=True, robust=True).faults("TRUSTED", 0.6, 0.5, 0.6) == []
