"""Peak memory at N and 10 · N streamed images, and how long a training waits for them.

    python benchmarks/streaming.py [--images 10000] [--side 32] [--model resnet10x16] [--json FILE]

Each size and kind of file is trained on for one epoch, in a process of its own. Shown are the peaks of the training
process and of its largest worker. The aim: at most 1.05 times at ten times the images, and at most 5% of the time spent
waiting. Images are noise, made in a temporary folder: JPEG files, and one .npy array. From 10,000 images on, 1,000 are
held out for validation. The training is without attacks, and thus waits for the largest share of its time.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("jpeg", "npy")
CLASSES = 10


def make(folder: Path, kind: str, images: int, side: int) -> None:
    rng = np.random.default_rng(0)
    if kind == "npy":
        header = {"descr": "|u1", "fortran_order": False, "shape": (images, side, side, 3)}
        with open(folder / "x_train.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(images):
                file.write(rng.integers(0, 256, (side, side, 3), dtype=np.uint8).tobytes())
        np.save(folder / "y_train.npy", np.arange(images) % CLASSES)
        return
    from PIL import Image

    for i in range(images):
        file_name = folder / "train" / str(i % CLASSES) / f"{i:07}.jpg"
        file_name.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(file_name, quality=90)


def work(folder: Path, model: str) -> dict[str, Any]:
    """One epoch; what it waited is measured around every batch."""
    import torch

    import gsem
    from gsem.data.batches import Streamed

    waited, inner = [], Streamed.batches

    def timed(self: Streamed, rows: Any) -> Any:
        batches = inner(self, rows)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            waited.append(time.perf_counter() - started)
            if batch is None:
                return
            yield batch

    Streamed.batches = timed  # type: ignore[method-assign]
    torch.set_num_threads(1)
    recipe = gsem.Recipe(model=model, epochs=1, adversarial_fraction=0.0, data=str(folder), augment="resized-crop")
    began: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        gsem.train(recipe, out=Path(out) / "run", hold=False, on_progress=lambda p: began.append(time.perf_counter()))
    # From the first step's end on: the first batch is waited for while the workers start.
    total = began[-1] - began[0]
    own, workers = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {"mebibytes": own, "workers": workers, "waited": sum(waited[1:-1]) / total, "first": waited[0]}


def measured(kind: str, images: int, o: argparse.Namespace) -> dict[str, Any]:
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # as in memory.py
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), kind, images, o.side)
        words = [sys.executable, __file__, "--work", folder, "--model", o.model]
        done = subprocess.run(words, capture_output=True, text=True, env=fixed)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, default=10_000, help="N")
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--model", default="resnet10x16")
    parser.add_argument("--json", type=Path, default=Path("streaming.json"))
    o = parser.parse_args()
    if o.work:
        print(json.dumps(work(o.work, o.model)))
        return
    rows = []
    print(f"{o.side} × {o.side} pixels, {o.model}, {platform.machine()}, {os.cpu_count()} CPUs")
    print(f"{'':<6} {'images':>8} {'peak':>10} {'a worker':>10} {'waiting':>8} {'first batch':>12}")
    for kind in KINDS:
        both = []
        for images in (o.images, 10 * o.images):
            both.append(measured(kind, images, o) | {"kind": kind, "images": images})
            r = both[-1]
            print(
                f"{kind:<6} {images:>8} {r['mebibytes']:>6.0f} MiB {r['workers']:>6.0f} MiB {100 * r['waited']:>7.2f}% "
                f"{r['first']:>10.2f} s",
                flush=True,
            )
        rows += both
        ratios = [both[1][key] / both[0][key] for key in ("mebibytes", "workers")]
        print(f"{kind:<6} {'10 × / 1 ×':>8} {ratios[0]:>10.3f} {ratios[1]:>14.3f}", flush=True)
    o.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
