"""Data of every kind on the command line: described, trained on, evaluated on corrupted images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gsem.cli.main import main
from gsem.evaluation.result import EvaluationResult

SMALL = ["--model", "resnet10x16", "--adversarial-fraction", "0", "--epochs", "1", "--batch-size", "16"]


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder of two classes, dark and bright, in images of many sizes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 6)):
        for i in range(count):
            file = tmp_path / "mixed" / part / ("dark", "bright")[i % 2] / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            size = (8 + i % 3, 8 + i % 2, 3)
            Image.fromarray((rng.integers(0, 100, size) + 150 * (i % 2)).astype(np.uint8)).save(file)
    return tmp_path / "mixed"


def corrupted(root: Path, n: int = 10, side: int = 8) -> Path:
    """In CIFAR-10-C's layout, of the classes bright (0) and dark (1)."""
    root.mkdir()
    rng, y = np.random.default_rng(1), np.arange(n) % 2
    for name in ("fog", "snow"):
        x = rng.integers(0, 100, (5 * n, side, side, 3)) + 150 * (1 - np.tile(y, 5))[:, None, None, None]
        np.save(root / f"{name}.npy", x.astype(np.uint8))
    np.save(root / "labels.npy", np.tile(y, 5))
    return root


def test_data_of_mixed_sizes_are_described_trained_on_and_evaluated(mixed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "data", mixed)
    assert code == 2 and "--resize 9" in err and err.count("\n") == 1
    code, out, _ = run(capsys, "data", mixed, "--resize", 8)
    assert code == 0 and "images 3×8×8" in out and "training 22 and validation 2 images" in out and "held" in out
    words = ("--data", mixed, "--resize", 8, "--augment", "resized-crop", "--no-hold", "--out", "r", *SMALL)
    assert run(capsys, "train", "standard", *words)[0] == 0
    assert json.loads(Path("r/recipe.json").read_text())["recipe"]["resize"] == 8
    # The run's own images are resized as in its training.
    assert run(capsys, "evaluate", "r", "--attacks", "clean")[0] == 0
    assert EvaluationResult.load("r/evaluation").metadata["about"]["resize"] == 8
    assert run(capsys, "evaluate", "r", "--attacks", "clean", "--data", mixed, "--resize", 8, "--out", "e")[0] == 0
    code, _, err = run(capsys, "evaluate", "r", "--attacks", "clean", "--data", mixed, "--out", "f")
    assert code == 2 and "--resize" in err
    code, _, err = run(capsys, "evaluate", "r", "--attacks", "clean", "--resize", 8)
    assert code == 2 and "--resize goes with --data" in err

    folder = corrupted(tmp_path / "set-C")
    code, out, _ = run(capsys, "evaluate", "r", "--corruptions", folder)
    assert code == 0 and "saved in r/corruptions.json" in out
    found = json.loads(Path("r/corruptions.json").read_text())
    assert list(found["by_corruption"]) == ["fog", "snow"] and len(found["cells"]) == 10
    assert 0 <= found["mean_corruption_accuracy"] <= 1 and found["metadata"]["corruptions"] == str(folder)
    assert "saved in r/corruptions.json" in run(capsys, "evaluate", "r", "--corruptions", folder)[1]  # shown again
    assert "saved in r/corruptions-2.json" in run(capsys, "evaluate", "r", "--corruptions", folder, "--images", 4)[1]
    code, _, err = run(capsys, "evaluate", "r", "--corruptions", folder, "--suite", "quick")
    assert code == 2 and "leave out --suite" in err
    code, _, err = run(capsys, "evaluate", "r", "--corruptions", corrupted(tmp_path / "large-C", side=9))
    assert code == 2 and "but the model's are (3, 8, 8)" in err


def test_a_parquet_folder_without_images_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra parquet)")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    parquet.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), "texts/train.parquet")
    code, _, err = run(capsys, "train", "standard", "--data", "texts", "--out", "r")
    assert code == 2 and "texts/train.parquet has no column of images" in err and err.count("\n") == 1
    assert not Path("r").exists()
