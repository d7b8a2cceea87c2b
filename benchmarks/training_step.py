"""One optimizer step of the published GCAT recipe: ours, the slow reference, and the stock alternative, in one run.

    python benchmarks/training_step.py [--model gsem-resnet18] [--batch 64] [--repeats 3] [--device cuda] [--json FILE]

reference: benchmarks/reference.py, eager, NCHW; float32 on a CPU, fp16 autocast on a GPU.
stock: the same code with channels-last and autocast in the precision that `auto` chooses here, and nothing else.
ours: `gsem.training.step.Stepper`, the step that `gsem train gcat-published` runs, its data and augmentation included.

The sides take turns. Then the parts of ours, beside the time that their arithmetic takes at the rate of a large
product in the search's precision (measured here, too). Images and labels are random: no time depends on them. Prints
tables, writes JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import reference
import torch
from timing import Clock, described, in_turns, product_rate, spread
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gsem
from gsem._env import DTYPES, choose_precision
from gsem.attacks._core import expected_gradient
from gsem.data import Dataset, Split
from gsem.losses import cross_entropy
from gsem.training.step import Stepper

EPS = 8 / 255
NAMES = ("reference", "stock", "ours")


def random_source(images: int, side: int) -> Dataset:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (images, 3, side, side), generator=rng, dtype=torch.uint8)
    split = Split(x, torch.randint(0, 10, (images,), generator=rng))
    return replace(
        gsem.data.load("digits"),
        name="random",
        shape=(3, side, side),
        eps=EPS,
        padding=4,
        fill=128,
        flip=True,
        read_train=lambda: split,
        read_test=lambda: split,
    )


class Sides:
    """The three sides on one batch, each with a model and optimizer of its own."""

    def __init__(self, o: argparse.Namespace):
        self.o, self.device = o, torch.device(o.device)
        self.source = random_source(o.batch, o.side)
        self.pixels = self.source.read_train().x.to(self.device)
        self.y = self.source.read_train().y.to(self.device)
        self.x = self.pixels.float() / 255
        self.recipe = replace(
            gsem.RECIPES["gcat-published"],
            steps=o.steps,
            eot=o.eot,
            draws=o.draws,
            model=o.model,
            batch_size=o.batch,
            attack_precision="fp16" if o.fp16 else "auto",
        )
        gpu = self.device.type == "cuda"
        self.casts = {
            "reference": partial(torch.autocast, "cuda", torch.float16) if gpu else nullcontext,
            "stock": partial(self._cast, DTYPES[choose_precision("auto", self.device)]),
        }
        self.models = {name: self._model(torch.contiguous_format) for name in ("reference",)}
        self.models["stock"] = self._model(torch.channels_last)
        self.models["ours"] = self._model(torch.channels_last)
        self.optimizers = {
            name: torch.optim.SGD(self.models[name].parameters(), 0.01, momentum=0.9, weight_decay=3.5e-3)
            for name in ("reference", "stock")
        }
        self.stepper = Stepper(self.recipe, self.source, EPS, self.models["ours"], None, compile=o.compile)
        self.number = 0
        self.grads = [torch.zeros_like(p) for p in self.models["ours"].parameters()]

    def _model(self, layout: torch.memory_format) -> nn.Module:
        torch.manual_seed(0)
        return gsem.create_model(self.o.model).to(self.device, memory_format=layout)

    def _cast(self, dtype: torch.dtype) -> AbstractContextManager:
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def images(self, side: str) -> Tensor:
        layout = torch.contiguous_format if side == "reference" else torch.channels_last
        return self.x.contiguous(memory_format=layout)

    def theirs(self, side: str) -> None:
        x = self.images(side)
        start = x[1::2] + EPS * (2 * torch.rand_like(x[1::2]) - 1)
        reference.step(
            self.models[side],
            self.optimizers[side],
            x,
            self.y,
            start.clamp(0, 1),
            eps=EPS,
            steps=self.o.steps,
            eot=self.o.eot,
            draws=self.o.draws,
            cast=self.casts[side],
        )

    def ours(self) -> None:
        self.number += 1
        self.stepper(self.pixels, self.y, step=self.number, epoch=0.0, averaged=None)

    def attack_pass(self, side: str) -> None:
        """A gradient of the whole batch (ours: on the folded model, all draws of the step at once)."""
        if side == "ours":
            expected_gradient(self.stepper.folded, self.images(side), self.y, cross_entropy, self.o.eot)
        else:
            reference.attack_gradient(self.models[side].eval(), self.images(side), self.y, self.casts[side])

    def training_pass(self, side: str) -> None:
        if side == "ours":
            self.models[side].train()
            logits = self.stepper._logits(self.images(side), self.images(side))
            self.stepper._losses(logits, self.y).mean().backward()
        else:
            reference.training_pass(self.models[side], self.images(side), self.y, 1.0, self.casts[side])

    # --- the parts of ours ------------------------------------------------------------------------------------

    def parts(self) -> dict[str, tuple[Callable[[], object], float]]:
        """name → (work, times a step)."""
        half = self.images("ours")[1::2].contiguous(memory_format=torch.channels_last)
        s, o = self.stepper, self.o
        return {
            "data and augmentation": (lambda: s._augmented(self.pixels, 1), 1),
            "folded model's refresh": (s.folded.refresh, 1),
            "attack gradients": (
                lambda: expected_gradient(s.folded, half, self.y[1::2], cross_entropy, o.eot),
                o.steps,
            ),
            "training passes": (lambda: self.training_pass("ours"), o.draws),
            "clip, SGD, guards": (self.update, 1),
        }

    def update(self) -> None:
        for parameter, grad in zip(self.stepper.model.parameters(), self.grads, strict=True):
            parameter.grad = grad
        self.stepper._update()

    def flops(self) -> dict[str, float]:
        """Operations of a step that the method needs, by torch's count on the unfolded model."""
        model = self.models["stock"].eval()
        with FlopCounterMode(display=False) as forward:
            model(self.images("stock")[:2])
        each = forward.get_total_flops() / 2 * self.o.batch
        return {
            "attack gradients": each / 2 * 2 * self.o.steps * self.o.eot,
            "training passes": each * 3 * self.o.draws,
        }


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gsem-resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eot", type=int, default=10)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, default=5, help="repeats of the single passes")
    parser.add_argument("--warm-ups", type=int, default=1, help="calls of each side before it is timed")
    parser.add_argument("--fp16", action="store_true", help="search on an fp16 folded model (a GPU's)")
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="ours, as gsem train's option")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, instead of wall time")
    parser.add_argument("--json", type=Path, default=Path("training_step.json"))
    return parser.parse_args(words)


