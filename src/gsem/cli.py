"""The command line: gsem demo | train | evaluate | audit | report | verify | recipes | models | study | data."""

import os
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from difflib import get_close_matches
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gsem.cli_audit import audit_command
from gsem.cli_evaluate import evaluate_command, evaluate_model, verify_command
from gsem.cli_report import report_command, write_report
from gsem.data import SOURCES, load
from gsem.models import MODELS, canonical_name
from gsem.options import (
    DataOptions,
    DemoOptions,
    EvaluateOptions,
    NoOptions,
    StudyOptions,
    TrainOptions,
    parse,
)
from gsem.progress import Scalars, TrainingBar, percent
from gsem.recipes import ABOUT, RECIPES, Recipe
from gsem.run import Progress, Run, TrainingInterrupted, resume_recipe
from gsem.show import pixels, show_list, study_table
from gsem.study import STUDIES, Variant, ablation, recipes, study
from gsem.suite import parse_attacks
from gsem.train import train

HELP = """\
gsem: image classifiers trained by gradient semi-masking, measured honestly.

usage: gsem COMMAND [OPTIONS]      (gsem COMMAND --help tells its options)

  demo       train a small GSeM network on digits, attack it, write a report
  train      train by a recipe:      gsem train gcat --data digits
  evaluate   attack a trained model: gsem evaluate runs/NAME --suite standard
  audit      is that accuracy real:  gsem audit runs/NAME --quick
  report     a page for people:      gsem report runs/NAME -o report.html
  verify     judge saved adversarial examples again
  recipes    list the named recipes, and what they cost
  models     list the networks
  study      compare variants over seeds: gsem study ablation
  data       list the data sets, or tell what one holds: gsem data PATH

  --debug    anywhere: show the traceback of an error
  --version  print the version
"""

console = Console(highlight=False, markup=False)
errors = Console(stderr=True, highlight=False, markup=False)


def _near(kind: str, name: str, known: Collection[str]) -> str:
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{kind} {name!r} is unknown.{hint} Possible are: {', '.join(known)}"


def _train(words: list[str]) -> None:
    name = words.pop(0) if words and not words[0].startswith("-") else "gcat"
    if name not in RECIPES:
        raise ValueError(_near("recipe", name, RECIPES))
    options = parse(TrainOptions, "train", words, default=TrainOptions(_scaled(RECIPES[name], words)))
    if options.resume is not None:
        recipe, out = resume_recipe(options.resume), options.resume
    else:
        recipe, out = options.recipe, options.out
        recipe = replace(recipe, model=canonical_name(recipe.model))
    how: dict[str, Any] = {"resume": options.resume is not None, "compiled": options.compile}
    run = _run(recipe, out, options.device, tensorboard=options.tensorboard, **how)
    best = run.best
    console.print(
        f"best: epoch {best['epoch']}, validation clean {percent(best['clean']).strip()}, "
        f"robust {percent(best['robust']).strip()} (PGD-10 on held-out training images)"
    )
    console.print(f"saved; next: gsem evaluate {run.path}", soft_wrap=True)


def _scaled(recipe: Recipe, words: list[str]) -> Recipe:
    """The recipe with its schedule scaled to `--epochs`, where that is told and the schedule is not."""
    told = dict(pairwise(words)) | dict(w.split("=", 1) for w in words if "=" in w)
    epochs = told.get("--epochs", "")
    if not epochs.isdigit() or int(epochs) < 1 or not told.keys().isdisjoint({"--milestones", "--warmup"}):
        return recipe
    return replace(recipe.scaled(int(epochs)), rounds=recipe.rounds)


