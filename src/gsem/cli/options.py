"""The options of each command, and their parsing."""

from collections.abc import Collection
from contextlib import redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

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
    """Train by a recipe: `gsem train [RECIPE] [OPTIONS]`. Every field of the recipe can be overridden.

    With --epochs alone, milestones and warm-up are scaled with it.
    """

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    out: Path | None = None
    """Run directory; default: runs/RECIPE-DATA-MODEL-seedN."""
    resume: Path | None = None
    """Go on with the run in this directory. Its recipe stays as it is; --data says where its images are now, if they
    are not found."""
    tensorboard: Path | None = None
    """Directory for TensorBoard's event files (needs the extra: pip install 'gsem-torch[tensorboard]')."""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one."""
    compile: bool = False
    """Run the passes by torch.compile: for long trainings on a GPU. The first steps take minutes."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Attack a trained model and score it on draws of its noise that no attack has seen.

    An interrupted evaluation goes on when the same command is started again; a finished one is shown again.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run directory, a .safetensors checkpoint, a published .pt, or package.module:function."""
    suite: str | None = None
    """quick, standard (AutoAttack), paper (its five attacks), or paper-code (the budgets that its code ran)."""
    attacks: str | None = None
    """Instead of a suite: attacks with commas between, options behind colons, like
    clean,pgd:steps=500:eot=20,apgd:loss=dlr,apgd:targets=9,cw,fab:targets=9,square,rays,transfer,autoattack."""
    source: tuple[str, ...] = ()
    """More models (as MODEL) whose adversarial examples are tried on this one: adds the transfer attack."""
    data: str | None = None
    """Whose test images: a data set's name, an image folder, or an .npz file. The run's own data by default."""
    data_path: str | None = None
    """Directory of the data sets that have names (cifar10, cifar100, svhn)."""
    images: int | None = None
    """Number of test images. Default: all."""
    subset: Literal["balanced", "first"] = "balanced"
    """Which test images --images takes: as many of each class, the same in every run, or the first ones."""
    eps: float | None = None
    """Radius, like 8/255. The run's own by default (L-infinity), 0.5 for L2."""
    norm: Literal["Linf", "L2"] = "Linf"
    """Norm of the perturbation: Linf or L2."""
    draws: int = 100
    """Scoring draws of the noise, for each image and attack; as many others choose the worst attack."""
    frozen: bool = True
    """Attack a stochastic GSeM also with its noise frozen by a known seed, and with its noise off."""
    batch_size: int = 256
    """Images attacked at once."""
    seed: int = 0
    out: Path | None = None
    """Where the result goes, as OUT.json and OUT.npz; default: RUN/evaluation, or evaluation here, with a number behind
    it where there is one of something else."""
    again: bool = False
    """Compute the evaluation anew where it is finished already; by default, the saved table is shown."""
    save_adv: bool = False
    """Keep the adversarial examples in the .npz."""
    normalize: str | None = None
    """For a network that wants normalised input: cifar10, cifar100, svhn, imagenet, or MEAN/STD with commas between
    channels, like 0.49,0.48,0.45/0.2,0.2,0.2. eps stays in pixels."""
    arch: str | None = None
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
class AuditOptions:
    """Is the robust accuracy real? Twelve checks, each with a figure, and a verdict: TRUSTED, SUSPECT or INVALID.

    An interrupted audit resumes after its last finished check when the same command is started again.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run directory, a .safetensors checkpoint, a published .pt, or package.module:function."""
    attacks: str | None = None
    """The audited attacks, with commas between, like pgd:steps=100,apgd:targets=9. Default: APGD on cross-entropy, on
    the margin and towards nine targets."""
    suite: str | None = None
    """Instead: quick, standard, paper or paper-code."""
    only: str | None = None
    """Only these checks, with commas between: randomness, gradient, unavailable, unstable, silent, unfinished,
    transfer, unconstrained, binarization, sweeps, blackbox, noise."""
    quick: bool = False
    """Other defaults: 128 images, fewer steps, draws and queries: minutes on a CPU for a small network. What is given
    as an option is used as it is."""
    source: tuple[str, ...] = ()
    """More models (as MODEL) whose adversarial examples are tried on this one."""
    surrogate: str | None = None
    """A model (as MODEL) through which the attacks go instead of this one."""
    gradient: Literal["corrected", "semi-masked"] | None = None
    """Gradient of every GSeM in the model; default: as it was trained."""
    data: str | None = None
    """Whose test images: a data set's name, an image folder, or an .npz file. Default: the run's own data."""
    data_path: str | None = None
    """Directory of the data sets that have names (cifar10, cifar100, svhn)."""
    images: int | None = None
    """Number of test images. Default: 500, with --quick 128."""
    subset: Literal["balanced", "first"] = "balanced"
    """Which test images --images takes: as many of each class, the same in every run, or the first ones."""
    eps: float | None = None
    """Radius, like 8/255. The run's own by default (L-infinity), 0.5 for L2."""
    norm: Literal["Linf", "L2"] = "Linf"
    """Norm of the perturbation: Linf or L2."""
    draws: int | None = None
    """Scoring draws of the noise for each point. Default: 100, with --quick 20."""
    batch_size: int = 256
    """Images attacked at once."""
    seed: int = 0
    out: Path | None = None
    """Where the audit goes, as OUT.json. Default: RUN/audit.json, or audit.json here; with a number behind it where
    there is one already."""
    normalize: str | None = None
    """For a network that takes normalised input: cifar10, cifar100, svhn, imagenet, or MEAN/STD."""
    arch: str | None = None
    """Of a published .pt: which network it is, like GSeMResNet18."""
    num_classes: int = 10
    """Of a published .pt: its number of classes."""
    levels: int = 6
    """Of a published .pt: GSeM's levels (the paper's alpha)."""
    noise: int = 4
    """Of a published .pt: GSeM's noise (the paper's beta)."""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one."""


@dataclass(frozen=True)
class VerifyOptions:
    """Judge saved adversarial examples again: bounds, labels, fresh draws."""

    result: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RESULT")]
    """The .npz of gsem evaluate --save-adv."""
    model: str
    """The evaluated model: a run directory, a checkpoint, a published .pt, or package.module:function."""
    data: str | None = None
    """Whose test images; default: those that the result names."""
    data_path: str | None = None
    """Directory of the data sets that have names (cifar10, cifar100, svhn)."""
    draws: int = 100
    """Fresh draws of the noise, for each image and attack."""
    seed: int = 1
    """Of these draws."""
    normalize: str | None = None
    """For a network that takes normalised input: cifar10, cifar100, svhn, imagenet, or MEAN/STD."""
    arch: str | None = None
    """Of a published .pt: which network it is, like GSeMResNet18."""
    num_classes: int = 10
    """Of a published .pt: its number of classes."""
    levels: int = 6
    """Of a published .pt: GSeM's levels (the paper's alpha)."""
    noise: int = 4
    """Of a published .pt: GSeM's noise (the paper's beta)."""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one."""