def measured(sides: Sides) -> dict[str, dict[str, list[float]]]:
    """Seconds of the single passes and of the step, by side."""
    o, device = sides.o, sides.device
    found: dict[str, dict[str, list[float]]] = {}
    for title, work in (
        ("attack pass of the batch", sides.attack_pass),
        ("training pass of the batch", sides.training_pass),
    ):
        each = {name: partial(work, name) for name in NAMES}
        found[title] = in_turns(device, each, o.passes, warm_ups=o.warm_ups)
    passes = found["attack pass of the batch"]
    passes["ours"] = [seconds / o.eot for seconds in passes["ours"]]
    sides.stepper.optimizer.zero_grad()
    steps = {"reference": lambda: sides.theirs("reference"), "stock": lambda: sides.theirs("stock"), "ours": sides.ours}
    found["the step"] = in_turns(device, steps, o.repeats, warm_ups=o.warm_ups)
    return found


def measured_parts(sides: Sides, whole: float, rate: float) -> dict[str, dict[str, float]]:
    """The parts of our step: seconds, share of the `whole` step, and seconds of the arithmetic alone at `rate`."""
    parts, flops = {}, sides.flops()
    for name, (work, count) in sides.parts().items():
        times = in_turns(sides.device, {name: work}, sides.o.passes, warm_ups=max(1, sides.o.warm_ups))
        seconds = statistics.median(times[name]) * count
        parts[name] = {"seconds": seconds, "share": seconds / whole, "floor": flops.get(name, 0.0) / rate}
    return parts


def main() -> None:
    o = arguments()
    Clock.now = staticmethod(time.process_time if o.processor_time else time.perf_counter)
    sides = Sides(o)
    on = described(sides.device)
    print(f"{o.model}, batch {o.batch}, {o.steps} steps × {o.eot} draws on every second image, {o.draws} draws")
    print(
        f"torch {torch.__version__}, {on}, {torch.get_num_threads()} threads"
        f"{', processor time' if o.processor_time else ''}"
    )
    found = measured(sides)
    for title, times in found.items():
        print(f"\n{title}")
        for name in NAMES:
            ratio = statistics.median(times[name]) / statistics.median(times["ours"])
            print(f"  {name:<10} {spread(times[name])}  {ratio:5.2f}×")
    top = product_rate(sides.device, sides.stepper.search_dtype)
    used = sides.stepper.used["attack_precision"]
    print(f"\nthe parts of ours ({used}; a product runs at {top / 1e12:.2f} TFLOP/s in it here)")
    parts = measured_parts(sides, statistics.median(found["the step"]["ours"]), top)
    for name, part in parts.items():
        print(f"  {name:<22} {part['seconds']:9.4f} s  {part['share']:6.1%} of the step", end="")
        floor = part["floor"]
        print(f"  arithmetic alone {floor:8.4f} s ({floor / part['seconds']:.0%})" if floor else "")
    metadata = {key: value for key, value in vars(o).items() if key != "json"} | {"torch": torch.__version__, "on": on}
    metadata |= {"threads": torch.get_num_threads(), "ceiling": top}
    o.json.write_text(json.dumps({"metadata": metadata, "times": found, "parts": parts}, indent=2))


if __name__ == "__main__":
    main()
