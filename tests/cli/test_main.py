import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import gsem
from gsem._env import choose_precision
from gsem.cli import train as cli_train
from gsem.cli.evaluate import evaluate_command
from gsem.cli.main import COMMANDS, main, read
from gsem.cli.options import changed, command_line

TINY = ["--epochs", "1", "--warmup", "0", "--steps", "1", "--batch-size", "64"]


@pytest.fixture
def npz(tmp_path):
    """24 training and 8 test images of two classes, as an .npz file."""
    rng = np.random.default_rng(0)
    y = np.arange(32) % 2
    x = (rng.integers(0, 100, (32, 8, 8, 1)) + 120 * y[:, None, None, None]).astype(np.uint8)
    file = tmp_path / "images.npz"
    np.savez(file, x_train=x[:24], y_train=y[:24], x_test=x[24:], y_test=y[24:])
    return file


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def run(capsys, *words):
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *words) -> str:
    """The one line that a refused command prints."""
    code, _, err = run(capsys, *words)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("gsem: ")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("words", [("recipes",), ("models",), ("data",), ("--help",), ("data", "digits")])
def test_listings(capsys, words):
    code, out, _ = run(capsys, *words)
    assert code == 0
    named = {"recipes": gsem.RECIPES, "models": gsem.MODELS, "data": gsem.data.DATASETS}.get(words[0], [])
    assert all(name in out for name in named) or words == ("data", "digits")
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"gsem {command}" in out


def test_train_then_evaluate_then_resume(capsys, npz, in_tmp, tmp_path):
    code, out, err = run(capsys, "train", "--data", npz, "--out", "r", "--eps", "8/255", *TINY)
    assert (code, err) == (0, "")
    assert "gsem evaluate r" in out
    assert json.loads((tmp_path / "r/recipe.json").read_text())["recipe"]["eps"] == 8 / 255
    code, out, _ = run(capsys, "evaluate", "r", "--attacks", "clean,pgd:steps=3:eot=2", "--draws", "7")
    assert code == 0
    assert re.search(r"pgd3-eot2 +\d+\.\d%", out)
    assert "eps = 8/255" in out
    assert "8 test images" in out
    result = gsem.EvaluationResult.load(tmp_path / "r/evaluation")
    assert result.draws == 7
    assert len(result["pgd3-eot2"].correct) == 8
    assert result["pgd3-eot2"].linf.max() <= 8 / 255 + 1e-6
    assert "at most 1" in refused(capsys, "evaluate", "r", "--eps", 8)
    assert "eps must be positive" in refused(capsys, "evaluate", "r", "--eps", 0)
    code, out, _ = run(capsys, "evaluate", "r", "--attacks", "clean", "--out", "at-0.15")
    assert "saved in at-0.15.json and at-0.15.npz" in out
    assert (tmp_path / "at-0.15.npz").exists()
    assert run(capsys, "evaluate", "r", "--attacks", "clean")[0] == 0
    assert gsem.EvaluationResult.load(tmp_path / "r/evaluation").draws == 7  # not overwritten
    assert gsem.EvaluationResult.load(tmp_path / "r/evaluation-2").draws == 100
    code, out, _ = run(capsys, "train", "--resume", "r")
    assert code == 0 and "finished" in out and "epoch" not in out.split("best:")[0]  # computes nothing
    assert "already holds a run" in refused(capsys, "train", "--data", npz, "--out", "r", *TINY)


def test_a_published_checkpoint_is_evaluated(capsys, npz, in_tmp, tmp_path):
    torch.save(gsem.create_model("gsem-resnet10x16", num_classes=2, in_channels=3).state_dict(), "w.pt")
    assert "give its name" in refused(capsys, "evaluate", "w.pt", "--data", npz)
    message = refused(capsys, "evaluate", "w.pt", "--data", npz, "--arch", "GSeMResNet18", "--num-classes", 2)
    assert "w.pt" in message


