"""The command line: gsem demo | train | evaluate | recipes | models | data."""

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fractions import Fraction
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gsem.checkpoint import load_model
from gsem.data import SOURCES, load, to_float
from gsem.device import device_named
from gsem.evaluate import Result, evaluate, parse_attacks
from gsem.models import MODELS, canonical_name
from gsem.progress import AttackBar, Scalars, TrainingBar, duration, percent
from gsem.recipes import ABOUT, RECIPES, Recipe
from gsem.study import STUDIES, study
from gsem.train import Progress, Run, TrainingInterrupted, resume_recipe, train

HELP = """\
gsem: train image classifiers by gradient semi-masking, and measure them honestly.

usage: gsem COMMAND [OPTIONS]      (gsem COMMAND --help tells its options)

  demo       train a small GSeM network on digits, attack it, print the result
  train      train by a recipe:      gsem train gcat --data digits
  evaluate   attack a trained model: gsem evaluate runs/NAME
  recipes    list the named recipes, and what they cost
  models     list the networks
  study      compare variants over seeds: gsem study ablation
  data       list the data sets, or tell what one holds: gsem data PATH

  --debug    anywhere: show the traceback of an error
  --version  print the version
"""

console = Console(highlight=False, markup=False)
errors = Console(stderr=True, highlight=False, markup=False)

# Every number may be written as a fraction: 8/255 is how the field writes an eps.
registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def _fraction(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[float] | None:
    if info.type is not float:
        return None

    def read(words: list[str]) -> float:
        try:
            return float(Fraction(words[0]))
        except (ValueError, ZeroDivisionError):
            try:
                return float(words[0])
            except ValueError:
                raise ValueError(f"{words[0]!r} is no number: 0.03 and 8/255 are") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (float, int)),
        str_from_instance=lambda value: [f"{value:g}"],
    )


@dataclass(frozen=True)
class TrainOptions:
    """Train by a recipe: `gsem train [RECIPE] [OPTIONS]`. Every field of the recipe can be overridden."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    out: Path | None = None
    """Run directory; runs/RECIPE-DATA-MODEL-seedN unless told."""
    resume: Path | None = None
    """Go on with the run in this directory. It follows its own recipe: options of the recipe are not read."""
    tensorboard: Path | None = None
    """Directory for TensorBoard's event files (needs the extra: pip install 'gsem[tensorboard]')."""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Attack a trained model and score it on draws of its noise that no attack has seen."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run directory, a .safetensors checkpoint, a published .pt, or package.module:function."""
    attacks: str = "clean,pgd:steps=100"
    """Attacks with commas between, options behind colons: clean,pgd:steps=500:eot=20:restarts=2."""
    data: str | None = None
    """Whose test images: digits, an image folder, or an .npz file. The run's own data by default."""
    data_path: str | None = None
    """Directory of the data sets that have names (cifar10, cifar100, svhn)."""
    images: int | None = None
    """Only the first so many test images."""
    eps: float | None = None
    """L-infinity radius, like 8/255. The run's own by default."""
    draws: int = 100
    """Scoring draws of the noise, for each image and attack."""
    batch: int = 256
    """Images attacked at once."""
    seed: int = 0
    out: Path | None = None
    """Where the result goes, as OUT.json and OUT.npz; RUN/evaluation, or evaluation here, unless told."""
    keep_images: bool = False
    """Keep the adversarial examples in the .npz."""
    name: str | None = None
    """Of a published .pt: which network it is, like GSeMResNet18."""
    num_classes: int = 10
    """Of a published .pt."""
    levels: int = 6
    """Of a published .pt: GSeM's alpha."""
    noise: int = 4
    """Of a published .pt: GSeM's beta."""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one."""


@dataclass(frozen=True)
class StudyOptions:
    """Train and evaluate variants over seeds: `gsem study ablation` or `gsem study recipes`.

    The ablation takes GSeM apart; recipes trains every named recipe, its schedule scaled to --epochs. What is
    finished is not computed again: start the same command to go on.
    """

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    seeds: int = 3
    """Trainings of each variant."""
    attacks: str = "clean,pgd:steps=50"
    """As in gsem evaluate."""
    images: int | None = None
    """Only the first so many test images."""
    test_data: str | None = None
    """Whose test images; those of --data by default."""
    out: Path | None = None
    """Directory of the study; runs/study-NAME-DATA unless told."""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one."""


@dataclass(frozen=True)
class DemoOptions:
    """Train the small GSeM network on digits by GCAT, evaluate it clean and under PGD-100, print the result."""

    out: Path = Path("runs/demo")
    """Run directory; a finished or interrupted demo there goes on where it stopped."""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one."""


@dataclass(frozen=True)
class DataOptions:
    """List the data sets, or tell what one holds."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="DATA")] = None
    """digits, an image folder, or an .npz file."""


@dataclass(frozen=True)
class NoOptions:
    """This command takes no options."""


