"""Every operation, and the policy as a whole, against Pillow image by image; Cutout against a loop."""

import platform
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from gsem.data import autoaugment
from gsem.data.autoaugment import auto_augment, cutout

NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC


def affine(image, matrix, how, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=(fill,) * 3)


PILLOW = {
    "shear_x": lambda im, m, fill: affine(im, (1, m, 0, 0, 1, 0), BICUBIC, fill),
    "shear_y": lambda im, m, fill: affine(im, (1, 0, 0, m, 1, 0), BICUBIC, fill),
    "translate_x": lambda im, m, fill: affine(im, (1, 0, m * im.width, 0, 1, 0), NEAREST, fill),
    "translate_y": lambda im, m, fill: affine(im, (1, 0, 0, 0, 1, m * im.height), NEAREST, fill),
    "rotate": lambda im, m, fill: im.rotate(m, NEAREST, fillcolor=(fill,) * 3),
    "brightness": lambda im, m, fill: ImageEnhance.Brightness(im).enhance(m),
    "color": lambda im, m, fill: ImageEnhance.Color(im).enhance(m),
    "contrast": lambda im, m, fill: ImageEnhance.Contrast(im).enhance(m),
    "sharpness": lambda im, m, fill: ImageEnhance.Sharpness(im).enhance(m),
    "posterize": lambda im, m, fill: ImageOps.posterize(im, int(m)),
    "solarize": lambda im, m, fill: ImageOps.solarize(im, m),
    "autocontrast": lambda im, m, fill: ImageOps.autocontrast(im),
    "equalize": lambda im, m, fill: ImageOps.equalize(im),
    "invert": lambda im, m, fill: ImageOps.invert(im),
}

# Equal, every value. Where Pillow was compiled with fused multiply-add (not on x86-64), its float32 blends and its
# bicubic kernel round once less, and a truncated value may be one level apart.
FUSED = {"shear_x", "shear_y", "brightness", "color", "contrast", "sharpness"}
EXACT = platform.machine().lower() in ("x86_64", "amd64")


def pillow(name: str, image: Tensor, m: float, fill: int) -> Tensor:
    made = PILLOW[name](Image.fromarray(image.permute(1, 2, 0).numpy()), m, fill)
    return torch.from_numpy(np.array(made)).permute(2, 0, 1)


