"""What a training costs and what it gives: the published recipe, our economical one, and what was tried on the way.

    python benchmarks/time_to_robustness.py --data digits --epochs 15 [--seeds 3] [--images 500] [--tried]
    python benchmarks/time_to_robustness.py --data cifar10 --model gsem-resnet18 --epochs 30 --only gcat --device cuda

Every training has the same number of epochs, its schedule scaled alike (five rounds of 150 become one). Rows:

published              gcat-published as it is: 50 + 10 passes an image and epoch
published, our schedule  its draws and attacks with our batch, learning rate, schedule and averaged weights
gcat                   5 + 1 passes: a tenth
(--tried)              gcat with one field changed

For each row clean and PGD accuracy (expected, of stochastic networks with gradients averaged over draws), and its
difference to the first row (`published`, unless --only leaves it out) of the same seed with a 90% t-interval over
seeds. Finished pieces are kept in --out, so that an interrupted benchmark resumes. Prints a table, writes JSON.
"""

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import gsem
from gsem.evaluation.result import EvaluationResult
from gsem.evaluation.statistics import Interval, t_interval
from gsem.study import Variant, _folder, study
from gsem.training.recipe import Recipe
from gsem.training.recipes import GCAT, GCAT_PUBLISHED

# Field by field, what gcat's choices were weighed against.
TRIED: dict[str, dict[str, Any]] = {
    "3 steps": {"steps": 3},
    "10 steps": {"steps": 10},
    "4 draws an attack": {"eot": 4},
    "4 draws a gradient": {"draws": 4},
    "half attacked": {"adversarial_fraction": 0.5},
    "no average": {"ema": 0.0},
    "no warm-up": {"warmup": 0.0},
    "step schedule": {"schedule": "step", "milestones": (16, 24), "warmup": 0.0},
    "line to 0": {"schedule": "cyclic"},
    "rate 0.05": {"lr": 0.05},
    "batch 256": {"batch_size": 256},
}


def variants(o: argparse.Namespace) -> list[Variant]:
    def of(recipe: Recipe) -> Recipe:
        data = {"data": o.data, "data_path": o.data_path, "model": o.model}
        return replace(recipe.scaled(o.epochs), rounds=1, validate_every=o.validate_every, **data)

    schedule = ("batch_size", "lr", "schedule", "milestones", "warmup", "nesterov", "ema", "weight_decay")
    ours = {field: getattr(GCAT, field) for field in schedule}
    rows = {
        "published": of(GCAT_PUBLISHED),
        "published, our schedule": of(replace(GCAT_PUBLISHED, epochs=GCAT.epochs, **ours)),
        "gcat": of(GCAT),
    }
    if o.tried:
        rows |= {f"gcat, {name}": of(replace(GCAT, **fields)) for name, fields in TRIED.items()}
    if o.augment:
        rows = {name: replace(recipe, augment=o.augment) for name, recipe in rows.items()}
    kept = o.only.split(";") if o.only else rows
    return [Variant(name, rows[name]) for name in kept]


def differences(o: argparse.Namespace, name: str, base: str) -> Interval | None:
    """Expected accuracy under the last attack minus that of `base` by seed: mean, 90% t-interval, in points."""
    if o.seeds < 2:
        return None
    found = []
    for seed in range(o.seeds):
        here, there = (
            EvaluationResult.load(o.out / _folder(Variant(row, GCAT), seed) / "test-fresh") for row in (name, base)
        )
        one, other = (r.expected([s.name for s in r.scores if s.noise == "fresh"][-1]).mean for r in (here, there))
        found.append(100 * (one - other))
    return t_interval(found, 0.9)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-path")
    parser.add_argument("--model", default="gsem-resnet10x16")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--attacks", default="clean,pgd:steps=50:eot=20")
    parser.add_argument("--augment", help="of all rows; default: each recipe's own")
    parser.add_argument("--validate-every", type=int, default=5)
    parser.add_argument("--tried", action="store_true")
    parser.add_argument("--only", help="rows by name, with ; between them")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path("runs/time-to-robustness"))
    parser.add_argument("--json", type=Path, default=Path("time_to_robustness.json"))
    return parser.parse_args()


def main() -> None:
    o = arguments()
    chosen = variants(o)
    print(f"{o.model} on {Path(o.data).name}, {o.epochs} epochs, {o.seeds} seeds, {o.images} test images")
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, gsem {gsem.__version__}"
    )
    started: list[str] = []

    def report(what: str, progress: object) -> None:
        if what not in started:
            started.append(what)
            print(f"  {what}", flush=True)

    rows = study(
        chosen,
        seeds=o.seeds,
        out=o.out,
        attacks=o.attacks.split(","),
        images=o.images,
        device=o.device,
        on_progress=report,
    )
    labels = list(rows[0]["accuracy"])
    print(f"\n{'row':<26} {'passes':>7} {'clean':>12} {labels[-1]:>12}  {'difference (90%)':<22} {'training':>9}")
    for row in rows:
        row["difference"] = differences(o, row["variant"], chosen[0].name)
        cells = [
            f"{100 * m:5.1f} ± {50 * (high - low):4.1f}"
            for m, low, high in (row["accuracy"][k] for k in (labels[0], labels[-1]))
        ]
        gap = row["difference"]
        gain = "" if gap is None or row is rows[0] else f"{gap[0]:+5.1f} ({gap[1]:+.1f} to {gap[2]:+.1f})"
        passes = row["epochs"] * (row["attack_passes"] + row["training_passes"])
        print(f"{row['variant']:<26} {passes:7g} {cells[0]:>12} {cells[1]:>12}  {gain:<22} {row['seconds']:7.0f} s")
    print(
        "passes an image in all; accuracy in per cent with its 95% t-interval; training: wall time, median over seeds"
    )
    metadata = {key: str(value) for key, value in vars(o).items()} | {"torch": torch.__version__}
    o.json.write_text(json.dumps({"metadata": metadata, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
