import io
import zipfile

import numpy as np
import pytest
import torch

from gsem.cli.main import main
from gsem.data import load


def arrays(**changed):
    """Two classes, 8 training and 4 test images of 6 × 5; a change to None leaves the key out."""
    random = np.random.default_rng(0)
    made = {
        "x_train": random.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(8) % 2,
        "x_test": random.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(4) % 2,
    }
    return {key: a for key, a in (made | changed).items() if a is not None}


def write(folder, **changed):
    path = folder / "set.npz"
    np.savez(path, **arrays(**changed))
    return path


def read_all(path):
    source = load(str(path))
    return source.training(), source.test()


def replace_member(path, key, content):
    """The same archive with other bytes in one member."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members[f"{key}.npy"] = content
    with zipfile.ZipFile(path, "w") as new:
        for name, body in members.items():
            new.writestr(name, body)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("labels", [np.int64, np.uint8, np.dtype(">i4"), np.uint64])
def test_arrays_become_tensors(tmp_path, save, labels):
    made = arrays(y_test=np.array([0, 1, 1, 0], dtype=labels))
    save(tmp_path / "set.npz", **made)
    source = load("npz", root=tmp_path / "set.npz")
    assert source.name == "set"
    assert source.classes == ("0", "1")
    assert source.shape == (3, 6, 5)
    test = source.test()
    assert torch.equal(test.x, torch.from_numpy(made["x_test"]).permute(0, 3, 1, 2))
    assert test.y.tolist() == [0, 1, 1, 0]
    assert test.y.dtype == torch.int64


def test_keys_that_are_not_used_are_named(tmp_path, recwarn):
    load(str(write(tmp_path, classes=np.array(["cat", "dog"]))))
    assert not recwarn
    path = write(tmp_path, class_names=np.array(["cat", "dog"]), x_val=np.zeros(3))
    with pytest.warns(UserWarning, match=r"set\.npz: class_names, x_val are not used; arrays must be called x_train"):
        assert load(str(path)).classes == ("0", "1")
    with pytest.warns(UserWarning, match="X_test is not used"):
        load(str(write(tmp_path, X_test=np.zeros(3))))


@pytest.mark.filterwarnings("default")
def test_a_command_names_keys_that_are_not_used(tmp_path, capsys):
    assert main(["data", str(write(tmp_path, names=np.array(["cat", "dog"])))]) == 0
    err = capsys.readouterr().err
    assert err.startswith("gsem: ") and "names is not used" in err and err.count("\n") == 1


def test_old_and_new_header_versions_are_read(tmp_path):
    path = write(tmp_path)
    for version in ((1, 0), (2, 0), (3, 0)):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, arrays()["x_train"], version=version)
        replace_member(path, "x_train", buffer.getvalue())
        assert len(read_all(path)[1]) == 4


def test_three_axes_are_grey(tmp_path):
    made = arrays()
    path = write(tmp_path, x_train=made["x_train"][..., 0], x_test=made["x_test"][..., 0])
    assert load(str(path)).shape == (1, 6, 5)
    assert torch.equal(load(str(path)).test().x[:, 0], torch.from_numpy(made["x_test"][..., 0]))


def test_one_part_is_enough(tmp_path):
    source = load(str(write(tmp_path, x_train=None, y_train=None, y_test=np.array([0, 0, 4, 1]))))
    assert source.classes == tuple("01234")
    assert len(source.test()) == 4
    with pytest.raises(ValueError, match="set has no training part"):
        source.training()
    source = load(str(write(tmp_path, x_test=None, y_test=None)))
    assert sum(map(len, source.training())) == 8
    with pytest.raises(ValueError, match="set has no test part"):
        source.test()


@pytest.mark.parametrize(("own", "other"), [("train", "test"), ("test", "train")])
def test_one_part_is_read_without_the_other(tmp_path, own, other):
    path = write(tmp_path)
    with zipfile.ZipFile(path) as archive:
        body = archive.read(f"x_{other}.npy")
    replace_member(path, f"x_{other}", body[:-40])
    if other == "test":
        replace_member(path, "y_test", b"damaged")
    source = load(str(path))
    read = {"train": source.training, "test": source.test}
    read[own]()
    with pytest.raises(ValueError, match=rf"set\.npz: [xy]_{other} cannot be read, the file is damaged"):
        read[other]()


def test_classes_are_named(tmp_path):
    source = load(str(write(tmp_path, classes=np.array(["cat", "dog"]))))
    assert source.classes == ("cat", "dog")
    test_only = write(tmp_path, x_train=None, y_train=None, y_test=np.zeros(4, int), classes=np.array(["a", "b"]))
    assert load(str(test_only)).classes == ("a", "b")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(y_train=None), "has x_train but no y_train; its keys are: x_train, x_test, y_test"),
        (dict(x_test=None), "has y_test but no x_test; its keys are"),
        (dict.fromkeys(arrays()) | dict(images=np.zeros(3)), "neither x_train nor x_test; its keys are: images"),
        (dict.fromkeys(arrays()), "neither x_train nor x_test; its keys are: none"),
        (dict(x_train=np.zeros((8, 6, 5, 3))), "x_train is float64, but must be uint8 .*255 *"),
        (dict(x_train=np.zeros((8, 6, 5, 3), np.int64)), r"x_train is int64, but must be uint8 \(0 to 255\)$"),
        (dict(x_test=np.zeros((4, 6, 5, 3), np.float32)), "x_test is float32, but must be uint8"),
        (dict(x_train=np.zeros((8, 6), np.uint8)), r"x_train has shape \[8, 6\], but must be \[n, h, w, c\]"),
        (dict(x_train=np.zeros((8, 3, 32, 32), np.uint8)), "channels come last"),
        (dict(x_train=np.zeros((0, 6, 5, 3), np.uint8)), "x_train is empty"),
        (dict(x_test=np.zeros((4, 7, 5, 3), np.uint8)), r"x_test has images .*\(3, 7, 5\), but x_train has \(3, 6"),
        (dict(x_train=np.zeros((7, 6, 5, 3), np.uint8)), "x_train has 7 images, but y_train has 8 labels"),
        (dict(y_test=np.zeros(5, int)), "x_test has 4 images, but y_test has 5 labels"),
        (dict(y_train=np.zeros(8)), "y_train is float64, but labels must be integers"),
        (dict(y_test=np.zeros(4, bool)), "y_test is bool, but labels must be integers"),
        (dict(y_train=np.zeros((8, 1), int)), r"y_train has shape \[8, 1\], but must be \[n\]"),
        (dict(y_train=np.zeros(0, int)), "y_train is empty"),
        (dict(y_train=np.arange(8) - 1), "y_train has the label -1"),
        (dict(y_test=np.array([0, 1, 0, 2])), "y_test has the label 2, but there are 2 classes"),
        (dict(y_train=np.arange(8), classes=np.array(["a", "b"])), "y_train has the label 7, but there are 2"),
        (dict(y_train=np.arange(8) % 2 * 2), "y_train has no image of class 1$"),
        (dict(y_train=np.arange(8) % 2 + 1), r"y_train has no image of class 0: labels start at 0, by y - 1$"),
        (dict(x_train=np.ones((8, 6, 5, 3), np.uint8)), r"x_train holds no value above 1, .*\(255 \* x\)"),
        (dict(y_train=np.arange(8) % 2 + 10**12), "y_train has no image of class 0, 1, 2$"),
        (dict(classes=np.array(["a", "b", "c"])), r"y_train has no image of class 2 \(c\)"),
        (dict(classes=np.array([0, 1])), "classes is int64"),
        (dict(classes=np.array(["a", "a"])), "names a class twice"),
        (dict(x_train=np.array([None] * 8)), "x_train holds Python objects"),
        (dict(y_train=np.array([0, "a"] * 4, dtype=object)), "y_train holds Python objects"),
        (dict(classes=np.array(["a", "b"], dtype=object)), "classes holds Python objects"),
    ],
)
def test_wrong_arrays_are_named_with_file_and_key(tmp_path, changed, message):
    path = write(tmp_path, **changed)
    with pytest.raises(ValueError, match=message) as raised:
        read_all(path)
    assert str(path) in str(raised.value)


def test_damaged_files_are_named(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    bare = io.BytesIO()
    np.save(bare, np.zeros(3))
    for content in (b"", b"no archive", whole[: len(whole) // 2], bare.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"set\.npz is not an \.npz file, or is damaged"):
            load(str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_noticed(tmp_path, save):
    path = tmp_path / "set.npz"
    save(path, **arrays())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("x_train.npy")
    content = bytearray(path.read_bytes())
    content[member.header_offset + member.compress_size - 20] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.npz: x_train cannot be read, the file is damaged"):
        read_all(path)


def test_an_absurd_header_is_named(tmp_path):
    path = write(tmp_path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (8, 10**6, 10**6, 3)}
    )
    replace_member(path, "x_train", header.getvalue() + bytes(100))
    with pytest.raises(ValueError, match=r"x_train cannot be read, the file is damaged"):
        read_all(path)
