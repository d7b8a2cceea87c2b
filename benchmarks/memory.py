"""Peak memory at one and at ten times the steps, draws and epochs, each in processes of its own (medians of 3).

    python benchmarks/memory.py [--json FILE]

Prints a table, writes JSON. The aim: at most 1.05 times. (Epochs are compared from three on: the first validation
and checkpoint need memory that later ones use again.)
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

CASES = {"attack steps": (10, 100), "draws of EOT": (10, 100), "scoring draws": (20, 200), "epochs": (3, 30)}


def work(case: str, count: int) -> None:
    import torch

    import gsem

    torch.manual_seed(0)
    if case == "epochs":
        source = gsem.data.load("digits")
        few = gsem.data.Split(*(part[:400] for part in (source.read_train().x, source.read_train().y)))
        with tempfile.TemporaryDirectory() as folder:
            recipe = replace(gsem.RECIPES["gcat"], epochs=count, steps=2, warmup=1.0)
            gsem.train(recipe, out=Path(folder) / "run", data=replace(source, read_train=lambda: few), device="cpu")
        return
    model = gsem.create_model("gsem-resnet10x16").eval().requires_grad_(False)
    x, y = torch.rand(64, 3, 32, 32), torch.randint(0, 10, (64,))
    if case == "scoring draws":
        gsem.evaluate(model, x, y, ["clean"], eps=8 / 255, draws=count, frozen=False)
    elif case == "draws of EOT":
        gsem.attacks.pgd(gsem.fold(model), x, y, eps=8 / 255, step=2 / 255, steps=3, eot=count, keep="last")
    else:
        gsem.attacks.apgd(gsem.fold(model), x, y, eps=8 / 255, steps=count, eot=2, stop_broken=False)


def peak(case: str, count: int) -> float:
    # glibc moves the size from which a freed tensor goes back to the system, by what a process happened to free: its
    # peak then shows holes in the heap. Held fixed, it shows what was in use.
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    words = [sys.executable, __file__, "--case", case, "--count", str(count)]
    done = subprocess.run(words, capture_output=True, text=True, env=fixed)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.splitlines()[-1])


def usual_peak(case: str, count: int) -> float:
    return statistics.median(peak(case, count) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=Path("memory.json"))
    o = parser.parse_args()
    if o.case:
        work(o.case, o.count)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    rows = []
    print(f"{'':<14} {'once':>16} {'ten times':>16} {'ratio':>6}")
    for case, counts in CASES.items():
        one, ten = (usual_peak(case, count) for count in counts)
        rows.append({"case": case, "counts": counts, "mebibytes": [one, ten], "ratio": ten / one})
        print(f"{case:<14} {counts[0]:>5}: {one:6.0f} MiB {counts[1]:>5}: {ten:6.0f} MiB {ten / one:6.3f}", flush=True)
    o.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