def _near(kind: str, name: str, known: dict[str, Any]) -> str:
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{kind} {name!r} is unknown.{hint} Possible are: {', '.join(known)}"


def _parse(kind: Any, command: str, words: list[str], **how: Any) -> Any:
    boxed = StringIO()
    config = (tyro.conf.DisallowNone,)  # no "{None}|" before what an option takes
    try:
        with redirect_stderr(boxed):
            return tyro.cli(kind, prog=f"gsem {command}", args=words, registry=registry, config=config, **how)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box of several lines; an error here is one line.
        lines = [line.strip("│ ") for line in boxed.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
        text = " ".join(line for line in lines if line.strip("─-") and not line.startswith("For full helptext"))
        text = text.split(" Argument helptext:")[0]
        raise ValueError(f"{text} (gsem {command} --help tells the options)") from None


def _train(words: list[str]) -> None:
    name = words.pop(0) if words and not words[0].startswith("-") else "gcat"
    if name not in RECIPES:
        raise ValueError(_near("recipe", name, RECIPES))
    options = _parse(TrainOptions, "train", words, default=TrainOptions(RECIPES[name]))
    if options.resume is not None:
        recipe, out = resume_recipe(options.resume), options.resume
    else:
        recipe, out = options.recipe, options.out
        recipe = replace(recipe, model=canonical_name(recipe.model))
    run = _run(recipe, out, options.device, resume=options.resume is not None, tensorboard=options.tensorboard)
    best = run.best
    console.print(
        f"best: epoch {best['epoch']}, validation clean {percent(best['clean']).strip()}, "
        f"robust {percent(best['robust']).strip()} (PGD-10 on held-out training images)\n"
        f"saved in {run.path}; next: gsem evaluate {run.path}"
    )


def _run(recipe: Recipe, out: Path | None, device: str | None, *, resume: bool, tensorboard: Path | None = None) -> Run:
    scalars = Scalars(tensorboard) if tensorboard is not None else None
    attack, training = recipe.passes
    console.print(
        f"{recipe.name}: {recipe.model} on {recipe.data}, {recipe.epochs} epochs"
        + (f" × {recipe.rounds} rounds" if recipe.rounds > 1 else "")
        + f" of\n{attack:g} attack and {training:g} training passes per image"
    )
    with TrainingBar(console) as bar:

        def report(p: Progress) -> None:
            bar(p)
            if scalars is not None:
                scalars(p)

        return train(recipe, out=out, device=device, resume=resume, report=report)


def _evaluate(words: list[str]) -> None:
    o = _parse(EvaluateOptions, "evaluate", words)
    attacks = parse_attacks(o.attacks)
    device = device_named(o.device)
    model, meta = load_model(o.model, name=o.name, num_classes=o.num_classes, levels=o.levels, noise=o.noise)
    where = o.data or meta.get("recipe", {}).get("data")
    if where is None:
        raise ValueError(f"{o.model} does not tell its data: give --data")
    source = load(where, o.data_path or (None if o.data else meta.get("recipe", {}).get("data_path")))
    eps = o.eps or meta.get("data", {}).get("eps") or source.eps
    test = source.test()
    if o.images is not None and o.images < 1:
        raise ValueError(f"--images must be at least 1, not {o.images}")
    x, y = to_float(test.x[: o.images]).to(device), test.y[: o.images].to(device)
    _check_fit(meta, x, y)
    what = f"{o.model} on {source.name}: " + (f"the first {len(x)} of " if len(x) < len(test) else "")
    run = Path(o.model)
    out = o.out or (run / "evaluation" if run.is_dir() else Path("evaluation"))
    _attack(model.to(device), x, y, attacks, what + f"{len(test)} test images", out, eps, o)


def _attack(
    model: torch.nn.Module, x: Tensor, y: Tensor, attacks: list, what: str, out: Path, eps: float, options: Any
) -> None:
    with AttackBar(console) as bar:
        result = evaluate(
            model,
            x,
            y,
            attacks,
            eps=eps,
            draws=options.draws,
            seed=options.seed,
            batch=options.batch,
            keep_images=options.keep_images,
            report=bar,
        )
    result.save(out)
    _show(result, what)
    console.print(f"saved in {out.with_suffix('.json')} and {out.with_suffix('.npz')}")


def _check_fit(meta: dict[str, Any], x: Tensor, y: Tensor) -> None:
    if not meta:
        return
    shape, classes = tuple(meta["data"]["shape"]), len(meta["data"]["classes"])
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"the model was trained on images {list(shape)}, these are {list(x.shape[1:])}")
    if int(y.max()) >= classes:
        raise ValueError(f"the model knows {classes} classes, these images have a label {int(y.max())}")


