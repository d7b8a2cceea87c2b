"""Every example runs to its end, with fewer epochs than by default, and prints what it promises."""

import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gsem
from gsem.cli.main import main, read

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a program as `python FILE WORDS` does, in an empty folder, and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def program(file: Path, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(file), *words])
        runpy.run_path(str(file), run_name="__main__")
        out = capsys.readouterr().out
        assert all(len(line) <= 80 for line in out.splitlines())
        return out

    return program


def accuracies(out: str, names: str = r"[a-z0-9-]+(?:@[a-z]+)?") -> dict[str, float]:
    """Of the lines `NAME 76.5% …` or `NAME 76.5 …`, by name."""
    return {name: float(number) for name, number in re.findall(rf"^({names}) +(\d+\.\d)% ", out, re.M)}


def test_every_example_is_tested():
    here = Path(__file__).read_text()
    assert [file.name for file in EXAMPLES.glob("*.py") if f'"{file.name}"' not in here] == []


def test_insert(run):
    out = run(EXAMPLES / "01_insert.py")
    assert "two calls agree: False\n" in out
    assert "two calls agree, noise frozen: True\n" in out
    masked, corrected = re.search(r"norm: (\d\.\d+) semi-masked, (\d\.\d+) corrected", out).groups()
    assert masked != corrected


def test_train_and_evaluate(run):
    out = run(EXAMPLES / "02_train_and_evaluate.py", "2")
    assert "epoch 2/2" in out and "2 of 2 epochs; best: epoch" in out
    before, masked, corrected = (accuracies(part) for part in out.split("attacked along"))
    assert before == {}
    assert set(masked) == set(corrected) == {"clean", "pgd20-eot5", "worst"}
    assert masked["clean"] == corrected["clean"] > 40  # the setting of the gradient does not touch the output
    assert max(masked["worst"], corrected["worst"]) < masked["clean"] - 10


def test_dataset_object(run):
    out = run(EXAMPLES / "04_dataset_object.py", "2")
    assert "2 of 2 epochs; best: epoch" in out
    found = accuracies(out)
    assert tuple(found) == ("clean", "pgd10-eot5", "worst", "worst@frozen", "worst@off")
    assert found["worst"] < found["clean"] and found["clean"] > 30
    description = json.loads(Path("runs/scans/recipe.json").read_text())
    assert description["data"]["classes"][:2] == ["zero", "one"] and description["model"]["in_channels"] == 1
    # As a notebook takes it: every cell begins with a comment, and there is no main function.
    text = (EXAMPLES / "04_dataset_object.py").read_text()
    assert len(re.findall(r"^# %% \w", text, re.M)) == 4 and "__main__" not in text


def test_evaluate_any_network(run):
    out = run(EXAMPLES / "05_evaluate_any_network.py")
    found = accuracies(out)
    assert tuple(found) == ("clean", "apgd20-eot1", "apgd20-t3-eot1", "square300-eot1", "worst")
    assert found["clean"] > 95 and found["worst"] <= min(found.values())
    assert float(re.search(r"largest change of a pixel by APGD: (\S+)", out)[1]) <= 0.1
    assert len(re.findall(r"^\S+: holds$", out, re.M)) == 4


@pytest.mark.filterwarnings("ignore:the gradient of the logits is zero")
def test_audit_a_defence():
    """A shorter training, and the attack that the audit repairs. The slow tests run the whole script."""
    program = runpy.run_path(str(EXAMPLES / "06_audit_a_defence.py"))
    model = program["defended"](steps=80)
    test = gsem.data.load("digits").test()
    x, y = gsem.data.to_float(test.x[:40]), test.y[:40]
    pixels = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels).sum(), pixels)
    assert gradient.abs().max() == 0
    claimed = gsem.evaluate(model, x, y, ["clean", "apgd:steps=10"], eps=program["EPS"])
    found = gsem.evaluate(model, x, y, ["clean", "apgd:steps=10:through=jpeg"], eps=program["EPS"])
    assert claimed.expected("worst").mean > found.expected("worst").mean + 0.3


def test_add_an_attack(run):
    program = runpy.run_path(str(EXAMPLES / "08_add_an_attack.py"))
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    x_adv = program["momentum"](net, x, y, eps=0.1, eot=1)
    # Of a linear network the gradient's sign changes little: every step goes the same way, to the edge of the ball.
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (gsem.losses.cross_entropy(net(x_adv), y) > gsem.losses.cross_entropy(net(x), y)).all()
    with pytest.raises(ValueError, match="farther than eps"):
        gsem.evaluate(net.eval(), x, y, [program["too_far"]], eps=0.1)


@pytest.mark.slow
def test_add_an_attack_whole(run):
    out = run(EXAMPLES / "08_add_an_attack.py")
    assert tuple(accuracies(out)) == ("clean", "momentum", "pgd20-eot20", "worst")


def test_several_processes_in_one(run):
    """The same script in one process; the tutorial starts two."""
    out = run(EXAMPLES / "07_several_processes.py", "1")
    assert "1 process\n" in out and tuple(accuracies(out)) == ("clean", "pgd10-eot5", "worst")


def test_your_own_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    file = Path(shutil.copy(EXAMPLES / "03_your_own_network.py", tmp_path))
    program = importlib.import_module(file.stem)
    monkeypatch.setattr(program, "IMAGES", 20)
    monkeypatch.setattr(program, "CHECKS", ["randomness"])
    monkeypatch.setattr(sys, "argv", [file.name, "1"])
    program.main()
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert tuple(accuracies(out)) == ("clean", "pgd20-eot5", "worst", "worst@frozen", "worst@off")
    assert "randomness" in out and Path("runs/own/report.html").is_file()
    # The command line finds the same network again, and the commands of the docstring are commands.
    assert (
        main(["evaluate", "runs/own", "--attacks", "clean", "--images", "20", "--draws", "2", "--device", "cpu"]) == 0
    )
    assert "clean" in accuracies(capsys.readouterr().out)
    commands = re.findall(r"^    gsem (train|evaluate|audit|report) ", program.__doc__, re.M)
    assert commands == ["train", "evaluate", "audit", "report"]
    options = read("train", shlex.split(re.search(r"gsem train (.*)", program.__doc__)[1]))
    assert options.recipe.insert_after == ("embed",)
