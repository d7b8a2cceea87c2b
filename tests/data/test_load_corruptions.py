"""CIFAR-10-C's arrays and ImageNet-C's folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from gsem.data import load_corruptions

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 1])


def arrays(root, repeats=5, **changed):
    root.mkdir(exist_ok=True)
    made = {"fog": PIXELS, "blur": PIXELS[::-1].copy(), "labels": np.tile(LABELS, repeats)} | changed
    for key, array in made.items():
        if array is not None:
            np.save(root / f"{key}.npy", array)
    return root


def folders(root, classes=("ant", "bee"), deeper=False):
    for c, corruption in enumerate(("fog", "snow")):
        for severity in (1, 3):
            for label, name in enumerate(classes):
                folder = (root / "weather" if deeper else root) / corruption / str(severity) / name
                folder.mkdir(parents=True)
                Image.fromarray(PIXELS[8 * c + 4 * (severity == 3) + label]).save(folder / "1.png")
    return root


@pytest.mark.parametrize("labels", [1, 5])
def test_severities_are_blocks_of_the_arrays(tmp_path, labels):
    found = load_corruptions(arrays(tmp_path / "c", labels), classes=("a", "b", "c"), shape=(3, 6, 5))
    assert list(found) == [(name, s) for name in ("blur", "fog") for s in range(1, 6)]
    for (name, severity), split in found.items():
        pixels = PIXELS if name == "fog" else PIXELS[::-1]
        expected = torch.from_numpy(pixels[4 * severity - 4 : 4 * severity].copy()).permute(0, 3, 1, 2)
        assert torch.equal(split.x[:], expected) and split.y.tolist() == LABELS.tolist()


@pytest.mark.parametrize("deeper", [False, True])
def test_folders_by_corruption_severity_and_class(tmp_path, deeper):
    found = load_corruptions(folders(tmp_path, deeper=deeper), classes=("bee", "ant"))
    assert list(found) == [("fog", 1), ("fog", 3), ("snow", 1), ("snow", 3)]
    snow = found["snow", 3]
    assert snow.y.tolist() == [0, 1]  # labels are the model's, not those of the sorted folders
    assert torch.equal(snow.x[:], torch.from_numpy(PIXELS[[13, 12]]).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("changed", "how", "message"),
    [
        ({"labels": None}, {}, r"has no labels\.npy; its files are: blur\.npy, fog\.npy"),
        ({"labels": LABELS / 1.0}, {}, "labels is float64, but labels must be integers"),
        ({"labels": LABELS[:3]}, {}, r"blur\.npy has 20 images and labels\.npy 3 labels"),
        ({"fog": PIXELS[:19]}, {}, r"fog\.npy has 19 images"),
        ({"fog": PIXELS / 255}, {}, r"fog is float64, but must be uint8"),
        ({"fog": np.asfortranarray(PIXELS)}, {}, r"fog\.npy is stored by columns"),
        (
            {},
            {"shape": (3, 32, 32)},
            r"blur\.npy has images \(c, h, w\) \(3, 6, 5\), but the model's are \(3, 32, 32\)",
        ),
        ({}, {"classes": ("a", "b")}, r"labels\.npy has the label 2, but there are 2 classes"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, changed, how, message):
    with pytest.raises(ValueError, match=message):
        load_corruptions(arrays(tmp_path, **changed), **how)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        load_corruptions(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no corruptions: neither CORRUPTION"):
        load_corruptions(tmp_path / "empty")
    root = folders(tmp_path / "c")
    with pytest.raises(ValueError, match=r"fog/1 has other classes .*\(not there: cow; unknown: ant\)"):
        load_corruptions(root, classes=("bee", "cow"))
    found = load_corruptions(root, shape=(3, 32, 32))
    with pytest.raises(ValueError, match=r"fog/1/ant/1\.png cannot be used: it is 5 × 6"):
        found["fog", 1].x[:]
