"""gsem train and gsem demo: a training with its bar, its heading and what to do next."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gsem.cli_evaluate import evaluate_command
from gsem.cli_report import write_report
from gsem.models import canonical_name
from gsem.options import DemoOptions, EvaluateOptions, TrainOptions
from gsem.progress import Scalars, TrainingBar, percent
from gsem.recipes import RECIPES, Recipe
from gsem.run import Progress, Run, TrainingInterrupted, resume_recipe
from gsem.train import train


def train_command(console: Console, options: TrainOptions) -> None:
    recipe, out = options.recipe, options.out
    if options.resume is not None:
        recipe, out = resume_recipe(options.resume), options.resume
    else:
        recipe = replace(recipe, model=canonical_name(recipe.model))
    how: dict[str, Any] = {"resume": options.resume is not None, "compiled": options.compile}
    run = _run(console, recipe, out, options.device, tensorboard=options.tensorboard, **how)
    best = run.best
    console.print(
        f"best: epoch {best['epoch']}, validation clean {percent(best['clean']).strip()}, "
        f"robust {percent(best['robust']).strip()} (PGD-10 on held-out training images)"
    )
    console.print(f"saved; next: gsem evaluate {run.path}", soft_wrap=True)


def _run(
    console: Console,
    recipe: Recipe,
    out: Path | None,
    device: str | None,
    *,
    resume: bool,
    compiled: bool = False,
    tensorboard: Path | None = None,
) -> Run:
    scalars = Scalars(tensorboard) if tensorboard is not None else None
    attack, training = recipe.passes
    heading = (
        f"{recipe.name}: {recipe.model} on {recipe.data}, {recipe.epochs} epochs"
        + (f" × {recipe.rounds} rounds" if recipe.rounds > 1 else "")
        + f" of\n{attack:g} attack and {training:g} training passes per image"
    )
    with TrainingBar(console) as bar:

        def report(p: Progress) -> None:
            nonlocal heading
            if heading:  # not before the run is known to begin
                console.print(heading)
                heading = ""
            bar(p)
            if scalars is not None:
                scalars(p)

        try:
            return train(recipe, out=out, device=device, resume=resume, compiled=compiled, report=report)
        except TrainingInterrupted as stopped:
            raise KeyboardInterrupt(f"stopped; saved. Go on with: gsem train --resume {stopped}") from None


def demo_command(console: Console, o: DemoOptions) -> None:
    run = _run(console, RECIPES["gcat"], o.out, o.device, resume=True)
    options = EvaluateOptions(
        str(run.path),
        attacks="clean,pgd:steps=100",
        images=200,
        frozen=False,
        out=run.path / "evaluation",
        keep_images=True,  # for the report to show
        device=o.device,
    )
    evaluate_command(console, options)
    console.print("Accuracy under one attack is an upper bound: a stronger attack may find more.")
    # (What is found about the run goes into its directory above this line; the report tells it.)
    write_report(console, [str(run.path)], [run.path / "report.html"], device=o.device)