def assert_like_pillow(ours: Tensor, theirs: Tensor, names: set[str]) -> None:
    if EXACT or not names & FUSED:
        assert torch.equal(ours, theirs)
    else:
        apart = (ours.int() - theirs.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() <= 0.01


def pictures(h: int, w: int) -> Tensor:
    """Noise, gradients of full and of narrow range, shapes of few levels, and one colour only: [20, 3, h, w]."""
    rng = torch.Generator().manual_seed(h * w)
    noise = torch.randint(256, (4, 3, h, w), generator=rng)
    down, across = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    slope = torch.rand(4, 3, 2, 1, 1, generator=rng)
    gradient = (slope[:, :, 0] * down + slope[:, :, 1] * across) * 127.5
    centre, radius = torch.rand(2, 4, 1, 1, 1, generator=rng), torch.rand(4, 3, 1, 1, generator=rng)
    disc = (down - centre[0]) ** 2 + (across - centre[1]) ** 2 < radius / 4
    colours = torch.randint(256, (2, 4, 3, 1, 1), generator=rng)
    shapes = torch.where(disc, *colours)
    noisy = (shapes + torch.randn(4, 3, h, w, generator=rng) * 8).clamp(0, 255)
    flat = colours[0].expand(4, 3, h, w)
    return torch.cat([noise, gradient, shapes, noisy, flat]).to(torch.uint8)


@pytest.mark.parametrize("size", [(32, 32), (9, 14), (2, 5)], ids=str)
@pytest.mark.parametrize("name", PILLOW)
def test_every_operation_is_pillows(name, size):
    x = pictures(*size)
    for level in range(10):
        middle, swing = autoaugment.magnitude(name, level)
        m = middle + swing * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(x) // 2)
        fill = 25 * level
        ours = autoaugment._OPERATIONS[name](x, m, fill)
        theirs = torch.stack([pillow(name, image, v, fill) for image, v in zip(x, m.tolist(), strict=True)])
        assert ours.dtype == torch.uint8
        assert_like_pillow(ours, theirs, {name})


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), fill=st.integers(0, 255), side=st.integers(4, 20))
def test_geometry_at_any_magnitude(seed, fill, side):
    x = pictures(side, 24 - side)
    m = torch.rand(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    for name, largest in (("shear_x", 1), ("shear_y", 1), ("translate_x", 2), ("translate_y", 2), ("rotate", 80)):
        ours = autoaugment._OPERATIONS[name](x, largest * m, fill)
        many = zip(x, (largest * m).tolist(), strict=True)
        assert_like_pillow(ours, torch.stack([pillow(name, image, v, fill) for image, v in many]), {name})


def policy_reference(x: Tensor, fill: int, generator: torch.Generator) -> Tensor:
    """auto_augment as in its docstring, by Pillow, image by image."""
    policy = torch.randint(25, (len(x),), generator=generator)
    rng = torch.rand(2, len(x), generator=generator)
    sign = torch.randint(2, (2, len(x)), generator=generator) * 2 - 1
    out = []
    for i, image in enumerate(x):
        for j, (name, probability, level) in enumerate(autoaugment.POLICY[policy[i]]):
            if rng[j, i] < probability:
                middle, swing = autoaugment.magnitude(name, level)
                image = pillow(name, image, middle + swing * int(sign[j, i]), fill)
        out.append(image)
    return torch.stack(out)


@pytest.mark.parametrize("fill", [128, 3])
def test_the_policy_equals_the_reference(fill):
    x = pictures(32, 32).repeat(30, 1, 1, 1)
    ours = auto_augment(x, fill=fill, generator=torch.Generator().manual_seed(fill))
    theirs = policy_reference(x, fill, torch.Generator().manual_seed(fill))
    if EXACT:
        assert torch.equal(ours, theirs)
    else:  # a level apart after the first operation is stretched by the second
        assert (ours != theirs).float().mean() < 0.05


def test_operations_are_as_frequent_as_the_table_says(monkeypatch):
    # The sums of their probabilities, in tenths, over the 25 sub-policies and both places; signs are even.
    tenths = {"shear_y": 7, "translate_x": 8, "translate_y": 34, "rotate": 7, "brightness": 23, "color": 29}
    tenths |= {"contrast": 8, "sharpness": 28, "posterize": 3, "solarize": 19, "autocontrast": 50, "equalize": 47}
    tenths |= {"invert": 2}
    found: Counter[str] = Counter()
    positive: Counter[str] = Counter()

    def recorder(name):
        def record(x, m, fill):
            found[name] += len(x)
            positive[name] += int((m > autoaugment.magnitude(name, 0)[0]).sum())
            return x

        return record

    for name in PILLOW:
        monkeypatch.setitem(autoaugment._OPERATIONS, name, recorder(name))
    b = 100_000
    x = torch.zeros(b, 3, 1, 1, dtype=torch.uint8)
    assert torch.equal(auto_augment(x, generator=torch.Generator().manual_seed(0)), x)
    assert set(found) == set(tenths)
    for name, share in tenths.items():
        expected = b * share / 10 / 25
        assert abs(found[name] - expected) < 5 * expected**0.5, name
    for name in ("shear_y", "translate_x", "translate_y", "rotate", "brightness", "contrast", "sharpness"):
        assert abs(positive[name] - found[name] / 2) < 2.5 * found[name] ** 0.5, name


def test_the_levels_are_those_of_the_method():
    largest = {name: autoaugment.magnitude(name, 9) for name in PILLOW}
    assert largest["shear_x"] == largest["shear_y"] == (0, 0.3)
    assert largest["translate_x"] == largest["translate_y"] == (0, 150 / 331)
    assert largest["rotate"] == (0, 30)
    assert largest["color"] == largest["brightness"] == largest["contrast"] == largest["sharpness"] == (1, 0.9)
    assert [autoaugment.magnitude("posterize", i)[0] for i in range(10)] == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
    assert [autoaugment.magnitude("solarize", i)[0] for i in (0, 9)] == [256, 0]


def test_the_generator_decides_and_the_random_state_is_left_alone():
    x = pictures(16, 16)
    kept, before = x.clone(), torch.get_rng_state()
    for augment in (auto_augment, cutout):
        first, again, other = (augment(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(x, kept)


def test_without_a_generator_torchs_own_stream_is_used():
    x = pictures(16, 16)
    for augment in (auto_augment, cutout):
        torch.manual_seed(5)
        made = augment(x)
        assert torch.equal(made, augment(x, generator=torch.Generator().manual_seed(5)))


def test_memory_format_is_kept():
    x = pictures(16, 16)
    last = x.contiguous(memory_format=torch.channels_last)
    for augment in (auto_augment, cutout):
        out, expected = (augment(a, generator=torch.Generator().manual_seed(1)) for a in (last, x))
        assert out.is_contiguous(memory_format=torch.channels_last) and expected.is_contiguous()
        assert torch.equal(out, expected)


def test_an_empty_batch_stays_empty():
    x = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    assert auto_augment(x).shape == cutout(x).shape == x.shape


def cutout_reference(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    b, _, h, w = x.shape
    rows = torch.randint(h, (b, 1), generator=generator).flatten().tolist()
    columns = torch.randint(w, (b, 1), generator=generator).flatten().tolist()
    out = x.clone()
    for image, row, column in zip(out, rows, columns, strict=True):
        top, left = row - size // 2, column - size // 2
        image[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
    return out


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_cutout_equals_the_reference(shape, size, seed):
    x = torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    out = cutout(x, size=size, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(out, cutout_reference(x, size, torch.Generator().manual_seed(seed)))


def test_what_cannot_be_meant_is_refused():
    grey = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert cutout(grey + 1).shape == grey.shape
    with pytest.raises(ValueError, match="3 channels, not 1"):
        auto_augment(grey)
    with pytest.raises(ValueError, match="fill"):
        auto_augment(grey.expand(2, 3, 8, 8), fill=256)
    with pytest.raises(ValueError, match="size"):
        cutout(grey, size=-1)
    for augment in (auto_augment, cutout):
        with pytest.raises(ValueError, match="float32"):
            augment(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match=r"\[3, 8, 8\]"):
            augment(torch.zeros(3, 8, 8, dtype=torch.uint8))
