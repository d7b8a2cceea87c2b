"""`gpu.py train`, `evaluate` and `autoattack`: a run within a budget, and the attacks on it."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import autoattack as suites
import torch
from gpu_report import Report
from timing import in_turns, tf32
from torch import Tensor

import gsem
from gsem.nn.predict import BATCH
from gsem.training.recipes import Recipe
from gsem.training.run import resume_recipe
from gsem.training.step import Stepper
from gsem.training.validation import Validator

MINUTES_MARK = 10.0  # for a training and its evaluation
SUITE_MARK = 3.0  # times as fast as pyautoattack
SAMPLE = 100  # images, and a tenth of the steps and queries, by which the cost of the suite is estimated
SPEAK_EVERY = 10.0  # seconds
MEASURE_FOR = 10.0  # seconds


class Spoken:
    """Prints a line of a long computation now and then, on_progress."""

    def __init__(self, line: Callable[[Any], str]):
        self.line, self.last = line, time.monotonic()

    def __call__(self, progress: Any) -> None:
        if time.monotonic() - self.last >= SPEAK_EVERY:
            self.last = time.monotonic()
            print(f"  … {self.line(progress)}", flush=True)


# --- train ------------------------------------------------------------------------------------------------------------


def train(report: Report, device: torch.device, o: argparse.Namespace) -> None:
    path = o.out / "run"
    resumed = (path / "recipe.json").exists()
    if resumed:
        recipe = resume_recipe(path)
        report.row("run", f"{path} is there already: it is resumed, with its own recipe")
    else:
        recipe = replace(gsem.RECIPES["gcat"], model=o.model, data=o.data, data_path=o.data_path)
        epochs = o.epochs or fitting_epochs(report, recipe, device, o.budget)
        recipe = recipe.scaled(epochs)
    spoken = Spoken(lambda p: f"epoch {p.epoch}/{p.epochs}, {p.images_per_second:,.0f} images/s, loss {p.loss:.3f}")
    started = time.monotonic()
    run = gsem.train(recipe, out=path, device=str(device), resume=resumed, on_progress=spoken)
    wall, seconds = time.monotonic() - started, run.metrics[-1]["seconds"]
    best, done = run.best, len(run.metrics)
    report.row("epochs", f"{done} of {recipe.epochs}, {seconds / done:.2f} s each", epochs=done)
    mark = "" if o.epochs or resumed else f"about {o.budget:.0f} s"
    report.row("training with validation", f"{seconds:.1f} s; this call {wall:.1f} s", mark, seconds=seconds, call=wall)
    accuracies = f"clean {best['clean']:.1%}, PGD-10 {best['robust']:.1%}"
    report.row("validation accuracy, best epoch", f"{accuracies} (epoch {best['epoch']})", **best)
    precision = json.loads((path / "recipe.json").read_text())["precision"]
    report.row("precision", ", ".join(f"{field} {choice['used']}" for field, choice in precision.items()), **precision)


def fitting_epochs(report: Report, recipe: Recipe, device: torch.device, budget: float) -> int:
    """As many as the budget allows by a short measurement, at most the recipe's own number, at least 1."""
    source = gsem.data.load(recipe.data, recipe.data_path)
    training, validation = (split.to(device) for split in source.training(recipe.seed))
    model = gsem.create_model(recipe.model, len(source.classes), source.shape[0]).to(device)
    stepper = Stepper(recipe, source, recipe.eps or source.eps, model.to(memory_format=torch.channels_last), None)
    batch = min(recipe.batch_size, len(training))
    held = min(BATCH, len(validation))
    number = iter(range(10**9))

    def step() -> None:
        stepper(training.x[:batch], training.y[:batch], step=next(number), epoch=0.0, averaged=None)

    validator = Validator(stepper, gsem.data.Split(validation.x[:held], validation.y[:held]))

    def validate() -> None:
        validator(model)

    (first,) = in_turns(device, {"step": step}, 1, warm_ups=2)["step"]
    repeats = max(2, min(20, int(MEASURE_FOR / first)))
    each = in_turns(device, {"step": step, "validation": validate}, repeats)
    a_step, a_validation = (statistics.median(times) for times in each.values())
    # Each epoch validates the average and the raw weights.
    validations = 2 * a_validation * len(validation) / held
    epoch = a_step * len(training) / batch + validations
    found = max(1, min(recipe.epochs, int(budget / epoch)))
    shown = f"a step {a_step * 1000:.1f} ms, an epoch {epoch:.2f} s"
    report.row(
        "measured before", f"{shown}: {found} epochs (of the recipe's {recipe.epochs})", step=a_step, epoch=epoch
    )
    return found


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_images(o: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor, float]:
    """The network of the run, images, labels and their rows in the test split, and the run's eps.

    Raises:
        FileNotFoundError: there is no run yet.
    """
    path = o.out / "run"
    if not (path / "recipe.json").exists():
        raise FileNotFoundError(f"there is no run in {path}: the part train, with the same OUT, makes it")
    model, meta = gsem.load_model(path)
    images = gsem.data.load(o.data, o.data_path).test()
    rows = gsem.data.balanced(images.y, min(o.images, len(images)))
    x, y = gsem.data.to_float(images.x[rows]).to(device), images.y[rows].to(device)
    return model.to(device), x, y, rows, meta["data"]["eps"]


