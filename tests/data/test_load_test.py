"""Test images as floats: `gsem.data.load_test`."""

import pytest
import torch

import gsem


def test_a_balanced_subset_is_that_of_the_evaluation():
    x, y = gsem.data.load_test("digits", n=50)
    test = gsem.data.load("digits").test()
    rows = gsem.data.balanced(test.y, 50)
    assert torch.equal(x, test.x[rows].float() / 255) and torch.equal(y, test.y[rows])
    assert x.dtype == torch.float32 and y.bincount().tolist() == [5] * 10


def test_by_default_all_images_in_their_order():
    x, y = gsem.data.load_test("digits")
    test = gsem.data.load("digits").test()
    assert torch.equal(x, gsem.data.to_float(test.x)) and torch.equal(y, test.y)


@pytest.mark.parametrize("n", [0, -1, True, 1.5, 10**6])
def test_a_wrong_number_of_images_is_refused(n):
    with pytest.raises(ValueError, match=r"n = 1000000|n must be"):
        gsem.data.load_test("digits", n=n)
