"""AutoAttack's standard parts: ours against pyautoattack on the same network and images, in one run.

    python benchmarks/autoattack.py RUN --data DATA [--images 1000] [--attacks apgd-ce,apgd-t,fab-t,square,standard]

Each attack alone, on the images that the network classifies rightly, then the whole suite. Three sides: ours (on the
float32 folded model, whose folding counts in its time), pyautoattack on the model as it is, and pyautoattack on our
folded model, which separates what the folding gives from what the attacks give. A GSeM network is made deterministic
by switching its noise off; with --stochastic it is attacked as it is, by our standard suite and by pyautoattack's
`rand` and `standard`, and all three are scored on the same draws.

pyautoattack is in the test extra; without it ours runs alone. TF32 is off for all sides. Prints a table, writes JSON.
`--steps`, `--queries` shorten both sides alike.
"""

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from timing import synchronize, tf32
from torch import Tensor, nn

import gsem
from gsem.attacks import apgd, autoattack, counting, fab, square
from gsem.nn.predict import predict_draws

ALONE = "pyautoattack cannot be imported: ours runs alone"
SIDES = {"ours": "ours", "reference": "reference", "folded": "on our folded model"}
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")


def ours(name: str, o: argparse.Namespace) -> Callable[..., Tensor]:
    classes = {"targets": 9}
    return {
        "apgd-ce": partial(apgd, steps=o.steps),
        "apgd-t": partial(apgd, steps=o.steps, **classes),
        "fab-t": partial(fab, steps=o.steps, **classes),
        "square": partial(square, queries=o.queries),
        "standard": partial(autoattack, steps=o.steps, queries=o.queries, batch_size=o.batch),
    }[name]


def theirs(model: nn.Module, name: str, eps: float, o: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    from pyautoattack import AutoAttack  # here, since ours can be measured without it

    logging.disable(logging.WARNING)
    version = name if name in ("standard", "rand") else "custom"
    attacks = None if version != "custom" else [name]
    peer = AutoAttack(model, norm=o.norm, eps=eps, seed=o.seed, version=version, attacks=attacks, device=o.device)
    peer.verbose = False
    # (The library's own defaults for a part alone are those of the standard, but for FAB's restarts.)
    peer.apgd.n_restarts = 1
    peer.apgd.n_iter = peer.apgd_targeted.n_iter = peer.fab.n_iter = o.steps
    peer.square.n_queries = o.queries
    return lambda x, y: peer.run_standard_evaluation(x, y, batch_size=o.batch)[0]


def wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(256)]) != y


def timed(model: nn.Module, attack: Callable[[nn.Module], Tensor], device: torch.device) -> tuple[Tensor, dict]:
    counted = counting(model)
    synchronize(device)
    started, worked = time.perf_counter(), time.process_time()
    x_adv = attack(counted)
    synchronize(device)
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    return x_adv, {"seconds": seconds, "cpu_seconds": cpu, "forwards": counted.forwards, "gradients": counted.gradients}


def attacked(side: str, model: nn.Module, x: Tensor, y: Tensor, name: str, eps: float, o: argparse.Namespace):
    """One attack by one implementation (ours, reference or folded) on these images: its points and its cost."""

    def attack_ours(counted: nn.Module) -> Tensor:
        parts = [(x, y)] if name == "standard" else zip(x.split(o.batch), y.split(o.batch), strict=True)
        return torch.cat([ours(name, o)(counted, *part, eps=eps, norm=o.norm, seed=o.seed) for part in parts])

    if side == "reference":
        return timed(model, lambda m: theirs(m, name, eps, o)(x, y), x.device)
    folded = gsem.fold(model)
    if side == "ours":
        return timed(folded, attack_ours, x.device)
    return timed(Contiguous(folded), lambda m: theirs(m, name, eps, o)(x, y), x.device)


def compare(model: nn.Module, x: Tensor, y: Tensor, name: str, eps: float, o: argparse.Namespace) -> dict:
    """One attack, by all implementations, on correctly classified images."""
    right = ~wrong(model, x, y)
    x, y = x[right].contiguous(), y[right]
    asked = [side for side in SIDES if side == "ours" or side in o.sides.split(",")]
    sides = {SIDES[side]: attacked(side, model, x, y, name, eps, o) for side in asked}
    row = {"attack": name, "images": len(x), "sides": {}}
    broken = {side: wrong(model, x_adv, y) for side, (x_adv, _) in sides.items()}
    for side, (_, cost) in sides.items():
        remaining = max(1, int((~broken[side]).sum()))
        row["sides"][side] = cost | {
            "broken": float(broken[side].double().mean()),
            "standing": remaining,
            "forwards_per_survivor": cost["forwards"] / remaining,
            "gradients_per_survivor": cost["gradients"] / remaining,
            "only_here": int((broken[side] & ~broken["ours"]).sum()),
            "only_ours": int((broken["ours"] & ~broken[side]).sum()),
        }
    return row


