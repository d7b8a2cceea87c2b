"""The schema of a recipe: all that determines a training run, as one frozen value. No tensors here."""

import difflib
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

Schedule = Literal["step", "cosine", "cyclic", "onecycle"]
Optimizer = Literal["sgd", "adamw"]
Norm = Literal["Linf", "L2"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
Objective = Literal["ce", "mart", "trades"]
Augment = Literal["none", "crop", "autoaugment", "resized-crop"]
Init = Literal["uniform", "gaussian", "noise"]
Gradient = Literal["corrected", "semi-masked"]
Compile = Literal["auto", "on", "off"]  # no field of a recipe: it decides how passes run, and not what they compute


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what a training run computes. A variant is `replace(recipe, lr=0.05)`.

    For another number of epochs take `recipe.scaled(5)`: warm-up and milestones are counted in epochs, and `replace`
    would leave them where they are.

    Raises:
        ValueError: a field out of its range, with the range.
    """

    name: str = "gcat"
    """Name of the recipe that this one is, or was changed from."""
    data: str = "digits"
    """Training images: a name that `gsem data` lists, or the path of an image folder with train/CLASS/*, of an .npz
    file, or of a folder of .npy, parquet or arrow files."""
    data_path: str | None = None
    """Directory of the data sets that have names (cifar10, cifar100, svhn). Default: ./dataset."""
    resize: int | None = None
    """Bring image files of any sizes to this number of pixels: the shorter side is resized, the centre cropped.
    Default: all images must have one size."""
    extra_data: str | None = None
    """Additional, mostly generated, training images: an .npz file with image and label, or a folder of such files.
    Default: none."""
    extra_share: float = 0.0
    """Share of each batch that comes from extra_data, from 0 to below 1. Above 0, extra_data must be given."""
    augment: Augment = "crop"
    """Augmentation of the training images. crop is a random crop and flip; autoaugment adds AutoAugment's CIFAR-10
    policy (on colour images) and Cutout of half the side, as the paper does. resized-crop is a random part, resized,
    and a flip, as usual for images of 64 pixels and more."""
    flip: bool | None = None
    """Flip images horizontally in the augmentation. Default: as the data set states (images yes, digits no)."""
    model: str = "gsem-resnet10x16"
    """Network to train: one that `gsem models` lists, a function of your own without arguments that returns one
    (package.module:function), or timm:NAME."""
    insert_after: tuple[str, ...] = ()
    """Layers of the network to put a GSeM behind, by their names in named_modules(). Default: none."""
    normalize: str | None = None
    """Normalisation that the network expects of its input: cifar10, cifar100, svhn, imagenet, or MEAN/STD. Attacks
    stay in pixels. Default: none."""
    levels: int = 6
    """GSeM's quantisation levels per unit of a feature (the paper's alpha)."""
    noise: int = 4
    """GSeM's largest noise offset, in levels (the paper's beta)."""
    quantiser: bool = True
    """Round the features in GSeM; without it, as an ablation, noise alone is added."""
    gradient: Gradient = "corrected"
    """Gradient of GSeM's quantiser: the identity (corrected), or zero (semi-masked)."""

    objective: Objective = "ce"
    """Loss to minimise: cross-entropy (ce), MART or TRADES. The last two also use the clean images."""
    kl_weight: float = 5.0
    """Weight of the divergence in MART and TRADES (the papers' lambda and beta)."""
    label_smoothing: float = 0.0
    """Share of the cross-entropy's target that is spread over all classes, from 0 to below 1. In MART that is the term
    of the adversarial image, in TRADES that of the clean one."""
    awp: float = 0.0
    """Size of the adversarial weight perturbation, relative to the norm of each weight tensor (gamma). 0 is none."""
    awp_warmup: float = 0.0
    """Epochs of each round before the weights are perturbed."""
    adversarial_fraction: float = 0.5
    """Share of each batch that is replaced by its adversarial examples, from 0 to 1."""
    norm: Norm = "Linf"
    """Norm of the perturbation, in training and validation: Linf or L2."""
    eps: float | None = None
    """Radius of the attack, in pixels of [0, 1]. Default: for Linf the data set's own (8/255 for colour images), for L2
    0.5."""
    step: float | None = None
    """Length of an attack step, in pixels of [0, 1]. Default: eps/4, and eps with attack_init noise."""
    attack_init: Init = "uniform"
    """Start of the attack: a uniform draw from the ball (uniform), the image plus a normal draw of deviation 0.001
    (gaussian), or plus uniform noise of noise_radius (noise: N-FGSM, a single step that is not projected into the
    ball)."""
    noise_radius: float = 2.0
    """Largest noise of attack_init noise, in multiples of eps (N-FGSM's k)."""
    steps: int = 10
    """Number of attack steps."""
    eot: int = 1
    """Draws of GSeM's noise that each attack gradient is averaged over."""
    draws: int = 1
    """Draws of GSeM's noise that each gradient of the weights is averaged over."""

    epochs: int = 30
    """Passes over the training images, in each round."""
    steps_per_epoch: int | None = None
    """Optimizer steps in an epoch. Default: as many as the training images fill once."""
    rounds: int = 1
    """Number of times the schedule runs, each from the best checkpoint so far."""
    batch_size: int = 128
    """Images in each optimizer step."""
    optimizer: Optimizer = "sgd"
    """sgd (with momentum), or adamw (betas 0.9 and 0.999)."""
    lr: float = 0.1
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Learning rate over a round: it is multiplied by `decay` at milestones (step), falls to 0 along a cosine (cosine)
    or a line (cyclic), or rises from lr/25 and falls to lr/250000 along cosines (onecycle)."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the step schedule multiplies the learning rate by `decay`. Default: none."""
    decay: float = 0.1
    """Factor of the step schedule."""
    warmup: float = 0.0
    """Epochs over which the learning rate rises to its peak: linearly from 0, in onecycle along a cosine from lr/25."""
    momentum: float = 0.9
    """Momentum of SGD, from 0 to below 1."""
    nesterov: bool = False
    """Use Nesterov's form of SGD's momentum."""
    weight_decay: float = 5e-4
    """Weight decay of the optimizer, on all parameters."""
    clip: float | None = None
    """Largest L2 norm of the gradient of all parameters together; longer gradients are shortened to it. Default: no
    clipping."""
    abort_grad_norm: float = 1e4
    """L2 norm of the gradient, before clipping, above which the run is stopped as diverged."""
    ema: float = 0.0
    """Decay of the exponential average of the weights, per step. 0 keeps no average. Averaged weights are validated
    beside the raw ones, and are the run's model."""
    swa_from: int | None = None
    """Epoch from which the weights of all steps are averaged equally (SWA, in place of ema). Default: none."""
    patience: int = 0
    """Validations in a row without a better robust accuracy after which the run stops. 0 never stops it early."""

    collapse: float = 0.0
    """Stop at catastrophic overfitting: when the robust validation accuracy of the raw weights has fallen by more than
    this share of its best, and the robust accuracy on the training batches has not fallen. 0 never stops."""

    precision: Precision = "auto"
    """Precision of the training passes. auto is bf16 where the device multiplies it in hardware, fp16 on older GPUs and
    float32 elsewhere; on a CPU, fp16 means auto."""
    attack_precision: Precision = "auto"
    """Precision of the attack's passes on the folded model, chosen like `precision`."""
    validate_every: int = 1
    """Epochs between validations. Each runs PGD-10 on at most 1,000 held-out training images."""
    init_from: str | None = None
    """A run directory or checkpoint whose weights the training starts from. Default: new random weights."""
    deterministic: bool = False
    """Use only torch operations that give the same bits in every run. A CPU's always do."""
    seed: int = 0
    """Seed of all random numbers of the run, the validation split included."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def passes(self) -> tuple[float, float]:
        """(attack passes, training passes) per image and epoch, each a forward and a backward."""
        branches = 1 if self.objective == "ce" else 2
        return self.adversarial_fraction * self.steps * self.eot, float(self.draws * (branches + (self.awp > 0)))

    def learning_rate(self, epoch: float) -> float:
        """At `epoch` (fractional) of a round."""
        return _learning_rate(self, epoch)

    def radius(self, own: float) -> float:
        """eps, or its default: `own`, that of the data set, for Linf, and 0.5 for L2."""
        return self.eps or (own if self.norm == "Linf" else 0.5)

    def attack_step(self, eps: float) -> float:
        """step, or its default."""
        return self.step or (eps if self.attack_init == "noise" else eps / 4)

    def scaled(self, epochs: int) -> "Recipe":
        """The same schedule over `epochs` of each round, as by --epochs: milestones and warm-ups move in proportion."""
        return _scaled(self, epochs)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: "Recipe | None" = None) -> "Recipe":
        """The inverse of `to_dict`. Fields that are left out are taken from `base`, or else from `Recipe()`.

        Raises:
            ValueError: a field that this version does not know, or a value of another type.
        """
        return replace(base or cls(), **{name: _typed(name, value) for name, value in values.items()})

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """The recipe in a .toml file, in a run directory, or in its recipe.json.

        A .toml file holds fields by their names; a number may be a text like "8/255", and "none" is None. What it
        leaves out is as in the named recipe `name` (default: gcat).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or `from_dict` refuses what it holds. The message names the file.
        """
        return _read(Path(path))

    def to_toml(self) -> str:
        """All fields as a .toml file that `read` reads."""
        values = {name: "none" if value is None else value for name, value in self.to_dict().items()}
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def _learning_rate(r: Recipe, epoch: float) -> float:
    if r.schedule == "step":
        return r.lr * r.decay ** sum(epoch >= m for m in r.milestones)
    if epoch < r.warmup:
        share = epoch / r.warmup
        return _cosine(r.lr / 25, r.lr, share) if r.schedule == "onecycle" else r.lr * share
    rest = (epoch - r.warmup) / (r.epochs - r.warmup)
    if r.schedule == "cyclic":
        return r.lr * (1 - rest)
    return _cosine(r.lr, r.lr / 25 / 1e4 if r.schedule == "onecycle" else 0.0, rest)


def _scaled(r: Recipe, epochs: int) -> Recipe:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    share = epochs / r.epochs
    moved = {max(1, round(m * share)) for m in r.milestones}
    return replace(
        r,
        epochs=epochs,
        milestones=tuple(sorted(m for m in moved if m < epochs)),
        warmup=r.warmup * share,
        awp_warmup=r.awp_warmup * share,
        swa_from=None if r.swa_from is None else int(r.swa_from * share),
    )


def _read(path: Path) -> Recipe:
    from gsem.training.recipes import RECIPES  # which are made of this class

    file = path / "recipe.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no recipe {file}")
    try:
        if file.suffix == ".json":
            values = json.loads(file.read_text())
            return Recipe.from_dict(values.get("recipe", values))
        values = tomllib.loads(file.read_text())
        return Recipe.from_dict(values, RECIPES.get(values.get("name", "gcat")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


def _typed(field: str, value: Any) -> Any:
    """A value read from a file, converted to the type of its field."""
    known = {f.name: f.type for f in fields(Recipe)}
    if field not in known:
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"; near it is {near[0]!r}" if near else ""
        raise ValueError(f"the recipe has a field {field!r} that this version of gsem does not know{hint}")
    kind: Any = known[field]
    options = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if NoneType in options and value in (None, "none"):
        return None
    wanted = options[0]
    if wanted is float and not isinstance(value, bool):
        try:
            return float(Fraction(value)) if isinstance(value, str) else float(value)
        except (ValueError, TypeError, ZeroDivisionError):
            pass
    elif get_origin(wanted) is tuple and isinstance(value, list | tuple):
        if all(type(one) is get_args(wanted)[0] for one in value):
            return tuple(value)
    elif get_origin(wanted) is Literal or type(value) is wanted:
        return value
    names = {
        float: "a number",
        int: "an integer",
        bool: "true or false",
        str: "a text",
        tuple[str, ...]: "a list of texts",
    }
    raise ValueError(f"{field} = {value!r} is not {names.get(wanted, 'a list of integers')}")


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


# A rule: whether a value fulfils it, and its description.
_Rule = tuple[Callable[[Any], bool], str]


def _integer(least: int) -> _Rule:
    return lambda value: type(value) is int and value >= least, f"an integer of at least {least}"


_POSITIVE: _Rule = (lambda value: 0 < value < math.inf, "positive")
_POSITIVE_OR_NONE: _Rule = (lambda value: value is None or 0 < value < math.inf, "positive, or left out")
_NOT_NEGATIVE: _Rule = (lambda value: 0 <= value < math.inf, "at least 0")
_BELOW_ONE: _Rule = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("levels", "steps", "eot", "draws", "epochs", "rounds", "batch_size"), _integer(1)),
    **dict.fromkeys(("validate_every",), _integer(1)),
    **dict.fromkeys(("noise", "patience"), _integer(0)),
    **dict.fromkeys(("eps", "step", "clip"), _POSITIVE_OR_NONE),
    **dict.fromkeys(("lr", "decay", "abort_grad_norm", "noise_radius"), _POSITIVE),
    **dict.fromkeys(("momentum", "ema", "label_smoothing", "extra_share", "collapse"), _BELOW_ONE),
    **dict.fromkeys(("weight_decay", "kl_weight", "awp", "awp_warmup"), _NOT_NEGATIVE),
    "steps_per_epoch": (lambda value: value is None or (type(value) is int and value >= 1), "at least 1, or left out"),
    "resize": (lambda value: value is None or (type(value) is int and value >= 1), "a number of pixels, at least 1"),
    "seed": (lambda value: type(value) is int, "an integer"),
    "adversarial_fraction": (lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    "milestones": (lambda value: [0, *value] == sorted({0, *value}), "rising epoch numbers from 1"),
}


def _check(r: Recipe) -> None:
    rules = _RULES | {
        f.name: (get_args(f.type).__contains__, f"one of {', '.join(get_args(f.type))}")
        for f in fields(r)
        if get_origin(f.type) is Literal
    }
    for field, (holds, rule) in rules.items():
        _require(r, holds(getattr(r, field)), field, rule)
    scale = "; for another number of epochs, recipe.scaled(EPOCHS) moves the schedule along"
    epochs = f"below the {r.epochs} epochs{scale}"
    within = r.milestones if r.schedule == "step" else ()
    together = (
        (r.norm == "L2" or r.eps is None or r.eps <= 1, "eps", "at most 1: images lie in [0, 1] (8/255, not 8)"),
        (r.extra_data is None or r.extra_share > 0, "extra_share", "above 0 with extra_data"),
        (r.attack_init != "noise" or r.norm == "Linf", "norm", "Linf with attack_init noise"),
        (r.attack_init != "noise" or r.steps == 1, "steps", "1 with attack_init noise, which is not projected"),
        (r.collapse == 0 or r.adversarial_fraction > 0, "collapse", "0 in a training without attacks"),
        (r.objective == "ce" or r.adversarial_fraction == 1, "adversarial_fraction", f"1 with objective {r.objective}"),
        (r.swa_from is None or 0 <= r.swa_from < r.epochs, "swa_from", f"from 0 to {epochs}"),
        (r.swa_from is None or r.ema == 0, "swa_from", "left out where ema is set: one average is kept"),
        (0 <= r.warmup < r.epochs, "warmup", f"at least 0 and {epochs}"),
        (not r.nesterov or r.momentum > 0, "nesterov", "off when momentum is 0"),
        (max(within, default=0) < r.epochs, "milestones", f"before epoch {r.epochs}{scale}"),
    )
    for kept, field, rule in together:
        _require(r, kept, field, rule)


def _require(r: Recipe, kept: bool, field: str, rule: str) -> None:
    if not kept:
        raise ValueError(f"recipe {r.name!r}: {field} = {getattr(r, field)!r}, but it must be {rule}")
