"""The data pipeline of training: batched tensors against one image after the other with Pillow, on one core.

    python benchmarks/data.py [--images 256] [--repeats 30] [--threads 1] [--data PATH] [--json FILE]

Both sides take the same uint8 images to an augmented uint8 batch [b, 3, h, w] with the same operations: random crop,
flip, AutoAugment's CIFAR-10 policy, Cutout. Pillow's side works as a data loader's worker does, and gets its images
as arrays in memory. The sides take turns, so that what else the machine does falls on both.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from gsem.data import crop_flip, load
from gsem.data.autoaugment import POLICY, auto_augment, cutout, magnitude
from gsem.data.dataset import crop_padding

FILL = 128


def affine(image: Image.Image, matrix: tuple[float, ...], how: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=(FILL,) * 3)


NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC
PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "shear_y": lambda im, m: affine(im, (1, 0, 0, m, 1, 0), BICUBIC),
    "translate_x": lambda im, m: affine(im, (1, 0, m * im.width, 0, 1, 0), NEAREST),
    "translate_y": lambda im, m: affine(im, (1, 0, 0, 0, 1, m * im.height), NEAREST),
    "rotate": lambda im, m: im.rotate(m, NEAREST, fillcolor=(FILL,) * 3),
    "brightness": lambda im, m: ImageEnhance.Brightness(im).enhance(m),
    "color": lambda im, m: ImageEnhance.Color(im).enhance(m),
    "contrast": lambda im, m: ImageEnhance.Contrast(im).enhance(m),
    "sharpness": lambda im, m: ImageEnhance.Sharpness(im).enhance(m),
    "posterize": lambda im, m: ImageOps.posterize(im, int(m)),
    "solarize": lambda im, m: ImageOps.solarize(im, m),  # type: ignore[arg-type]
    "autocontrast": lambda im, m: ImageOps.autocontrast(im),
    "equalize": lambda im, m: ImageOps.equalize(im),
    "invert": lambda im, m: ImageOps.invert(im),
}


def pillow_crop_flip(image: Image.Image, padding: int, rng: random.Random) -> Image.Image:
    w, h = image.size
    image = ImageOps.expand(image, padding, fill=(FILL,) * 3)
    left, top = rng.randint(0, 2 * padding), rng.randint(0, 2 * padding)
    image = image.crop((left, top, left + w, top + h))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def pillow_policy(image: Image.Image, rng: random.Random) -> Image.Image:
    for name, probability, level in rng.choice(POLICY):
        if rng.random() < probability:
            middle, swing = magnitude(name, level)
            image = PILLOW[name](image, middle + rng.choice((-1, 1)) * swing)
    return image


def cut(pixels: np.ndarray, size: int, rng: random.Random) -> None:
    h, w = pixels.shape[:2]
    top, left = rng.randrange(h) - size // 2, rng.randrange(w) - size // 2
    pixels[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0


def one_by_one(images: list[np.ndarray], whole: bool, rng: random.Random) -> Tensor:
    """Every image through Pillow, then one batch."""
    h = images[0].shape[0]
    out = []
    for pixels in images:
        image = pillow_crop_flip(Image.fromarray(pixels), crop_padding(h), rng)
        if whole:
            image = pillow_policy(image, rng)
        made = np.array(image)
        if whole:
            cut(made, h // 2, rng)
        out.append(torch.from_numpy(made.transpose(2, 0, 1)))
    return torch.stack(out)


def batched(x: Tensor, whole: bool, generator: torch.Generator) -> Tensor:
    h = x.shape[2]
    x = crop_flip(x, padding=crop_padding(h), flip=True, fill=FILL, generator=generator)
    return cutout(auto_augment(x, fill=FILL, generator=generator), size=h // 2, generator=generator) if whole else x


def generated(n: int) -> Tensor:
    """Smooth colours with some noise, [n, 3, 32, 32]."""
    rng = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(n, 3, 4, 4, generator=rng), size=32, mode="bicubic", antialias=False)
    return (smooth * 255 + 12 * torch.randn(n, 3, 32, 32, generator=rng)).clamp_(0, 255).to(torch.uint8)


def of_source(path: str, n: int) -> tuple[str, Tensor]:
    source = load(path)
    if source.shape[0] != 3:
        raise SystemExit(f"{path} has {source.shape[0]} channel(s); AutoAugment takes colour images, 3 channels")
    x = (source.read_train or source.test)().x
    if len(x) < n:
        raise SystemExit(f"{path} has {len(x)} images, fewer than --images {n}")
    return Path(source.name).stem, x[:n].contiguous()


def measure(x: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Seconds of each side for each pipeline, one per repeat, the first (not kept) to warm up."""
    images = list(x.permute(0, 2, 3, 1).contiguous().numpy())
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    rows = []
    for pipeline, whole in (("crop, flip", False), ("crop, flip, policy, Cutout", True)):
        sides: dict[str, Callable[[], Tensor]] = {
            "batched": lambda whole=whole: batched(x, whole, generator),  # type: ignore[misc]
            "pillow": lambda whole=whole: one_by_one(images, whole, rng),  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(repeats + 1):
            for side, run in sides.items():
                started = time.perf_counter()
                out = run()
                seconds[side].append(time.perf_counter() - started)
                assert out.shape == x.shape and out.dtype == torch.uint8
        rows.append({"pipeline": pipeline} | {side: spread(s[1:], len(x)) for side, s in seconds.items()})
    return rows


def spread(seconds: list[float], images: int) -> dict[str, float]:
    """The median and the quartiles in milliseconds, and images per second at the median."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"ms": 1e3 * middle, "ms_low": 1e3 * low, "ms_high": 1e3 * high, "images_per_second": images / middle}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':26}{'batched':>26}{'image by image, Pillow':>28}",
        f"{'':26}{'ms (quartiles)':>17}{'images/s':>9}{'ms (quartiles)':>19}{'images/s':>9}",
    ]
    for row in rows:
        ours, theirs = (
            (f"{s['ms']:.1f} ({s['ms_low']:.1f}–{s['ms_high']:.1f})", f"{s['images_per_second']:,.0f}")
            for s in (row["batched"], row["pillow"])
        )
        lines.append(f"{row['pipeline']:26}{ours[0]:>17}{ours[1]:>9}{theirs[0]:>19}{theirs[1]:>9}")
    times = (f"{row['pipeline']}: {row['pillow']['ms'] / row['batched']['ms']:.1f}×" for row in rows)
    return "\n".join([*lines, "times as fast, medians: " + "; ".join(times)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=256, help="in the batch")
    parser.add_argument("--repeats", type=int, default=30, help="at least 2")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--data", metavar="PATH", help="real images: a name, .npz file or folder for gsem.data.load")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if args.images < 1 or args.repeats < 2 or args.threads < 1:
        parser.error("--images and --threads must be at least 1, --repeats at least 2")
    torch.set_num_threads(args.threads)
    name, x = ("generated", generated(args.images)) if args.data is None else of_source(args.data, args.images)
    rows = measure(x, args.repeats)
    machine = {"machine": platform.machine(), "torch": torch.__version__, "pillow": PIL.__version__}
    print(f"{len(x)} images {list(x.shape[1:])} ({name}), uint8 to uint8, {args.repeats} repeats")
    print(", ".join(f"{k} {v}" for k, v in machine.items()) + f", threads {torch.get_num_threads()}")
    print(table(rows))
    if args.json is not None:
        metadata = machine | {"threads": torch.get_num_threads(), "images": len(x), "shape": list(x.shape[1:])}
        metadata |= {"data": name, "repeats": args.repeats, "rows": rows}
        args.json.write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    main()
