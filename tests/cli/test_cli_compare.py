"""gsem compare on networks and saved evaluations."""

import json

import numpy as np
import pytest

import gsem
from gsem.cli.main import main

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift
    def forward(self, x):
        left, right = x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))
        return torch.stack([left + self.shift, right, 0 * left - 1], 1)

def fair():
    return Net(0.0)

def partial():
    return Net(0.1)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """24 images of two classes, and two networks, of which one favours class 0."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "comparednet.py").write_text(FACTORY)
    monkeypatch.delitem(__import__("sys").modules, "comparednet", raising=False)
    y = np.repeat([0, 1], 12)
    x = np.full((24, 8, 8, 1), 100, dtype=np.uint8)
    x[:12, :, :4] += np.arange(8, 104, 8, dtype=np.uint8)[:, None, None, None]
    x[12:, :, 4:] += np.arange(8, 104, 8, dtype=np.uint8)[:, None, None, None]
    for name, rows in (("images", slice(None)), ("others", slice(0, 20))):
        np.savez(tmp_path / f"{name}.npz", x_test=x[rows], y_test=y[rows], x_train=x, y_train=y)
    return tmp_path


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(["compare", *map(str, words)])
    return code, *capsys.readouterr()


WHAT = ("--data", "images.npz", "--eps", "0.05", "--attacks", "clean,pgd:steps=3")
NETS = ("comparednet:fair", "comparednet:partial")


def test_two_networks_are_evaluated_once_and_compared(here, capsys):
    code, _, err = run(capsys, *NETS, *WHAT)
    assert code == 0, err
    found = json.loads((here / "comparison.json").read_text())
    results = [gsem.EvaluationResult.load(here / name) for name in ("evaluation", "evaluation-2")]
    assert found == json.loads(json.dumps(gsem.compare(*results, NETS).to_dict()))
    # The second network takes dark images of class 1 for class 0, and only those.
    clean = found["attacks"][0]
    assert clean["difference"]["mean"] > 0 and not clean["lost_by_one_only"]
    assert clean["lost_by_two_only"] == [12, 13, 14] == [12 + k for k in range(12) if 8 * (k + 1) / 255 < 0.1]
    before = [(here / f"{name}.npz").stat().st_mtime_ns for name in ("evaluation", "evaluation-2")]
    assert run(capsys, *NETS, *WHAT, "--out", "again.json")[0] == 0
    assert [(here / f"{name}.npz").stat().st_mtime_ns for name in ("evaluation", "evaluation-2")] == before
    assert json.loads((here / "again.json").read_text()) == found
    # A saved evaluation has its eps, which is then that of the other network, too.
    assert run(capsys, "evaluation.npz", NETS[1], "--data", "images.npz", *WHAT[4:], "--out", "third.json")[0] == 0
    assert json.loads((here / "third.json").read_text())["attacks"] == found["attacks"]
    assert not (here / "evaluation-3.npz").exists()


def test_what_cannot_be_compared_is_refused_before_anything_is_evaluated(here, capsys):
    assert run(capsys, *NETS, *WHAT)[0] == 0
    code, _, err = run(capsys, "evaluation.npz", NETS[1], "--data", "images.npz", "--eps", "0.1")
    assert code == 2 and "differ in: eps (0.05 of evaluation.npz, 0.1 of comparednet:partial)" in err
    code, _, err = run(capsys, "evaluation.npz", NETS[1], "--data", "others.npz")
    assert code == 2 and "the images" in err
    code, _, err = run(capsys, *NETS, *WHAT, "--out", "table.md")
    assert code == 2 and "must end in .json" in err
    assert not (here / "evaluation-3.npz").exists() and not list(here.glob("*.unfinished"))
