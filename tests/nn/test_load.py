import pytest
import torch

import gsem
from gsem._io import read_checkpoint, save_checkpoint, write_atomically
from gsem.nn.load import load_model
from gsem.training.recipes import RECIPES
from gsem.training.run import model_meta


def test_tensors_and_facts_come_back(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)}
    save_checkpoint(tmp_path / "c.safetensors", tensors, {"x": [1, "two"]})
    back, meta = read_checkpoint(tmp_path / "c.safetensors")
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)
    assert meta == {"x": [1, "two"]}


def test_a_failed_write_keeps_the_former_content(tmp_path, monkeypatch):
    file = tmp_path / "f"
    write_atomically(file, b"former")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("gsem._io.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"former"


def test_a_checkpoint_rebuilds_its_model(tmp_path):
    recipe = RECIPES["gcat"]
    model = gsem.create_model(recipe.model, num_classes=3, in_channels=1).eval()
    meta = model_meta(recipe, classes=("a", "b", "c"), shape=(1, 8, 8), eps=0.1)
    weights = {f"model.{k}": v for k, v in model.state_dict().items()}
    save_checkpoint(tmp_path / "c.safetensors", weights, meta)
    loaded, meta = load_model(tmp_path / "c.safetensors")
    x = torch.rand(2, 1, 8, 8)
    with gsem.noise(model, "off"), gsem.noise(loaded, "off"):
        assert torch.equal(loaded(x), model(x))
    assert not loaded.training
    assert meta["data"]["classes"] == ["a", "b", "c"]


def test_averaged_weights_are_the_model_of_a_last_checkpoint(tmp_path):
    recipe = RECIPES["gcat"]
    raw, average = (gsem.create_model(recipe.model, in_channels=1) for _ in range(2))
    tensors = {f"{part}.{k}": v for part, m in (("model", raw), ("ema", average)) for k, v in m.state_dict().items()}
    save_checkpoint(
        tmp_path / "last.safetensors",
        tensors,
        model_meta(recipe, classes=tuple("0123456789"), shape=(1, 8, 8), eps=0.1),
    )
    loaded, _ = load_model(tmp_path / "last.safetensors")
    assert torch.equal(loaded.conv1.weight, average.conv1.weight)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    file = tmp_path / "c.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.safetensors"):
        load_model(file)


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        load_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"gone\.pt"):
        load_model(tmp_path / "gone.pt")