def _run(
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

        return train(recipe, out=out, device=device, resume=resume, compiled=compiled, report=report)


def _demo(words: list[str]) -> None:
    o = parse(DemoOptions, "demo", words)
    run = _run(RECIPES["gcat"], o.out, o.device, resume=True)
    options = EvaluateOptions(
        str(run.path),
        attacks="clean,pgd:steps=100",
        images=200,
        frozen=False,
        out=run.path / "evaluation",
        keep_images=True,  # for the report to show
        device=o.device,
    )
    evaluate_model(console, options)
    console.print("Accuracy under one attack is an upper bound: a stronger attack may find more.")
    # (What is found about the run goes into its directory above this line; the report tells it.)
    write_report(console, [str(run.path)], [run.path / "report.html"], device=o.device)


def _recipes(words: list[str]) -> None:
    parse(NoOptions, "recipes", words)
    console.print("Passes are forward-and-backward passes per image and epoch.\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("recipe", no_wrap=True)
    for heading in ("attack", "train", "epochs"):
        table.add_column(heading, justify="right")
    table.add_column("what")
    for recipe in RECIPES.values():
        attack, training = recipe.passes
        epochs = f"{recipe.epochs}" if recipe.rounds == 1 else f"{recipe.rounds}×{recipe.epochs}"
        table.add_row(recipe.name, f"{attack:g}", f"{training:g}", epochs, ABOUT[recipe.name])
    console.print(table)


def _study(words: list[str]) -> None:
    name = words.pop(0) if words and not words[0].startswith("-") else "ablation"
    if name not in STUDIES:
        raise ValueError(_near("study", name, STUDIES))
    o = parse(StudyOptions, f"study {name}", words, default=StudyOptions(RECIPES["gcat"]))
    attacks = [text.strip() for text in o.attacks.split(",")]
    parse_attacks(o.attacks)  # before the first training starts
    variants = _variants(name, replace(o.recipe, model=canonical_name(o.recipe.model)), o)
    out = o.out or Path("runs") / f"study-{name}-{Path(o.recipe.data).stem}"

    def report(what: str, progress: Progress | None) -> None:
        if progress is None:
            console.print(what)
        elif progress.step == progress.steps:
            console.print(
                f"{what}: validation clean {percent(progress.clean).strip()}, robust {percent(progress.robust).strip()}"
            )

    rows = study(
        variants,
        seeds=o.seeds,
        out=out,
        attacks=attacks,
        images=o.images,
        test_data=o.test_data,
        device=o.device,
        report=report,
    )
    console.print()
    console.print(study_table(rows))
    interval = "t-interval over seeds" if o.seeds > 1 else "bootstrap interval over images"
    console.print(f"{rows[0]['images']} test images, {o.seeds} seeds; expected accuracy in per cent, 95% {interval}")
    console.print(f"saved in {out / 'study.json'}")


def _variants(study: str, base: Recipe, o: StudyOptions) -> list[Variant]:
    if o.passes is not None and study != "recipes":
        raise ValueError("--passes belongs to gsem study recipes: the ablation's variants cost the same")
    if o.passes is not None and not o.passes > 0:
        raise ValueError(f"--passes must be positive, not {o.passes:g}")
    variants = {v.name: v for v in (recipes(base, o.passes) if study == "recipes" else ablation(base))}
    names = list(variants) if o.only is None else [name.strip() for name in o.only.split(",")]
    for name in names:
        if name not in variants:
            raise ValueError(_near("variant", name, variants))
    return [variants[name] for name in names]


def _models(words: list[str]) -> None:
    parse(NoOptions, "models", words)
    show_list(console, "model", MODELS)
    console.print("\nThe paper's names, like GSeMResNet18, are understood too.")


def _data(words: list[str]) -> None:
    name = parse(DataOptions, "data", words).name
    if name is None:
        show_list(console, "data", SOURCES)
        console.print("\nA path of an image folder or of an .npz file is a name too.")
        return
    source = load(name)
    shape = "×".join(map(str, source.shape))
    console.print(f"{source.name}: {source.description}")
    console.print(
        f"images {shape}, eps {pixels(source.eps)}, {len(source.classes)} classes: {', '.join(source.classes)}"
    )
    if source.read_train is not None:
        training, validation = source.training()
        console.print(f"training {len(training)} and validation {len(validation)} images")
    if source.read_test is not None:
        console.print(f"test {len(source.test())} images")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "train": _train,
    "evaluate": lambda words: evaluate_command(console, words),
    "audit": lambda words: audit_command(console, words),
    "report": lambda words: report_command(console, words),
    "verify": lambda words: verify_command(console, words),
    "recipes": _recipes,
    "models": _models,
    "study": _study,
    "data": _data,
}


RESUMED = ("evaluate", "study")


def _note(message: Warning | str, *where: Any) -> None:
    errors.print(f"gsem: note: {' '.join(str(message).split())}", soft_wrap=True)


def main(words: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for an error (one line on stderr), 130 for Ctrl-C."""
    words = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        console.print(HELP)
        return 0 if words else 2
    if words[0] == "--version":
        console.print(f"gsem {version('gsem')} (torch {torch.__version__})")
        return 0
    command, *rest = words
    try:
        if command not in COMMANDS:
            raise ValueError(_near("command", command, COMMANDS))
        with warnings.catch_warnings():
            warnings.showwarning = _note  # type: ignore[assignment]  # (who warned is not for people)
            COMMANDS[command](rest)
        return 0
    except TrainingInterrupted as stopped:
        errors.print(f"stopped; saved. Go on with: gsem train --resume {stopped}", soft_wrap=True)
        return 130
    except KeyboardInterrupt:
        kept = "; what is finished is kept: the same command goes on from there" if command in RESUMED else ""
        errors.print(f"stopped{kept}", soft_wrap=True)
        return 130
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        text = " ".join(str(error).split()) or type(error).__name__
        errors.print(f"gsem: {kind}{text}", soft_wrap=True)
        return 2


def script() -> None:
    """The console script."""
    sys.exit(main())
