"""The paper's commands, on tiny files in the original formats."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gsem
from formats import write_cifar10, write_cifar100, write_svhn
from gsem.cli.main import main
from gsem.cli.paper import device_of, parse_bool, recipe_of, run_evaluation, run_training
from gsem.cli.paper_options import EvaluateOptions, TrainOptions, train_main

ROOT = Path(__file__).parents[2]
WRITERS = {"cifar10": write_cifar10, "cifar100": write_cifar100, "svhn": write_svhn}
# Two of a class, the fewest: one to train, one to validate.
PICTURES = {"cifar10": 20, "cifar100": 200, "svhn": 20}
SCRIPTS = ["train_gsem.py", "train_gsem_mart.py", "train_gsem_awp.py"]
# All eighteen commands. In the quick run are those of ResNet-18 on ten classes; a hundred classes need ten times the
# images, so that there the scripts train the smallest network. The others take minutes each: `make test-slow`.
COMMANDS = [
    pytest.param(name, net, data, marks=[pytest.mark.slow] if slow else [])
    for name in SCRIPTS
    for net in ("GSeMResNet18", "GSeMWideResNet28x10")
    for data in WRITERS
    for slow in [net != "GSeMResNet18" or data == "cifar100"]
] + [pytest.param(name, "GSeMResNet10x16", "cifar100") for name in SCRIPTS]
SHORT = ["--epochs", "1", "--reload", "1", "--gra_eot_num", "1", "--att_eot_num", "1", "--device", "cpu"]


def script(name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / name), *words], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(("name", "classifier", "dataset"), COMMANDS)
def test_every_command_of_the_paper_trains_and_its_checkpoint_evaluates(tmp_path, name, classifier, dataset):
    WRITERS[dataset](tmp_path / "dataset", n=PICTURES[dataset])
    words = ["--classifier_name", classifier, "--dataset_name", dataset, "--batch_size", "32", *SHORT]
    ran = script(name, *words, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    [saved] = (tmp_path / "adv_model" / dataset).glob("*.pt")
    assert saved.name.startswith(f"{classifier}_6_4_")
    assert ran.stdout.splitlines()[-1] == f"saved adv_model/{dataset}/{saved.name}"
    classes = len(gsem.data.load(dataset, tmp_path / "dataset").classes)
    options = ["--arch", classifier, "--num-classes", classes, "--data", dataset, "--data-path", tmp_path / "dataset"]
    short = ["--images", 4, "--draws", 2, "--attacks", "clean,pgd:steps=1:eot=1", "--no-frozen"]
    short += ["--out", tmp_path / "result"]
    assert main([str(word) for word in ["evaluate", saved, *options, *short]]) == 0
    assert len(gsem.EvaluationResult.load(tmp_path / "result")["pgd1-eot1"].correct) == 4


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A .pt of the training script, by a small network, and the options that made it."""
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "dataset", n=64, n_test=4)
    options = TrainOptions(
        classifier_name="GSeMResNet10x16",
        batch_size=32,
        epochs=1,
        reload=1,
        gra_eot_num=1,
        att_eot_num=1,
        device="cpu",
        use_amp="false",
    )
    return run_training(options, "gcat-published"), options


def test_the_evaluation_script_reads_what_training_saved(trained):
    path, o = trained
    result = run_evaluation(
        EvaluateOptions(
            model_load_path=str(path), classifier_name=o.classifier_name, att_eot_num=1, suite="quick", device="cpu"
        )
    )
    fresh = [s.name for s in result.scores if s.noise == "fresh"]
    assert fresh == ["clean", "apgd20-eot1", "apgd20-t3-eot1", "square300-eot1"]
    assert len(gsem.EvaluationResult.load(str(path).removesuffix(".pt")).y) == 4


def test_the_same_command_again_goes_on_and_other_options_are_refused(trained, capsys):
    path, o = trained
    before = path.stat().st_mtime_ns
    assert run_training(o, "gcat-published") == path
    assert path.stat().st_mtime_ns >= before
    assert "epoch" not in capsys.readouterr().out.split("saved")[-1]
    with pytest.raises(ValueError, match=r"another recipe .*lr"):
        run_training(replace(o, lr=0.5), "gcat-published")
    assert run_training(replace(o, best_acc=100.0), "gcat-published") is None


def test_training_starts_from_a_published_checkpoint(trained):
    path, o = trained
    again = replace(o, model_load_path=str(path), model_save_path="second", lr=1e-12, weight_decay=0.0)
    second = run_training(again, "gcat-published")
    weights = [torch.load(p, weights_only=True)["conv1.weight"] for p in (path, second)]
    torch.testing.assert_close(*weights)


def test_the_options_reach_the_recipe():
    o = TrainOptions(milestones=("3,5",), epochs=7, reload=2, alpha=8, beta=0, gra_eot_num=2, att_eot_num=3)
    r = recipe_of(
        replace(o, use_amp="false", data_path="d", classifier_name="GSeMWideResNet28x10"), "gcat-awp-published"
    )
    found = (r.milestones, r.epochs, r.rounds, r.levels, r.noise, r.draws, r.eot, r.precision, r.data_path, r.model)
    assert found == ((3, 5), 7, 2, 8, 0, 2, 3, "float32", "d", "gsem-wideresnet28x10")
    assert (r.objective, r.awp, r.adversarial_fraction) == ("mart", 0.01, 1.0)
    assert recipe_of(replace(o, milestones=("3", "5")), "gcat-published").milestones == (3, 5)
    assert recipe_of(TrainOptions(), "gcat-published").scaled(150) == replace(
        gsem.RECIPES["gcat-published"], data="cifar10", data_path="dataset"
    )


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="mnist"):
        recipe_of(TrainOptions(dataset_name="mnist"), "gcat-published")
    with pytest.raises(ValueError, match="milestones"):
        recipe_of(TrainOptions(milestones=("soon",)), "gcat-published")
    with pytest.raises(ValueError, match="before epoch 50"):
        recipe_of(TrainOptions(milestones=("60", "90"), epochs=50), "gcat-published")
    with pytest.raises(ValueError, match="use_amp"):
        parse_bool("use_amp", "maybe")
    with pytest.raises(ValueError, match="gpu"):
        device_of("gpu")


def test_without_a_gpu_it_says_that_it_runs_on_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("0") == "cpu"
    assert "CPU" in capsys.readouterr().err


def test_an_error_is_one_line(tmp_path):
    ran = script("train_gsem.py", "--data_path", "nowhere", "--dataset_name", "mnist", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_script_says_how_to_go_on(capsys, monkeypatch, number, code):
    def stop(options, published):
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr("sys.argv", ["train_gsem.py"])
    monkeypatch.setattr("gsem.cli.paper.run_training", stop)
    assert train_main("gcat-published") == code
    assert capsys.readouterr().err == "stopped; the same command resumes from here\n"
