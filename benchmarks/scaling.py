"""How much faster N processes are than one: training and evaluation, each against one process in the same run.

    python benchmarks/scaling.py --processes 2                 # on a CPU, one thread for each process
    python benchmarks/scaling.py --gpus 8 --model gsem-resnet18 --data cifar10 --batch-size 1024

"apart" is the speed-up of N processes that each do all the work of one, without any communication: the processors may
share their arithmetic units, memory or a hypervisor, and then give less than N. The sides take turns, pair by pair.
Start-up and warm-up are not counted: a training is timed from its first step to its last look at the guards before the
epoch ends, an evaluation after a first one. Bytes are what one process brings into the sums of one step:
DistributedDataParallel sums each parameter's gradient in float32, all other sums are counted as they are made. A ring
sends 2(N − 1)/N times as much from each process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import gsem
from gsem.distributed import Processes, current


class Payload:
    """Counts the bytes of all sums but those of DistributedDataParallel."""

    def __init__(self) -> None:
        self.bytes = 0
        plain = Processes._reduce

        def counted(processes, operation, tensors):
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            plain(processes, operation, tensors)

        Processes._reduce = counted  # type: ignore[method-assign]


def training(o: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images per second, and bytes of a step."""
    recipe = replace(gsem.RECIPES[o.recipe].scaled(1), model=o.model, data=o.data, data_path=o.data_path, warmup=0)
    recipe = replace(recipe, batch_size=o.batch_size, steps_per_epoch=o.steps + 1)
    payload, seen = Payload(), []

    def look(p) -> None:
        if not p.epoch_ended:
            seen.append((p.step, time.perf_counter(), payload.bytes))

    run = gsem.train(recipe, out=folder / "run", device=o.device, on_progress=look)
    if not current().first:
        return {}
    (first, began, before), (last, ended, after) = seen[0], seen[-1]
    if last == first:
        raise SystemExit("--steps must be at least 20")
    weights = sum(p.numel() for p in run.model().parameters() if p.requires_grad)
    sums = (after - before) / (last - first) + 4 * weights if current().several else 0
    batch = min(o.batch_size, len(gsem.data.load(o.data, o.data_path).training()[0]))
    return {"rate": batch * (last - first) / (ended - began), "bytes": sums}


def evaluation(o: argparse.Namespace, folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    source = gsem.data.load(o.data, o.data_path)
    model = gsem.create_model(o.model, num_classes=len(source.classes), in_channels=source.shape[0]).eval()
    test = source.test()
    device = current().device(o.device)
    x, y = gsem.data.to_float(test.x[: o.images]).to(device), test.y[: o.images].to(device)
    batch = max(1, min(o.batch_size, len(x) // (4 * o.most)))

    def attack(images: int) -> float:
        current().gathered(None)  # all begin together
        began = time.perf_counter()
        gsem.evaluate(
            model.to(device), x[:images], y[:images], ["clean", f"pgd:steps={o.attack_steps}"], eps=source.eps,
            draws=20, batch_size=batch, frozen=False, save=folder / f"evaluation-{images}",
        )  # fmt: skip
        return time.perf_counter() - began

    attack(batch * o.most)
    return {"rate": len(x) / attack(len(x)), "bytes": 0}


def measured(kind: str, processes: int, o: argparse.Namespace) -> dict[str, float]:
    """One side: this file as a worker, in one process or in several."""
    words = [__file__, "--worker", kind, "--most", str(o.most)]
    for name in ("model", "recipe", "data", "data_path", "batch_size", "steps", "images", "attack_steps", "device"):
        value = getattr(o, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    start = [sys.executable, *words]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    threads = {} if o.gpus else {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(start, env=os.environ | threads, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def apart(kind: str, o: argparse.Namespace) -> float:
    """Images per second of N processes at once that know nothing of each other: what this machine can give."""
    with ThreadPoolExecutor(o.most) as pool:
        return sum(side["rate"] for side in pool.map(lambda _: measured(kind, 1, o), range(o.most)))


def compare(kind: str, o: argparse.Namespace) -> None:
    turns = [
        (measured(kind, 1, o), measured(kind, o.most, o), 0.0 if o.gpus else apart(kind, o)) for _ in range(o.pairs)
    ]
    gains = sorted(several["rate"] / one["rate"] for one, several, _ in turns)
    one, several = (statistics.median(turn[side]["rate"] for turn in turns) for side in (0, 1))
    gain, most = statistics.median(gains), statistics.median(most / one["rate"] for one, _, most in turns)
    print(
        f"{kind:<11} {one:9.1f} {several:9.1f} {gain:8.2f} ({gains[0]:.2f} – {gains[-1]:.2f}) {gain / o.most:10.0%} "
        f"{'' if o.gpus else f'{most:.2f}':>8} {turns[-1][1]['bytes']:12,.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="on the CPU, with one thread each")
    parser.add_argument("--gpus", type=int, default=0, help="one process for each of so many GPUs instead")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--recipe", default="gcat")
    parser.add_argument("--model", default="gsem-resnet10x16")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-path")
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--steps", type=int, default=40, help="of a training")
    parser.add_argument("--images", type=int, default=400, help="of an evaluation")
    parser.add_argument("--attack-steps", type=int, default=20)
    parser.add_argument("--worker", choices=("training", "evaluation"), help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        # (All processes share the folder: an evaluation keeps its finished batches there.)
        folder = current().from_first(lambda: tempfile.mkdtemp())
        found = {"training": training, "evaluation": evaluation}[o.worker](o, Path(folder))
        if current().first:
            print(json.dumps(found))
        return
    o.most, o.device = o.gpus or o.processes, "cuda" if o.gpus else "cpu"
    print(f"{o.model} on {o.data}, {o.recipe}, batches of {o.batch_size}; {o.pairs} pairs, medians (least – most)")
    several = f"{o.most}: img/s"
    print(f"{'':<11} {'1: img/s':>9} {several:>9} {'speed-up':>22} {'efficiency':>10} {'apart':>8} {'bytes/step':>12}")
    for kind in ("training", "evaluation"):
        compare(kind, o)


if __name__ == "__main__":
    main()
