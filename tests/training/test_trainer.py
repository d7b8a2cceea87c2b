import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gsem
from gsem._io import read_checkpoint
from gsem.data import Split
from gsem.training.progress import epoch_order
from gsem.training.run import Run, TrainingDiverged, TrainingInterrupted, deterministic
from gsem.training.step import Stepper, attacked_rows
from gsem.training.trainer import train
from gsem.training.validation import Validator
from killed_training import RECIPE

HELPERS = Path(__file__).parents[1] / "helpers"

TINY = replace(RECIPE, rounds=1)


def state(path: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return read_checkpoint(path / "checkpoints" / f"{name}.safetensors")[0]


def timeless(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("share", "rows"), [(0.5, [1, 3, 5, 7, 9]), (0.3, [3, 6, 9]), (0.0, [])])
def test_attacked_rows_are_spread_evenly(share, rows):
    assert attacked_rows(10, share).tolist() == rows


def test_all_rows_attacked():
    assert len(torch.arange(7)[attacked_rows(7, 1.0)]) == 7


def test_a_run_learns_and_leaves_its_files(tmp_path):
    recipe = replace(gsem.RECIPES["gcat"], epochs=4, batch_size=64)
    run = train(recipe, out=tmp_path / "run", device="cpu")
    assert [m["epoch"] for m in run.metrics] == [1, 2, 3, 4]
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    assert run.best["clean"] > 0.5  # ten classes: chance is 0.1
    assert {p.name for p in run.path.rglob("*") if p.is_file()} == {
        "recipe.json",
        "metrics.jsonl",
        "last.safetensors",
        "best.safetensors",
    }
    metadata = json.loads((run.path / "recipe.json").read_text())
    assert gsem.Recipe.from_dict(metadata["recipe"]) == recipe
    x = gsem.data.to_float(gsem.data.load("digits").test().x[:8])
    with gsem.noise(model := run.model(), "off"):
        assert model(x).shape == (8, 10)


def test_the_same_recipe_gives_the_same_numbers_and_leaves_chance_alone(tmp_path, few_digits):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    runs = [train(TINY, out=tmp_path / n, data=few_digits, device="cpu") for n in "ab"]
    assert torch.equal(torch.get_rng_state(), before)
    assert timeless(runs[0].metrics) == timeless(runs[1].metrics)
    assert same(state(runs[0].path), state(runs[1].path))
    other = train(replace(TINY, seed=1), out=tmp_path / "c", data=few_digits, device="cpu")
    assert other.metrics[0]["loss"] != runs[0].metrics[0]["loss"]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_it_comes_to_the_same_end(tmp_path, few_digits, seed):
    script = HELPERS / "killed_training.py"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as the script does: sums over threads depend on their number
        whole = train(RECIPE, out=tmp_path / "whole", data=few_digits, device="cpu")
    finally:
        torch.set_num_threads(threads)
    words = [sys.executable, str(script), str(tmp_path / "killed"), str(seed), "10"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(ran.stdout.split()[1]) >= 5, "too few kills to prove anything"
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert timeless([json.loads(line) for line in lines]) == timeless(whole.metrics)
    for name in ("last", "best"):
        assert same(state(tmp_path / "killed", name), state(whole.path, name))


def test_ctrl_c_saves_the_step_and_resume_ends_the_same(tmp_path, few_digits):
    whole = train(TINY, out=tmp_path / "whole", data=few_digits, device="cpu")

    def interrupt(progress):
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted):
        train(TINY, out=tmp_path / "run", data=few_digits, device="cpu", on_progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is former
    assert not same(state(tmp_path / "run"), state(whole.path))
    run = train(TINY, out=tmp_path / "run", data=few_digits, device="cpu", resume=True)
    assert timeless(run.metrics) == timeless(whole.metrics)
    assert same(state(run.path), state(whole.path))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "lr": 0.002},
        {"norm": "L2", "schedule": "onecycle", "warmup": 1.0, "steps_per_epoch": 2},
        {"attack_init": "noise", "steps": 1, "collapse": 0.9, "label_smoothing": 0.1},
        {"objective": "trades", "adversarial_fraction": 1.0, "norm": "L2", "attack_init": "gaussian"},
    ],
    ids=["adamw", "l2-onecycle", "noise", "trades-l2"],
)
def test_stopped_in_the_middle_of_an_epoch_and_resumed_it_ends_with_the_same_bits(tmp_path, few_digits, changes):
    recipe = replace(TINY, epochs=2, **changes)
    whole = train(recipe, out=tmp_path / "whole", data=few_digits, device="cpu")

    def interrupt(progress):
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        train(recipe, out=tmp_path / "run", data=few_digits, device="cpu", on_progress=interrupt)
    run = train(recipe, out=tmp_path / "run", data=few_digits, device="cpu", resume=True)
    assert timeless(run.metrics) == timeless(whole.metrics)
    assert same(state(run.path), state(whole.path))


