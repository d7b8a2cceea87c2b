"""The options of each command, their parsing, and the command line that repeats them."""

import shlex
from collections.abc import Collection
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gsem._text import pixels
from gsem.training.recipe import Recipe

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
                raise ValueError(f"{words[0]!r} is not a number, like 0.03 or 8/255") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (float, int)),
        str_from_instance=lambda value: [f"{value:g}"],
    )


def option(text: str, default: str | None = None, **more: Any) -> Any:
    """The help of an option, for `Annotated`.

    Args:
        text: one sentence, or several.
        default: in words, where the default value itself does not say it.
        more: of `tyro.conf.arg`.
    """
    return tyro.conf.arg(help=text, help_behavior_hint=None if default is None else f"(default: {default})", **more)


MODEL = "A run directory, a .safetensors checkpoint, a published .pt, or package.module:function."


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    device: Annotated[str | None, option("Where to compute: cpu, cuda or cuda:N.", "the GPU if there is one")] = None


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What gsem must know of a network that is not a run of its own."""

    normalize: Annotated[
        str | None,
        option(
            "Mean and std for a network that takes normalised input: cifar10, cifar100, svhn, imagenet, or MEAN/STD "
            "with a number for each channel, like 0.49,0.48,0.45/0.2,0.2,0.2. eps stays in pixels.",
            "the network takes pixels in [0, 1]",
        ),
    ] = None
    arch: Annotated[
        str | None,
        option("Architecture of a published .pt, like GSeMResNet18 (see gsem models).", "none; a .pt needs it"),
    ] = None
    num_classes: Annotated[int, option("Number of classes of a published .pt.")] = 10
    levels: Annotated[int, option("GSeM's levels (the paper's alpha) in a published .pt.")] = 6
    noise: Annotated[int, option("GSeM's noise (the paper's beta) in a published .pt.")] = 4


@dataclass(frozen=True, kw_only=True)
class DataSourceOptions:
    data: Annotated[
        str | None,
        option(
            "The data whose test images are used: a data set's name, an image folder, or an .npz file.",
            "the data that the run or the saved evaluation names",
        ),
    ] = None
    data_path: Annotated[
        str | None,
        option("Directory of the data sets that have names (cifar10, cifar100, svhn).", "where gsem downloads them to"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that is attacked, by which attacks."""

    model: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="MODEL", help=MODEL, help_behavior_hint="(required, here or as --model)"),
    ] = ""
    named_model: Annotated[str, option("The same as MODEL, as an option.", "MODEL", name="model")] = ""
    suite: Annotated[
        str | None,
        option(
            "A named list of attacks: quick, standard (AutoAttack), paper (its five attacks), or paper-code (the "
            "budgets that its code ran).",
            "none",
        ),
    ] = None
    attacks: str | None = None
    source: Annotated[
        tuple[str, ...],
        option("More models (as MODEL) whose adversarial examples are tried on this one: the transfer attack.", "none"),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class ThreatOptions:
    """The images that are attacked, how far, and how."""

    images: int | None = None
    subset: Annotated[
        Literal["balanced", "first"],
        option("The images that --images takes: as many of each class, always the same ones, or the first ones."),
    ] = "balanced"
    eps: Annotated[
        float | None,
        option("Radius of the threat model in pixels of [0, 1], like 8/255.", "the run's own for Linf, 0.5 for L2"),
    ] = None
    norm: Annotated[Literal["Linf", "L2"], option("Norm of the perturbation: Linf or L2.")] = "Linf"
    batch_size: Annotated[int, option("Images attacked at once.")] = 256
    seed: Annotated[int, option("Seed of all random draws.")] = 0


@dataclass(frozen=True, kw_only=True)
class TaskOptions(DeviceOptions, NetworkOptions, ThreatOptions, DataSourceOptions, ModelOptions):
    """What gsem evaluate and gsem audit share. (Help lists the options from the last base to the first.)"""

    @property
    def default_images(self) -> int | None:
        """Test images without --images; None for all."""
        return None


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TaskOptions):
    """Attack a model, and score it on draws of its noise that no attack has seen.

    An interrupted evaluation resumes when the same command is started again.
    """

    attacks: Annotated[
        str | None,
        option(
            "Attacks instead of a suite, with commas between and options behind colons, like "
            "clean,pgd:steps=500:eot=20,apgd:loss=dlr,apgd:targets=9,cw,fab:targets=9,square,rays,transfer,autoattack.",
            "clean,pgd:steps=100",
        ),
    ] = None
    images: Annotated[int | None, option("Number of test images.", "all")] = None
    draws: Annotated[
        int,
        option("Scoring draws of the noise for each image and attack; as many others choose the worst attack."),
    ] = 100
    frozen: Annotated[
        bool, option("Attack a stochastic GSeM also with its noise frozen by a known seed, and with its noise off.")
    ] = True
    out: Annotated[
        Path | None,
        option(
            "The result is written to OUT.json and OUT.npz.",
            "RUN/evaluation, or evaluation here; with a number behind it where another evaluation is",
        ),
    ] = None
    again: Annotated[
        bool, option("Compute an evaluation anew that is finished already, instead of showing its table.")
    ] = False
    save_adv: Annotated[bool, option("Keep the adversarial examples in the .npz.")] = False


