import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gsem.data import load


def noise(side=8, channels=3, seed=0):
    shape = (side, side, channels) if channels > 1 else (side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path)


def make(root, channels=3, parts=("train", "test"), count=4):
    """Classes cat and dog; returns {part: (images, labels)} in the order in which they should be read."""
    made = {}
    for p, part in enumerate(parts):
        arrays, labels = [], []
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                arrays.append(noise(channels=channels, seed=1000 * p + 100 * label + i))
                labels.append(label)
                save(root / part / name / f"{i:03}.png", arrays[-1])
        made[part] = (np.stack(arrays), np.array(labels))
    return made


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_and_npz_of_the_same_images_are_equal(tmp_path, channels):
    made = make(tmp_path / "images", channels)
    arrays = {f"{k}_{part}": a for part, both in made.items() for k, a in zip("xy", both, strict=True)}
    np.savez(tmp_path / "arrays.npz", classes=np.array(["cat", "dog"]), **arrays)
    folder, npz = load(str(tmp_path / "images")), load(str(tmp_path / "arrays.npz"))
    assert folder.classes == npz.classes == ("cat", "dog")
    assert folder.shape == npz.shape == (channels, 8, 8)
    assert (folder.eps, folder.padding, folder.fill, folder.flip) == (8 / 255, 1, 128, True)
    pairs = zip((*folder.training(5), folder.test()), (*npz.training(5), npz.test()), strict=True)
    for a, b in pairs:
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
        assert a.x.dtype == torch.uint8
        assert a.x.is_contiguous()
        assert b.x.is_contiguous()
    expected = torch.from_numpy(made["test"][0].reshape(8, 8, 8, channels)).permute(0, 3, 1, 2)
    assert torch.equal(folder.test().x, expected)


def test_many_large_images_come_in_order(tmp_path):
    # Large enough for several threads, and more than one chunk of files.
    for i in range(150):
        save(tmp_path / "test" / "a" / f"{i:03}.png", np.full((96, 96), i, np.uint8))
    x = load(str(tmp_path)).test().x
    assert torch.equal(x[:, 0, 0, 0], torch.arange(150, dtype=torch.uint8))


def test_training_never_opens_test_files_nor_the_other_way_round(tmp_path):
    make(tmp_path)
    (tmp_path / "test" / "cat" / "000.png").write_bytes(b"damaged")
    source = load(str(tmp_path))
    source.training()
    with pytest.raises(ValueError, match=r"test/cat/000\.png is not an image"):
        source.test()
    make(tmp_path)
    (tmp_path / "train" / "dog" / "003.png").write_bytes(b"damaged")
    source = load(str(tmp_path))
    assert len(source.test()) == 8
    with pytest.raises(ValueError, match=r"train/dog/003\.png"):
        source.training()


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_part_is_enough(tmp_path, part):
    make(tmp_path, parts=(part,))
    source = load("folder", root=tmp_path)
    assert source.classes == ("cat", "dog")
    with pytest.raises(ValueError, match="has no"):
        source.training() if part == "test" else source.test()


def test_one_image_in_colour_makes_all_rgb(tmp_path):
    make(tmp_path, channels=1)
    assert load(str(tmp_path)).shape == (1, 8, 8)
    save(tmp_path / "train" / "dog" / "zzz.png", noise())
    source = load(str(tmp_path))
    assert source.shape == (3, 8, 8)
    expected = torch.from_numpy(noise(channels=1, seed=1000)).expand(3, 8, 8)
    assert torch.equal(source.test().x[0], expected)


def test_alpha_is_dropped_and_palettes_and_bits_are_read(tmp_path):
    rgb = noise()
    alpha = np.dstack([rgb, noise(channels=1, seed=9)])
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    save(tmp_path / "train" / "a" / "0.png", alpha)
    palette.save(tmp_path / "train" / "a" / "1.png", transparency=bytes(range(64)))
    save(tmp_path / "test" / "a" / "0.png", Image.fromarray(rgb[..., 0] > 127))
    source = load(str(tmp_path))
    x = torch.cat([split.x for split in source.training()])
    assert {tuple(i.flatten().tolist()) for i in x} == {
        tuple(rgb.transpose(2, 0, 1).flatten().tolist()),
        tuple(np.tile(np.arange(64), 3).tolist()),
    }
    assert torch.equal(source.test().x[0, 0], torch.from_numpy(np.where(rgb[..., 0] > 127, 255, 0)).byte())


def test_bits_alone_are_grey(tmp_path):
    save(tmp_path / "test" / "a" / "0.png", Image.fromarray(noise(channels=1) > 127))
    source = load(str(tmp_path))
    assert source.shape == (1, 8, 8)
    assert source.test().x.unique().tolist() == [0, 255]