@dataclass(frozen=True)
class ReportOptions:
    """One page for people, of one run or of several side by side: verdict, accuracies, curves, images, cost."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN…")]
    """Run directories, or the .npz of single evaluations. Of a directory, the latest evaluation and the latest whole
    audit are shown."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write: .html, .md (Markdown) or .json (a card with RobustBench's field names). RUN/report.html, or
    report.html for several runs, by default."""
    markdown: Path | None = None
    """Write Markdown to this file too."""
    json: Path | None = None
    """Write the JSON card to this file too."""
    model: str | None = None
    """The network that an evaluation (.npz) is of, where gsem did not train it: as MODEL of gsem evaluate. Pictures
    need it; without it the gallery shows what gsem evaluate --save-adv kept."""
    data: str | None = None
    """Whose test images the pictures are made of. Default: those that the evaluation or the run
    names."""
    data_path: str | None = None
    """Directory of the data sets that have names (cifar10, cifar100, svhn)."""
    normalize: str | None = None
    """For a network of --model that takes normalised input: cifar10, cifar100, svhn, imagenet, or MEAN/STD."""
    arch: str | None = None
    """Of a published .pt: which network it is, like GSeMResNet18."""
    num_classes: int = 10
    """Of a published .pt."""
    levels: int = 6
    """Of a published .pt: GSeM's alpha."""
    noise: int = 4
    """Of a published .pt: GSeM's beta."""
    images: int = 100
    """Test images that confusion, gallery and loss surface are computed of, where the evaluation kept no adversarial
    examples (--save-adv); 0 leaves them out."""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one."""


STUDIES = ("ablation", "recipes")


@dataclass(frozen=True)
class StudyOptions:
    """Train and evaluate variants over seeds: `gsem study ablation` or `gsem study recipes`.

    The ablation takes GSeM apart; recipes trains every named recipe, its schedule scaled to --epochs. What is
    finished is not computed again: start the same command to go on.
    """

    study: tyro.conf.Suppress[str]
    """One of STUDIES: it stands in front of the options."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    seeds: int = 3
    """Trainings of each variant."""
    only: str | None = None
    """Names of variants with commas between, as the table shows them; all by default."""
    passes: float | None = None
    """Of `study recipes`: equal cost instead of equal epochs. Each recipe gets the epochs, at least one, that bring
    its attack and training passes per image nearest to this number."""
    attacks: str = "clean,pgd:steps=50"
    """Attacks with commas between, options behind colons."""
    images: int | None = None
    """Only the first so many test images."""
    test_data: str | None = None
    """Whose test images; those of --data by default."""
    out: Path | None = None
    """Directory of the study; default: runs/study-NAME-DATA."""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one."""


@dataclass(frozen=True)
class DemoOptions:
    """Train the small GSeM network on digits by GCAT, evaluate it clean and under PGD-100, write a report."""

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


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """What is said of a name that does not exist: the names like it, and all there are."""
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{kind} {name!r} is unknown.{hint} Possible are: {', '.join(known)}"


def parse(kind: Any, command: str, words: list[str], **how: Any) -> Any:
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
