import gzip
import os
import pickle
import tarfile
import warnings

import numpy as np
import pytest
import torch

from formats import CIFAR10, CIFAR100, pickled, write_cifar10, write_cifar100, write_pickles
from gsem.data import download, load

BATCH = {"labels": list(range(10)), "data": np.zeros((10, 3072), np.uint8)}
BATCHES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def fail(*_):
        raise OSError("no network in tests")

    monkeypatch.setattr(download, "_download", fail)


def write10(root, *, archive=True, **changed):
    """Batches of ten images; a change to None leaves the file out."""
    files = {name: f for name, f in (dict.fromkeys(BATCHES, BATCH) | changed).items() if f is not None}
    return write_pickles(root, CIFAR10, files, archive=archive)


def rows(*splits):
    return sorted((int(y), *x.flatten()[:50].tolist()) for s in splits for x, y in zip(s.x, s.y, strict=True))


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "folder"])
@pytest.mark.parametrize("keys", ["python2", "str", "bytes"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("deep", [False, True], ids=["in root", "in root/name"])
def test_images_are_what_was_written(tmp_path, name, keys, archive, deep):
    write = {"cifar10": write_cifar10, "cifar100": write_cifar100}[name]
    made = write(tmp_path / name if deep else tmp_path, keys=keys, archive=archive)
    before = sorted(tmp_path.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns at dtypes of Python 2
        source = load(name, tmp_path)
        train, held = source.training()
        test = source.test()
    assert torch.equal(test.x, made["test"].x)
    assert torch.equal(test.y, made["test"].y)
    assert rows(train, held) == rows(made["train"])
    assert torch.equal(source.read_train().x, made["train"].x)
    assert test.x.dtype == torch.uint8 and test.y.dtype == torch.int64
    assert test.x.is_contiguous()
    assert (source.name, source.shape) == (name, (3, 32, 32))
    assert (source.eps, source.padding, source.fill, source.flip) == (8 / 255, 4, 128, True)
    if name == "cifar10":
        assert source.classes[:3] == ("airplane", "automobile", "bird") and len(source.classes) == 10
    else:
        assert source.classes == tuple(f"fine-{k}" for k in range(100))
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked to the disk


def test_root_is_dataset_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = write_cifar10(tmp_path / "dataset")
    assert torch.equal(load("cifar10").test().x, made["test"].x)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_what_is_missing_is_named_at_once(tmp_path, name):
    with pytest.raises(FileNotFoundError) as raised:
        load(name, tmp_path / "none")
    file, folder = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    for part in (file, folder, f"https://www.cs.toronto.edu/~kriz/{file}", str(tmp_path / "none"), "no network"):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "folder"])
@pytest.mark.parametrize(("damaged", "own"), [("test_batch", "train"), ("data_batch_3", "test")])
def test_one_part_is_read_without_the_other(tmp_path, archive, damaged, own):
    write10(tmp_path, archive=archive, **{damaged: b"damaged"})
    source = load("cifar10", tmp_path)
    read = {"train": source.training, "test": source.test}
    read.pop(own)()
    with pytest.raises(ValueError, match=rf"{damaged} cannot be read, it is damaged"):
        next(iter(read.values()))()


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "folder"])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, "data_batch_2"),
        ({"labels": [0] * 10}, "has no data; its keys are: labels"),
        ({"data": BATCH["data"]}, "has no labels; its keys are: data"),
        ({}, "has no data; its keys are: none"),
        ([1, 2], "must hold a dictionary, not list"),
        (BATCH | {"data": [[0] * 3072] * 10}, "data is list, but must be an array of uint8"),
        (BATCH | {"data": np.zeros((10, 3072))}, "data is float64, but must be an array of uint8"),
        (BATCH | {"data": np.zeros((10, 1024), np.uint8)}, r"data has shape \[10, 1024\], but must be \[n, 3072\]"),
        (BATCH | {"data": np.zeros((0, 3072), np.uint8)}, r"data has shape \[0, 3072\]"),
        (BATCH | {"data": np.zeros((9, 3072), np.uint8)}, "data has 9 images, but labels has 10 labels"),
        (BATCH | {"labels": ["a"] * 10}, "labels must be integers"),
        (BATCH | {"labels": [0.5] * 10}, "labels must be integers"),
        (BATCH | {"labels": [[0], [0, 1]]}, "labels must be integers"),
        (BATCH | {"labels": 3}, "labels must be integers"),
        (BATCH | {"labels": [0] * 9 + [10]}, "labels has the label 10, but there are 10 classes"),
        (BATCH | {"labels": [-1] * 10}, "labels has the label -1"),
        (pickled(BATCH, "python2")[:-9], "cannot be read, it is damaged"),
        (b"", "cannot be read, it is damaged"),
    ],
)
def test_wrong_files_are_named_with_file_and_key(tmp_path, batch, message, archive):
    path = write10(tmp_path, archive=archive, data_batch_2=batch)
    source = load("cifar10", tmp_path)
    assert len(source.test()) == 10
    with pytest.raises(ValueError, match=message) as raised:
        source.training()
    assert str(path) in str(raised.value) and "data_batch_2" in str(raised.value)


