"""The options of each command, their parsing, and the command line that repeats them."""

import ast
import shlex
import sys
from collections.abc import Collection
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fractions import Fraction
from inspect import getsource
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import tyro
from tyro.conf import Positional

from gsem._text import pixels
from gsem.training.recipe import Compile, Recipe

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


_CLASSES = {c.name: c.body for c in ast.parse(getsource(sys.modules[__name__])).body if isinstance(c, ast.ClassDef)}


T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(kind: type[T]) -> type[T]:
    """A frozen dataclass whose fields are options, each with the text below it as its help.

    The text after "Default:" is shown as the default, for fields whose value does not show it (None, ()).
    """
    _help(kind, _CLASSES[kind.__name__])
    return dataclass(frozen=True, kw_only=True)(kind)


def _help(kind: type, body: list[ast.stmt]) -> None:
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            name, text = ast.unparse(field.target), " ".join(ast.literal_eval(below.value).split())
            text, _, default = text.partition(" Default: ")
            helped = tyro.conf.arg(
                help=text,
                help_behavior_hint=f"(default: {default.removesuffix('.')})" if default else None,
                metavar=name.upper() if ast.unparse(field.annotation).startswith("Positional") else None,
            )
            kind.__annotations__[name] = Annotated[kind.__annotations__[name], helped]


_help(Recipe, ast.parse(getsource(Recipe)).body[0].body)  # type: ignore[attr-defined]  # (its body is a class)


@options
class DeviceOptions:
    device: str | None = None
    """Where to compute: cpu, cuda or cuda:N. Default: the GPU if there is one."""


@options
class ProcessesOptions(DeviceOptions):
    processes: int | Literal["auto"] | None = None
    """Compute in this number of processes on this host; auto: one for each GPU. Several hosts: see
    docs/distributed.md. Default: one process."""


@options
class NetworkOptions:
    """How to load a network that gsem did not train."""

    normalize: str | None = None
    """Mean and std for a network that takes normalised input: cifar10, cifar100, svhn, imagenet, or MEAN/STD with a
    number for each channel, like 0.49,0.48,0.45/0.2,0.2,0.2. eps stays in pixels. Default: pixels in [0, 1] as they
    are."""
    arch: str | None = None
    """Architecture of a published .pt, like GSeMResNet18 (see gsem models). Default: none; a .pt needs it."""
    num_classes: int = 10
    """Number of classes of a published .pt."""
    levels: int = 6
    """GSeM's levels (the paper's alpha) in a published .pt."""
    noise: int = 4
    """GSeM's noise (the paper's beta) in a published .pt."""


@options
class DataSourceOptions:
    data: str | None = None
    """The data whose test images are used: a data set's name, or the path of an image folder, of an .npz file, or of a
    folder of .npy, parquet or arrow files. Default: the data that the run or the saved evaluation names."""
    data_path: str | None = None
    """Directory of the data sets that have names (cifar10, cifar100, svhn). Default: where gsem downloads them to."""
    resize: int | None = None
    """Bring image files of any sizes of --data to this number of pixels: the shorter side is resized, the centre
    cropped. Default: all images must have one size; for a run's own data, as in its training."""


@options
class ModelOptions:
    model: Positional[str] = ""
    """A run directory, a .safetensors checkpoint, a published .pt, package.module:function, timm:NAME with timm's
    pretrained weights, or robustbench:NAME:DATA:THREAT. Default: none; it may be given as --model."""
    named_model: Annotated[str, tyro.conf.arg(name="model")] = ""
    """The same as MODEL, as an option. Default: none."""


@options
class AttackOptions:
    suite: str | None = None
    """A named list of attacks: quick, standard (AutoAttack), paper (its five attacks), or paper-code (the budgets that
    its code ran). Default: none."""
    attacks: str | None = None
    source: tuple[str, ...] = ()
    """More models (as MODEL) whose adversarial examples are tried on this one: the transfer attack. Default: none."""


@options
class ImagesOptions:
    images: int | None = None
    subset: Literal["balanced", "first"] = "balanced"
    """Which images --images takes: a fixed choice with equally many of each class (balanced), or the first ones."""


