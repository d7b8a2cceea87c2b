"""What a pass costs in each precision on this machine, and whether `auto` chooses the fastest.

    python benchmarks/precision.py [--repeats 9] [--device cuda] [--json FILE]

Attack passes (a gradient of the images, on the folded model) and training passes (forward and backward) of a small
network on digits and on 32 × 32 images, and of a large one. The precisions take turns; images and labels are random,
no time depends on them. Prints one table, medians and spread in milliseconds, and writes JSON.

A processor with bf16 instructions can be measured as one without: set ONEDNN_MAX_CPU_ISA=AVX2 and
ATEN_CPU_CAPABILITY=avx2 before the start.
"""

import argparse
import json
import statistics
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from timing import described, in_turns

import gsem
from gsem._env import choose_precision
from gsem.attacks._core import expected_gradient
from gsem.losses import cross_entropy
from gsem.training.step import Stepper

CASES = (
    ("gsem-resnet10x16", (1, 8, 8), 128),
    ("gsem-resnet10x16", (3, 32, 32), 128),
    ("gsem-resnet18", (3, 32, 32), 16),
)


def sides(name: str, shape: tuple[int, int, int], batch: int, precision: str, device: torch.device):
    """The attack pass and the training pass of a network in one precision."""
    torch.manual_seed(0)
    model = gsem.create_model(name, in_channels=shape[0]).to(device, memory_format=torch.channels_last)
    recipe = replace(gsem.RECIPES["gcat"], model=name, precision=precision, attack_precision=precision)
    stepper = Stepper(recipe, gsem.data.load("digits"), 8 / 255, model, None)
    x = torch.rand(batch, *shape, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=device)

    def train() -> None:
        model.train()
        stepper.scaler.scale(stepper._losses(stepper._logits(x, x), y).mean()).backward()

    return {"attack": lambda: expected_gradient(stepper.folded, x, y, cross_entropy, 1), "training": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("precision.json"))
    o = parser.parse_args()
    device = torch.device(o.device)
    precisions = ["float32", "bf16"] + (["fp16"] if device.type == "cuda" else [])
    auto = choose_precision("auto", device)
    warnings.simplefilter("ignore")  # bf16 is measured where it is emulated, too
    print(f"{described(device)}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"auto chooses {auto}; milliseconds, median (least – most) of {o.repeats}\n")
    rows = []
    for name, shape, batch in CASES:
        print(f"{name}, images {'×'.join(map(str, shape))}, batch {batch}")
        each = {p: sides(name, shape, batch, p, device) for p in precisions}
        for kind in ("attack", "training"):
            seconds = in_turns(device, {p: each[p][kind] for p in precisions}, o.repeats)
            times = {p: [1000 * t for t in each_time] for p, each_time in seconds.items()}
            medians = {p: statistics.median(t) for p, t in times.items()}
            ratio = medians[auto] / min(medians.values())
            cells = [f"{p} {medians[p]:.1f} ({min(t):.1f} – {max(t):.1f})" for p, t in times.items()]
            print(f"  {kind:<9}" + "".join(f"{cell:<30}" for cell in cells) + f"auto / best {ratio:.2f}", flush=True)
            rows.append({"network": name, "shape": shape, "batch": batch, "pass": kind, "ms": times, "ratio": ratio})
    print(f"\nauto is at most {max(row['ratio'] for row in rows):.2f} times the best")
    metadata = {"on": described(device), "torch": torch.__version__, "threads": torch.get_num_threads(), "auto": auto}
    o.json.write_text(json.dumps({"metadata": metadata, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
