"""Random resized crops against torch's interpolate on each crop alone, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from gsem.data import resized_crop
from gsem.data.augment import crop_resize


def images(b=40, c=3, h=24, w=20, seed=0):
    return torch.randint(256, (b, c, h, w), generator=rng(seed), dtype=torch.uint8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", [False, True])
def test_each_part_is_interpolated_as_by_torch_in_float64(flip):
    x, g = images(), rng(1)
    size = torch.stack([torch.randint(1, n + 1, (40,), generator=g) for n in (24, 20)])
    size[:, 0] = torch.tensor([24, 20])
    corner = torch.stack(
        [(torch.rand(40, generator=g) * (n - s + 1)).long() for n, s in zip((24, 20), size, strict=True)]
    )
    mirrored = torch.arange(40) % 3 == 0 if flip else None
    out = crop_resize(x, corner, size, mirrored)
    assert out.dtype == torch.uint8 and out.shape == x.shape
    for i in range(40):
        (top, left), (h, w) = corner[:, i].tolist(), size[:, i].tolist()
        part = x[i : i + 1, :, top : top + h, left : left + w].double()
        expected = F.interpolate(part, size=(24, 20), mode="bilinear", align_corners=False)[0]
        if flip and mirrored[i]:
            expected = expected.flip(2)
        # Rounded: at most half a level off, but for float32's error where float64 lies in the middle of two levels.
        assert (out[i].double() - expected).abs().max() < 0.5 + 1e-3
    assert torch.equal(out[0], x[0].flip(2) if flip else x[0])


def torchvision_parameters(drawn, place, h, w, scale, ratio):
    """(top, left, height, width) by the published loop over ten tries, from the same random numbers."""
    for area, shape in zip(*drawn.tolist(), strict=True):
        area = h * w * (scale[0] + (scale[1] - scale[0]) * area)
        shape = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
        width, height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < width <= w and 0 < height <= h:
            return int(place[0] * (h - height + 1)), int(place[1] * (w - width + 1)), height, width
    if w / h < min(ratio):
        width, height = w, round(w / min(ratio))
    elif w / h > max(ratio):
        width, height = round(h * max(ratio)), h
    else:
        width, height = w, h
    return (h - height) // 2, (w - width) // 2, height, width


@pytest.mark.parametrize(("h", "w"), [(24, 20), (16, 16), (40, 6), (5, 40)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_the_parts_are_those_of_the_published_loop(h, w, scale, monkeypatch):
    x, ratio = images(b=300, c=1, h=h, w=w), (3 / 4, 4 / 3)
    seen = []
    monkeypatch.setattr("gsem.data.augment.crop_resize", lambda x, corner, size, m: seen.append((corner, size)) or x)
    resized_crop(x, flip=False, scale=scale, generator=rng(5))
    [(corner, size)] = seen
    g = rng(5)
    drawn, place = torch.rand(2, 10, 300, generator=g), torch.rand(2, 300, generator=g)
    expected = [torchvision_parameters(drawn[:, :, i], place[:, i], h, w, scale, ratio) for i in range(300)]
    ours = torch.cat([corner, size]).T.tolist()
    # (float32's and Python's logarithms may round a side to different integers, very rarely.)
    assert sum(tuple(a) != b for a, b in zip(ours, expected, strict=True)) <= 1
    assert all(min(top, left) >= 0 and top + a <= h and left + b <= w for top, left, a, b in ours)


def test_half_of_the_images_are_flipped_and_the_generator_decides():
    x = images(b=400, c=1, h=8, w=8)
    whole = resized_crop(x, flip=True, scale=(1, 1), ratio=(1, 1), generator=rng(3))
    flipped = (whole == x.flip(3)).flatten(1).all(1)
    assert ((whole == x).flatten(1).all(1) | flipped).all()
    assert 150 < int(flipped.sum()) < 250
    before = torch.get_rng_state()
    assert torch.equal(resized_crop(x, flip=True, generator=rng(3)), resized_crop(x, flip=True, generator=rng(3)))
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"takes uint8 images"):
        resized_crop(images().float(), flip=True)
    for scale in ((0, 1), (0.5, 0.4), (0.5, 2)):
        with pytest.raises(ValueError, match="scale must be"):
            resized_crop(images(), flip=True, scale=scale)
    with pytest.raises(ValueError, match="ratio must be"):
        resized_crop(images(), flip=True, ratio=(0, 1))