def test_hidden_files_are_passed_over(tmp_path):
    make(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "cat/.DS_Store", "dog/Thumbs.db", "dog/desktop.ini"):
        (tmp_path / "train" / name).write_bytes(b"x")
    (tmp_path / "train" / ".cache").mkdir()
    assert sum(map(len, load(str(tmp_path)).training())) == 8


def test_a_truncated_image_is_named(tmp_path):
    make(tmp_path)
    whole = io.BytesIO()
    Image.fromarray(noise(side=8)).save(whole, "jpeg")
    for missing in (20, 400):  # of the pixels, of the header
        (tmp_path / "train" / "cat" / "zzz.jpg").write_bytes(whole.getvalue()[:-missing])
        with pytest.raises(ValueError, match=r"train/cat/zzz\.jpg cannot be used: (?i:.*truncated)"):
            load(str(tmp_path)).training()
    (tmp_path / "train" / "cat" / "zzz.jpg").unlink()
    png = tmp_path / "train" / "dog" / "001.png"
    png.write_bytes(png.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"train/dog/001\.png"):
        load(str(tmp_path)).training()


def test_of_several_bad_files_the_first_is_named(tmp_path):
    make(tmp_path, count=200)
    for name in ("cat/150.png", "dog/003.png", "dog/190.png"):
        (tmp_path / "train" / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"train/cat/150\.png"):
        load(str(tmp_path)).training()


def test_a_file_that_is_no_image_is_named(tmp_path):
    make(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("which cats")
    with pytest.raises(ValueError, match=r"cat/notes\.txt is not an image"):
        load(str(tmp_path)).training()


def test_mixed_sizes_name_both_files(tmp_path):
    make(tmp_path)
    save(tmp_path / "train" / "dog" / "002.png", np.zeros((9, 7, 3), np.uint8))
    with pytest.raises(ValueError, match=r"dog/002\.png.* 7 × 9 pixels, while .*train/cat/000\.png is 8 × 8"):
        load(str(tmp_path)).training()


def test_a_test_part_must_look_like_the_training_part(tmp_path):
    make(tmp_path, channels=1)
    save(tmp_path / "test" / "dog" / "001.png", noise())
    with pytest.raises(ValueError, match=r"test/dog/001\.png .*in colour .*training images are grey"):
        load(str(tmp_path)).test()


def sixteen_bit_colour_png() -> bytes:
    """Pillow reads such a file (as 8 bits) but does not write one, so it is put together here."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(8 * 6) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    make(tmp_path)
    bad = tmp_path / "train" / "cat" / "deep.png"
    save(bad, Image.fromarray(np.zeros((8, 8), np.uint16)))
    with pytest.raises(ValueError, match=r"deep\.png cannot be used: it has more than 8-bit values \(mode I"):
        load(str(tmp_path)).training()
    bad.write_bytes(sixteen_bit_colour_png())
    with pytest.raises(ValueError, match=r"deep\.png cannot be used: it has more than 8-bit values"):
        load(str(tmp_path)).training()
    bad.unlink()
    save(tmp_path / "train" / "cat" / "float.tiff", Image.fromarray(np.zeros((8, 8), np.float32)))
    with pytest.raises(ValueError, match=r"float\.tiff cannot be used: it has float values \(mode F\)"):
        load(str(tmp_path)).training()


def test_what_is_wrong_with_the_folders_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither a train nor a test folder"):
        load("folder", root=tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train has no class folders"):
        load("folder", root=tmp_path)
    make(tmp_path)
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"different classes \(only in train: emu\)"):
        load("folder", root=tmp_path)
    (tmp_path / "test" / "fox").mkdir()
    with pytest.raises(ValueError, match=r"\(only in train: emu; only in test: fox\)"):
        load("folder", root=tmp_path)
    (tmp_path / "test" / "fox").rmdir()
    (tmp_path / "test" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*train/emu is empty"):
        load("folder", root=tmp_path)
    save(tmp_path / "train" / "emu" / "0.png", noise())
    with pytest.raises(ValueError, match=r"class folder .*test/emu is empty"):
        load("folder", root=tmp_path).test()
    (tmp_path / "train" / "emu" / "more").mkdir()
    with pytest.raises(ValueError, match=r"emu/more is a folder"):
        load("folder", root=tmp_path)
    save(tmp_path / "train" / "stray.png", noise())
    with pytest.raises(ValueError, match=r"train/stray\.png is in no class"):
        load("folder", root=tmp_path)


def test_a_class_of_one_image_cannot_be_validated(tmp_path):
    make(tmp_path, count=1)
    with pytest.raises(ValueError, match=r"class 'cat' .* has 1 training image"):
        load(str(tmp_path)).training()
