"""Recipes: all that determines a training run, as one frozen value, and the named recipes. No tensors here."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Schedule = Literal["step", "cosine", "cyclic"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
PRECISIONS = ("auto", "float32", "bf16", "fp16")
Objective = Literal["ce", "mart", "trades"]
Augment = Literal["none", "crop", "autoaugment"]
Start = Literal["uniform", "gaussian"]
Gradient = Literal["corrected", "semi-masked"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what a training run computes. A variant is `replace(recipe, lr=0.05)`.

    For another number of epochs take `recipe.scaled(5)`: warm-up and milestones are counted in epochs, and `replace`
    would leave them where they are.

    Raises:
        ValueError: a field that makes no sense, with the reason.
    """

    name: str = "gcat"
    """Of the recipe that this one is, or started from."""
    data: str = "digits"
    """digits, an image folder with train/CLASS/*, or an .npz file."""
    data_path: str | None = None
    """Directory of the data sets that have names (cifar10, cifar100, svhn)."""
    extra_data: str | None = None
    """An .npz file of additional, mostly generated, training images: image and label."""
    extra_share: float = 0.0
    """Share of each batch that comes from extra_data."""
    augment: Augment = "crop"
    """crop: random crop and flip. autoaugment: also AutoAugment's CIFAR-10 policy (on colour images) and Cutout of
    half the side, the paper's augmentation."""
    flip: bool | None = None
    """Horizontal flips in the augmentation; by default as the data say (images yes, digits no)."""
    model: str = "gsem-resnet10x16"
    """See `gsem models`."""
    levels: int = 6
    """GSeM's quantisation levels per unit (the paper's alpha)."""
    noise: int = 4
    """GSeM's largest noise offset, in levels (the paper's beta)."""
    quantiser: bool = True
    """Whether GSeM rounds (False: an ablation)."""
    gradient: Gradient = "corrected"
    """What flows back through GSeM's quantiser."""

    objective: Objective = "ce"
    """What is minimised: cross-entropy, or one that also compares with the clean images."""
    kl_weight: float = 5.0
    """Of MART's and TRADES' divergence (the papers' lambda and beta)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (ce only)."""
    awp: float = 0.0
    """Adversarial weight perturbation: its length relative to each weight tensor (gamma); 0 is none."""
    awp_warmup: float = 0.0
    """Epochs before the weights are perturbed."""
    adversarial_fraction: float = 0.5
    """Share of each batch that is replaced by its adversarial examples, 0 to 1."""
    eps: float | None = None
    """L-infinity radius, in pixels of [0, 1]; the data's own by default (8/255 for images)."""
    step: float | None = None
    """Length of an attack step; eps/4 by default (2/255 for images)."""
    attack_init: Start = "uniform"
    """Of the attack: uniform in the ball, or 0.001 times a normal draw."""
    steps: int = 10
    """Attack steps."""
    eot: int = 1
    """Draws of the noise that each attack gradient is averaged over."""
    draws: int = 1
    """Draws of the noise that each parameter gradient is averaged over."""

    epochs: int = 30
    """Passes over the training images, in each round."""
    rounds: int = 1
    """Times the schedule is run, each from the best checkpoint of those before."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 0.1
    """Peak learning rate of SGD."""
    schedule: Schedule = "cosine"
    """Of the learning rate: steps at milestones, or a fall to 0 along a cosine or a line."""
    milestones: tuple[int, ...] = ()
    """Epochs after which the step schedule multiplies the rate by `decay`."""
    decay: float = 0.1
    """Factor of the step schedule."""
    warmup: float = 0.0
    """Epochs over which the rate rises linearly to its peak (cosine and cyclic)."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: float = 5e-4
    """Of SGD, on all parameters."""
    clip: float | None = None
    """Largest norm of the gradient of all parameters together; longer ones are shortened to it."""
    abort_grad_norm: float = 1e4
    """A gradient longer than this, before clipping, stops the run."""
    ema: float = 0.0
    """Decay of the exponential average of the weights per step; 0 keeps none. Averaged weights are validated beside
    the raw ones, and saved as the model."""
    swa_from: int | None = None
    """Epoch of a round from which the weights of all steps are averaged equally (SWA, instead of ema)."""
    patience: int = 0
    """Validations without a better robust accuracy after which the run stops early; 0 never."""

    precision: Precision = "auto"
    """Of the training passes (autocast). auto: bf16 where the device multiplies it in hardware, fp16 on older GPUs,
    else float32; on a CPU, fp16 means auto."""
    attack_precision: Precision = "auto"
    """Of the attack's gradient directions, on the folded model."""
    validate_every: int = 1
    """Epochs between validations, each on at most 1,000 held-out training images under PGD-10."""
    init_from: str | None = None
    """A run directory or checkpoint whose weights the training starts from."""
    deterministic: bool = False
    """Only torch operations that give the same bits in every run (a CPU's do anyway)."""
    seed: int = 0
    """Of all chance in the run, the validation split included."""

    def __post_init__(self) -> None:
        def require(holds: bool, field: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"recipe {self.name!r}: {field} = {getattr(self, field)!r}, but it must be {rule}")

        for field in ("levels", "steps", "eot", "draws", "epochs", "rounds", "batch_size", "validate_every"):
            value = getattr(self, field)
            require(type(value) is int and value >= 1, field, "an integer of at least 1")
        require(type(self.noise) is int and self.noise >= 0, "noise", "an integer of at least 0")
        require(type(self.seed) is int, "seed", "an integer")
        require(0 <= self.adversarial_fraction <= 1, "adversarial_fraction", "a share from 0 to 1")
        for field in ("eps", "step", "clip"):
            value = getattr(self, field)
            require(value is None or 0 < value < math.inf, field, "positive, or left out")
        require(self.eps is None or self.eps <= 1, "eps", "at most 1: images lie in [0, 1] (8/255, not 8)")
        for field in ("lr", "decay", "abort_grad_norm"):
            require(0 < getattr(self, field) < math.inf, field, "positive")
        for field in ("momentum", "ema"):
            require(0 <= getattr(self, field) < 1, field, "at least 0 and below 1")
        for field in ("weight_decay", "kl_weight", "awp", "awp_warmup"):
            require(0 <= getattr(self, field) < math.inf, field, "at least 0")
        require(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1")
        require(type(self.patience) is int and self.patience >= 0, "patience", "an integer of at least 0")
        require(0 <= self.extra_share < 1, "extra_share", "at least 0 and below 1")
        both = (self.extra_data is None) == (self.extra_share == 0)
        require(both, "extra_share", "above 0 with extra_data, and 0 without")
        require(
            self.objective == "ce" or self.adversarial_fraction == 1,
            "adversarial_fraction",
            f"1 with objective {self.objective}",
        )
        require(self.label_smoothing == 0 or self.objective == "ce", "label_smoothing", "0 unless objective is ce")
        swa = self.swa_from
        moved = "; for another number of epochs, recipe.scaled(EPOCHS) moves the schedule along"
        require(swa is None or 0 <= swa < self.epochs, "swa_from", f"from 0 to below the {self.epochs} epochs{moved}")
        require(swa is None or self.ema == 0, "swa_from", "left out where ema is set: one average is kept")
        require(0 <= self.warmup < self.epochs, "warmup", f"at least 0 and below the {self.epochs} epochs{moved}")
        require(not self.nesterov or self.momentum > 0, "nesterov", "off when momentum is 0")
        ordered = list(self.milestones) == sorted(set(self.milestones))
        require(ordered and all(m >= 1 for m in self.milestones), "milestones", "rising epoch numbers from 1")
        if self.schedule == "step":
            before = all(m < self.epochs for m in self.milestones)
            require(before, "milestones", f"before epoch {self.epochs}{moved}")
        for field, known in (
            ("objective", ("ce", "mart", "trades")),
            ("augment", ("none", "crop", "autoaugment")),
            ("attack_init", ("uniform", "gaussian")),
            ("gradient", ("corrected", "semi-masked")),
            ("schedule", ("step", "cosine", "cyclic")),
            ("precision", PRECISIONS),
            ("attack_precision", PRECISIONS),
        ):
            require(getattr(self, field) in known, field, f"one of {', '.join(known)}")

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


GCAT_PUBLISHED = Recipe(
    name="gcat-published",
    model="gsem-resnet18",
    augment="autoaugment",
    steps=10,
    eot=10,
    draws=10,
    epochs=150,
    rounds=5,
    batch_size=256,
    lr=0.01,
    schedule="step",
    milestones=(60, 110),
    weight_decay=3.5e-3,
    precision="fp16",
)

GCAT = Recipe(
    name="gcat",
    adversarial_fraction=1.0,
    steps=5,
    epochs=30,
    lr=0.1,
    warmup=1.0,
    nesterov=True,
    ema=0.995,
)

# The baselines, with the values their papers used, on the plain network. Madry-style training as Rice et al. (2020)
# run it; TRADES of Zhang et al. (2019), CIFAR-10; MART of Wang et al. (2020), ResNet-18; AWP of Wu et al. (2020).
# The attack step of TRADES and MART, 0.007, is taken as eps/4 = 0.0078, so that it follows eps on other data.
STANDARD = Recipe(
    name="standard",
    model="resnet18",
    adversarial_fraction=0.0,
    epochs=200,
    lr=0.1,
    schedule="step",
    milestones=(100, 150),
)
PGD_AT = replace(STANDARD, name="pgd-at", adversarial_fraction=1.0)
TRADES = replace(
    PGD_AT,
    name="trades",
    objective="trades",
    kl_weight=6.0,
    attack_init="gaussian",
    epochs=76,
    milestones=(75,),
    weight_decay=2e-4,
)
MART = replace(
    PGD_AT,
    name="mart",
    objective="mart",
    attack_init="gaussian",
    epochs=120,
    lr=0.01,
    milestones=(75, 90),
    weight_decay=3.5e-3,
)
AT_AWP = replace(PGD_AT, name="at-awp", awp=0.01)
TRADES_AWP = replace(
    TRADES, name="trades-awp", awp=0.005, awp_warmup=10.0, epochs=200, milestones=(100, 150), weight_decay=5e-4
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        GCAT,
        replace(GCAT, name="gcat-mart", objective="mart"),
        replace(GCAT, name="gcat-awp", objective="mart", awp=0.005),
        GCAT_PUBLISHED,
        replace(GCAT_PUBLISHED, name="gcat-mart-published", objective="mart", adversarial_fraction=1.0),
        replace(GCAT_PUBLISHED, name="gcat-awp-published", objective="mart", adversarial_fraction=1.0, awp=0.01),
        STANDARD,
        PGD_AT,
        TRADES,
        MART,
        AT_AWP,
        TRADES_AWP,
    )
}
DESCRIPTIONS: dict[str, str] = {
    "gcat": "our economical GCAT: one draw a step, averaged weights",
    "gcat-mart": "the same with MART's loss",
    "gcat-awp": "the same with MART's loss and AWP",
    "gcat-published": "GCAT step for step as the paper's code runs it",
    "gcat-mart-published": "GCAT + MART as published, both branches corrected",
    "gcat-awp-published": "GCAT + MART + AWP as published",
    "standard": "no attack",
    "pgd-at": "PGD-10 adversarial training (Madry; Rice et al.)",
    "trades": "TRADES (Zhang et al.)",
    "mart": "MART (Wang et al.)",
    "at-awp": "PGD training with AWP (Wu et al.)",
    "trades-awp": "TRADES with AWP (Wu et al.)",
}
