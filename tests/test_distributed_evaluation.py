"""Evaluations and audits in several processes: the result of one process, also after one is killed."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from processes import Ended, ended, run, started

HELPERS = Path(__file__).parent / "helpers"
SIZES = (1, 2, 3)


def words(case: str, out: Path) -> list[str]:
    return [str(HELPERS / "evaluated_together.py"), case, str(out)]


def printed(ends: list[Ended]) -> list[dict]:
    assert [end.code for end in ends] == [0] * len(ends), [end.err for end in ends]
    return [json.loads(end.out.splitlines()[-1]) for end in ends]


def saved(file: Path) -> dict:
    """All of a result's two files but the time."""
    with np.load(file.with_suffix(".npz")) as arrays:
        found = {key: arrays[key].tolist() for key in arrays if key != "meta"}
        metas = [json.loads(str(arrays["meta"])), json.loads(file.with_suffix(".json").read_text())]
    for meta in metas:
        for row in meta["attacks"]:
            del row["seconds"]
    return found | {"meta": metas[0], "json": metas[1]}


@pytest.fixture(scope="module")
def equal(tmp_path_factory) -> dict[int, tuple[Path, list[dict]]]:
    """For each number of processes: where they saved, and what each printed."""
    found = {}
    for size in SIZES:
        out = tmp_path_factory.mktemp("equal")
        found[size] = (out, printed(run(size, words("equal", out))))
    return found


def test_the_result_is_that_of_one_process_to_the_bit(equal):
    """Stochastic and deterministic networks, attack functions, more processes than batches; on every process."""
    whole = equal[1][1][0]["results"]
    assert len(whole) == 4 and whole[0] == whole[3]
    for size in SIZES:
        assert [found["results"] for found in equal[size][1]] == [whole] * size


def test_the_files_are_those_of_one_process(equal):
    for name in ("stochastic", "deterministic"):
        whole = saved(equal[1][0] / name)
        assert any(key.endswith("x_adv") for key in whole)
        assert all(saved(equal[size][0] / name) == whole for size in SIZES)
    names = [f"{name}.{kind}" for name in ("deterministic", "stochastic") for kind in ("json", "npz")]
    assert all(found["left"] == names for size in SIZES for found in equal[size][1])


def test_a_finished_result_is_returned_and_another_one_refused_on_all(equal):
    for size in SIZES:
        assert all(found["kept"] for found in equal[size][1])
        (kind, text), *others = [found["another"] for found in equal[size][1]]
        assert kind == "AnotherQuestion" and "eps (0.1 then, 0.2 now)" in text
        assert others == [[kind, text]] * (size - 1)


def test_the_first_process_reports_all_batches(equal):
    for size in SIZES:
        first, *others = equal[size][1]
        assert len(first["finished"]) == 12 and all(first["finished"].values())
        assert [found["reports"] for found in others] == [0] * (size - 1)


def test_an_error_of_one_process_ends_all_and_all_can_go_on(tmp_path):
    alone, *together = [printed(run(size, words("errors", tmp_path / str(size)))) for size in (1, 2)]
    ((whole,), (one, other)) = alone, together[0]
    raised = sorted([one["in one item"], other["in one item"]])
    assert raised[0] == ["ArithmeticError", "this batch"] == whole["in one item"]
    assert raised[1][0] == "OtherProcessFailed" and "this batch" in raised[1][1]
    assert one["kept"] == other["kept"] >= 1
    assert one["other eps"] == other["other eps"] and "process 1 differs" in one["other eps"][1]
    assert one["no attack"] == other["no attack"] == whole["no attack"] and one["no attack"][0] == "ValueError"
    assert one["warnings"] == whole["warnings"] and len(one["warnings"]) >= 1 and other["warnings"] == []
    assert one["at the end"] == other["at the end"] == whole["at the end"]


@pytest.mark.parametrize(("size", "victim", "then"), [(2, 0, 3), (3, 1, 1)])
def test_a_killed_process_ends_all_and_any_number_resumes(tmp_path, monkeypatch, equal, size, victim, then):
    whole = equal[1][1][0]["results"][1]
    calls = tmp_path / "calls"
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("SLOW", "0.5")
    running = started(size, words("slow", tmp_path / "out"))
    until = time.monotonic() + 60
    # (The slow attack goes first: one of its four batches is kept, and others are not.)
    while not list(tmp_path.glob("out/deterministic.unfinished/[0-9a-f]*.npz")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(running[victim].pid, signal.SIGKILL)
    ends = ended(running)
    assert all(end.code for end in ends)
    messages = [line for end in ends for line in end.err.splitlines() if line.startswith("gsem: ")]
    assert len(messages) == 1 and f"process {victim} (" in messages[0]
    kept = list(tmp_path.glob("out/deterministic.unfinished/[0-9a-f]*.npz"))
    assert 1 <= len(kept) < 4 + 5 * 4
    monkeypatch.setenv("SLOW", "0")
    assert [found["results"] for found in printed(run(then, words("slow", tmp_path / "out")))] == [whole] * then
    assert saved(tmp_path / "out/deterministic") == saved(equal[1][0] / "deterministic")
    assert len(calls.read_text().splitlines()) <= 4 + size  # what was finished is not computed again


def test_audit_corruptions_and_report_are_those_of_one_process(tmp_path):
    (whole,), together = (printed(run(size, words("audits", tmp_path / str(size) / "run"))) for size in (1, 2))
    for rank, found in enumerate(together):
        for key in ("audit", "kept", "corruptions", "shared", "failed", "left"):
            assert found[key] == whole[key], key
        assert found["reports"] == 0 if rank else found["reports"] > 5
    assert [check["name"] for check in whole["kept"]["checks"]] == [check["name"] for check in whole["audit"]["checks"]]
    assert whole["shared"] == [n * n for n in range(7)] and whole["failed"] == "RuntimeError('item 0')"
    reports = [(tmp_path / str(size) / "run/report.md").read_text().splitlines() for size in (1, 2)]
    one, two = ([line for line in lines if not line.endswith(" s |")] for lines in reports)  # (but for the times)
    assert one == two and len(one) > 10
