"""SVHN, house numbers in cropped digits, in its original MATLAB files.

Source: Y. Netzer et al., Reading digits in natural images with unsupervised feature learning, 2011.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from gsem.data.dataset import Dataset, Split, crop_padding
from gsem.data.download import Remote, obtain

DESCRIPTION = "99,289 digits of house numbers, 32 × 32 RGB, 10 classes; found in root or downloaded (246 MB)"

_TRAIN = Remote("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373")
_TEST = Remote("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3")


def svhn(root: Path | None = None) -> Dataset:
    """SVHN: 73,257 training and 26,032 test images [3, 32, 32] of the digits 0 … 9; without the "extra" part.

    `train_32x32.mat` and `test_32x32.mat` are looked for in `root` (None is "dataset") and `root`/svhn when
    their part is read; the one that is not there is downloaded into `root`.

    Reading a part raises:
        OSError: its file is not there and cannot be downloaded.
        ValueError: its file is damaged or incomplete.
    """
    return Dataset(
        name="svhn",
        classes=tuple("0123456789"),
        shape=(3, 32, 32),
        eps=8 / 255,
        padding=crop_padding(32),
        fill=128,
        # As in the released code, which flips all three data sets although a mirrored digit is not a digit.
        # --no-flip switches it off.
        flip=True,
        description=DESCRIPTION,
        read_train=partial(_read, _TRAIN, root),
        read_test=partial(_read, _TEST, root),
    )


def _read(remote: Remote, root: Path | None) -> Split:
    path = obtain(remote, "svhn", root=root)
    images, labels = _arrays(path)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.size == 0:
        raise ValueError(
            f"{path}: X is {images.dtype} {list(images.shape)}, but must be uint8 [32, 32, 3, n]: images last"
        )
    n = images.shape[3]
    if labels.dtype.kind not in "iu" or labels.size != max(labels.shape, default=0):
        raise ValueError(f"{path}: y is {labels.dtype} {list(labels.shape)}, but must be integers [n, 1]")
    if labels.size != n:
        raise ValueError(f"{path}: X has {n} images, but y has {labels.size} labels")
    if labels.min() < 0 or labels.max() > 10:
        raise ValueError(f"{path}: y has labels from {labels.min()} to {labels.max()}, but must have 1 to 10")
    x = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    y = labels.reshape(-1).astype(np.int64) % 10  # digit 0 has label 10, as MATLAB counts from 1
    return Split(torch.from_numpy(x), torch.from_numpy(y))


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import loadmat  # here because the import is slow

    try:
        found = loadmat(path, variable_names=["X", "y"])
    # On a damaged file scipy raises TypeError, struct.error, zlib.error, MemoryError and others.
    except Exception as error:
        raise ValueError(f"{path} cannot be read, it is not a MATLAB file or is damaged ({error})") from error
    for key in ("X", "y"):
        if not isinstance(found.get(key), np.ndarray):
            raise ValueError(f"{path} has no array {key}: it is not SVHN's file, or is damaged")
    return found["X"], found["y"]