@pytest.mark.parametrize("names", [None, ["a"] * 100, ["a"], "a", list(range(100)), [["a"]] * 100])
def test_names_of_cifar100_are_checked(tmp_path, names):
    write_pickles(tmp_path, CIFAR100, {"meta": {"fine_label_names": names} if names else {}})
    with pytest.raises(ValueError, match=r"cifar-100-python/meta.*fine_label_names"):
        load("cifar100", tmp_path)


def test_a_truncated_archive_is_named_wherever_it_ends(tmp_path):
    path = write10(tmp_path)
    whole = path.read_bytes()
    for end in (0, 5, 100, len(whole) // 2, len(whole) - 200, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:end])
        source = load("cifar10", tmp_path)
        for read in (source.training, source.test):
            with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz .*(damaged|no file)"):
                read()
    unpacked = gzip.decompress(whole)
    for end in (700, len(unpacked) // 2):  # packed again after it was cut
        path.write_bytes(gzip.compress(unpacked[:end]))
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz"):
            load("cifar10", tmp_path).training()


def test_a_flipped_bit_is_noticed(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / CIFAR10[0]
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(10, len(whole), 30):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz"):
            load("cifar10", tmp_path).training()


def test_damage_within_a_tar_or_pickle_is_a_value_error(tmp_path):
    small = {"labels": [1], "data": np.zeros((1, 3072), np.uint8)}
    path = write10(tmp_path, **{file: small for file in BATCHES})
    whole = gzip.decompress(path.read_bytes())
    random = np.random.default_rng(0)
    messages = []
    # Only bytes that are not zero: the others are pixels.
    for place in random.choice(np.flatnonzero(np.frombuffer(whole, np.uint8)), 200, replace=False):
        changed = bytearray(whole)
        changed[place] ^= 1 << random.integers(8)
        path.write_bytes(gzip.compress(bytes(changed), 1))
        try:
            load("cifar10", tmp_path).read_train()
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(str(path) in message for message in messages)


def test_links_and_strange_members_are_not_followed(tmp_path):
    (tmp_path / "secret").write_bytes(pickled(BATCH, "str"))
    with tarfile.open(tmp_path / CIFAR10[0], "w:gz") as tar:
        tar.add(tmp_path / "secret", "../escaped")
        tar.add(tmp_path / "secret", str(tmp_path / "absolute"))
        link = tarfile.TarInfo(f"{CIFAR10[1]}/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"has no file cifar-10-batches-py/test_batch"):
        load("cifar10", tmp_path).test()
    assert sorted(p.name for p in tmp_path.iterdir()) == [CIFAR10[0], "secret"]


def test_members_with_a_dot_are_found(tmp_path):
    folder = write10(tmp_path / "made", archive=False)
    with tarfile.open(tmp_path / CIFAR10[0], "w:gz") as tar:
        tar.add(folder, f"./{CIFAR10[1]}")
    assert len(load("cifar10", tmp_path).test()) == 10


class Calling:
    def __init__(self, call, *arguments):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "folder"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_a_command_is_refused(tmp_path, protocol, archive):
    touched = tmp_path / "touched"
    hostile = pickle.dumps(BATCH | {"data": Calling(os.system, f"touch {touched}")}, protocol)
    pickle.loads(hostile)
    assert touched.exists(), "the pickle is indeed hostile"
    touched.unlink()
    path = write10(tmp_path, archive=archive, data_batch_1=hostile)
    with pytest.raises(ValueError, match=r"data_batch_1 is refused, nothing executed: .*\.system") as raised:
        load("cifar10", tmp_path).training()
    assert str(path) in str(raised.value)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("pickled", "asked"),
    [
        (pickle.dumps(Calling(eval, "1")), r"builtins\.eval"),
        (pickle.dumps(Calling(eval, "1"), 2), r"__builtin__\.eval"),
        (pickle.dumps(Calling(np.load, "x")), r"numpy\.load"),
        (pickle.dumps(Calling(getattr, "x", "y")), r"builtins\.getattr"),
        (b"cnumpy.core.multiarray\nscalar\n.", r"numpy\.core\.multiarray\.scalar"),
        # Attributes of what is admitted: a dotted name.
        (b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", r"numpy\.dtype\.__init__"),
        (b"c_codecs\nlookup\n.", r"_codecs\.lookup"),
    ],
)
def test_only_arrays_are_admitted(tmp_path, pickled, asked):
    write10(tmp_path, test_batch=pickled)
    with pytest.raises(ValueError, match=f"test_batch is refused, nothing executed: it asks for {asked}"):
        load("cifar10", tmp_path).test()


def test_text_is_encoded_as_latin1_only(tmp_path):
    write10(tmp_path, test_batch=b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.")
    with pytest.raises(ValueError, match=r"test_batch cannot be read.*latin1, not rot13"):
        load("cifar10", tmp_path).test()