def _show(result: Result, what: str) -> None:
    facts = result.facts
    console.print(f"\n{what}, eps = {_eps(facts['eps'])} ({facts['norm']})")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("attack", no_wrap=True)
    for heading in ("expected accuracy", "95% interval", "passes/image", "time"):
        table.add_column(heading, justify="right")
    for s in result.scores:
        mean, low, high = result.expected(s.label)
        table.add_row(
            s.label,
            percent(mean),
            f"{100 * low:.1f} – {100 * high:.1f}",
            f"{(s.forwards + s.gradients) / len(result.y):.0f}",
            duration(s.seconds),
        )
    console.print(table)
    noise = "1 draw: the model is deterministic" if result.draws == 1 else f"{result.draws} scoring draws"
    console.print(f"{facts['images']} images, {noise}, seed {facts['seed']}")


def _eps(eps: float) -> str:
    pixels = eps * 255
    return f"{round(pixels)}/255" if abs(pixels - round(pixels)) < 1e-6 else f"{eps:g}"


@dataclass(frozen=True)
class _DemoEvaluation:
    draws: int = 100
    seed: int = 0
    batch: int = 256
    keep_images: bool = False


def _demo(words: list[str]) -> None:
    o = _parse(DemoOptions, "demo", words)
    run = _run(RECIPES["gcat"], o.out, o.device, resume=True)
    device = device_named(o.device)
    test = load("digits").test()
    x, y = to_float(test.x[:200]).to(device), test.y[:200].to(device)
    attacks = parse_attacks("clean,pgd:steps=100")
    what = f"{run.path} on digits: the first 200 of {len(test)} test images"
    _attack(run.model().to(device), x, y, attacks, what, run.path / "evaluation", load("digits").eps, _DemoEvaluation())
    console.print("Accuracy under one attack is an upper bound: a stronger attack may find more.")


def _recipes(words: list[str]) -> None:
    _parse(NoOptions, "recipes", words)
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
    o = _parse(StudyOptions, f"study {name}", words, default=StudyOptions(RECIPES["gcat"]))
    attacks = [text.strip() for text in o.attacks.split(",")]
    parse_attacks(o.attacks)  # before the first training starts
    base = replace(o.recipe, model=canonical_name(o.recipe.model))
    out = o.out or Path("runs") / f"study-{name}-{Path(base.data).stem}"

    def report(what: str, progress: Progress | None) -> None:
        if progress is None:
            console.print(what)
        elif progress.step == progress.steps:
            console.print(
                f"{what}: validation clean {percent(progress.clean).strip()}, robust {percent(progress.robust).strip()}"
            )

    rows = study(
        STUDIES[name](base),
        seeds=o.seeds,
        out=out,
        attacks=attacks,
        images=o.images,
        test_data=o.test_data,
        device=o.device,
        report=report,
    )
    console.print()
    console.print(_study_table(rows))
    interval = "t-interval over seeds" if o.seeds > 1 else "bootstrap interval over images"
    console.print(f"{rows[0]['images']} test images, {o.seeds} seeds; expected accuracy in per cent, 95% {interval}")
    console.print(f"saved in {out / 'study.json'}")


def _study_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("variant")
    for heading in (*rows[0]["accuracy"], "passes", "training"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{100 * mean:.1f} ±{100 * (high - low) / 2:4.1f}" for mean, low, high in row["accuracy"].values()]
        passes = f"{row['attack_passes']:g}+{row['training_passes']:g}"
        table.add_row(row["variant"], *cells, passes, duration(row["seconds"]))
    return table


def _list(kind: str, entries: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(kind, no_wrap=True)
    table.add_column("what")
    for name, line in entries.items():
        table.add_row(name, line)
    console.print(table)


def _models(words: list[str]) -> None:
    _parse(NoOptions, "models", words)
    _list("model", MODELS)
    console.print("\nThe paper's names, like GSeMResNet18, are understood too.")


def _data(words: list[str]) -> None:
    name = _parse(DataOptions, "data", words).name
    if name is None:
        _list("data", SOURCES)
        console.print("\nA path of an image folder or of an .npz file is a name too.")
        return
    source = load(name)
    shape = "×".join(map(str, source.shape))
    console.print(f"{source.name}: {source.description}")
    console.print(f"images {shape}, eps {_eps(source.eps)}, {len(source.classes)} classes: {', '.join(source.classes)}")
    if source.read_train is not None:
        training, validation = source.training()
        console.print(f"training {len(training)} and validation {len(validation)} images")
    if source.read_test is not None:
        console.print(f"test {len(source.test())} images")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "train": _train,
    "evaluate": _evaluate,
    "recipes": _recipes,
    "models": _models,
    "study": _study,
    "data": _data,
}


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
        COMMANDS[command](rest)
        return 0
    except TrainingInterrupted as stopped:
        errors.print(f"stopped; saved. Go on with: gsem train --resume {stopped}", soft_wrap=True)
        return 130
    except KeyboardInterrupt:
        errors.print("stopped")
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
