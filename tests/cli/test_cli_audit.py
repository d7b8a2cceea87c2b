"""gsem audit on a run and on a factory: its table, its file, and what repeats a check."""

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

import gsem
from gsem.auditing import Audit, Check
from gsem.auditing.audit import CHECKS, Progress
from gsem.cli.audit import AuditBar
from gsem.cli.main import main, read
from gsem.cli.options import changed, command_line

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        x = (x * 4).round() / 4
        left, right = x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))
        return torch.stack([left, right, *[0 * left - 1] * 8], 1)

def net():
    return Net()
"""


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roundnet.py").write_text(FACTORY)
    monkeypatch.delitem(__import__("sys").modules, "roundnet", raising=False)
    return tmp_path


def test_a_run_is_audited_by_its_own_data_into_its_directory(capsys, here):
    recipe = replace(gsem.RECIPES["gcat"], epochs=1, warmup=0, steps=1, eps=0.05)
    gsem.train(recipe, out=here / "run")
    words = ["audit", "run", "--quick", "--only", "randomness,gradient", "--images", "20", "--gradient", "semi-masked"]
    words += ["--attacks", "pgd:steps=1:eot=2", "--draws", "2"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    audit = Audit.load(here / "run" / "audit.json")
    assert audit.metadata["subset"] == {"kind": "balanced", "images": 20} and audit.metadata["eps"] == 0.05
    assert [c.name for c in audit.checks] == ["randomness", "gradient"] and audit.verdict in out
    assert audit["gradient"].outcome == "flag" and audit["gradient"].details["layer"] == "gsem_module"
    # The command that is shown repeats a check, to the same figure.
    again = f"{audit.metadata['command']} --only gradient --out again.json"
    assert f"Re-run: {audit.metadata['command']} --only gradient" in out
    assert run(capsys, *shlex.split(again)[1:])[0] == 0
    assert Audit.load("again.json")["gradient"] == audit["gradient"]
    assert run(capsys, *words, "--gradient", "corrected")[0] == 0
    assert Audit.load(here / "run" / "audit-2.json")["gradient"].outcome == "inconclusive"  # (too few images to pass)


def test_a_factory_is_audited_and_the_table_fits(capsys, here):
    code, out, err = run(
        capsys, "audit", "--model", "roundnet:net", "--data", "digits", "--eps", "0.3", "--quick", "--attacks",
        "pgd:steps=3", "--only", "randomness,gradient,unavailable,unstable", "--out", "found/audit.json",
    )  # fmt: skip
    assert code == 0, err
    table = out.split("check ")[1]
    assert max(len(line) for line in table.splitlines() if "gsem " not in line) <= 80
    for word in ("flagged when", "OVERSTATED", "the forward of Net itself", "What to do:", "4/4 unstable"):
        assert word in " ".join(out.split())
    found = json.loads((here / "found" / "audit.json").read_text())
    assert found["verdict"] == "OVERSTATED" and found["metadata"]["data"] == "digits"
    # The command that reaches the accuracy found.
    command = found_by = Audit.load(here / "found" / "audit.json").found_command
    assert found_by in out
    assert run(capsys, *shlex.split(command)[1:], "--out", "again")[0] == 0
    again = gsem.EvaluationResult.load("again.npz")
    assert again.expected("worst").mean == pytest.approx(found["metadata"]["found"]["accuracy"], abs=0.05)


@pytest.mark.parametrize(
    ("words", "repeated"),
    [
        ("run --quick --only gradient --out a.json", "run --quick"),
        ("--model m:net --only=noise --data d --eps 8/255", "m:net --data d --eps 8/255"),
        ("run --source a b --eps 0.3 --seed 3", "run --source a b --eps 0.3 --seed 3"),
        ("'my run' --normalize=-0.5/1 --num-classes 7", "'my run' --normalize=-0.5/1 --num-classes 7"),
    ],
)
def test_the_command_that_repeats_an_audit_has_its_options(words, repeated):
    options = read("audit", shlex.split(words))
    again = command_line("audit", options.model, **changed(options, "model", "only", "out"))
    assert again == f"gsem audit {repeated}"
    assert read("audit", shlex.split(again)[2:]) == replace(options, only=None, out=None)


@pytest.mark.parametrize(
    ("words", "draws"), [([], 20), (["--draws", "100"], 100), (["--draws", "7"], 7)], ids=["default", "100", "7"]
)
def test_draws_that_are_given_are_used_in_the_quick_form_too(capsys, here, words, draws):
    (here / "noisy.py").write_text(FACTORY.replace("(x * 4).round() / 4", "x + 0.01 * torch.randn_like(x)"))
    noisy = [
        "noisy:net",
        "--data",
        "digits",
        "--images",
        "10",
        "--attacks",
        "pgd:steps=1:eot=1",
        "--only",
        "randomness",
    ]
    code, _, err = run(capsys, "audit", *noisy, "--quick", *words)
    assert code == 0, err
    metadata = Audit.load("audit.json").metadata
    assert metadata["draws"] == draws
    assert ("--draws" in metadata["command"]) == bool(words)


SHORT = ["roundnet:net", "--data", "digits", "--images", "10", "--eps", "0.3", "--attacks", "pgd:steps=2"]


def stopped_at(name: str):
    """Within the block, Ctrl-C is pressed when this check begins."""
    return mock.patch.dict(CHECKS, {name: mock.Mock(side_effect=KeyboardInterrupt)})


def test_an_interrupted_audit_resumes(capsys, here):
    words = ["audit", *SHORT, "--quick", "--only", "randomness,gradient,unavailable", "--out", "strict.txt"]
    assert run(capsys, *words)[0] == 0
    whole = Audit.load("strict.txt.json")
    (here / "strict.txt.json").unlink()
    with stopped_at("unavailable"):
        code, out, err = run(capsys, *words)
    assert code == 130 and err.count("\n") == 1
    assert "2/3 gradient" in out and not (here / "strict.txt.json").exists()
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert re.search(r"2/3 gradient +\w+, finished before", out) and not re.search("3/3 .*before", out)
    assert "saved in strict.txt.json" in out
    found = Audit.load("strict.txt.json")
    assert found.checks == whole.checks
    assert found.metadata | {"seconds": 0} == whole.metadata | {"seconds": 0}
    assert not list(here.glob("*.unfinished"))


def test_another_audit_does_not_disturb_the_unfinished_one(capsys, here):
    words = ["audit", *SHORT, "--quick", "--only"]
    with stopped_at("unavailable"):
        assert run(capsys, *words, "randomness,unavailable")[0] == 130
    assert run(capsys, *words, "randomness")[0] == 0
    assert Path("audit-2.json").exists() and not Path("audit.json").exists()
    assert "randomness    pass, finished before" in run(capsys, *words, "randomness,unavailable")[1]
    assert [c.name for c in Audit.load("audit.json").checks] == ["randomness", "unavailable"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("terminal", [False, True])
def test_it_prints_a_line_now_and_then_with_the_time_left(terminal: bool):
    clock, file = Clock(), io.StringIO()
    bar = AuditBar(Console(file=file, width=80, force_terminal=terminal), clock)

    def at(seconds: float, *values, **more) -> list[str]:
        clock.now = seconds
        bar(Progress(*values, **more))
        return file.getvalue().splitlines()

    assert at(1, "gradient", 2, 12, "begins") == []
    line = " 2/12 gradient      central differences"
    assert at(31, "gradient", 2, 12, "central differences") == ([] if terminal else [line])
    check = Check("gradient", "", 1.0, "", "pass", "", "", "")
    ended = at(32, "gradient", 2, 12, "", ended=check, seconds_left=90.0)
    assert ended[-1] == " 2/12 gradient      pass         1:30 min left"
    assert len(at(40, "sweeps", 3, 12, "twice the steps", seconds_left=80.0)) == len(ended)
    later = at(63, "sweeps", 3, 12, "twice the steps", seconds_left=59.0)
    assert later[len(ended) :] == ([] if terminal else [" 3/12 sweeps        twice the steps, 59 s left"])


def test_what_is_refused(capsys, here):
    for words, message in (
        (["roundnet:net", "--data", "digits", "--images", "0"], "--images must be at least 1, not 0"),
        (["roundnet:net"], "does not name its data: give --data"),
        (["roundnet:net", "--data", "digits", "--only", "gradent"], "check 'gradent' is unknown"),
        (["roundnet:net", "--data", "digits", "--suite", "quick", "--attacks", "pgd"], "not both"),
    ):
        code, _, err = run(capsys, "audit", *words)
        assert code == 2 and message in err and err.count("\n") == 1