def test_a_factory_is_evaluated(capsys, npz, in_tmp, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))\n"
        "def number():\n    return 3\n"
        "def one():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))\n"
        "made = net()\n"
    )
    code, out, _ = run(capsys, "evaluate", "mine:net", "--data", npz, "--attacks", "clean,pgd:steps=2")
    assert code == 0
    assert "deterministic, one draw" in out
    assert "pgd2-eot1" in out
    assert run(capsys, "evaluate", "mine:made", "--data", npz, "--attacks", "clean")[0] == 0  # a module itself
    (tmp_path / "text.npz").write_text("no archive")
    assert "text.npz is not an .npz file" in refused(capsys, "verify", "text.npz", "--model", "mine:net")
    assert "images.npz holds no result of gsem evaluate" in refused(capsys, "verify", npz, "--model", "mine:net")
    assert "attack ''" in refused(capsys, "evaluate", "mine:net", "--data", npz, "--attacks", "")
    assert "not a torch.nn.Module" in refused(capsys, "evaluate", "mine:number", "--data", npz)
    assert "mine:one: the model" in refused(capsys, "train", "--data", npz, "--model", "mine:one")  # no emoji
    assert str(tmp_path) not in sys.path
    assert "is no run directory" in refused(capsys, "evaluate", npz, "--data", npz)
    assert "nett" in refused(capsys, "evaluate", "mine:nett", "--data", npz)


@pytest.mark.parametrize(
    ("recipe", "words", "found"),
    [
        ("gcat", ["--epochs", "1"], (1, 1 / 30, ())),
        ("pgd-at", ["--epochs=20"], (20, 0.0, (10, 15))),
        ("gcat", ["--epochs", "6", "--warmup", "2"], (6, 2.0, ())),
        ("pgd-at", ["--batch-size", "8"], (200, 0.0, (100, 150))),
    ],
)
def test_epochs_alone_scale_the_schedule(recipe, words, found):
    made = read("train", [recipe, *words]).recipe
    assert (made.epochs, pytest.approx(made.warmup), made.milestones) == found


def test_published_rounds_are_kept():
    assert read("train", ["gcat-published", "--epochs", "15"]).recipe.rounds == 5


