"""Training on images that are read batch by batch equals training on the same images held as a tensor."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gsem
from gsem._io import read_checkpoint
from gsem.data import DamagedImage, Dataset, load
from gsem.training.run import TrainingInterrupted
from planted import small_digits

RECIPE = gsem.Recipe(
    model="gsem-resnet10x16",
    adversarial_fraction=0.5,
    steps=1,
    epochs=2,
    batch_size=16,
    augment="resized-crop",
    precision="float32",
    attack_precision="float32",
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """120 digits as files, a few of each class larger than 8 × 8."""
    digits = small_digits().read_train()
    for i, (x, y) in enumerate(zip(digits.x, digits.y.tolist(), strict=True)):
        file = tmp_path / "images" / "train" / f"digit{y}" / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(x[0].numpy())
        image.resize((12, 9)).save(file) if i % 5 == 0 else image.save(file)
    return tmp_path / "images"


def losses(out: Path, monkeypatch, **how) -> tuple[list[tuple[int, float]], dict]:
    """The mean loss of the epoch so far after each step, and the last checkpoint's tensors."""
    monkeypatch.setattr("gsem.training.trainer.CHECK_EVERY", 1)
    seen = []
    how = {"recipe": RECIPE} | how
    gsem.train(**how, out=out, device="cpu", on_progress=lambda p: seen.append((p.step, p.loss)))
    return seen, read_checkpoint(out / "checkpoints" / "last.safetensors")[0]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_losses_are_equal_step_by_step_also_with_generated_images(folder, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "extra.npz", image=rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), label=np.arange(40) % 10
    )
    recipe = replace(
        RECIPE, data=str(folder), resize=8, extra_data=str(tmp_path / "extra.npz"), extra_share=0.25, epochs=1
    )
    held, end = losses(tmp_path / "held", monkeypatch, recipe=recipe, hold=True)
    streamed, other = losses(tmp_path / "streamed", monkeypatch, recipe=recipe, hold=False)
    assert len(held) == 9 and held == streamed  # 110 images, 12 real ones in a batch
    assert equal(end, other)
    then, now = (json.loads((tmp_path / run / "recipe.json").read_text()) for run in ("held", "streamed"))
    assert then["data"] == now["data"]


def test_a_stopped_run_on_streamed_images_resumes_to_the_same_bits(folder, tmp_path, monkeypatch):
    recipe = replace(RECIPE, data=str(folder), resize=8)
    held, end = losses(tmp_path / "held", monkeypatch, recipe=recipe)

    def stop(p):
        if p.step == 4:
            raise TrainingInterrupted(tmp_path / "run")

    monkeypatch.setattr("gsem.training.trainer.SAVE_SECONDS", 0.0)
    with pytest.raises(TrainingInterrupted):
        gsem.train(recipe, out=tmp_path / "run", device="cpu", hold=False, on_progress=stop)
    resumed, other = losses(tmp_path / "run", monkeypatch, recipe=recipe, hold=False, resume=True)
    assert resumed == held[4:]
    assert equal(end, other)


def test_a_damaged_image_in_the_stream_is_named_and_the_run_is_saved(folder, tmp_path, monkeypatch):
    recipe = replace(RECIPE, data=str(folder), resize=8)
    _, end = losses(tmp_path / "whole", monkeypatch, recipe=recipe)
    victim = folder / "train" / "digit3" / sorted(p.name for p in (folder / "train" / "digit3").iterdir())[5]
    content = victim.read_bytes()
    source = load(folder, resize=8, hold=False)

    def damaged() -> Dataset:
        # After the hash of all images was taken, as a disk that fails during the training does.
        monkeypatch.setattr("gsem.training.recorded.data_fingerprint", damage)
        return source

    def damage(pair):
        found = gsem._fingerprint.data_fingerprint(pair)
        if (tmp_path / "run" / "recipe.json").exists():
            return found
        victim.write_bytes(content[:40])
        return found

    with pytest.raises(DamagedImage, match=rf"{victim.name} .*Saved at step \d+ of 12: .*--resume {tmp_path}/run"):
        gsem.train(recipe, data=damaged(), out=tmp_path / "run", device="cpu")
    step = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors")[1]["state"]["step"]
    assert 0 <= step < 6
    victim.write_bytes(content)
    gsem.train(recipe, data=source, out=tmp_path / "run", device="cpu", resume=True)
    assert equal(end, read_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors")[0])


def test_arrays_and_datasets_are_passed_directly(tmp_path):
    digits = small_digits().read_train()
    recipe = replace(RECIPE, epochs=1, augment="none")
    pair = gsem.train(recipe, data=(digits.x, digits.y), out=tmp_path / "pair", device="cpu")
    items = torch.utils.data.TensorDataset(digits.x, digits.y)
    torch_ = gsem.train(recipe, data=items, out=tmp_path / "items", device="cpu")
    assert pair.metrics[0]["loss"] == torch_.metrics[0]["loss"]
    assert json.loads((tmp_path / "items" / "recipe.json").read_text())["data"]["name"] == "TensorDataset"
    for wrong, error in (((digits.x.float(), digits.y), ValueError), ([1, 2], TypeError)):
        with pytest.raises(error, match=r"x is float with values|data is list"):
            gsem.train(recipe, data=wrong, out=tmp_path / "wrong", device="cpu")
    assert not (tmp_path / "wrong").exists()
