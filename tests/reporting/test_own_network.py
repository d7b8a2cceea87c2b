"""Pictures of networks that gsem did not train: with the network, or of what its evaluation saved."""

from pathlib import Path

import numpy as np
import pytest
import torch

import gsem
from gsem.cli.main import main
from gsem.reporting.report import report
from planted_run import planted_run

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, sharpness):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
    def forward(self, x):
        left, right = x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))
        return self.sharpness * torch.stack([left, right], 1)

def one():
    return Net(1.0).eval()

def other():
    return Net(2.0).eval()
"""
GALLERY, CONFUSION, SURFACE = "<img", "Most frequent errors", "Around row"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownnets.py").write_text(FACTORY)
    monkeypatch.delitem(__import__("sys").modules, "ownnets", raising=False)
    y = np.arange(24) % 2
    x = np.random.default_rng(0).integers(100, 110, (24, 8, 8, 1))
    x[y == 0, :, :4] += 20
    x[y == 1, :, 4:] += 20
    np.savez(tmp_path / "images.npz", x_test=x.astype(np.uint8), y_test=y, classes=np.array(["left", "right"]))
    return tmp_path


def run(*words) -> None:
    assert main([str(word) for word in words]) == 0


def evaluated(*words) -> None:
    words = ("--data", "images.npz", "--eps", "0.2", "--images", "8", *words)
    run("evaluate", "ownnets:one", "--attacks", "pgd:steps=2", *words)


def page(*words) -> str:
    run("report", "evaluation.npz", "-o", "page.html", *words)
    return Path("page.html").read_text()


def test_with_the_network_there_are_all_pictures(here):
    evaluated("--save-adv")
    found = page("--model", "ownnets:one")
    assert all(part in found for part in (GALLERY, CONFUSION, SURFACE))
    assert "worst point of the evaluation" in found and "taken for" in found
    (here / "images.npz").unlink()  # the saved images are enough
    assert all(part in page("--model", "ownnets:one") for part in (GALLERY, CONFUSION, SURFACE))


def test_without_saved_images_the_evaluated_ones_are_attacked_anew(here):
    evaluated("--subset", "first")
    found = page("--model", "ownnets:one")
    assert "points found for this report" in found and "Around row 0: left" in found
    assert "Row 7: <b>right</b>" in found and "Row 8" not in found
    (here / "images.npz").rename(here / "moved.npz")
    assert "The test images were not found" in page("--model", "ownnets:one")
    assert "Row 7: <b>right</b>" in page("--model", "ownnets:one", "--data", "moved.npz")


def test_without_the_network_the_gallery_shows_what_was_saved_and_what_is_missing(here):
    evaluated("--save-adv", "--subset", "first")
    found = page()
    assert GALLERY in found and CONFUSION not in found and SURFACE not in found
    assert "clean: right" in found and "attacked: wrong" in found
    assert "gsem report evaluation.npz --model ownnets:one shows it" in found
    assert "Row 0: <b>left</b>" in page("--data", "images.npz")
    (here / "evaluation.npz").unlink()
    evaluated("--again")
    assert GALLERY not in page() and "--save-adv" in page()


def test_another_network_than_the_evaluated_one_is_refused(here, capsys):
    evaluated("--save-adv")
    assert main(["report", "evaluation.npz", "--model", "ownnets:other"]) == 2
    err = capsys.readouterr().err
    assert "is not an evaluation of the given network" in err and "other weights" in err
    assert not Path("report.html").exists()
    assert main(["report", "evaluation.npz", "--model", "ownnets:one", "--normalize", "0.5/0.5"]) == 2
    assert "another setting" in capsys.readouterr().err


def test_a_run_holds_its_own_model(tmp_path):
    run = planted_run(tmp_path / "run")
    with pytest.raises(ValueError, match="run directories hold their own model"):
        report(run, tmp_path / "page.html", model=torch.nn.Identity())


def test_in_python_the_network_and_its_data_are_passed(here):
    evaluated()
    import ownnets  # type: ignore[import-not-found]

    source = gsem.data.load("images.npz")
    gsem.report("evaluation.npz", "page.html", model=ownnets.one(), data=source)
    assert SURFACE in Path("page.html").read_text()
