"""Images that are read when they are asked for, and batches of them by worker processes."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from gsem._fingerprint import data_fingerprint
from gsem.data import Split, load, read_extra
from gsem.data.batches import Held, Streamed, batches_of
from gsem.data.dataset import held_or_not
from gsem.data.images import DamagedImage, Images, Joined, RowsOfFile

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()
CPU = torch.device("cpu")


def png_folder(root, n=30):
    for i in range(n):
        file = root / "train" / f"class{LABELS[i]}" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[i]).save(file)
    return root


def raw(tmp_path) -> RowsOfFile:
    (tmp_path / "raw").write_bytes(b"head" + PIXELS.tobytes())
    return RowsOfFile(tmp_path / "raw", 4, PIXELS.shape)


@pytest.mark.parametrize(
    "rows", [slice(None), slice(3, 20, 4), [5, 2, 2, -1], torch.tensor([7, 0]), torch.arange(30) % 3 == 1]
)
def test_rows_are_taken_as_of_a_tensor(tmp_path, rows):
    images = raw(tmp_path)
    assert images.shape == EXPECTED.shape and len(images) == 30
    assert torch.equal(images[rows], EXPECTED[rows])
    assert torch.equal(Split(images, torch.from_numpy(LABELS)).rows(rows).held(), EXPECTED[rows])


def test_views_of_joined_images_are_read_and_pickled(tmp_path):
    joined = Joined([raw(tmp_path), EXPECTED[:4], raw(tmp_path)])
    both = torch.cat([EXPECTED, EXPECTED[:4], EXPECTED])
    rows = torch.tensor([31, 2, 63, 30, 29, 34])
    assert torch.equal(joined.whole(), both)
    view = pickle.loads(pickle.dumps(joined.view(rows)))
    assert torch.equal(view[:], both[rows])
    assert torch.equal(view.view(torch.tensor([3, 0]))[:], both[rows[[3, 0]]])


def test_a_file_that_ends_early_is_named(tmp_path):
    images = raw(tmp_path)
    (tmp_path / "raw").write_bytes((tmp_path / "raw").read_bytes()[:-1])
    assert torch.equal(images[:29], EXPECTED[:29])
    with pytest.raises(DamagedImage, match=r"raw ends before image 29"):
        images[[3, 29]]


@pytest.mark.parametrize("kind", ["folder", "npz", "npy"])
def test_streamed_and_held_parts_are_the_same_images(tmp_path, kind):
    path = tmp_path / kind
    if kind == "folder":
        png_folder(path)
    else:
        np.savez(path.with_suffix(".npz"), x_train=PIXELS, y_train=LABELS)
        path = path.with_suffix(".npz")
    if kind == "npy":
        path = tmp_path / "arrays"
        path.mkdir()
        for key, array in (("x_train", PIXELS), ("y_train", LABELS)):
            np.save(path / f"{key}.npy", array)
    held, streamed = load(path, hold=True), load(path, hold=False)
    for one, other, unread in zip(held.training(3), streamed.training(3), (True, False), strict=True):
        assert isinstance(one.x, torch.Tensor)
        assert isinstance(other.x, Images) == unread
        assert torch.equal(one.x, other.held()) and torch.equal(one.y, other.y)
    whole, unread = held.whole_training(), streamed.whole_training()
    assert data_fingerprint((whole.x, whole.y)) == data_fingerprint((unread.x, unread.y))


def test_of_many_images_a_sample_is_hashed(tmp_path, monkeypatch):
    images, y = raw(tmp_path), torch.from_numpy(LABELS)
    monkeypatch.setattr("gsem._fingerprint.SAMPLED_ABOVE", 100)
    assert data_fingerprint((images, y)) == data_fingerprint((EXPECTED, y))
    other = EXPECTED.clone()
    other[17, 0, 0, 0] += 1  # of fewer than 1,000 all are in the sample
    assert data_fingerprint((images, y))["images"] != data_fingerprint((other, y))["images"]


def test_size_decides_what_is_held(tmp_path):
    part = Split(raw(tmp_path), torch.from_numpy(LABELS))
    assert isinstance(held_or_not(part, None, limit=PIXELS.size).x, torch.Tensor)
    assert held_or_not(part, None, limit=PIXELS.size - 1) is part
    assert isinstance(held_or_not(part, True, limit=0).x, torch.Tensor)


def test_compressed_arrays_are_held_or_refused_with_the_way_out(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x_train=PIXELS, y_train=LABELS)
    assert torch.equal(load(tmp_path / "a.npz").whole_training().x, EXPECTED)
    with pytest.raises(ValueError, match=r"a\.npz: x_train is compressed .*python -m zipfile -e .*a\.npz .*/a\)"):
        load(tmp_path / "a.npz", hold=False).training()
    np.savez(tmp_path / "b.npz", x_train=PIXELS // 255, y_train=LABELS)
    with pytest.raises(ValueError, match="x_train holds no value above 1"):
        load(tmp_path / "b.npz", hold=False).training()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_streamed_images_are_those_of_a_tensor(tmp_path, workers):
    y = torch.from_numpy(LABELS)
    rows = [torch.tensor(r) for r in ([3, 1], [29, 0], [5, 5], [8, 9], [7, 2])]
    before = torch.get_rng_state()
    held = list(Held(EXPECTED, y, CPU).batches(iter(rows)))
    streamed = list(Streamed(raw(tmp_path), y, CPU, workers).batches(iter(rows)))
    assert torch.equal(before, torch.get_rng_state())
    for (x, labels), (expected, others), picked in zip(streamed, held, rows, strict=True):
        assert torch.equal(x, expected) and torch.equal(x, EXPECTED[picked])
        assert torch.equal(labels, others) and torch.equal(labels, y[picked])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_raised_when_its_batch_is_due(tmp_path, workers):
    folder = png_folder(tmp_path / "images")
    part = load(folder, hold=False).whole_training()
    (folder / "train" / "class0" / "03.png").write_bytes(b"damaged")
    batches = Streamed(part.x, part.y, CPU, workers).batches(torch.tensor([[5], [4], [1]]))
    assert all(len(next(batches)[1]) == 1 for _ in range(2))
    with pytest.raises(DamagedImage, match=r"^\S*class0/03\.png is not an image"):
        next(batches)


def test_generated_images_of_several_files_are_joined_unread(tmp_path):
    for number, part in enumerate((slice(0, 10), slice(10, 25), slice(25, 30))):
        np.savez(tmp_path / f"{number}.npz", image=PIXELS[part], label=LABELS[part])
    extra = read_extra(tmp_path, (3, 6, 5), "abc", hold=False)
    assert isinstance(extra.x, Images)
    assert torch.equal(extra.x[:], EXPECTED) and extra.y.tolist() == LABELS.tolist()
    assert torch.equal(read_extra(tmp_path, (3, 6, 5), "abc").x, EXPECTED)
    both = batches_of([Split(EXPECTED[:5], extra.y[:5]), extra], CPU)
    assert isinstance(both, Streamed) and len(both) == 35
    [(x, y)] = both.batches([torch.tensor([0, 34, 6])])
    assert torch.equal(x, EXPECTED[[0, 29, 1]]) and y.tolist() == LABELS[[0, 29, 1]].tolist()
    np.savez(tmp_path / "3.npz", image=PIXELS[:4, :5], label=LABELS[:4])
    with pytest.raises(ValueError, match=r"3\.npz: image has images .* \(3, 5, 5\), but the real ones are \(3, 6, 5\)"):
        read_extra(tmp_path, (3, 6, 5), "abc")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none holds neither \.npz files, nor image\.npy"):
        read_extra(tmp_path / "none", (3, 6, 5), "abc")


def test_only_the_rows_that_are_asked_for_are_read_of_a_huge_file(tmp_path):
    # A sparse file that no memory would hold: 64 GiB of zeros with one image written.
    n, item = 64 * 2**30 // PIXELS[0].size, PIXELS[0].size
    folder = tmp_path / "huge"
    folder.mkdir()
    with open(folder / "image.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, 6, 5, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.seek(start + 7 * item)
        file.write(PIXELS[0].tobytes())
        file.truncate(start + n * item)
    images = RowsOfFile(folder / "image.npy", start, (n, 6, 5, 3))
    assert torch.equal(images[[7]], EXPECTED[:1])
    assert int(images[[n - 1]].max()) == 0
