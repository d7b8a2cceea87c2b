"""The schema of a recipe: all that determines a training run, as one frozen value. No tensors here."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

Schedule = Literal["step", "cosine", "cyclic"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
Objective = Literal["ce", "mart", "trades"]
Augment = Literal["none", "crop", "autoaugment"]
Init = Literal["uniform", "gaussian"]
Gradient = Literal["corrected", "semi-masked"]


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
    """Training images: a name that `gsem data` lists, an image folder with train/CLASS/*, or an .npz file."""
    data_path: str | None = None
    """Directory of the data sets that have names (cifar10, cifar100, svhn). Default: ./dataset."""
    extra_data: str | None = None
    """An .npz file of additional, mostly generated, training images (image and label). Default: none."""
    extra_share: float = 0.0
    """Share of each batch that comes from extra_data, from 0 to below 1."""
    augment: Augment = "crop"
    """Augmentation of the training images. crop is a random crop and flip; autoaugment adds AutoAugment's CIFAR-10
    policy (on colour images) and Cutout of half the side, as the paper does."""
    flip: bool | None = None
    """Flip images horizontally in the augmentation. Default: as the data set states (images yes, digits no)."""
    model: str = "gsem-resnet10x16"
    """Network to train; `gsem models` lists them."""
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
    """Share of the target that is spread over all classes, from 0 to below 1 (objective ce only)."""
    awp: float = 0.0
    """Size of the adversarial weight perturbation, relative to the norm of each weight tensor (gamma). 0 is none."""
    awp_warmup: float = 0.0
    """Epochs of each round before the weights are perturbed."""
    adversarial_fraction: float = 0.5
    """Share of each batch that is replaced by its adversarial examples, from 0 to 1."""
    eps: float | None = None
    """L-infinity radius of the attack, in pixels of [0, 1]. Default: the data set's own (8/255 for colour images)."""
    step: float | None = None
    """Length of an attack step, in pixels of [0, 1]. Default: eps/4."""
    attack_init: Init = "uniform"
    """Start of the attack: a uniform draw from the ball, or the image plus a normal draw of deviation 0.001."""
    steps: int = 10
    """Number of attack steps."""
    eot: int = 1
    """Draws of GSeM's noise that each attack gradient is averaged over."""
    draws: int = 1
    """Draws of GSeM's noise that each gradient of the weights is averaged over."""

    epochs: int = 30
    """Passes over the training images, in each round."""
    rounds: int = 1
    """Number of times the schedule runs, each from the best checkpoint so far."""
    batch_size: int = 128
    """Images in each optimizer step."""
    lr: float = 0.1
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Learning rate over a round: it is multiplied by `decay` at milestones (step), or falls to 0 along a cosine
    (cosine) or a line (cyclic)."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the step schedule multiplies the learning rate by `decay`."""
    decay: float = 0.1
    """Factor of the step schedule."""
    warmup: float = 0.0
    """Epochs over which the learning rate rises linearly from 0 to its peak (cosine and cyclic)."""
    momentum: float = 0.9
    """Momentum of SGD, from 0 to below 1."""
    nesterov: bool = False
    """Use Nesterov's form of the momentum."""
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
        if self.schedule == "step":
            return self.lr * self.decay ** sum(epoch >= m for m in self.milestones)
        if epoch < self.warmup:
            return self.lr * epoch / self.warmup
        rest = (epoch - self.warmup) / (self.epochs - self.warmup)
        if self.schedule == "cyclic":
            return self.lr * (1 - rest)
        return self.lr * (1 + math.cos(math.pi * rest)) / 2

    def scaled(self, epochs: int) -> "Recipe":
        """The same schedule over `epochs` (of each round): milestones and warm-ups are moved in proportion.

        It is what `--epochs` does on the command line. Set them afterwards, by `replace`, to have them elsewhere.
        """
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {epochs}")
        share = epochs / self.epochs
        moved = {max(1, round(m * share)) for m in self.milestones}
        return replace(
            self,
            epochs=epochs,
            milestones=tuple(sorted(m for m in moved if m < epochs)),
            warmup=self.warmup * share,
            awp_warmup=self.awp_warmup * share,
            swa_from=None if self.swa_from is None else int(self.swa_from * share),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field that this version does not know.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"the recipe has a field {unknown[0]!r} that this version of gsem does not know")
        return cls(**values | {"milestones": tuple(values.get("milestones", ()))})


# A rule: whether a value keeps it, and its words.
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
    **dict.fromkeys(("lr", "decay", "abort_grad_norm"), _POSITIVE),
    **dict.fromkeys(("momentum", "ema", "label_smoothing", "extra_share"), _BELOW_ONE),
    **dict.fromkeys(("weight_decay", "kl_weight", "awp", "awp_warmup"), _NOT_NEGATIVE),
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
        (r.eps is None or r.eps <= 1, "eps", "at most 1: images lie in [0, 1] (8/255, not 8)"),
        ((r.extra_data is None) == (r.extra_share == 0), "extra_share", "above 0 with extra_data, and 0 without"),
        (r.objective == "ce" or r.adversarial_fraction == 1, "adversarial_fraction", f"1 with objective {r.objective}"),
        (r.objective == "ce" or r.label_smoothing == 0, "label_smoothing", "0 unless objective is ce"),
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
