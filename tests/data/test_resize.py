"""Images of mixed sizes are brought to one: shorter side resized, centre cropped."""

import numpy as np
import pytest
import torch
from PIL import Image

from gsem.data import load

SIZES = [(9, 6), (6, 6), (12, 30), (20, 7)]  # width, height


def folder(root):
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            for i, (w, h) in enumerate(SIZES):
                file = root / part / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                ramp = np.arange(w)[None, :, None] * 8 + np.zeros((h, 1, 3)) + label
                Image.fromarray(ramp.astype(np.uint8)).save(file)
    return root


def test_the_shorter_side_is_resized_and_the_centre_cropped(tmp_path):
    source = load(folder(tmp_path), resize=6)
    assert source.shape == (3, 6, 6)
    x = source.test().x
    assert x.shape == (8, 3, 6, 6)
    # 9 × 6 and 6 × 6 have a shorter side of 6 already: cropped at columns (9 - 6) // 2 = 1, and whole.
    assert x[0, 0, 0].tolist() == [8, 16, 24, 32, 40, 48]
    assert x[1, 2, 5].tolist() == [0, 8, 16, 24, 32, 40]
    # 12 × 30 becomes 6 × 15: half as wide, so a ramp twice as steep, whose middle is that of the columns.
    inner = x[2, 0, 3].double()
    assert torch.allclose(inner[1:-1], torch.tensor([20.0, 36, 52, 68]).double(), atol=1)


def test_all_sizes_are_read_and_streamed_alike(tmp_path):
    held = load(folder(tmp_path), resize=5, hold=True).training()[0]
    streamed = load(tmp_path, resize=5, hold=False).training()[0]
    assert torch.equal(held.x, streamed.held())


@pytest.mark.parametrize("hold", [True, False])
def test_mixed_sizes_without_resize_name_the_option_before_anything_is_read(tmp_path, hold):
    with pytest.raises(ValueError, match=r"cat/1\.png.* 6 × 6 pixels, while .*0\.png is 9 × 6; .*--resize 6"):
        load(folder(tmp_path), hold=hold).training()
    with pytest.raises(ValueError, match="resize must be at least 1 pixel, not 0"):
        load(tmp_path, resize=0)
    with pytest.raises(ValueError, match="resize"):
        load("digits", resize=16)