@options
class ThreatOptions:
    eps: float | None = None
    """Radius of the threat model in pixels of [0, 1], like 8/255. Default: the run's own for Linf, 0.5 for L2."""
    norm: Literal["Linf", "L2"] = "Linf"
    """Norm of the perturbation: Linf or L2."""
    batch_size: int = 256
    """Images attacked at once."""
    seed: int = 0
    """Seed of all random draws."""


@options
class TaskOptions(
    ProcessesOptions, NetworkOptions, ThreatOptions, ImagesOptions, DataSourceOptions, AttackOptions, ModelOptions
):
    """What gsem evaluate and gsem audit share. (Help lists the options from the last base to the first.)"""

    @property
    def default_images(self) -> int | None:
        """Test images without --images; None for all."""
        return None


@options
class EvaluateOptions(TaskOptions):
    """Attack a model, and score it on draws of its noise that no attack has seen.

    An interrupted evaluation resumes when the same command is started again.
    """

    attacks: str | None = None
    """Attacks instead of a suite, separated by commas, with options after colons, like
    clean,pgd:steps=500:eot=20,apgd:loss=dlr,apgd:targets=9,cw,fab:targets=9,square,rays,transfer,autoattack. Default:
    clean,pgd:steps=100."""
    images: int | None = None
    """Number of test images. Default: all."""
    draws: int = 100
    """Scoring draws of the noise for each image and attack; as many others choose the worst attack."""
    frozen: bool = True
    """Attack a stochastic GSeM also with its noise frozen by a known seed, and with its noise off."""
    out: Path | None = None
    """The result is written to OUT.json and OUT.npz. Default: RUN/evaluation, or evaluation here; with a number behind
    it where another evaluation is."""
    again: bool = False
    """Compute a finished evaluation again, instead of showing its saved table."""
    save_adv: bool = False
    """Keep the adversarial examples in the .npz."""
    corruptions: Path | None = None
    """Directory of CIFAR-10-C, CIFAR-100-C or ImageNet-C: the accuracy by corruption and severity instead of attacks,
    written to RUN/corruptions.json. Default: none."""


@options
class CompareOptions(ProcessesOptions, NetworkOptions, ThreatOptions, DataSourceOptions):
    """Compare two networks on the same images and attacks: the difference of their accuracies.

    Networks that have not been evaluated with these options are evaluated first.
    """

    one: Positional[str]
    """The first network: a MODEL as of gsem evaluate, or the .npz of a saved evaluation."""
    two: Positional[str]
    """The second network, likewise."""
    suite: str | None = None
    """A named list of attacks: quick, standard (AutoAttack), paper or paper-code. Default: none."""
    attacks: str | None = None
    """Attacks instead of a suite, as of gsem evaluate. Default: clean,pgd:steps=100."""
    images: int | None = None
    """Number of test images. Default: all."""
    draws: int = 100
    """Scoring draws of the noise for each image and attack; as many others choose the worst attack."""
    frozen: bool = True
    """Attack a stochastic GSeM also with its noise frozen by a known seed, and with its noise off."""
    out: Path = Path("comparison.json")
    """JSON file for the comparison."""


@options
class AuditOptions(TaskOptions):
    """Which robust accuracy may be quoted? Twelve checks, the lowest accuracy found, and a verdict.

    An interrupted audit resumes when the same command is started again.
    """

    attacks: str | None = None
    """The attacks whose accuracy is claimed, instead of a suite, separated by commas, like
    pgd:steps=100,apgd:targets=9,square. Default: APGD on cross-entropy, on the margin and towards nine targets."""
    images: int | None = None
    """Number of test images. Default: 500, with --quick 128."""
    draws: int | None = None
    """Scoring draws of the noise for each image and attack. Default: 100, with --quick 20."""
    only: str | None = None
    """Run only these checks, separated by commas: randomness, gradient, unavailable, unstable, silent_success,
    incomplete, transfer, unconstrained, binarization, sweeps, blackbox, noise. Default: all."""
    quick: bool = False
    """Take fewer images, steps, draws and queries: minutes on a CPU for a small network. Numbers that are given as
    options take precedence."""
    surrogate: str | None = None
    """A model (as MODEL) whose gradient the attacks follow. Default: the audited model."""
    gradient: Literal["corrected", "semi-masked"] | None = None
    """Gradient of every GSeM in the model. Default: the one it was trained with."""
    out: Path | None = None
    """The audit is written to OUT.json. Default: RUN/audit.json, or audit.json here; with a number behind it where
    another audit is."""

    @property
    def default_images(self) -> int:
        return 128 if self.quick else 500