@dataclass(frozen=True, kw_only=True)
class AuditOptions(TaskOptions):
    """Is the robust accuracy real? Twelve checks, and a verdict.

    An interrupted audit resumes when the same command is started again.
    """

    attacks: Annotated[
        str | None,
        option(
            "The audited attacks instead of a suite, with commas between, like pgd:steps=100,apgd:targets=9.",
            "APGD on cross-entropy, on the margin and towards nine targets",
        ),
    ] = None
    images: Annotated[int | None, option("Number of test images.", "500, with --quick 128")] = None
    draws: Annotated[
        int | None, option("Scoring draws of the noise for each image and attack.", "100, with --quick 20")
    ] = None
    only: Annotated[
        str | None,
        option(
            "Run only these checks, with commas between: randomness, gradient, unavailable, unstable, silent_success, "
            "incomplete, transfer, unconstrained, binarization, sweeps, blackbox, noise.",
            "all",
        ),
    ] = None
    quick: Annotated[
        bool,
        option(
            "Take fewer images, steps, draws and queries: minutes on a CPU for a small network. Numbers that are "
            "given as options stay as they are."
        ),
    ] = False
    surrogate: Annotated[
        str | None, option("A model (as MODEL) whose gradient the attacks follow.", "the audited model")
    ] = None
    gradient: Annotated[
        Literal["corrected", "semi-masked"] | None,
        option("Gradient of every GSeM in the model.", "the one it was trained with"),
    ] = None
    out: Annotated[
        Path | None,
        option(
            "The audit is written to OUT.json.",
            "RUN/audit.json, or audit.json here; with a number behind it where another audit is",
        ),
    ] = None

    @property
    def default_images(self) -> int:
        return 128 if self.quick else 500


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(DeviceOptions, NetworkOptions, DataSourceOptions):
    """Judge saved adversarial examples again: bounds, labels, fresh draws."""

    result: Annotated[tyro.conf.Positional[str], option("The .npz of gsem evaluate --save-adv.", metavar="RESULT")]
    model: Annotated[str, option(f"The evaluated model. {MODEL}")]
    draws: Annotated[int, option("Fresh draws of the noise for each image and attack.")] = 100
    seed: Annotated[int, option("Seed of the fresh draws.")] = 1


@dataclass(frozen=True, kw_only=True)
class ReportOptions(DeviceOptions, NetworkOptions, DataSourceOptions):
    """One page on one run, or on several side by side.

    It shows the verdict, accuracies, curves, images and cost.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        option(
            "Run directories, or the .npz of single evaluations. Of a directory, the latest evaluation and the latest "
            "whole audit are shown.",
            "none: give one or more",
            metavar="RUN…",
        ),
    ]
    out: Annotated[
        Path | None,
        option(
            "File to write: .html, .md (Markdown) or .json (a card with RobustBench's field names).",
            "RUN/report.html, or report.html here for evaluations and for several runs",
            aliases=["-o"],
        ),
    ] = None
    markdown: Annotated[Path | None, option("Write Markdown to this file too.", "none")] = None
    json: Annotated[Path | None, option("Write the JSON card to this file too.", "none")] = None
    model: Annotated[
        str | None,
        option(
            f"The evaluated network, for the pictures of an evaluation (.npz) of one that gsem did not train. {MODEL}",
            "none: the pictures are those that gsem evaluate --save-adv kept",
        ),
    ] = None
    images: Annotated[
        int,
        option(
            "Test images behind confusion matrix, gallery and loss surface, if the evaluation kept no adversarial "
            "examples; 0 leaves these pictures out."
        ),
    ] = 100


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DeviceOptions):
    """Train by a recipe: gsem train [RECIPE] [OPTIONS].

    Every field of the recipe can be set by its option.

    With --epochs alone, milestones and warm-up are scaled with it.
    """

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    out: Annotated[Path | None, option("Run directory.", "runs/RECIPE-DATA-MODEL-seedN")] = None
    resume: Annotated[
        Path | None,
        option(
            "Resume the run in this directory, with its own recipe. --data says where its images are now, if they are "
            "not found.",
            "a new run",
        ),
    ] = None
    tensorboard: Annotated[
        Path | None,
        option("Directory for TensorBoard's event files (needs pip install 'gsem-torch[tensorboard]').", "none"),
    ] = None
    compile: Annotated[
        bool, option("Run the passes by torch.compile, for long trainings on a GPU. The first steps take minutes.")
    ] = False


STUDIES = ("ablation", "recipes")


@dataclass(frozen=True, kw_only=True)
class StudyOptions(DeviceOptions):
    """Train and evaluate variants over seeds: gsem study [ablation | recipes].

    The ablation takes GSeM apart; recipes trains every named recipe.

    With --epochs, every schedule is scaled to it. A stopped study resumes.
    """

    study: tyro.conf.Suppress[str]
    """One of STUDIES: it stands in front of the options."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    seeds: Annotated[int, option("Trainings of each variant.")] = 3
    only: Annotated[
        str | None, option("Names of variants with commas between, as the table shows them.", "all variants")
    ] = None
    passes: Annotated[
        float | None,
        option(
            "For gsem study recipes: each recipe gets the epochs, at least one, that bring its attack and training "
            "passes per image nearest to this number.",
            "as many epochs for each",
        ),
    ] = None
    attacks: Annotated[str, option("Attacks of the test, with commas between and options behind colons.")] = (
        "clean,pgd:steps=50"
    )
    images: Annotated[int | None, option("Number of test images, from the first.", "all")] = None
    test_data: Annotated[str | None, option("The data whose test images are used.", "those of --data")] = None
    out: Annotated[Path | None, option("Directory of the study.", "runs/study-STUDY-DATA")] = None