class Contiguous(nn.Module):
    """pyautoattack's APGD-T calls `view` on gradients, which the folded model's layout does not allow."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.clone(memory_format=torch.contiguous_format))


def stochastic(model: nn.Module, x: Tensor, y: Tensor, eps: float, o: argparse.Namespace) -> list[dict]:
    """Strength and cost on a network with its noise on; all points are scored on the same 100 draws."""
    folded = gsem.fold(model)
    sides = {
        "clean": (x, {"seconds": 0.0, "cpu_seconds": 0.0, "forwards": 0, "gradients": 0}),
        "ours, standard, eot 20": timed(
            folded, lambda m: ours("standard", o)(m, x, y, eps=eps, norm=o.norm, eot=20, seed=o.seed), x.device
        ),
    }
    if "reference" in o.sides.split(","):
        for version in ("rand", "standard"):
            attack = partial(lambda version, m: theirs(m, version, eps, o)(x, y), version)
            sides[f"pyautoattack {version}"] = timed(model, attack, x.device)
    rows = []
    for side, (x_adv, cost) in sides.items():
        found = predict_draws(model, x_adv, draws=100, seed=1234)
        rows.append({"side": side, "expected": float((found == y).double().mean()), "images": len(x)} | cost)
    return rows


def show(rows: list[dict]) -> None:
    print(
        f"{'attack':<9} {'side':<20} {'broken':>7} {'only':>5} {'-':>5} "
        f"{'fwd/surv':>9} {'grad/surv':>9} {'s':>8} {'×':>4} {'cpu s':>8} {'×':>4}"
    )
    for row in rows:
        for side, s in row["sides"].items():
            wall, cpu = (s[key] / max(row["sides"]["ours"][key], 1e-9) for key in ("seconds", "cpu_seconds"))
            print(
                f"{row['attack']:<9} {side:<20} {s['broken']:7.1%} {s['only_here']:>5} {s['only_ours']:>5} "
                f"{s['forwards_per_survivor']:9.0f} {s['gradients_per_survivor']:9.0f} "
                f"{s['seconds']:8.1f} {wall:4.1f} {s['cpu_seconds']:8.1f} {cpu:4.1f}"
            )
    print("only: broken here and not by ours; -: by ours and not here; ×: its time over ours")
    print("cpu s: processor time, which other work on the machine does not lengthen as it does wall time")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory or checkpoint, or package.module:function")
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-path")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument(
        "--with-training-images", action="store_true", help="where test images are few: attacks are compared, not nets"
    )
    parser.add_argument("--attacks", default=",".join((*PARTS, "standard")))
    parser.add_argument("--sides", default=",".join(SIDES), help="ours, reference, folded")
    parser.add_argument("--norm", default="Linf")
    parser.add_argument("--eps", type=float)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stochastic", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("autoattack.json"))
    o = parser.parse_args(words)
    if not peer_found():
        o.sides = "ours"
    return o


def peer_found() -> bool:
    try:
        import pyautoattack  # noqa: F401
    except ImportError:
        return False
    return True


def task(o: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, float, str]:
    """The network, images, labels, eps, and the name of the data."""
    model, meta = gsem.load_model(o.run)
    model = model.to(o.device, memory_format=torch.contiguous_format)
    source = gsem.data.load(o.data, o.data_path)
    images = source.test()
    if o.with_training_images:
        x, y = zip(*((part.x, part.y) for part in (images, source.read_train())), strict=True)
        images = gsem.data.Split(torch.cat(x), torch.cat(y))
    rows = gsem.data.balanced(images.y, min(o.images, len(images)))
    x, y = gsem.data.to_float(images.x[rows]).to(o.device), images.y[rows].to(o.device)
    return model, x, y, o.eps or meta.get("data", {}).get("eps", source.eps), source.name


def deterministic(model: nn.Module) -> AbstractContextManager:
    """Inside the block, a GSeM network computes without its noise."""
    noisy = any(isinstance(m, gsem.GSeM) for m in model.modules())
    return gsem.noise(model, "off") if noisy else nullcontext()


def main() -> None:
    o = arguments()
    model, x, y, eps, data = task(o)
    print(f"{o.run} on {len(x)} images of {data}, eps {eps:.4f} ({o.norm}), steps {o.steps}, queries {o.queries}")
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, {o.device}")
    if not peer_found():
        print(ALONE)
    rows: list[dict] = []
    if o.stochastic:
        with tf32(False):
            rows = stochastic(model, x, y, eps, o)
        for r in rows:
            print(
                f"{r['side']:<24} expected {r['expected']:6.1%}  forwards/image {r['forwards'] / len(x):8.0f}  "
                f"gradients/image {r['gradients'] / len(x):7.0f}  {r['seconds']:8.1f} s"
            )
    else:
        with deterministic(model), tf32(False):
            for name in o.attacks.split(","):
                rows.append(compare(model, x, y, name, eps, o))
                show(rows[-1:])
        print()
        show(rows)
    metadata = {
        "run": str(o.run),
        "data": o.data,
        "images": len(x),
        "eps": eps,
        "norm": o.norm,
        "torch": torch.__version__,
    }
    metadata |= {"machine": platform.machine(), "threads": torch.get_num_threads(), "device": o.device, "seed": o.seed}
    o.json.write_text(
        json.dumps({"metadata": metadata | {"steps": o.steps, "queries": o.queries}, "rows": rows}, indent=2)
    )


if __name__ == "__main__":
    main()
