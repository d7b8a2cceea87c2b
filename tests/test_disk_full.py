"""Where nothing more can be written, the message names the path, nothing half-written stays, and the rest is kept.

A limit on the size of files stands for the full disk: the same error of the same system call, in this process alone.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import gsem
from gsem._io import append_line, write_atomically
from gsem.cli.main import main
from gsem.evaluation.evaluate import evaluate
from gsem.evaluation.result import EvaluationResult
from planted import Halves, halves

resource = pytest.importorskip("resource")
RECIPE = gsem.Recipe(
    model="resnet10x16",
    adversarial_fraction=0.0,
    epochs=3,
    batch_size=64,
    precision="float32",
    attack_precision="float32",
)


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_atomically(tmp_path / "f", b"former")
    with full_after(1000), pytest.raises(OSError, match=r"/f could not be written: File too large.* is kept"):
        write_atomically(tmp_path / "f", bytes(2000))
    assert (tmp_path / "f").read_bytes() == b"former" and names(tmp_path) == ["f"]


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    append_line(tmp_path / "f", "former")
    with full_after(1000), pytest.raises(OSError, match="/f could not be written: File too large"):
        append_line(tmp_path / "f", "x" * 2000)
    append_line(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "former\nnew\n"


def test_a_training_keeps_its_last_checkpoint_and_its_metrics(tmp_path, few_digits):
    whole = gsem.train(RECIPE, out=tmp_path / "whole", data=few_digits, device="cpu")
    out = tmp_path / "run"

    def fill(progress) -> None:
        if progress.epoch == 2 and progress.epoch_ended:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    with full_after(resource.RLIM_INFINITY):
        with pytest.raises(OSError, match=r"/run/.* could not be written: File too large"):
            gsem.train(RECIPE, out=out, data=few_digits, device="cpu", on_progress=fill)
    assert {n for n in names(out) if "." in n} == {
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "metrics.jsonl",
        "recipe.json",
    }
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 2
    again = gsem.train(RECIPE, out=out, data=few_digits, device="cpu", resume=True)
    assert [m["loss"] for m in again.metrics] == [m["loss"] for m in whole.metrics]
    assert torch.equal(again.model().linear.weight, whole.model().linear.weight)


def test_an_evaluation_keeps_what_is_finished(tmp_path):
    x, y = halves(64)
    how = {"attacks": "clean,pgd:steps=2", "eps": 0.1, "batch_size": 8, "save_adv": True, "save": tmp_path / "r"}
    # The pieces are small enough, the result is not.
    with full_after(4000), pytest.raises(OSError, match=r"/r\.npz could not be written: File too large"):
        evaluate(Halves(), x, y, **how)
    assert len(list((tmp_path / "r.unfinished").glob("*.npz"))) == 16
    assert names(tmp_path)[0] == "r.unfinished" and not list(tmp_path.rglob("*writing*"))

    seen = []
    result = evaluate(Halves(), x, y, **how, on_progress=lambda p: seen.append(p.gradients_per_second))
    assert not any(seen)  # nothing was attacked again
    assert EvaluationResult.load(tmp_path / "r")["clean"].correct.sum() == result["clean"].correct.sum() == 64


def test_a_piece_that_cannot_be_written_is_named(tmp_path):
    x, y = halves(64)
    with full_after(400), pytest.raises(OSError, match=r"/r\.unfinished/\w+-0\.npz could not be written"):
        evaluate(Halves(), x, y, "clean", eps=0.1, save=tmp_path / "r")
    assert names(tmp_path) == []


def test_a_command_says_it_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with full_after(1000):
        assert main(["train", "--out", "r", "--model", "resnet10x16", "--epochs", "1"]) == 2
    err = capsys.readouterr().err
    assert err == "gsem: r/recipe.json could not be written: File too large. What was written before is kept\n"
    assert json.dumps(names(tmp_path / "r")) == '["checkpoints"]'
