import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsem.data import crop_flip, to_float


def reference(x, padding, flip, fill, generator):
    """crop_flip as in its docstring, image by image."""
    b, _, h, w = x.shape
    rows, columns = torch.randint(2 * padding + 1, (2, b), generator=generator).tolist()
    mirrored = torch.randint(2, (b, 1), generator=generator).flatten().tolist() if flip else [0] * b
    out = []
    for image, row, column, mirror in zip(x, rows, columns, mirrored, strict=True):
        large = torch.full((x.shape[1], h + 2 * padding, w + 2 * padding), fill, dtype=torch.uint8)
        large[:, padding : padding + h, padding : padding + w] = image
        crop = large[:, row : row + h, column : column + w]
        out.append(crop.flip(2) if mirror else crop)
    return torch.stack(out)


def images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    padding=st.integers(0, 5),
    flip=st.booleans(),
    fill=st.integers(0, 255),
    seed=st.integers(0, 2**31),
)
def test_crop_flip_equals_the_reference(shape, padding, flip, fill, seed):
    x = images(*shape, seed=seed)
    out = crop_flip(x, padding=padding, flip=flip, fill=fill, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(out, reference(x, padding, flip, fill, torch.Generator().manual_seed(seed)))
    assert out.is_contiguous()


def test_every_crop_and_flip_is_equally_frequent():
    # Nine crops, each as it is or mirrored: 18 different results, 1,000 times each on average.
    x = images(1, 1, 4, 4).expand(18000, 1, 4, 4)
    out = crop_flip(x, padding=1, flip=True, generator=torch.Generator().manual_seed(0))
    kinds, counts = torch.unique(out.flatten(1), dim=0, return_counts=True)
    assert len(kinds) == 18
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_memory_format_is_kept():
    x = images(5, 3, 8, 6).contiguous(memory_format=torch.channels_last)
    out = crop_flip(x, padding=2, flip=True, generator=torch.Generator().manual_seed(1))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, reference(x, 2, True, 0, torch.Generator().manual_seed(1)))


def test_a_generator_leaves_the_random_state_alone_and_the_input_too():
    x = images(4, 3, 8, 8)
    kept, before = x.clone(), torch.get_rng_state()
    crop_flip(x, padding=2, flip=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(x, kept)
    assert torch.equal(crop_flip(x, padding=0, flip=False), x)


def test_an_empty_batch_stays_empty():
    assert crop_flip(images(0, 3, 8, 8), padding=1, flip=True).shape == (0, 3, 8, 8)


def test_crop_flip_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="float32"):
        crop_flip(torch.zeros(1, 1, 2, 2), padding=1, flip=True)
    with pytest.raises(ValueError, match=r"\[1, 2, 2\]"):
        crop_flip(images(1, 2, 2), padding=1, flip=True)
    with pytest.raises(ValueError, match="padding"):
        crop_flip(images(1, 1, 2, 2), padding=-1, flip=True)
    with pytest.raises(ValueError, match="fill"):
        crop_flip(images(1, 1, 2, 2), padding=1, flip=True, fill=256)


def test_to_float_is_division_by_255():
    x = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_float(x), torch.tensor([v / 255 for v in range(256)]))
    assert to_float(x).dtype == torch.float32
    with pytest.raises(ValueError, match="int64"):
        to_float(torch.arange(3))
