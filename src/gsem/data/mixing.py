"""Additional, mostly generated, training images, and how they are mixed with the real ones.

Source: S.-A. Rebuffi et al., Data augmentation can improve robustness, NeurIPS 2021; S. Gowal et al., Improving
robustness using generated data, NeurIPS 2021; Z. Wang et al., Better diffusion models further improve
adversarial training, ICML 2023.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from gsem.data import npz
from gsem.data.dataset import Split, held_or_not
from gsem.data.images import Joined

_KEYS = (("image", "label"), ("x_train", "y_train"))


def read_extra(
    path: str | Path, shape: tuple[int, int, int], classes: Sequence[str], *, hold: bool | None = None
) -> Split:
    """Images of .npz files: `image` [n, h, w, c] uint8 with `label` [n] integers, or x_train with y_train.

    Classes without an image are allowed. Pickled objects are never loaded. Only labels and headers are read here where
    the images are not held.

    Args:
        path: an .npz file, a folder of several (in the order of their names), or a folder with image.npy and label.npy.
            `image` and `label` are how generated data sets are published.
        shape: (c, h, w) of the real images.
        classes: the real classes, in the order of their labels.
        hold: as `Dataset.hold`, of all the files together.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a file is damaged, an array is missing or not as above, the images are of another shape, or
            a label has no class. The message names the file and the key.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    parts = [_read_one(file, shape, classes) for file in _files(path)]
    if len(parts) == 1:
        return held_or_not(parts[0], hold)
    return held_or_not(Split(Joined([part.x for part in parts]), torch.cat([part.y for part in parts])), hold)


def _files(path: Path) -> list[Path]:
    if path.is_file() or any(path.glob("*.npy")):
        return [path]
    if not (files := sorted(path.glob("*.npz"))):
        raise ValueError(f"{path} holds neither .npz files, nor image.npy and label.npy")
    return files


def _read_one(path: Path, shape: tuple[int, int, int], classes: Sequence[str]) -> Split:
    images, labels = _pair(path)
    found = npz._shape(path, images)
    if found != tuple(shape):
        raise ValueError(f"{path}: {images} has images (c, h, w) {found}, but the real ones are {tuple(shape)}")
    y = npz._labels(path, labels)
    if int(y.max()) >= len(classes):
        raise ValueError(f"{path}: {labels} has the label {int(y.max())}, but there are {len(classes)} classes")
    return Split(npz._images(path, images, y, labels), y)


def _pair(path: Path) -> tuple[str, str]:
    keys = npz._keys(path)
    there = f"its keys are: {', '.join(keys) or 'none'}"
    for pair in _KEYS:
        missing = [key for key in pair if key not in keys]
        if not missing:
            return pair
        if len(missing) == 1:
            [partner] = set(pair) - set(missing)
            raise ValueError(f"{path} has {partner} but no {missing[0]}; {there}")
    raise ValueError(f"{path} has neither image and label nor x_train and y_train; {there}")


def mixed_order(
    n_real: int, n_extra: int, batch: int, share: float, generator: torch.Generator | None = None
) -> Int64[Tensor, "steps batch"]:
    """One epoch of batches: places in the real images followed by the extra ones.

    Each batch has round(batch · (1 − share)) real images and otherwise extra ones, in random order. An epoch
    lasts as long as the real images do: each is seen at most once. Extra images are drawn without replacement;
    all of them were drawn before one is drawn again.

    Args:
        n_real, n_extra: how many images there are.
        batch: images in a batch.
        share: of extra images in a batch, in [0, 1).
        generator: the random numbers, on the device of the result; None is torch's own stream.

    Raises:
        ValueError: the share is outside [0, 1), a batch would have no real image, more than there are, or no
            extra image although the share is above 0.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share of extra images must be in [0, 1), not {share}")
    real = round(batch * (1 - share))
    extra = batch - real
    if real < 1 or (share > 0 and extra < 1):
        kind = "real" if real < 1 else "extra"
        raise ValueError(f"a batch of {batch} with a share of {share} has no {kind} image: make the batch larger")
    if real > n_real:
        raise ValueError(f"a batch has {real} real images, but there are {n_real}")
    if extra > 0 and n_extra < 1:
        raise ValueError(f"the share of extra images is {share}, but there are none")
    device = torch.device("cpu") if generator is None else generator.device
    steps = n_real // real
    chosen = torch.randperm(n_real, generator=generator, device=device)[: steps * real].view(steps, real)
    if extra == 0:
        return chosen
    rounds = -(-steps * extra // n_extra)
    drawn = torch.cat([torch.randperm(n_extra, generator=generator, device=device) for _ in range(rounds)])
    both = torch.cat([chosen, n_real + drawn[: steps * extra].view(steps, extra)], dim=1)
    # Shuffled, since the place in the batch decides which images are attacked.
    return both.gather(1, torch.rand(steps, batch, generator=generator, device=device).argsort(1))