def test_training_works_outside_the_main_thread(tmp_path, few_digits):
    runs = []
    work = threading.Thread(
        target=lambda: runs.append(train(TINY, out=tmp_path / "run", data=few_digits, device="cpu"))
    )
    work.start()
    work.join()
    assert len(runs[0].metrics) == TINY.epochs


def test_a_run_is_not_overwritten_nor_mixed(tmp_path, few_digits):
    train(TINY, out=tmp_path / "run", data=few_digits, device="cpu")
    before = state(tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        train(TINY, out=tmp_path / "run", data=few_digits, device="cpu")
    with pytest.raises(ValueError, match=r"another recipe .*lr"):
        train(replace(TINY, lr=0.2), out=tmp_path / "run", data=few_digits, device="cpu", resume=True)
    assert same(state(tmp_path / "run"), before)


def test_divergence_is_named_and_the_last_good_checkpoint_kept(tmp_path, few_digits):
    wild = replace(TINY, lr=1e20, epochs=20, precision="float32", warmup=0.0)
    with pytest.raises(TrainingDiverged, match=r"(NaN or infinite|exploded).* step .*last good checkpoint"):
        train(wild, out=tmp_path / "run", data=few_digits, device="cpu")
    assert all(t.isfinite().all() for t in state(tmp_path / "run").values())


def test_clipping_bounds_the_update(tmp_path, few_digits):
    short = replace(TINY, clip=1e-6, momentum=0.0, weight_decay=0.0, ema=0.0, epochs=1, lr=1.0)
    run = train(short, out=tmp_path / "run", data=few_digits, device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(gsem.rng.derive_seed(short.seed, "weights"))
        start = gsem.create_model(short.model, in_channels=1).state_dict()
    end = run.model().state_dict()
    moved = sum(((end[k] - start[k]) ** 2).sum() for k in start if "running" not in k and "num_b" not in k) ** 0.5
    assert 0 < moved <= 3e-6 * (1 + 1e-3)  # three steps at most, each 1e-6 long; float32 weights round


@pytest.mark.parametrize("recipe", gsem.RECIPES)
@pytest.mark.parametrize("model", ["gsem-wideresnet10x2", "resnet10x16"])
def test_every_recipe_trains_every_kind_of_model(tmp_path, few_digits, recipe, model):
    short = replace(
        gsem.RECIPES[recipe],
        model=model,
        epochs=1,
        rounds=1,
        milestones=(),
        warmup=0.0,
        awp_warmup=0.0,
        steps=1 if gsem.RECIPES[recipe].attack_init == "noise" else 2,
        steps_per_epoch=None,
        extra_share=0.0,
        eot=2,
        draws=2,
    )
    run = train(short, out=tmp_path / "run", data=few_digits, device="cpu")
    assert 0 <= run.best["robust"] <= run.best["clean"] + 0.2


def test_the_test_split_is_never_opened(tmp_path, few_digits):
    def opened() -> Split:
        raise AssertionError("training opened the test split")

    run = train(TINY, out=tmp_path / "run", data=replace(few_digits, read_test=opened), device="cpu")
    assert len(run.metrics) == TINY.epochs


def test_half_a_line_of_metrics_counts_as_not_written(tmp_path, few_digits):
    run = train(TINY, out=tmp_path / "run", data=few_digits, device="cpu")
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "st')
    again = train(TINY, out=tmp_path / "run", data=few_digits, device="cpu", resume=True)
    assert again.metrics == run.metrics


def test_training_starts_from_given_weights(tmp_path, few_digits):
    first = train(TINY, out=tmp_path / "first", data=few_digits, device="cpu")
    still = replace(TINY, init_from=str(first.path), lr=1e-12, epochs=1, weight_decay=0.0)
    second = train(still, out=tmp_path / "second", data=few_digits, device="cpu")
    torch.testing.assert_close(second.model().conv1.weight, first.model().conv1.weight)
    other = replace(TINY, init_from=str(first.path), model="gsem-wideresnet10x2")
    with pytest.raises(ValueError, match=r"init_from .*conv1"):
        train(other, out=tmp_path / "third", data=few_digits, device="cpu")


def test_early_stopping_stops_at_the_same_place_after_a_resume(tmp_path, few_digits):
    # a rate this small never improves on the first validation
    stuck = replace(TINY, lr=1e-12, patience=2, epochs=9, ema=0.0)
    run = train(stuck, out=tmp_path / "run", data=few_digits, device="cpu")
    assert len(run.metrics) == 3
    assert train(stuck, out=tmp_path / "run", data=few_digits, device="cpu", resume=True).metrics == run.metrics


def test_averaged_and_raw_weights_are_validated_beside_each_other(tmp_path, few_digits):
    run = train(replace(TINY, ema=0.0, swa_from=1), out=tmp_path / "run", data=few_digits, device="cpu")
    assert "raw_robust" not in run.metrics[0]  # the average has not begun
    assert all("raw_robust" in line for line in run.metrics[1:])


def test_equal_averaging_is_the_mean():
    from gsem.training.step import Average

    model, averaged = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    average = Average(model, averaged, decay=0.0, equal=True)
    for count, value in enumerate([1.0, 4.0, 7.0]):
        torch.nn.init.constant_(model.weight, value)
        average.update(count)
    assert averaged.weight.item() == pytest.approx(4.0)


@pytest.mark.parametrize("steps", [2, 3, 10])
def test_an_epoch_has_the_steps_it_is_given(tmp_path, few_digits, steps):
    run = train(replace(TINY, steps_per_epoch=steps, epochs=2), out=tmp_path / "run", data=few_digits, device="cpu")
    assert [m["step"] for m in run.metrics] == [steps, 2 * steps]


def test_a_long_epoch_sees_every_image_before_one_comes_again():
    recipe = replace(TINY, steps_per_epoch=7)
    order = epoch_order(recipe, 24, 0, 8, 0, 1)
    assert order.shape == (7, 8)
    for first in (0, 3):
        assert order[first : first + 3].flatten().sort().values.tolist() == list(range(24))
    assert not torch.equal(order[:3], order[3:6])
    # the first pass is that of an epoch without a given length
    assert torch.equal(order[:3], epoch_order(replace(recipe, steps_per_epoch=None), 24, 0, 8, 0, 1))


def collapsing(robust: list[float], training: list[float]) -> list[dict]:
    pairs = zip(robust, training, strict=True)
    return [{"epoch": i, "clean": 0.9, "robust": r, "training_robust": t} for i, (r, t) in enumerate(pairs, 1)]


@pytest.mark.parametrize(
    ("robust", "training", "collapsed"),
    [
        ([0.3, 0.4, 0.1], [0.3, 0.4, 0.9], True),
        ([0.3, 0.4, 0.1], [0.3, 0.4, 0.2], False),  # both fall: the training diverges, it does not overfit
        ([0.3, 0.4, 0.3], [0.3, 0.4, 0.9], False),  # robust overfitting: slow, and not of this kind
    ],
)
def test_catastrophic_overfitting_is_a_fall_in_validation_alone(robust, training, collapsed):
    run = Run(Path("x"), replace(gsem.RECIPES["fast-at"]), collapsing(robust, training))
    assert run.collapsed is collapsed
    assert ("catastrophic overfitting" in repr(run)) is collapsed
    assert run.best["epoch"] == 2


def test_the_training_stops_at_catastrophic_overfitting_and_keeps_the_best_weights(tmp_path, few_digits, monkeypatch):
    robust = iter([0.3, 0.5, 0.1])
    monkeypatch.setattr(Validator, "_accuracies", lambda self, model: {"clean": 0.6, "robust": next(robust)})
    monkeypatch.setattr(Stepper, "training_robust", lambda self: 0.7)
    recipe = replace(gsem.RECIPES["fast-at"], model="resnet10x16", epochs=9, warmup=2.0, batch_size=32)
    with pytest.warns(UserWarning, match=r"catastrophic overfitting: by epoch 3"):
        run = train(recipe, out=tmp_path / "run", data=few_digits, device="cpu")
    assert len(run.metrics) == 3 and run.collapsed
    assert read_checkpoint(run.path / "checkpoints/best.safetensors")[1]["metrics"]["epoch"] == 2
    # nothing is left to train
    assert train(recipe, out=run.path, data=few_digits, device="cpu", resume=True).metrics == run.metrics


def test_the_accuracy_on_the_training_batches_is_that_of_the_adversarial_examples(tmp_path, few_digits):
    recipe = replace(TINY, collapse=0.9, adversarial_fraction=0.5, epochs=6)
    run = train(recipe, out=tmp_path / "run", data=few_digits, device="cpu")
    found = [m["training_robust"] for m in run.metrics]
    # 110 images in batches of 32: 48 of the 96 in an epoch are attacked
    assert all(share * 48 == pytest.approx(round(share * 48), abs=1e-4) for share in found)
    assert found[-1] > found[0]


def test_deterministic_mode_is_put_back(tmp_path, few_digits):
    train(replace(TINY, deterministic=True, epochs=1), out=tmp_path / "run", data=few_digits, device="cpu")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("device", "given", "inside"),
    [("cpu", None, None), ("cuda:1", None, ":4096:8"), ("cuda", ":16:8", ":16:8")],
)
def test_deterministic_mode_on_a_gpu_has_the_workspace_that_cublas_wants(monkeypatch, device, given, inside):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    with suppress(KeyError), deterministic(True, torch.device(device)):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == inside
        raise KeyError
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == given
    with deterministic(False, torch.device(device)):
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == given


def test_extra_images_are_mixed_in(tmp_path, few_digits):
    # The extra images are all of class 3: a network that mostly sees them answers 3 more often.
    import numpy as np

    rng = np.random.default_rng(0)
    file = tmp_path / "extra.npz"
    np.savez(file, image=rng.integers(0, 256, (64, 8, 8, 1), dtype=np.uint8), label=np.full(64, 3))
    mixed = replace(TINY, extra_data=str(file), extra_share=0.75, epochs=4)
    run = train(mixed, out=tmp_path / "mixed", data=few_digits, device="cpu")
    # 110 real images, 8 a batch: an epoch is as long as the real images last
    assert run.metrics[0]["step"] == 13
    assert json.loads((run.path / "recipe.json").read_text())["training_images"] == 110
    plain = train(replace(TINY, epochs=16), out=tmp_path / "plain", data=few_digits, device="cpu")
    x = torch.from_numpy(rng.integers(0, 256, (64, 1, 8, 8))).float() / 255
    share = [float((r.model()(x).argmax(1) == 3).float().mean()) for r in (run, plain)]
    assert share[0] > 0.9 > share[1]
    with pytest.raises(ValueError, match="--extra-data"):
        train(replace(TINY, extra_share=0.5), out=tmp_path / "none", data=few_digits, device="cpu")
    assert not (tmp_path / "none").exists()


def test_the_best_epoch_is_the_most_robust_then_the_cleanest_and_without_attacks_the_cleanest():
    metrics = [
        {"epoch": 1, "robust": 0.3, "clean": 0.2},
        {"epoch": 2, "robust": 0.5, "clean": 0.6},
        {"epoch": 3, "robust": 0.5, "clean": 0.7},
        {"epoch": 4, "robust": 0.4, "clean": 0.9},
        {"epoch": 5, "loss": 1.0},
    ]
    for recipe, epoch in (("gcat", 3), ("standard", 4)):
        assert Run(Path("x"), gsem.RECIPES[recipe], metrics).best["epoch"] == epoch


def test_the_checkpoint_kept_is_that_of_the_best_epoch(tmp_path, few_digits):
    for recipe in (TINY, replace(TINY, adversarial_fraction=0.0)):
        run = train(replace(recipe, epochs=4), out=tmp_path / str(recipe.adversarial_fraction), data=few_digits)
        _, meta = read_checkpoint(run.path / "checkpoints/best.safetensors")
        assert meta["metrics"] == run.best


def test_a_training_in_l2_leaves_the_linf_radius_to_evaluations(tmp_path, few_digits):
    recipe = replace(TINY, norm="L2", eps=1.5, epochs=1)
    run = train(recipe, out=tmp_path / "run", data=few_digits, device="cpu")
    metadata = json.loads((run.path / "recipe.json").read_text())
    assert (metadata["recipe"]["norm"], metadata["recipe"]["eps"]) == ("L2", 1.5)
    assert metadata["data"]["eps"] == few_digits.eps
