"""gsem audit on a run and on a factory: its table, its file, and what repeats a check."""

import json
import shlex
from dataclasses import replace

import pytest

import gsem
from gsem.audit import Audit
from gsem.cli import main, read
from gsem.cli_audit import repeated_by

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
    words = ["audit", "run", "--quick", "--only", "randomness,gradient", "--images", "100", "--gradient", "semi-masked"]
    words += ["--attacks", "pgd:steps=2:eot=2", "--draws", "5"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "a fixed, class-balanced subset of 100 of 500 test images, eps = 0.05 (Linf)" in " ".join(out.split())
    audit = Audit.load(here / "run" / "audit.json")
    assert [c.name for c in audit.checks] == ["randomness", "gradient"] and audit.verdict in out
    assert audit["gradient"].outcome == "flag" and audit["gradient"].details["layer"] == "gsem_module"
    # The command that is shown repeats a check, to the same figure.
    again = f"{audit.facts['command']} --only gradient --out again.json"
    assert f"Again: {audit.facts['command']} --only gradient" in out
    assert run(capsys, *shlex.split(again)[1:])[0] == 0
    assert Audit.load("again.json")["gradient"] == audit["gradient"]
    assert run(capsys, *words, "--gradient", "corrected")[0] == 0
    assert Audit.load(here / "run" / "audit-2.json")["gradient"].outcome == "pass"


def test_a_stranger_is_audited_and_the_table_fits(capsys, here):
    code, out, err = run(
        capsys, "audit", "--model", "roundnet:net", "--data", "digits", "--eps", "0.3", "--quick", "--attacks",
        "pgd:steps=3", "--only", "randomness,gradient,unavailable,unstable", "--out", "found/audit.json",
    )  # fmt: skip
    assert code == 0, err
    table = out.split("check ")[1]
    assert max(len(line) for line in table.splitlines() if "gsem audit" not in line) <= 80
    for word in ("flagged when", "INVALID", "the forward of Net itself", "What to do:", "4/4 unstable"):
        assert word in " ".join(out.split())
    found = json.loads((here / "found" / "audit.json").read_text())
    assert found["verdict"] == "INVALID" and found["facts"]["data"] == "digits"


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
    again = repeated_by(options)
    assert again == f"gsem audit {repeated}"
    assert read("audit", shlex.split(again)[2:]) == replace(options, only=None, out=None)


@pytest.mark.parametrize(
    ("words", "draws"), [([], 20), (["--draws", "100"], 100), (["--draws", "7"], 7)], ids=["default", "100", "7"]
)
def test_draws_that_are_given_are_used_in_the_quick_form_too(capsys, here, words, draws):
    (here / "noisy.py").write_text(FACTORY.replace("(x * 4).round() / 4", "x + 0.01 * torch.randn_like(x)"))
    told = ["noisy:net", "--data", "digits", "--images", "10", "--attacks", "pgd:steps=1:eot=1", "--only", "randomness"]
    code, out, err = run(capsys, "audit", *told, "--quick", *words)
    assert code == 0, err
    assert f"10 images, {draws} scoring draws" in out
    facts = Audit.load("audit.json").facts
    assert facts["draws"] == draws
    assert ("--draws" in facts["command"]) == bool(words)


def test_what_is_refused(capsys, here):
    for words, message in (
        (["roundnet:net", "--data", "digits", "--images", "0"], "--images must be at least 1, not 0"),
        (["roundnet:net"], "does not tell its data: give --data"),
        (["roundnet:net", "--data", "digits", "--only", "gradent"], "check 'gradent' is unknown"),
        (["roundnet:net", "--data", "digits", "--suite", "quick", "--attacks", "pgd"], "not both"),
    ):
        code, _, err = run(capsys, "audit", *words)
        assert code == 2 and message in err and err.count("\n") == 1
