"""gsem train and gsem demo: a training with its bar, its heading and what to do next."""

from dataclasses import replace

from rich.console import Console

from gsem._text import duration, percent
from gsem.cli.evaluate import evaluate_command
from gsem.cli.options import DemoOptions, EvaluateOptions, TrainOptions, command_line
from gsem.cli.progress import Scalars, TrainingBar
from gsem.cli.report import write_report
from gsem.evaluation.result import EvaluationResult
from gsem.nn.build import named
from gsem.training.progress import Progress
from gsem.training.recipe import Recipe
from gsem.training.recipes import RECIPES
from gsem.training.run import Run, TrainingInterrupted
from gsem.training.trainer import train

# A quick audit of the demo's run takes so many times the seconds of the demo's attack: 3.4 measured on a processor with
# AVX512-BF16 (52 s), 3.7 with AVX2 alone (60 s).
AUDIT_SECONDS = 3.5


def train_command(console: Console, o: TrainOptions) -> None:
    """Train, or resume a run, and print its best epoch."""
    # (The network of a run may have been passed in Python, and cannot be found by its name.)
    recipe = o.recipe if o.resume is not None else replace(o.recipe, model=named(o.recipe.model))
    if o.print_config:
        console.print(recipe.to_toml(), end="", soft_wrap=True)
        return
    run = _run(console, replace(o, recipe=recipe, out=o.resume or o.out), resume=o.resume is not None)
    best = run.best
    console.print(
        f"best: epoch {best['epoch']}, validation clean {percent(best['clean']).strip()}, "
        f"robust {percent(best['robust']).strip()} (PGD-10 on held-out training images)"
    )
    norm = None if recipe.norm == "Linf" else recipe.norm
    console.print(f"saved; next: {command_line('evaluate', run.path, norm=norm)}", soft_wrap=True)


def _run(console: Console, o: TrainOptions, *, resume: bool) -> Run:
    """The run in `o.out`, with its bar and heading."""
    scalars = Scalars(o.tensorboard) if o.tensorboard is not None else None
    with TrainingBar(console) as bar:
        begun = False

        def report(p: Progress) -> None:
            nonlocal begun
            if not begun:  # not before the run is known to begin
                console.print(_heading(o.recipe, p))
                begun = True
            bar(p)
            if scalars is not None:
                scalars(p)

        try:
            run = train(
                o.recipe, out=o.out, device=o.device, resume=resume, compile=o.compile, hold=o.hold, on_progress=report
            )
        except TrainingInterrupted as stopped:
            command = command_line("train", resume=str(stopped))
            raise stopped.kind(f"stopped; saved. Resume with: {command}") from None
    if not begun:
        console.print("this training is already finished")
    return run


def _heading(recipe: Recipe, p: Progress) -> str:
    attack, training = recipe.passes
    rounds = f" × {recipe.rounds} rounds" if recipe.rounds > 1 else ""
    chosen = []
    for field, what in (("precision", "training passes"), ("attack_precision", "attack")):
        asked = getattr(recipe, field)
        chosen.append(f"{what} in {p.precision[field]}" + ("" if asked == p.precision[field] else f" ({asked})"))
    return (
        f"{recipe.name}: {recipe.model} on {recipe.data}, {recipe.epochs} epochs{rounds} of\n"
        f"{attack:g} attack and {training:g} training passes per image\n{', '.join(chosen)}, on {p.device}"
    )


def demo_command(console: Console, o: DemoOptions) -> None:
    run = _run(console, TrainOptions(recipe=RECIPES["gcat"], out=o.out, device=o.device), resume=True)
    options = EvaluateOptions(
        model=str(run.path),
        attacks="clean,pgd:steps=100",
        images=200,
        frozen=False,
        save_adv=True,  # for the report to show
        device=o.device,
    )
    result = evaluate_command(console, options)
    assert isinstance(result, EvaluationResult)
    console.print("Accuracy under one attack is an upper bound: a stronger attack may find more.")
    # The report shows what is in the run directory, so it comes last.
    write_report(console, [str(run.path)], [run.path / "report.html"], device=o.device)
    expected = duration(AUDIT_SECONDS * sum(s.seconds for s in result.scores))
    console.print(f"Is that accuracy real? Next, about {expected} on this machine:")
    console.print(f"  {command_line('audit', run.path, quick=True)}", soft_wrap=True)
