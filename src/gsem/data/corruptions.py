"""Test sets of corrupted images: CIFAR-10-C, CIFAR-100-C, ImageNet-C, and others with the same layout.

Source: D. Hendrycks, T. Dietterich, Benchmarking neural network robustness to common corruptions and perturbations,
ICLR 2019.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gsem.data import npz
from gsem.data.dataset import Split
from gsem.data.decode import Layout, opened
from gsem.data.folder import FolderImages, class_names

SEVERITIES = 5
EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
"""Published for validation, and not part of the usual mean over 15 corruptions."""

Corruptions = dict[tuple[str, int], Split]
"""For each corruption and severity (from 1): the images, still unread, and their labels."""


def load_corruptions(
    path: str | Path, *, classes: Sequence[str] | None = None, shape: Sequence[int] | None = None
) -> Corruptions:
    """The corrupted images at `path`, sorted by corruption and severity.

    Either `path` holds CORRUPTION.npy, uint8 [5 · n, h, w, c] with the severities one after the other, and labels.npy
    with 5 · n or n labels; or CORRUPTION/SEVERITY/CLASS/* image files, also one folder deeper, as ImageNet-C is packed.

    Args:
        classes: of the model, in the order of their labels. Class folders must have these names.
        shape: (c, h, w) of the model's images; default: as the first file is.

    Raises:
        FileNotFoundError: `path` is no directory.
        ValueError: it has neither layout, or images, labels or classes do not fit; the message names the file.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}")
    if (path / "labels.npy").exists() or any(path.glob("*.npy")):
        found = dict(_of_arrays(path, classes, shape))
    else:
        found = dict(_of_folders(path, classes, shape))
    if not found:
        raise ValueError(
            f"{path} holds no corruptions: neither CORRUPTION.npy with labels.npy (CIFAR-10-C), nor image files "
            "CORRUPTION/SEVERITY/CLASS/* (ImageNet-C)"
        )
    return dict(sorted(found.items()))


def _of_arrays(
    path: Path, classes: Sequence[str] | None, shape: Sequence[int] | None
) -> Iterator[tuple[tuple[str, int], Split]]:
    keys = [key for key in npz._keys(path) if key != "labels"]
    if not (path / "labels.npy").exists():
        raise ValueError(f"{path} has no labels.npy; its files are: {', '.join(f'{key}.npy' for key in keys)}")
    y = npz._labels(path, "labels")
    if classes is not None and int(y.max()) >= len(classes):
        raise ValueError(f"{path}/labels.npy has the label {int(y.max())}, but there are {len(classes)} classes")
    for key in keys:
        file, found = path / f"{key}.npy", npz._shape(path, key)
        if shape is not None and found != tuple(shape):
            raise ValueError(f"{file} has images (c, h, w) {found}, but the model's are {tuple(shape)}")
        whole = npz._header(path, key)[0]
        n, rest = divmod(whole[0], SEVERITIES)
        if rest or len(y) not in (n, whole[0]):
            raise ValueError(
                f"{file} has {whole[0]} images and labels.npy {len(y)} labels: they must be as many, or the images "
                f"{SEVERITIES} times as many, one block for each severity"
            )
        images = npz.ArrayImages(path, key, whole)
        if images.at is None:
            raise ValueError(f"{file} is stored by columns: write it anew, np.save(FILE, np.ascontiguousarray(array))")
        for severity in range(1, SEVERITIES + 1):
            rows = torch.arange((severity - 1) * n, severity * n)
            yield (key, severity), Split(images.view(rows), y[rows] if len(y) > n else y)


def _of_folders(
    path: Path, classes: Sequence[str] | None, shape: Sequence[int] | None
) -> Iterator[tuple[tuple[str, int], Split]]:
    levels = ([f for f in path.glob(depth) if f.name.isdecimal() and f.is_dir()] for depth in ("*/*", "*/*/*"))
    folders = sorted(next(filter(None, levels), []))
    layout = None
    for folder in folders:
        names = class_names(folder)
        classes = names if classes is None else tuple(classes)
        if set(names) != set(classes):
            lacking, more = (sorted(a - b)[:5] for a, b in ((set(classes), set(names)), (set(names), set(classes))))
            raise ValueError(
                f"{folder} has other classes than the model (not there: {', '.join(lacking) or 'none'}; unknown: "
                f"{', '.join(more) or 'none'})"
            )
        if layout is None:
            layout = _layout(FolderImages(folder, classes).file(0), shape)
        images = FolderImages(folder, classes, layout)
        yield (folder.parent.name, int(folder.name)), Split(images, images.y)


def _layout(first: str, shape: Sequence[int] | None) -> Layout:
    if shape is not None:
        c, h, w = shape
        return Layout(c, h, w, "an image of the model")
    with opened(first) as image:
        return Layout(3, image.height, image.width, first)