def evaluate(report: Report, device: torch.device, o: argparse.Namespace) -> None:
    model, x, y, rows, eps = test_images(o, device)
    # (Both sizes of a batch, the whole one and the rest.)
    for size in {min(BATCH, len(x)), len(x) % BATCH} - {0}:
        gsem.evaluate(model, x[:size], y[:size], "clean,pgd:steps=1", eps=eps, draws=2)
    spoken = Spoken(lambda p: f"{p.name}: {p.done}/{p.images} images, {p.gradients_per_second:,.0f} gradients/s")
    started = time.monotonic()
    how = {"eps": eps, "rows": rows.numpy(), "save": o.out / "evaluation", "on_progress": spoken}
    result = gsem.evaluate(model, x, y, o.attacks, **how)
    wall = time.monotonic() - started
    for s in result.scores:
        mean, low, high = result.expected(s.name)
        passes = s.gradients + s.forwards
        cost = f"{s.seconds:7.1f} s, {passes:,} passes" + (f", {passes / s.seconds:,.0f}/s" if passes else "")
        figures = {"seconds": s.seconds, "gradients": s.gradients, "forwards": s.forwards, "accuracy": mean}
        report.row(s.name, f"{mean:6.1%} ({low:.1%} – {high:.1%})  {cost}", **figures)
    for name in (name for name in result.names if name.split("@")[0] == "worst"):
        mean, low, high = result.expected(name)
        report.row(name, f"{mean:6.1%} ({low:.1%} – {high:.1%})", accuracy=mean)
    total = sum(s.seconds for s in result.scores)
    shown = f"{wall:.1f} s in this call, the attacks {total:.1f} s; {len(x)} images, eps {eps:.4f}"
    # (If the evaluation was resumed, or was there already, this call did only a part of it.)
    seconds = max(wall, total)
    report.row("evaluation", shown, seconds=seconds, call=wall)
    trained = read_seconds(o.out / "train.json", "training with validation")
    if trained is not None:
        minutes = (trained + seconds) / 60
        shown = f"{minutes:.1f} min, {trained:.0f} s of them training"
        report.at_least("training and evaluation", -minutes, -MINUTES_MARK, shown, f"at most {MINUTES_MARK:g} min")


def read_seconds(file: Path, what: str) -> float | None:
    """The `seconds` of a row of another part's JSON file; None where there is none."""
    if not file.exists():
        return None
    rows = json.loads(file.read_text())["rows"]
    return next((row["figures"]["seconds"] for row in rows if row["what"] == what), None)


# --- autoattack -------------------------------------------------------------------------------------------------------


def autoattack(report: Report, device: torch.device, o: argparse.Namespace) -> None:
    model, x, y, _, eps = test_images(o, device)
    sides = ["ours", "reference"] if suites.peer_found() else ["ours"]
    how = suites.arguments([str(o.out / "run"), "--data", o.data, "--device", str(device)])
    with suites.deterministic(model), tf32(False):
        right = ~suites.wrong(model, x, y)
        x, y = x[right].contiguous(), y[right]
        if not len(x):
            raise ValueError("the network is wrong on all test images: there is nothing to attack")
        count = fitting_images(report, sides, model, x, y, eps, how, o)
        x, y = x[:count], y[:count]
        how.steps, how.queries = o.steps, o.queries
        setting = f"eps {eps:.4f}, {o.steps} steps, {o.queries} queries; noise off, TF32 off"
        report.row("setting", setting, eps=eps, steps=o.steps, queries=o.queries)
        found: dict[str, tuple[Tensor, float]] = {}
        for side in sides:
            print(f"  … {side}, {count} images", flush=True)
            x_adv, cost = suites.attacked(side, model, x, y, "standard", eps, how)
            broken = suites.wrong(model, x_adv, y)
            found[side] = broken, cost["seconds"]
            name = "ours" if side == "ours" else "pyautoattack"
            shown = f"{cost['seconds']:.1f} s, {float((~broken).double().mean()):.1%} of {count} images not broken"
            report.row(f"standard suite: {name}", shown, standing=int((~broken).sum()), images=count, **cost)
    if "reference" not in found:
        report.row("pyautoattack", suites.ALONE)
        return
    (ours, our_seconds), (theirs, seconds) = found["ours"], found["reference"]
    only = f"broken by ours only: {int((ours & ~theirs).sum())}, by pyautoattack only: {int((theirs & ~ours).sum())}"
    report.row("images", only)
    ratio = seconds / our_seconds
    report.at_least("ours beside pyautoattack", ratio, SUITE_MARK, f"{ratio:.2f}× as fast", f"at least {SUITE_MARK:g}×")


def fitting_images(
    report: Report,
    sides: list[str],
    model: torch.nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    how: argparse.Namespace,
    o: argparse.Namespace,
) -> int:
    """How many images fit into the budget, by a sample with a tenth of the steps and queries. It warms up, too."""
    sample = min(SAMPLE, len(x))
    how.steps, how.queries = max(1, o.steps // 10), max(1, o.queries // 10)
    seconds = 0.0
    for side in sides:
        suites.attacked(side, model, x[: min(8, sample)], y[: min(8, sample)], "apgd-ce", eps, how)
        _, cost = suites.attacked(side, model, x[:sample], y[:sample], "standard", eps, how)
        seconds += cost["seconds"] * max(o.steps / how.steps, o.queries / how.queries)
    # A small sample does not fill a GPU: the estimate is too high rather than too low.
    count = max(1, min(len(x), int(sample * o.budget / seconds)))
    shown = f"{seconds / sample:.2f} s an image by a sample of {sample}: {count} of {len(x)} rightly classified images"
    report.row("measured before", f"{shown} fit into {o.budget:.0f} s", seconds_per_image=seconds / sample)
    return count
