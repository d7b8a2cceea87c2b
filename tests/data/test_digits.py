import torch
from sklearn.datasets import load_digits

from gsem.data import load


def rows(x: torch.Tensor) -> list[tuple[int, ...]]:
    return sorted(tuple(row) for row in x.flatten(1).tolist())


def test_digits_are_scikit_learns_in_255ths():
    source = load("digits")
    train, held = source.training()
    test = source.test()
    assert (len(train), len(held), len(test)) == (1297 - len(held), 120, 500)
    assert source.classes == tuple("0123456789")
    assert (source.eps, source.padding, source.fill, source.flip) == (0.15, 1, 0, False)
    assert source.shape == tuple(test.x.shape[1:]) == (1, 8, 8)
    assert test.x.dtype == torch.uint8
    assert test.y.dtype == torch.int64
    # Together the three splits are the data set, each image once.
    values = [round(v * 255 / 16) for v in range(17)]
    original = torch.tensor([[values[int(v)] for v in image.flatten()] for image in load_digits().images])
    assert rows(torch.cat([train.x, held.x, test.x])) == rows(original)


def test_digits_test_part_is_balanced_and_the_same_for_every_seed():
    a, b = load("digits"), load("digits")
    before = torch.get_rng_state()
    a.training(1)
    b.training(2)
    assert torch.equal(a.test().x, b.test().x)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.bincount(a.test().y).tolist() == [50] * 10
    assert torch.bincount(a.training(1)[1].y).tolist() == [12] * 10
