import pytest
import torch

from gsem.data import Dataset, Split
from gsem.data.dataset import crop_padding, held_out, validation_per_class


def source_of(y: list[int], classes: int) -> Dataset:
    labels = torch.tensor(y)
    x = torch.arange(len(y), dtype=torch.uint8).view(-1, 1, 1, 1)  # every image holds its place
    return Dataset(
        name="made",
        classes=tuple(f"class-{k}" for k in range(classes)),
        shape=(1, 1, 1),
        eps=0.1,
        padding=1,
        fill=0,
        flip=False,
        description="",
        read_train=lambda: Split(x, labels),
    )


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_training_and_validation_partition_the_part(seed):
    source = source_of([k % 4 for k in range(200)], 4)
    train, held = source.training(seed)
    assert len(train) == 180
    assert torch.bincount(held.y).tolist() == [5, 5, 5, 5]
    assert sorted([*train.x.flatten().tolist(), *held.x.flatten().tolist()]) == list(range(200))
    for split in (train, held):
        assert torch.equal(split.x.flatten().long() % 4, split.y)
        assert split.x.flatten().tolist() == sorted(split.x.flatten().tolist())  # order is kept


def test_validation_is_fixed_by_the_seed_and_leaves_the_random_state_alone():
    source = source_of([k % 4 for k in range(200)], 4)
    before = torch.get_rng_state()
    held = source.training(3)[1].x
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(held, source.training(3)[1].x)
    assert not torch.equal(held, source.training(4)[1].x)
    assert torch.equal(source.training()[1].x, source.training(0)[1].x)


@pytest.mark.parametrize(
    ("counts", "per_class"),
    [
        ([5000] * 10, 100),  # at most 1,000 in all
        ([500] * 100, 10),
        ([130, 130], 13),  # a tenth of 260, shared by 2
        ([40, 60, 70], 5),  # 17 // 3
        ([3, 3, 3], 1),  # at least 1
        ([200, 6], 3),  # at most half of the smallest class
        ([2, 500], 1),
    ],
)
def test_validation_size(counts, per_class):
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert validation_per_class(y, [str(k) for k in range(len(counts))]) == per_class


def test_a_class_of_one_image_is_named():
    with pytest.raises(ValueError, match=r"'class-1' \(label 1\) has 1 training image: at least 2"):
        source_of([0, 0, 1, 2, 2], 3).training()
    with pytest.raises(ValueError, match=r"'class-2' \(label 2\) has 0 training images"):
        source_of([0, 0, 1, 1], 3).training()


def test_held_out_is_uniform_within_a_class():
    y = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    rate = torch.stack([held_out(y, 1, seed) for seed in range(2000)]).float().mean(0)
    expected = torch.where(y == 0, 1 / 4, 1 / 3)
    assert torch.allclose(rate, expected, atol=5 * (0.25 / 2000) ** 0.5)


def test_absent_parts_are_named():
    source = source_of([0, 0], 1)
    with pytest.raises(ValueError, match="made has no test part"):
        source.test()
    empty = Dataset("made", ("a",), (1, 1, 1), 0.1, 1, 0, False, "")
    with pytest.raises(ValueError, match="made has no training part"):
        empty.training()


def test_split_length_and_device():
    split = Split(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    assert len(split) == 3
    moved = split.to("meta")
    assert moved.x.device.type == moved.y.device.type == "meta"


def test_crop_padding_is_in_proportion():
    assert [crop_padding(h) for h in (4, 8, 28, 32, 64, 224)] == [1, 1, 3, 4, 8, 28]