@options
class CertifyOptions(ProcessesOptions, NetworkOptions, ImagesOptions, DataSourceOptions, ModelOptions):
    """Certify radii in L2 by randomised smoothing (Cohen, Rosenfeld, Kolter 2019).

    No perturbation below its radius changes the answer of the smoothed classifier: the class that the model answers
    most often under Gaussian noise.

    An interrupted certification resumes when the same command is started again.
    """

    sigma: float
    """Standard deviation of the Gaussian noise in pixels of [0, 1], like 0.25."""
    images: int | None = None
    """Number of test images. Default: 200."""
    n0: int = 100
    """Draws for each image that select its class."""
    n: int = 10_000
    """Draws for each image that estimate the probability of this class. More draws certify larger radii."""
    alpha: float = 0.001
    """Probability that the certificate of an image is wrong."""
    batch_size: int = 256
    """Noisy copies of an image at once."""
    seed: int = 0
    """Seed of all random draws."""
    out: Path | None = None
    """The result is written to OUT.json. Default: RUN/certification.json, or certification.json here; with a number
    behind it where another certification is."""
    again: bool = False
    """Compute a finished certification again, instead of showing its saved table."""

    @property
    def default_images(self) -> int:
        return 200


@options
class VerifyOptions(DeviceOptions, NetworkOptions, DataSourceOptions):
    """Check saved adversarial examples again: bounds, labels, accuracy on fresh draws."""

    result: Positional[str]
    """The .npz of gsem evaluate --save-adv."""
    model: str
    """The evaluated model: a run directory, a .safetensors checkpoint, a published .pt, package.module:function, or
    timm:NAME."""
    draws: int = 100
    """Fresh draws of the noise for each image and attack."""
    seed: int = 1
    """Seed of the fresh draws."""


@options
class ReportOptions(DeviceOptions, NetworkOptions, DataSourceOptions):
    """One page on one run, or on several side by side.

    It shows the verdict, accuracies, curves, images and cost.
    """

    run: Positional[tuple[str, ...]]
    """Run directories, or the .npz of single evaluations. For a directory, the latest evaluation and the latest
    complete audit are shown. Default: none; give one or more."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write: .html, .md (Markdown) or .json (a card with RobustBench's field names). Default: RUN/report.html;
    report.html here for evaluations and for several runs."""
    markdown: Path | None = None
    """Write Markdown to this file too. Default: none."""
    json: Path | None = None
    """Write the JSON card to this file too. Default: none."""
    model: str | None = None
    """The evaluated network (as MODEL of gsem evaluate), for the pictures of an evaluation of one that gsem did not
    train. Default: none; the pictures are those that gsem evaluate --save-adv kept."""
    images: int = 100
    """Test images behind confusion matrix, gallery and loss surface, if the evaluation kept no adversarial examples; 0
    leaves these pictures out."""


@options
class TrainOptions(ProcessesOptions):
    """Train by a recipe: gsem train [RECIPE] [OPTIONS].

    Every field of the recipe can be set by its option.

    With --epochs alone, milestones and warm-up are scaled with it.
    """

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    out: Path | None = None
    """Run directory. Default: runs/RECIPE-DATA-MODEL-seedN."""
    config: Path | None = None
    """Recipe to start from: a .toml file, a run directory or its recipe.json. Options override it. Default: RECIPE."""
    print_config: bool = False
    """Print the recipe as a .toml file for --config, and do not train."""
    resume: Path | None = None
    """Resume the run in this directory, with its own recipe. --data gives the present place of its images, if they are
    not found. Default: a new run."""
    tensorboard: Path | None = None
    """Directory for TensorBoard's event files (needs pip install 'gsem-torch[tensorboard]'). Default: none."""
    compile: Compile = "auto"
    """auto: on a CUDA GPU, attacks are replayed as a CUDA graph where launching their kernels takes longer than running
    them. on: torch.compile runs the passes, for long trainings on a GPU; the first steps take minutes. off: neither."""
    hold: bool | None = None
    """Hold the training images in memory, or (--no-hold) let worker processes read them during the training. Default:
    hold up to 4 GiB."""


