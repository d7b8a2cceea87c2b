import numpy as np
import pytest
import torch
from scipy.io import savemat

from formats import write_svhn
from gsem.data import download, load

X = np.zeros((32, 32, 3, 10), np.uint8)
Y = np.arange(1, 11, dtype=np.uint8)[:, None]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def fail(*_):
        raise OSError("no network in tests")

    monkeypatch.setattr(download, "_download", fail)


@pytest.mark.parametrize("deep", [False, True], ids=["in root", "in root/svhn"])
def test_images_are_what_was_written(tmp_path, deep):
    made = write_svhn(tmp_path / "svhn" if deep else tmp_path)
    source = load("svhn", tmp_path)
    for part, split in (("train", source.read_train()), ("test", source.test())):
        assert torch.equal(split.x, made[part].x)
        assert torch.equal(split.y, made[part].y)
        assert split.x.dtype == torch.uint8 and split.y.dtype == torch.int64
        assert split.x.is_contiguous()
    assert sum(map(len, source.training())) == 40
    assert source.classes == tuple("0123456789")
    assert (source.name, source.shape) == ("svhn", (3, 32, 32))
    assert (source.eps, source.padding, source.fill, source.flip) == (8 / 255, 4, 128, True)


def test_label_10_is_digit_0_and_matlabs_axes_are_turned(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, X.shape, dtype=np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": x, "y": Y})
    test = load("svhn", tmp_path).test()
    assert test.y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert test.x[7, 2, 30, 4] == x[30, 4, 2, 7]


def test_root_is_dataset_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_svhn(tmp_path / "dataset")
    assert len(load("svhn").test()) == 20


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_file_is_named_and_the_other_not_opened(tmp_path, part):
    write_svhn(tmp_path)
    (tmp_path / f"{part}_32x32.mat").unlink()
    source = load("svhn", tmp_path)
    (source.test if part == "train" else source.training)()
    with pytest.raises(FileNotFoundError) as raised:
        (source.training if part == "train" else source.test)()
    file = f"{part}_32x32.mat"
    for words in (file, f"http://ufldl.stanford.edu/housenumbers/{file}", f"put it into {tmp_path}", "no network"):
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": X}, "has no array y"),
        ({"y": Y}, "has no array X"),
        ({"X": X.astype(float), "y": Y}, "X is float64"),
        ({"X": X.transpose(3, 0, 1, 2), "y": Y}, r"X is uint8 \[10, 32, 32, 3\], but must be .*\[32, 32, 3, n\]"),
        ({"X": X[..., :0], "y": Y[:0]}, "X is uint8"),
        ({"X": X, "y": Y[:9]}, "X has 10 images, but y has 9 labels"),
        ({"X": X, "y": Y.astype(float) / 2}, r"y is float64 \[10, 1\], but must be integers"),
        ({"X": X, "y": Y.reshape(5, 2)}, r"y is uint8 \[5, 2\]"),
        ({"X": X, "y": Y + 1}, "y has labels from 2 to 11"),
        ({"X": X, "y": -Y.astype(int)}, "y has labels from -10 to -1"),
    ],
)
def test_wrong_arrays_are_named_with_file_and_key(tmp_path, arrays, message):
    path = tmp_path / "test_32x32.mat"
    savemat(path, arrays)
    with pytest.raises(ValueError, match=message) as raised:
        load("svhn", tmp_path).test()
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path, compressed):
    path = tmp_path / "train_32x32.mat"
    savemat(
        path,
        {"X": np.random.default_rng(0).integers(0, 256, X.shape, dtype=np.uint8), "y": Y},
        do_compression=compressed,
    )
    whole = path.read_bytes()
    for end in (0, 1, 60, 127, 130, 150, 200, len(whole) // 2, len(whole) - 60, len(whole) - 30, len(whole) - 8):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"train_32x32\.mat"):
            load("svhn", tmp_path).training()


def test_a_file_of_another_kind_is_named(tmp_path):
    for content in (b"<html>not here</html>" * 100, b"\x89HDF\r\n\x1a\n" + bytes(600)):
        (tmp_path / "test_32x32.mat").write_bytes(content)
        with pytest.raises(ValueError, match=r"test_32x32\.mat cannot be read, it is not a MATLAB file or is damaged"):
            load("svhn", tmp_path).test()
