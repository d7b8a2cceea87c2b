"""Training on several processes: what is equal to one process, and that all end alike."""

import copy
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import distributed_runs
import distributed_steps
import gsem
from gsem._fingerprint import model_fingerprint
from gsem._interrupt import finish_step_on_interrupt
from gsem.attacks._core import random_start
from gsem.data import auto_augment, crop_flip, cutout, resized_crop
from gsem.distributed import share_statistics
from gsem.nn.folded import fold
from gsem.rng import Shard
from gsem.training.step import attacked_rows, attacked_shard
from processes import run

HELPERS = Path(distributed_steps.__file__).parent


@pytest.fixture(scope="module")
def alone() -> dict:
    return distributed_steps.everything()


@pytest.mark.parametrize("size", [2, 3])
def test_weights_after_some_steps_are_those_of_one_process(tmp_path, alone, size):
    ends = run(size, [str(HELPERS / "distributed_steps.py"), str(tmp_path)])
    assert [end.code for end in ends] == [0] * size, [end.err for end in ends]
    found = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
    for name in distributed_steps.CASES:
        for kind, values in alone[name].items():
            for key, value in values.items():
                for mine in found:
                    assert torch.equal(mine[name][kind][key], found[0][name][kind][key]), (name, key)
                torch.testing.assert_close(
                    found[0][name][kind][key],
                    value,
                    rtol=0,
                    atol=1e-5 if kind == "sums" else 1e-10,
                    msg=f"{name} {key}",
                )
    for mine in found:
        assert mine["validated"] == alone["validated"]
        # The variance between the processes' means is missing in running_var.
        now, then = mine["statistics"], alone["statistics"]
        assert torch.allclose(now["running_mean"], then["running_mean"], rtol=0, atol=1e-10)
        assert torch.allclose(now["running_var"], then["running_var"], rtol=0.05)
        assert now["num_batches_tracked"] == then["num_batches_tracked"]
        assert all(torch.equal(now[name], found[0]["statistics"][name]) for name in now)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of the runs of two processes, and what happened on each of the two."""
    folder = tmp_path_factory.mktemp("runs")
    words = [str(HELPERS / "distributed_runs.py"), str(folder)]
    ends = run(2, [*words, "killed"])
    assert all(end.code for end in ends)
    said = [line for end in ends for line in end.err.splitlines() if line.startswith("gsem: ")]
    assert len(said) == 1 and "process 1 (" in said[0] and f"--resume {folder / 'killed'}" in said[0]
    ends = run(2, words)
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    return folder, [json.loads(end.out.splitlines()[-1]) for end in ends]


def test_all_processes_end_with_equal_weights_and_one_writes(runs):
    folder, (first, other) = runs
    assert first["whole"] == other["whole"]
    assert [line["epoch"] for line in first["whole"]["metrics"]] == [1, 2]
    assert len((folder / "whole" / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((folder / "whole" / "recipe.json").read_text())["processes"] == 2
    assert not (folder / "whole" / ".lock").exists()


@pytest.mark.parametrize(("name", "stopped"), [("resumed", "stopped"), ("after the kill", None)])
def test_stopped_or_killed_and_resumed_equals_the_undisturbed_run(runs, name, stopped):
    _, found = runs
    for mine in found:
        assert mine[name] == mine["whole"]
        assert stopped is None or mine[stopped]["error"] == "TrainingInterrupted"


def test_a_stopped_run_continues_on_one_process(runs):
    folder, found = runs
    assert [mine["terminated"]["error"] for mine in found] == ["TrainingInterrupted"] * 2
    resumed = distributed_runs.end(out=folder / "elsewhere", resume=True)
    assert [line["epoch"] for line in resumed["metrics"]] == [1, 2]
    assert resumed["metrics"][0] == found[0]["whole"]["metrics"][0]  # of two processes
    assert resumed["metrics"][-1]["loss"] == pytest.approx(found[0]["whole"]["metrics"][-1]["loss"], rel=0.3)
    assert json.loads((folder / "elsewhere" / "recipe.json").read_text())["processes"] == 1


def test_nan_on_one_process_is_found_on_all(runs):
    assert [mine["diverged"]["error"] for mine in runs[1]] == ["TrainingDiverged"] * 2


def test_a_run_that_is_there_and_too_many_processes_are_refused_on_all(runs):
    assert [mine["again"]["error"] for mine in runs[1]] == ["ValueError"] * 2
    assert [mine["too many"]["error"] for mine in runs[1]] == ["ValueError"] * 2


def test_a_damaged_image_of_one_process_stops_all_and_streamed_equals_held(runs):
    for mine in runs[1]:
        assert mine["damaged"]["error"] == "DamagedImage" and "planted" in mine["damaged"]["text"]
        assert mine["streamed"] == mine["held"]


@pytest.mark.parametrize("size", [2, 3])
def test_the_shards_of_a_batch_are_drawn_as_the_whole(size):
    x = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    point = x.double() / 255
    draws = {
        "crop and flip": lambda rows, **how: crop_flip(x[rows], padding=2, flip=True, **how),
        "resized crop": lambda rows, **how: resized_crop(x[rows], flip=True, **how),
        "autoaugment": lambda rows, **how: auto_augment(x[rows], **how),
        "cutout": lambda rows, **how: cutout(x[rows], size=4, **how),
        "Linf start": lambda rows, **how: random_start(point[rows], 0.1, "Linf", **how),
        "L2 start": lambda rows, **how: random_start(point[rows], 0.1, "L2", **how),
    }
    shards = [Shard(7 * rank // size, 7 * (rank + 1) // size, 7) for rank in range(size)]
    for name, draw in draws.items():
        parts = [draw(s.rows, shard=s, generator=torch.Generator().manual_seed(1)) for s in shards]
        whole = draw(slice(None), generator=torch.Generator().manual_seed(1))
        assert torch.equal(torch.cat(parts), whole), name


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_the_attacked_rows_of_the_shards_are_those_of_the_batch(share):
    shards = [Shard(0, 2, 7), Shard(2, 4, 7), Shard(4, 7, 7)]
    found, places = [], []
    for shard in shards:
        rows, attacked = attacked_shard(shard, share)
        found += torch.arange(shard.start, shard.stop)[rows].tolist()
        places += range(attacked.batch)[attacked.rows]
    assert found == torch.arange(7)[attacked_rows(7, share)].tolist()
    assert places == list(range(len(found)))


def test_shared_statistics_are_folded_and_keep_names_and_fingerprint():
    model = gsem.create_model("gsem-resnet10x16")
    x = torch.rand(3, 1 if model.conv1.in_channels == 1 else 3, 8, 8)
    model(x)  # in train mode: statistics of its own
    model.eval()
    shared = copy.deepcopy(model)
    share_statistics(shared)
    assert not any(type(m) is nn.BatchNorm2d for m in shared.modules())
    assert list(shared.state_dict()) == list(model.state_dict())
    assert model_fingerprint(shared) == model_fingerprint(model)
    with gsem.noise(model, "off"), gsem.noise(shared, "off"):
        assert torch.equal(shared(x), model(x))
        assert torch.equal(fold(shared)(x), fold(model)(x))


def test_a_signal_that_comes_twice_within_seconds_counts_once(monkeypatch):
    clock = iter([100.0, 109.0, 111.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with finish_step_on_interrupt(10.0) as interrupted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
