"""gsem evaluate and gsem verify on files, factories and suites, and the fixed subset of images."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch

import gsem
from gsem.cli.main import main
from gsem.data import balanced

FACTORY = '''
import torch
from torch import nn

class Net(nn.Module):
    """Class 0 where the left half is brighter; takes pixels minus 0.5, else warns."""
    def __init__(self, shift=0.0, noise=0.0):
        super().__init__()
        self.shift, self.noise = shift, noise
    def forward(self, x):
        x = x + self.shift
        left, right = x[..., :4].clamp_min(0).mean((1, 2, 3)), x[..., 4:].clamp_min(0).mean((1, 2, 3))
        logits = torch.stack([left, right, 0 * left - 1], 1)
        return logits + self.noise * torch.randn_like(logits)

def net():
    return Net()

def normal():
    return Net(shift=0.5)

def noisy():
    return Net(noise=0.02)

def random():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

class Bright(Net):
    """NaN for the brighter images."""
    def forward(self, x):
        return super().forward(x) / (x.amax((1, 2, 3)) < 0.6)[:, None] * 1.0

def bright():
    return Bright()
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a factory and 24 images of two classes, stored class by class."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "halfnet.py").write_text(FACTORY)
    monkeypatch.delitem(__import__("sys").modules, "halfnet", raising=False)
    y = np.repeat([0, 1], 12)
    x = np.full((24, 8, 8, 1), 100, dtype=np.uint8)
    x[:12, :, :4] += np.arange(8, 104, 8, dtype=np.uint8)[:, None, None, None]
    x[12:, :, 4:] += np.arange(8, 104, 8, dtype=np.uint8)[:, None, None, None]
    np.savez(tmp_path / "images.npz", x_test=x, y_test=y, x_train=x, y_train=y)
    return tmp_path


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def evaluated(capsys, *words) -> str:
    code, out, err = run(capsys, "evaluate", *words, "--data", "images.npz", "--eps", "0.05")
    assert code == 0, err
    return out


def refused(capsys, *words) -> str:
    code, _, err = run(capsys, *words)
    assert code == 2 and err.count("\n") == 1 and err.startswith("gsem: ")
    return err


@pytest.mark.filterwarnings("ignore:the targeted DLR loss needs 4 classes")
def test_a_suite_on_a_factory_named_by_an_option(capsys, here):
    out = evaluated(capsys, "--model", "halfnet:net", "--suite", "quick", "--draws", "5")
    assert "24 test images" in out and "vote needs" not in out and re.search(r"^worst +\d", out, re.M)
    for label in ("clean", "apgd20-eot1", "apgd20-t3-eot1", "square300-eot1"):
        assert label in out
    assert max(len(line) for line in out.splitlines()[2:]) <= 80
    metadata = json.loads((here / "evaluation.json").read_text())["metadata"]
    assert metadata["about"]["model"] == "halfnet:net"


def test_normalised_input_keeps_eps_in_pixels(capsys, here):
    """The network adds 0.5 again: with its normalisation it is the other one, point for point."""
    evaluated(capsys, "halfnet:net", "--attacks", "pgd:steps=4", "--out", "plain")
    evaluated(capsys, "halfnet:normal", "--attacks", "pgd:steps=4", "--normalize", "0.5/1", "--out", "normal")
    plain, normal = (gsem.EvaluationResult.load(name)["pgd4-eot1"] for name in ("plain", "normal"))
    assert (plain.correct == normal.correct).all() and 0 < plain.correct.sum() < 24
    assert "none of cifar10" in refused(capsys, "evaluate", "halfnet:net", "--data", "images.npz", "--normalize", "x")


def test_a_normalisation_for_other_channels_than_the_images_have_is_refused(capsys, here):
    for command in ("evaluate", "audit"):
        err = refused(capsys, command, "halfnet:net", "--data", "images.npz", "--normalize", "cifar10")
        assert "--normalize cifar10 is for 3 channels, but the images have 1" in err


def test_one_model_is_given_as_a_word_or_as_an_option(capsys):
    for words in ([], ["halfnet:net", "--model", "halfnet:normal"]):
        assert "give one MODEL" in refused(capsys, "evaluate", *words)


def test_the_subset_is_balanced_or_the_first_and_is_recorded(capsys, here):
    out = evaluated(capsys, "halfnet:net", "--attacks", "clean", "--images", "6")
    result = gsem.EvaluationResult.load("evaluation")
    assert "balanced" in out and result.metadata["about"]["subset"] == {"kind": "balanced", "images": 6}
    assert np.bincount(result.y).tolist() == [3, 3]
    out = evaluated(capsys, "halfnet:net", "--attacks", "clean", "--images", "6", "--subset", "first")
    result = gsem.EvaluationResult.load("evaluation-2")
    assert "first 6 of 24" in out and result.metadata["about"]["subset"] == {"kind": "first", "images": 6}
    assert result.y.tolist() == [0] * 6
    assert "--images must be at least 1" in refused(
        capsys, "evaluate", "halfnet:net", "--data", "images.npz", "--images", "0"
    )


def test_balanced_takes_as_many_of_each_class_and_the_same_ones_every_time():
    y = torch.cat([torch.zeros(50), torch.ones(20), torch.full((5,), 2)]).long()
    for count, each in ((3, [1, 1, 1]), (15, [5, 5, 5]), (25, [10, 10, 5]), (40, [18, 17, 5])):
        rows = balanced(y, count)
        assert sorted(torch.bincount(y[rows]).tolist()) == sorted(each)
        assert torch.equal(rows, rows.unique()) and torch.equal(rows, balanced(y, count))
    assert balanced(y, 3)[0] != 0  # not the first of its class
    assert set(balanced(y, 10).tolist()) <= set(balanced(y, 20).tolist())


@pytest.mark.filterwarnings("ignore:fold runs")
def test_few_draws_say_why_there_is_no_vote(capsys, here):
    out = evaluated(capsys, "halfnet:noisy", "--attacks", "clean", "--draws", "5")
    assert "vote needs" in out and gsem.EvaluationResult.load("evaluation").vote("clean") is None
    assert "vote needs" not in evaluated(capsys, "halfnet:noisy", "--attacks", "clean", "--draws", "11")


@pytest.mark.filterwarnings("ignore:fold runs")
def test_other_models_become_sources_of_transfer(capsys, here):
    out = evaluated(capsys, "halfnet:noisy", "--attacks", "clean,fgsm", "--source", "halfnet:net", "--draws", "20")
    assert "transfer100-eot20" in out and "10 queries" in out
    assert "needs at least one source" in refused(
        capsys, "evaluate", "halfnet:net", "--data", "images.npz", "--attacks", "transfer", "--out", "t"
    )


def test_saved_points_are_verified_and_a_changed_one_is_found(capsys, here):
    evaluated(capsys, "halfnet:net", "--attacks", "pgd:steps=4", "--images", "10", "--save-adv")
    code, out, _ = run(capsys, "verify", "evaluation.npz", "--model", "halfnet:net")
    assert code == 0 and "10 images: bounds, labels, distances and accuracies hold" in out
    result = gsem.EvaluationResult.load("evaluation")
    result.scores[1].x_adv[2] += 0.2
    result.save("changed")
    code, out, err = run(capsys, "verify", "changed.npz", "--model", "halfnet:net")
    assert code == 2 and re.search(r"image 2 \(row \d+ of the data set\) lies", out) and "could not be confirmed" in err
    assert "holds no adversarial examples" in _without_images(capsys)


def test_points_are_not_verified_by_another_model(capsys, here):
    evaluated(capsys, "halfnet:random", "--attacks", "clean", "--save-adv")
    err = refused(capsys, "verify", "evaluation.npz", "--model", "halfnet:random")
    assert "this is not the evaluated model. By its fingerprint, different are: the model's weights" in err


def _without_images(capsys) -> str:
    evaluated(capsys, "halfnet:net", "--attacks", "clean", "--out", "bare")
    return refused(capsys, "verify", "bare.npz", "--model", "halfnet:net")


def test_a_finished_evaluation_is_shown_again_and_computed_anew_only_when_asked(capsys, here, monkeypatch):
    first = evaluated(capsys, "halfnet:net", "--attacks", "pgd:steps=4")
    table = first[first.index("attack ") : first.index("saved in")]
    before = (here / "evaluation.npz").stat().st_mtime_ns
    evaluated(capsys, "halfnet:net", "--attacks", "clean")  # something else, to evaluation-2

    def searched(*args, **more):
        raise AssertionError("it is computed again")

    with monkeypatch.context() as m:
        m.setattr("gsem.attacks.suite.AttackSpec.run", searched)
        for out in ((), ("--out", "evaluation")):
            again = evaluated(capsys, "halfnet:net", "--attacks", "pgd:steps=4", *out)
            assert table in again and "already finished" in again and "saved in" not in again
        with pytest.raises(AssertionError):
            main(["--debug", "evaluate", "halfnet:net", "--attacks", "pgd:steps=4", "--data", "images.npz",
                  "--eps", "0.05", "--again"])  # fmt: skip
        err = refused(capsys, "evaluate", "halfnet:net", "--data", "images.npz", "--eps", "0.05", "--attacks",
                      "pgd:steps=4", "--save-adv")  # fmt: skip
        assert "evaluation.npz" in err and "--again" in err
    assert (here / "evaluation.npz").stat().st_mtime_ns == before
    anew = evaluated(capsys, "halfnet:net", "--attacks", "pgd:steps=4", "--again", "--save-adv")
    assert "already finished" not in anew
    assert (here / "evaluation.npz").stat().st_mtime_ns > before
    assert {p.name for p in here.glob("*.npz")} == {"evaluation.npz", "evaluation-2.npz", "images.npz"}


def test_a_finished_evaluation_of_something_else_is_not_overwritten(capsys, here):
    evaluated(capsys, "halfnet:net", "--attacks", "clean", "--out", "mine")
    before = (here / "mine.npz").read_bytes()
    for words in (("halfnet:normal",), ("halfnet:net", "--seed", "1", "--again"), ("halfnet:net", "--images", "6")):
        rest = ("--attacks", "clean", "--data", "images.npz", "--eps", "0.05", "--out", "mine")
        err = refused(capsys, "evaluate", *words, *rest)
        assert "mine.npz" in err and "--out" in err
    assert "the images; the labels" in err
    assert (here / "mine.npz").read_bytes() == before


def test_without_a_terminal_every_finished_attack_prints_a_line(capsys, here):
    out = evaluated(capsys, "halfnet:net", "--attacks", "clean,pgd:steps=4")
    assert re.findall(r"^(\S+) +24/24 images, \d+\.\d%, ", out, re.M) == ["clean", "pgd4-eot1"]


def test_the_rows_of_the_images_are_kept_and_named(capsys, here):
    evaluated(capsys, "halfnet:net", "--attacks", "clean", "--images", "6", "--save-adv", "--out", "few")
    evaluated(capsys, "halfnet:net", "--attacks", "clean", "--out", "all")
    few, whole = gsem.EvaluationResult.load("few"), gsem.EvaluationResult.load("all")
    with np.load("images.npz") as file:
        assert (few.y == file["y_test"][few.rows]).all() and len(set(few.rows.tolist())) == 6
    assert whole.rows.tolist() == list(range(24))
    assert (few["clean"].correct == whole["clean"].correct[few.rows]).all()  # what subsets are joined by
    assert run(capsys, "verify", "few.npz", "--model", "halfnet:net")[0] == 0
    few.scores[0].x_adv[4] += 0.2
    few.save("changed")
    _, out, _ = run(capsys, "verify", "changed.npz", "--model", "halfnet:net")
    assert f"image 4 (row {few.rows[4]} of the data set) lies" in out
    err = refused(capsys, "evaluate", "halfnet:bright", "--data", "images.npz", "--images", "6", "--eps", "0.05")
    image, row = re.search(r"image (\d) \(row (\d+) of the data set\)", err).groups()
    assert few.rows[int(image)] == int(row)


def test_an_unfinished_evaluation_of_another_question_is_not_touched(capsys, here):
    (here / "evaluation.unfinished").mkdir()
    (here / "evaluation.unfinished" / "question.json").write_text('{"eps": 0.3}')
    (here / "evaluation.unfinished" / "0123-0.npz").touch()  # something in it is finished
    err = refused(capsys, "evaluate", "halfnet:net", "--data", "images.npz", "--attacks", "clean")
    assert "eps (0.3 then, 8/255 now)" in err and "choose another --out" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--suite", "hard"), "suite 'hard' is unknown: it is one of quick, standard, paper, paper-code"),
        (("--suite", "quick", "--attacks", "clean"), "give --suite or --attacks, not both"),
        (("--attacks", "cw:form=l2"), "cw:form=l2 bounds the L2 norm"),
        (("--attacks", "apgd:loss=hinge"), "loss 'hinge' is unknown"),
    ],
)
def test_what_it_refuses(capsys, here, words, message):
    assert message in refused(capsys, "evaluate", "halfnet:net", "--data", "images.npz", *words)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_for_people(capsys, here):
    _, _, err = run(
        capsys,
        "evaluate",
        "halfnet:net",
        "--data",
        "images.npz",
        "--attacks",
        "apgd:steps=2:targets=9",
        "--eps",
        "0.05",
    )
    assert err == "gsem: warning: the targeted DLR loss needs 4 classes, the model has 3: the targeted margin is used\n"


@pytest.mark.parametrize(("number", "stopped"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_evaluation_keeps_what_is_finished_and_resumes(capsys, here, monkeypatch, number, stopped):
    words = ("evaluate", "halfnet:net", "--data", "images.npz", "--attacks", "pgd:steps=2", "--batch-size", "12")

    def stop(bar, progress) -> None:
        if progress.done == 12:
            os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr("gsem.cli.progress.AttackBar.__call__", stop)
        code, _, err = run(capsys, *words)
    assert (code, signal.getsignal(signal.SIGTERM)) == (stopped, before)
    assert err == "stopped; what is finished is kept: the same command resumes from there\n"
    assert len(list((here / "evaluation.unfinished").glob("*.npz"))) == 1
    assert not list(here.glob(".*.lock"))
    assert run(capsys, *words)[0] == 0
    assert sorted(p.name for p in here.glob("evaluation*")) == ["evaluation.json", "evaluation.npz"]
