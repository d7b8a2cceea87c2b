"""What a GPU should show, one part at a time, each in under nine minutes.

    python benchmarks/gpu.py PART [--out runs/gpu] [--data digits] [--data-path FOLDER] [--device cuda]

check: correctness against the CPU in float64. Exits with 1 if a line fails, after all of them have run.
step: the published training step beside an eager fp16 reference; ResNet-18's attack pass beside the rate of a large
  product; kernel launches; torch.compile.
train: a GSeM-ResNet by `gcat`, with as many epochs as fit into the budget, in OUT/run. Resumes a run that is there.
evaluate: attacks on the run of `train`, fresh, frozen and without noise. Resumes an evaluation that was interrupted.
autoattack: the standard suite on the run of `train` without its noise, ours and pyautoattack's (where it is installed).

Every part prints one table last and writes OUT/PART.json. Needs gsem's sources and torch, numpy, scipy, scikit-learn,
pillow, jinja2, safetensors, jaxtyping and rich; neither tyro nor pooch. Every option can be set by an environment
variable of its name in capitals, too: DEVICE=cuda:1, BUDGET=120, DATA_PATH=….
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check
import gpu_run
import gpu_step
import torch
from gpu_report import Report
from timing import OverTime, time_limit

from gsem._env import device_named

PARTS: dict[str, Callable[[Report, torch.device, argparse.Namespace], None]] = {
    "check": lambda report, device, o: gpu_check.run(report, device, images=min(o.batch, 64), side=o.side),
    "step": gpu_step.run,
    "train": gpu_run.train,
    "evaluate": gpu_run.evaluate,
    "autoattack": gpu_run.autoattack,
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, default: Any, kind: Callable[[str], Any] = str, help: str | None = None) -> None:
        variable = name.removeprefix("--").replace("-", "_").upper()
        parser.add_argument(name, type=kind, default=os.environ.get(variable) or default, help=help)

    parser.add_argument("part", choices=PARTS)
    option("--out", "runs/gpu", Path, "folder of the run, the logs and the JSON files")
    option("--data", "digits", str, "an .npz file, or what gsem.data.load takes")
    option("--data-path", None, str, "where the files of a data set that has a name lie")
    option("--device", "cuda", str, "cpu, cuda or cuda:N")
    option("--model", "gsem-resnet18", str, "what is trained, and whose step is measured")
    option("--batch", 256, int, "images of the measured step")
    option("--side", 32, int, "pixels of the sides of the images of check and step")
    option("--repeats", 5, int, "calls behind each median")
    option("--compile-seconds", 150, float, "of step: limit of torch.compile's measurement; 0: leave it out")
    option("--budget", 300, float, "seconds: of the training, and of the AutoAttack runs")
    option("--epochs", 0, int, "of the training; 0: as many as fit into the budget")
    option("--images", 1000, int, "test images that are attacked")
    option("--attacks", "clean,fgsm,pgd:steps=50,apgd:steps=50", str, "of evaluate")
    option("--steps", 100, int, "of autoattack: 100 is the standard")
    option("--queries", 5000, int, "of autoattack: 5000 is the standard")
    option("--limit", 510, float, "seconds after which a part stops")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    o = arguments(words)
    try:
        device = device_named(o.device)
    except ValueError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message="this processor has no bf16")  # it is measured all the same
    o.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(o).items()}
    report = Report(o.part, device, settings)
    try:
        with time_limit(o.limit, f"the time limit of {o.part} (--limit)"):
            report.attempt(o.part, lambda: PARTS[o.part](report, device, o))
    except OverTime:
        pass  # the table has its line
    report.finish(o.out)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
