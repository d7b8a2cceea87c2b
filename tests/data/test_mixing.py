import numpy as np
import pytest
import torch

from gsem.data import mixed_order, read_extra

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 0, 2, 2])
CLASSES = ("a", "b", "c")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def write(path, **arrays):
    np.savez(path / "extra.npz", **arrays)
    return path / "extra.npz"


@pytest.mark.parametrize("keys", [("image", "label"), ("x_train", "y_train")])
def test_both_layouts_are_read(tmp_path, keys):
    path = write(tmp_path, **dict(zip(keys, (IMAGES, LABELS), strict=True)))
    extra = read_extra(path, (3, 5, 4), CLASSES)
    assert torch.equal(extra.x, torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    assert extra.y.tolist() == LABELS.tolist()
    assert (extra.x.dtype, extra.y.dtype) == (torch.uint8, torch.int64)
    assert len(read_extra(path, (3, 5, 4), [*CLASSES, "of which there is none"])) == 6


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "neither image and label nor x_train and y_train; its keys are: none"),
        ({"image": IMAGES}, "has image but no label; its keys are: image"),
        ({"label": LABELS}, "has label but no image"),
        ({"x_train": IMAGES}, "has x_train but no y_train"),
        ({"image": IMAGES / 255, "label": LABELS}, "image is float64, but must be uint8"),
        ({"image": IMAGES[..., 0], "label": LABELS}, r"image has images .* \(1, 5, 4\), but .* \(3, 5, 4\)"),
        ({"image": IMAGES.transpose(0, 3, 1, 2), "label": LABELS}, "image .*channels come last"),
        ({"image": IMAGES[:, :4], "label": LABELS}, r"image has images \(c, h, w\) \(3, 4, 4\)"),
        ({"image": IMAGES[:5], "label": LABELS}, "image has 5 images, but label has 6 labels"),
        ({"image": IMAGES, "label": LABELS.astype(float)}, "label is float64, but labels must be integers"),
        ({"image": IMAGES, "label": LABELS + 1}, "label has the label 3, but there are 3 classes"),
        ({"image": IMAGES, "label": LABELS - 1}, "label has the label -1"),
        ({"image": IMAGES[:0], "label": LABELS[:0]}, "image is empty"),
        ({"image": IMAGES, "label": np.array([0] * 6, object)}, "label holds Python objects"),
        ({"image": np.array([None] * 6), "label": LABELS}, "image holds Python objects"),
    ],
)
def test_wrong_files_are_named_with_file_and_key(tmp_path, arrays, message):
    path = write(tmp_path, **arrays)
    with pytest.raises(ValueError, match=message) as raised:
        read_extra(path, (3, 5, 4), CLASSES)
    assert str(path) in str(raised.value)


def test_a_missing_or_truncated_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.npz"):
        read_extra(tmp_path / "none.npz", (3, 5, 4), CLASSES)
    path = write(tmp_path, image=IMAGES, label=LABELS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"extra\.npz is not an \.npz file, or is damaged"):
        read_extra(path, (3, 5, 4), CLASSES)


@pytest.mark.parametrize(
    ("n_real", "n_extra", "batch", "share"),
    [(1000, 5000, 50, 0.7), (1000, 5000, 256, 0.7), (103, 40, 10, 0.8), (64, 1, 8, 0.5), (90, 7, 9, 1 / 3)],
)
def test_counts_of_an_epoch(n_real, n_extra, batch, share):
    real = round(batch * (1 - share))
    order = mixed_order(n_real, n_extra, batch, share, seeded())
    assert order.shape == (n_real // real, batch)
    assert order.dtype == torch.int64
    assert ((order < n_real).sum(1) == real).all()  # each batch has its share, no more and no less
    counts = torch.bincount(order.flatten(), minlength=n_real + n_extra)
    assert len(counts) == n_real + n_extra
    assert counts[:n_real].max() == 1 and counts[:n_real].sum() == n_real // real * real
    assert counts[n_real:].max() - counts[n_real:].min() <= 1  # none a second time before all once


def test_all_extra_images_are_drawn_before_one_is_drawn_again():
    order = mixed_order(100, 30, 4, 0.5, seeded())  # 50 steps of two: the extra images last for 15
    for start in (0, 15, 30):
        drawn = order[start : start + 15]
        assert sorted(drawn[drawn >= 100].tolist()) == list(range(100, 130))


def test_no_share_is_the_order_of_the_real_images_alone():
    order = mixed_order(103, 0, 10, 0, seeded(3))
    assert torch.equal(order, torch.randperm(103, generator=seeded(3))[:100].view(10, 10))
    assert torch.equal(order, mixed_order(103, 50, 10, 0.0, seeded(3)))


def test_real_and_extra_images_are_at_every_place_of_a_batch():
    order = mixed_order(10_000, 10_000, 10, 0.5, seeded())
    rate = (order >= 10_000).double().mean(0)
    assert (rate - 0.5).abs().max() < 5 * (0.25 / len(order)) ** 0.5


def test_the_order_is_fixed_by_the_generator_and_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    first, other = (mixed_order(100, 50, 10, 0.3, seeded(seed)) for seed in (1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, mixed_order(100, 50, 10, 0.3, seeded(1)))
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("n_real", "n_extra", "batch", "share", "message"),
    [
        (10, 10, 4, 1.0, r"must be in \[0, 1\), not 1\.0"),
        (10, 10, 4, -0.1, r"must be in \[0, 1\)"),
        (10, 10, 4, float("nan"), r"must be in \[0, 1\)"),
        (10, 10, 2, 0.9, "a batch of 2 with a share of 0.9 has no real image"),
        (10, 10, 4, 0.1, "a batch of 4 with a share of 0.1 has no extra image"),
        (10, 0, 4, 0.5, "the share of extra images is 0.5, but there are none"),
        (10, 10, 40, 0.5, "a batch has 20 real images, but there are 10"),
        (10, 10, 0, 0.0, "a batch of 0"),
    ],
)
def test_impossible_mixtures_are_named(n_real, n_extra, batch, share, message):
    with pytest.raises(ValueError, match=message):
        mixed_order(n_real, n_extra, batch, share)
