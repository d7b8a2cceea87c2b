"""A file that cannot be read is one clear error, and nothing is written."""

import importlib
import json
import os

import numpy as np
import pytest

import gsem
from gsem.cli.main import main
from gsem.reporting import read_runs
from planted_run import planted_audit, planted_run


@pytest.fixture
def run(tmp_path):
    return planted_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("recipe.json", b"{", "recipe.json is damaged"),
        ("recipe.json", b"[]", "recipe.json is damaged"),
        ("metrics.jsonl", b"{}\n{\n{}\n", "metrics.jsonl is damaged"),
        ("evaluation.npz", b"PK", "evaluation.npz is damaged, or of another version"),
        ("evaluation.npz", b"", "evaluation.npz is damaged, or of another version"),
        ("audit.json", b"{}", "audit.json is damaged, or of another version"),
        ("audit.json", b"\xff\xfe", "audit.json is damaged, or of another version"),
        ("audit.json", b'{"checks": [{"name": "x"}]}', "audit.json is damaged, or of another version"),
    ],
)
def test_a_damaged_file_is_named(run, file, content, message):
    (run / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_runs([run])


def test_an_evaluation_of_an_earlier_version(run):
    with np.load(run / "evaluation.npz") as file:
        arrays = {key: value for key, value in file.items() if not key.endswith(".votes")}
    np.savez(run / "evaluation.npz", **arrays)
    with pytest.raises(ValueError, match=r"another version of gsem.*evaluate again"):
        read_runs([run])


def test_what_is_no_run(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="there is no run"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="no run of gsem train"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match=r"neither a run directory nor the \.npz"):
        read_runs([run / "metrics.jsonl"])
    with pytest.raises(ValueError, match="given twice"):
        read_runs([run, run])
    with pytest.raises(ValueError, match="no run to report"):
        read_runs([])


def test_a_run_killed_while_it_wrote_its_metrics(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 5, "lo')
    assert len(read_runs([run])[0].metrics) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no run nowhere"),
        ([], "RUN"),
        (["run", "-o", "report.pdf"], ".html, .md, .json"),
        (["run", "--markdown", "x.txt"], "must end in .md"),
        (["run", "-o", "folder.html"], "is a directory"),
        (["run", "--images", "-1"], "images must be at least 0"),
    ],
)
def test_the_command_refuses_in_one_line(run, capsys, monkeypatch, words, message):
    monkeypatch.chdir(run.parent)
    (run.parent / "folder.html").mkdir()
    assert main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(run.parent.rglob("report.html"))


def test_the_command_writes_all_three(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert main(["report", "run", "--markdown", "x.md", "--json", "x.json"]) == 0
    assert capsys.readouterr().out.splitlines() == ["report: run/report.html", "report: x.md", "report: x.json"]
    page = (run / "report.html").read_text()
    assert "could not be loaded" in page  # the planted run has no weights
    assert json.loads((run.parent / "x.json").read_text())["name"] == "run"
    assert main(["report", "run", "-o", "y.md"]) == 0
    assert (run.parent / "y.md").read_text() == (run.parent / "x.md").read_text()


def test_in_python(run, tmp_path):
    assert gsem.report(run, tmp_path / "deep/page.md") == [tmp_path / "deep/page.md"]
    assert "45.0%" in (tmp_path / "deep/page.md").read_text()
    assert importlib.import_module("gsem.reporting").html is not None  # the package is there under the function's name


def test_an_audit_of_an_earlier_version_is_named_and_not_shown(run):
    """Its verdict had other rules."""
    found = json.loads((run / "audit.json").read_text())
    found["checks"][0]["invalidates"] = True
    (run / "audit.json").write_text(json.dumps(found))
    entry = read_runs([run])[0]
    assert entry.audit is None
    assert [line for line in entry.unmatched if "earlier version of gsem" in line and "audit again" in line]


def test_an_audit_of_any_name_is_found(run, tmp_path):
    """As `gsem audit --out RUN/strict` saves it; the latest counts, whatever its name."""
    first = read_runs([run])[0].audit
    assert first is not None
    later = planted_audit(verdict="SUSPECT", reason="strict")
    saved = later.save(run / "strict")
    os.utime(saved, (2e9, 2e9))
    assert read_runs([run])[0].audit == later
    os.utime(saved, (1e9, 1e9))
    assert read_runs([run])[0].audit == first
    (run / "audit.json").unlink()
    (run / "notes.json").write_text("[1, 2")
    assert read_runs([run])[0].audit == later