@dataclass(frozen=True, kw_only=True)
class DemoOptions(DeviceOptions):
    """Train a small GSeM network on digits, attack it, and write a report."""

    out: Annotated[Path, option("Run directory; a finished or interrupted demo there resumes.")] = Path("runs/demo")


@dataclass(frozen=True)
class DataOptions:
    """List the data sets, or show what one holds."""

    name: Annotated[
        tyro.conf.Positional[str | None],
        option("A data set's name, an image folder, or an .npz file.", "list the names", metavar="DATA"),
    ] = None


@dataclass(frozen=True)
class NoOptions:
    """This command takes no options."""


@dataclass(frozen=True)
class _Epochs:
    """The one option that other defaults follow from."""

    epochs: int | None = None


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """The error for a name that does not exist: the names like it, and all there are."""
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{kind} {name!r} is unknown.{hint} Possible are: {', '.join(known)}"


def parse(kind: Any, command: str, words: list[str], **more: Any) -> Any:
    """The options of a command from its words.

    Args:
        kind: the class of the options. more: of `tyro.cli`.

    Raises:
        ValueError: words that the command does not take, in one line. SystemExit: its help was printed.
    """
    boxed = StringIO()
    config = (tyro.conf.DisallowNone,)  # no "{None}|" before what an option takes
    try:
        with redirect_stderr(boxed):
            return tyro.cli(kind, prog=f"gsem {command}", args=words, registry=registry, config=config, **more)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box of several lines; an error here is one line.
        lines = [line.strip("│ ") for line in boxed.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
        text = " ".join(line for line in lines if line.strip("─-") and not line.startswith("For full helptext"))
        text = text.split(" Argument helptext:")[0]
        raise ValueError(f"{text} (gsem {command} --help lists the options)") from None


def parse_recipe(kind: Any, command: str, words: list[str], recipe: Recipe, **more: Any) -> Any:
    """Options with a recipe: `recipe`, its schedule scaled to --epochs, with what else is given.

    Args:
        more: further defaults of the options.
    """
    given, _ = parse(_Epochs, command, words, add_help=False, return_unknown_args=True)
    scaled = recipe if given.epochs is None or given.epochs < 1 else recipe.scaled(given.epochs)
    return parse(kind, command, words, default=kind(recipe=scaled, **more))


def command_line(command: str, *arguments: object, **options: Any) -> str:
    """The command line of parsed options, quoted for a shell. An option that is None is left out."""
    words = ["gsem", command, *map(str, arguments)]
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = _number(value) if isinstance(value, float) else str(value)
            # The form with = is for values like -0.5/1, which would be taken for an option.
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shlex.join(words)


def changed(options: Any, *without: str) -> dict[str, Any]:
    """The options that are not at their defaults, but for those `without`."""
    values = {f.name: (getattr(options, f.name), f.default) for f in fields(options) if f.name not in without}
    return {name: value for name, (value, default) in values.items() if value != default}


def _number(value: float) -> str:
    """The shortest text that is read as this number: 8/255, or 0.3."""
    return min((t for t in (repr(value), pixels(value)) if float(Fraction(t)) == value), key=len)
