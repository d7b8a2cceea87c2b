"""`gpu.py step`: the published step, an attack pass beside a large product, kernel launches, torch.compile."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import training_step
from gpu_report import Report
from timing import OverTime, in_turns, kernel_launches, product_rate, spread, taken, tf32, time_limit
from torch._dynamo.exc import TorchDynamoException
from torch.utils.flop_counter import FlopCounterMode
from training_step import NAMES, Sides

import gsem
from gsem._env import DTYPES
from gsem.attacks._core import expected_gradient
from gsem.losses import cross_entropy

STEP_MARK = 3.0  # times as fast as the eager fp16 reference
PASS_MARK = 0.4  # of the rate of a large product
PASS_BATCHES = (1, 4)  # times the batch: a pass with several draws folded in has more rows than the batch
COMPILING = "torch.compile"


def run(report: Report, device: torch.device, o: argparse.Namespace) -> None:
    report.attempt("the published step", lambda: published_step(report, options(o)))
    if device.type == "cuda":
        for title, words in {"ours, fp16 search": ["--fp16"], "ours, no CUDA graph": ["--compile", "off"]}.items():
            report.attempt(title, lambda title=title, words=words: our_step(report, title, options(o, *words)))
    for precision in ("bf16", "fp16", "float32", "TF32") if device.type == "cuda" else ("bf16", "float32"):
        for times in PASS_BATCHES:
            work = partial(attack_pass, report, device, precision, times * o.batch, o)
            report.attempt(f"ResNet-18's attack pass, {precision}", work)
    report.attempt("launches", lambda: launches(report, options(o)))
    if o.compile_seconds:
        report.attempt(COMPILING, lambda: compiled(report, options(o, "--compile", "on"), o.compile_seconds))


def options(o: argparse.Namespace, *words: str) -> argparse.Namespace:
    """Those of `training_step.py`."""
    given = {"--model": o.model, "--batch": o.batch, "--side": o.side, "--repeats": o.repeats, "--passes": o.repeats}
    given["--device"] = o.device
    # A CPU takes minutes for a step of ten draws: there the part is tried, not measured.
    given |= {} if o.device.startswith("cuda") else {"--steps": 2, "--eot": 2, "--draws": 2}
    return training_step.arguments([*(str(word) for pair in given.items() for word in pair), *words])


def published_step(report: Report, o: argparse.Namespace) -> None:
    sides = Sides(o)
    size = f"batch {o.batch}, {o.steps} steps × {o.eot} draws on every second image, {o.draws} draws"
    used = ", ".join(f"{field} {value}" for field, value in sides.stepper.used.items())
    report.row(o.model, size, steps=o.steps, eot=o.eot, draws=o.draws)
    report.row("precision", f"{used}; reference {'fp16' if sides.device.type == 'cuda' else 'float32'}")
    found = training_step.measured(sides)
    for title, times in found.items():
        ours = statistics.median(times["ours"])
        for name in NAMES:
            ratio = statistics.median(times[name]) / ours
            shown, figures = f"{spread(times[name]).strip()}  {ratio:.2f}×", {"seconds": times[name], "ratio": ratio}
            if title == "the step" and name == "reference":
                report.at_least(f"{title}: {name}", ratio, STEP_MARK, shown, f"at least {STEP_MARK:g}×", **figures)
            else:
                report.row(f"{title}: {name}", shown, **figures)
    rate = product_rate(sides.device, sides.stepper.search_dtype)
    parts = training_step.measured_parts(sides, statistics.median(found["the step"]["ours"]), rate)
    for name, part in parts.items():
        floor = f", arithmetic alone {part['floor'] / part['seconds']:.0%}" if part["floor"] else ""
        report.row(f"of our step: {name}", f"{part['seconds']:9.4f} s, {part['share']:.0%}{floor}".strip(), **part)
    if sides.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(sides.device)
        report.row("most GPU memory, three models", f"{peak / 2**30:.1f} GiB", bytes=peak)


def our_step(report: Report, title: str, o: argparse.Namespace) -> None:
    sides = Sides(o)
    times = in_turns(sides.device, {"ours": sides.ours}, o.repeats, warm_ups=2)["ours"]
    report.row(f"the step: {title}", f"{spread(times).strip()}; used: {sides.stepper.compile_used}", seconds=times)


def attack_pass(report: Report, device: torch.device, precision: str, batch: int, o: argparse.Namespace) -> None:
    """Forward and gradient of the images on plain ResNet-18's folded model, as a share of a large product's rate."""
    dtype = DTYPES.get(precision, torch.float32)
    torch.manual_seed(0)
    model = gsem.create_model(o.model.removeprefix("gsem-")).to(device).eval()
    x = torch.rand(batch, 3, o.side, o.side, device=device)
    y = torch.randint(10, (batch,), device=device)
    with FlopCounterMode(display=False) as forward:
        model(x[:2])
    operations = 2 * forward.get_total_flops() / 2 * batch
    with tf32(precision == "TF32"):
        rate = product_rate(device, dtype)
        folded = gsem.fold(model, dtype)
        work = partial(expected_gradient, folded, x, y, cross_entropy, 1)
        times = in_turns(device, {"pass": work}, 2 * o.repeats, warm_ups=3)["pass"]
    share = operations / statistics.median(times) / rate
    shown = f"{spread(times).strip()}  {share:.0%} of {rate / 1e12:.1f} TFLOP/s"
    what = f"{o.model.removeprefix('gsem-')}'s attack pass, {precision}, {batch} images"
    figures = {"seconds": times, "rate": rate, "operations": operations}
    if precision == "bf16":
        report.at_least(what, share, PASS_MARK, shown, f"at least {PASS_MARK:.0%}", **figures)
    else:
        report.row(what, shown, figure=share, **figures)


def launches(report: Report, o: argparse.Namespace) -> None:
    sides = Sides(o)
    half = sides.images("ours")[1::2].contiguous(memory_format=torch.channels_last)
    work: dict[str, Callable[[], object]] = {
        "attack pass": lambda: expected_gradient(sides.stepper.folded, half, sides.y[1::2], cross_entropy, 1),
        "training pass": lambda: sides.training_pass("ours"),
        "folded model's refresh": sides.stepper.folded.refresh,
        "the step": sides.ours,
    }
    for name, call in work.items():
        taken(sides.device, call)  # the first call of a shape launches more
        found = kernel_launches(sides.device, call)
        sides.stepper.optimizer.zero_grad()
        if isinstance(found, str):
            report.row(f"kernel launches: {name}", found)
        else:
            shown = f"{found['launches']:,}; the host waits {found['waits']} times"
            report.row(f"kernel launches: {name}", shown, **found)


def compiled(report: Report, o: argparse.Namespace, seconds: float) -> None:
    try:
        with time_limit(seconds, COMPILING):
            sides = Sides(o)
            if not sides.stepper.compiled:  # its warning has the reason
                report.row(COMPILING, "not possible here", "", "")
                return
            first = taken(sides.device, sides.ours)
            report.row("the step: compiled, first call", f"{first:.1f} s", seconds=first)
            times = in_turns(sides.device, {"ours": sides.ours}, o.repeats, warm_ups=2)["ours"]
            report.row("the step: ours, compiled", spread(times).strip(), seconds=times)
    except OverTime as stopped:
        if stopped.what != COMPILING:
            raise
        report.row(COMPILING, str(stopped), "", "", limit=seconds)
    except TorchDynamoException as error:  # such as no C++ compiler, or no setuptools: nothing to measure
        reason = f"not possible here: {type(error).__name__}: {error}".splitlines()[0]
        report.row(COMPILING, reason, reason=reason)