STUDIES = ("ablation", "recipes")


@options
class StudyOptions(ProcessesOptions):
    """Train and evaluate variants over seeds: gsem study [ablation | recipes].

    The ablation removes parts of GSeM; recipes trains every named recipe.

    With --epochs, every schedule is scaled to it. A stopped study resumes.
    """

    study: tyro.conf.Suppress[str]  # one of STUDIES: it comes before the options
    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    seeds: int = 3
    """Trainings of each variant."""
    only: str | None = None
    """Names of variants as in the table, separated by commas. Default: all variants."""
    passes: float | None = None
    """For gsem study recipes: each recipe gets the epochs, at least one, that bring its attack and training passes per
    image nearest to this number. Default: the same number of epochs for each."""
    attacks: str = "clean,pgd:steps=50"
    """Attacks of the test, separated by commas, with options after colons."""
    images: int | None = None
    """Number of test images; the first ones are taken. Default: all."""
    test_data: str | None = None
    """The data whose test images are used. Default: those of --data."""
    out: Path | None = None
    """Directory of the study. Default: runs/study-STUDY-DATA."""


@options
class DemoOptions(DeviceOptions):
    """Train a small GSeM network on digits, attack it, and write a report."""

    out: Path = Path("runs/demo")
    """Run directory; a finished or interrupted demo there resumes."""


@options
class DataOptions:
    """List the data sets, or show what one holds."""

    data: Positional[str | None] = None
    """A data set's name, or the path of an image folder, of an .npz file, or of a folder of .npy, parquet or arrow
    files. Default: list the names."""
    resize: int | None = None
    """Bring image files of any sizes to this number of pixels: the shorter side is resized, the centre cropped.
    Default: all images must have one size."""


@dataclass(frozen=True)
class NoOptions:
    """This command takes no options."""


@dataclass(frozen=True)
class _First:
    """The options that other defaults follow from."""

    config: Path | None = None

    epochs: int | None = None


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """The error for a name that does not exist: the names like it, and all there are."""
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{kind} {name!r} is unknown.{hint} Possible are: {', '.join(known)}"


# Options that take several values, which may also be given one by one.
SEVERAL = ("--insert-after", "--source")


def _joined(words: list[str]) -> list[str]:
    """`--source a --source b` as `--source a b`: tyro would keep the last alone."""
    kept: list[str] = []
    values: dict[str, list[str]] = {}
    option = None
    for word in words:
        name, equals, value = word.partition("=")
        known = name.replace("_", "-") if name.replace("_", "-") in SEVERAL else None
        if known is not None:
            values.setdefault(known, []).extend([value] if equals else [])
            option = known
        elif option is not None and not word.startswith("-"):
            values[option].append(word)
        else:
            kept, option = [*kept, word], None
    return kept + [word for name, several in values.items() for word in (name, *several)]


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
            return tyro.cli(kind, prog=f"gsem {command}", args=_joined(words), registry=registry, config=config, **more)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box of several lines; an error here is one line.
        lines = [line.strip("│ ") for line in boxed.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
        text = " ".join(line for line in lines if line.strip("─-") and not line.startswith("For full helptext"))
        text = text.split(" Argument helptext:")[0]
        raise ValueError(f"{text} (gsem {command} --help lists the options)") from None


def parse_recipe(kind: Any, command: str, words: list[str], recipe: Recipe, **more: Any) -> Any:
    """Options with a recipe: `recipe`, or that of --config, its schedule scaled to --epochs, with what else is given.

    Args:
        more: further defaults of the options.
    """
    given, _ = parse(_First, command, words, add_help=False, return_unknown_args=True)
    recipe = recipe if given.config is None else Recipe.read(given.config)
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