def test_a_study_scales_its_schedule_as_train_does():
    made = read("study", ["ablation", "--epochs=1"])
    assert (made.study, made.recipe) == ("ablation", gsem.RECIPES["gcat"].scaled(1))
    assert read("study", ["recipes", "--epochs", "5", "--warmup", "2"]).recipe.warmup == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluat",), "evaluate"),
        (("train", "gcta"), "Did you mean gcat"),
        (("study", "ablaton"), "Did you mean ablation"),
        (("study", "--passes", "3"), "--passes is an option of gsem study recipes only"),
        (("study", "--only", "plian"), "Did you mean plain"),
        (("train", "--epohcs", "3"), "--epochs"),
        (("train", "--model", "gsem-resnt18"), "gsem-resnet18"),
        (("train", "--data", "digts"), "digits"),
        (("train", "--data", "nowhere.npz"), "nowhere.npz"),
        (("train", "--eps", "8"), "at most 1"),
        (("train", "--eps", "8/0"), "8/0"),
        (("train", "--schedule", "linear"), "cosine"),
        (("train", "--resume", "nowhere"), "nowhere"),
        (("evaluate", "nowhere"), "nowhere"),
        (("evaluate",), "MODEL"),
        (("evaluate", "x:y", "--attacks", "pdg"), "pdg"),
        (("evaluate", "x:y", "--attacks", "pgd:stps=3"), "stps"),
        (("data", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_wrong_words_get_one_line(capsys, in_tmp, words, message):
    assert message in refused(capsys, *words)


def test_a_model_and_images_that_do_not_fit(capsys, npz, in_tmp):
    assert run(capsys, "train", "--data", npz, "--out", "r", *TINY)[0] == 0
    assert "[1, 8, 8]" in refused(capsys, "evaluate", "r", "--data", _colour(npz))
    assert "at least 1" in refused(capsys, "evaluate", "r", "--images", 0)
    assert "label" in refused(capsys, "evaluate", "r", "--data", "digits")


def _colour(npz):
    with np.load(npz) as file:
        arrays = {k: np.repeat(v, 3, axis=-1) if v.ndim == 4 else v for k, v in file.items()}
    np.savez(npz.with_name("colour.npz"), **arrays)
    return npz.with_name("colour.npz")


def test_debug_shows_the_traceback(in_tmp):
    with pytest.raises(ValueError, match="unknown"):
        main(["--debug", "train", "gcta"])


def test_a_damaged_checkpoint_is_named(capsys, npz, in_tmp, tmp_path):
    assert run(capsys, "train", "--data", npz, "--out", "r", *TINY)[0] == 0
    file = tmp_path / "r/checkpoints/best.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "best.safetensors" in refused(capsys, "evaluate", "r", "--data", npz)


def test_python_m_gsem_is_the_command(tmp_path):
    ran = subprocess.run([sys.executable, "-m", "gsem", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0
    assert ran.stdout.startswith(f"gsem {gsem.__version__}")


def test_ctrl_c_in_a_study_names_the_study_not_its_training(capsys, in_tmp, monkeypatch):
    def stop(*args, **more):
        raise gsem.TrainingInterrupted("runs/study-ablation-digits/plain-seed0")

    monkeypatch.setattr("gsem.cli.study.study", stop)
    code, _, err = run(capsys, "study")
    assert code == 130
    assert err.startswith("stopped") and "study-ablation-digits" not in err


def test_a_file_that_a_report_writes_is_not_taken_for_a_run(capsys, in_tmp, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    for name in ("card.json", "evaluation.json", "page.html"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "evaluation.npz").touch()
    assert "gsem report RUN -o card.json" in refused(capsys, "report", "card.json")
    assert "give evaluation.npz" in refused(capsys, "report", "evaluation.json")
    assert "page.html cannot be a RUN" in refused(capsys, "report", "runs/x", "page.html")
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_printed_command_is_read_as_the_options_it_was_made_of():
    options = read("audit", ["my run", "--normalize=-0.5/1", "--eps", "8/255", "--source", "a", "b", "--quick"])
    line = command_line("audit", options.model, **changed(options, "model"))
    assert line == "gsem audit 'my run' --source a b --eps 8/255 --normalize=-0.5/1 --quick"
    assert read("audit", shlex.split(line)[2:]) == options
    assert command_line("evaluate", "r", frozen=False, seed=0, out=None) == "gsem evaluate r --no-frozen --seed 0"


@pytest.mark.parametrize("command", ["evaluate", "compare", "audit", "verify", "report", "demo", "data"])
def test_every_option_has_a_sentence_and_a_default(capsys, monkeypatch, command):
    """And no default is None."""
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(run(capsys, command, "--help")[1].replace("│", " ").split())
    kind = COMMANDS[command][0]
    assert "(default: None)" not in text and "(default: )" not in text
    assert text.count("(default: ") + text.count("(required)") == len(fields(kind))
    assert len(re.findall(r"\. \((?:default: |required\))", text)) == len(fields(kind))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_is_saved_and_names_the_command_that_resumes_it(tmp_path, number, code):
    """Ctrl-C, and the signal that clusters send before they kill."""
    words = [sys.executable, "-m", "gsem", "train", "--out", "my run", "--epochs", "500"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch"):
                os.kill(process.pid, number)
                break
        _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert err == "stopped; saved. Resume with: gsem train --resume 'my run'\n"
    assert (tmp_path / "my run/checkpoints/last.safetensors").exists()
    assert not (tmp_path / "my run/.lock").exists()


def test_a_training_says_what_it_computes_in(capsys, npz, in_tmp):
    options = ["--precision", "float32", "--attack-precision", "auto", "--device", "cpu"]
    code, out, _ = run(capsys, "train", "--data", npz, "--out", "r", *options, *TINY)
    assert code == 0
    search = choose_precision("auto", torch.device("cpu"))
    assert f"training passes in float32, attack in {search} (auto), on cpu" in out.splitlines()


def test_the_demo_ends_with_its_page_and_the_command_of_the_audit(capsys, in_tmp, tmp_path, monkeypatch):
    def shorter(console, o):
        return evaluate_command(console, replace(o, attacks="clean,pgd:steps=2:eot=2", images=20, draws=11))

    monkeypatch.setattr(cli_train, "RECIPES", {"gcat": replace(gsem.RECIPES["gcat"], epochs=1, warmup=0, steps=1)})
    monkeypatch.setattr(cli_train, "evaluate_command", shorter)
    code, out, err = run(capsys, "demo")
    assert (code, err) == (0, "")
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 10_000
    *_, page, question, command = out.splitlines()
    assert page == "report: runs/demo/report.html"
    assert re.fullmatch(r"Is that accuracy real\? Next, about \d.* on this machine:", question)
    assert command == "  gsem audit runs/demo --quick"
    assert all(len(line) <= 80 for line in out.splitlines())
