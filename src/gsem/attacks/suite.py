"""The registry of attacks: attacks as text, with labels made from the options that run; and the named suites."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gsem.attacks._types import Norm, OnStep
from gsem.attacks.apgd import apgd
from gsem.attacks.autoattack import autoattack
from gsem.attacks.cw import cw_form
from gsem.attacks.fab import fab
from gsem.attacks.pgd import fgsm, pgd
from gsem.attacks.rays import rays
from gsem.attacks.square import square
from gsem.attacks.transfer import transfer
from gsem.losses import LOSSES
from gsem.nn.contract import to_number
from gsem.nn.surrogate import repaired

GRADIENT = 3.0  # a pass with a gradient, in passes without
EOT = 20  # draws per gradient, loss and decision of an attack on a stochastic model, as published


def _clean(model: nn.Module, x: Tensor, y: Tensor, **_: object) -> Tensor:
    return x


@dataclass(frozen=True)
class Entry:
    """An attack in the registry."""

    function: Callable[..., Tensor]
    """Called function(model, x, y, eps=, norm=, seed=, on_step=, and every option)."""
    options: dict[str, Any]
    """The options that a text may set, in the order of the label, with their defaults. A default's type is that of the
    values: int, float or str; None is a float that depends on eps (see `AttackSpec.resolved`)."""
    follows_gradient: bool = True
    """Whether it differentiates the model that it attacks."""
    source_models: bool = False
    """Whether the function also takes source_models=, a list of other models."""


ATTACKS = {
    "clean": Entry(_clean, {}, follows_gradient=False),
    "fgsm": Entry(fgsm, {"eot": EOT, "loss": "ce"}),
    "pgd": Entry(pgd, {"steps": 100, "eot": EOT, "loss": "ce", "restarts": 1, "keep": "best", "step": None}),
    "cw": Entry(cw_form, {"steps": 100, "form": "margin", "eot": EOT, "c": 1.0, "lr": 0.01, "searches": 1}),
    "apgd": Entry(apgd, {"steps": 100, "targets": 0, "eot": EOT, "loss": "ce", "restarts": 1, "order": "logits"}),
    "fab": Entry(fab, {"steps": 100, "targets": 0, "eot": EOT, "restarts": 1}),
    "square": Entry(square, {"queries": 5000, "eot": EOT, "restarts": 1}, follows_gradient=False),
    "rays": Entry(rays, {"queries": 10000, "eot": EOT}, follows_gradient=False),
    "transfer": Entry(transfer, {"steps": 100, "eot": EOT}, follows_gradient=False, source_models=True),
    "autoattack": Entry(autoattack, {"version": "standard", "eot": EOT, "steps": 100, "queries": 5000}),
}
# Options of every attack that follows a gradient. They change the model that it attacks. `through` names layers, with +
# between them (see `repaired`). Labels and files have them only where they are set.
REPAIRS: dict[str, Any] = {"through": "", "smooth": 0.0, "secant": 0.0}
# Options, with their defaults, that files have only where they are set: what was saved before they existed is the same.
_LATER = {"order": "logits"}
# The values of options that are texts, so that a wrong one is found before an attack runs.
_CHOICES = {
    "loss": tuple(LOSSES),
    "keep": ("best", "last"),
    "form": ("margin", "l2", "unbounded"),
    "version": ("standard", "plus", "rand"),
    "order": ("logits", "malt"),
}
# How a label shows an option; default: -NAME and the value, or the value alone if it is a text.
_SHOWN = {"targets": "-t{}", "restarts": "-x{}", "step": "-step{:.4g}"}
SUITES: dict[str, tuple[str, str]] = {
    "quick": (
        "clean,apgd:steps=20,apgd:steps=20:targets=3,square:queries=300",
        "minutes: an upper bound to iterate with, not to report",
    ),
    "standard": ("clean,autoattack", "AutoAttack at the standard's budgets"),
    "paper": (
        "clean,pgd:steps=500,cw:steps=100,cw:steps=100:form=unbounded,apgd:steps=500:restarts=5,autoattack",
        "the paper's five, at their true strength",
    ),
    "paper-code": (
        "clean,pgd:steps=500:keep=last,cw:steps=500:form=unbounded,apgd:steps=500:restarts=50,autoattack:steps=10",
        "the budgets that the paper's code ran, and no others",
    ),
}


@dataclass(frozen=True)
class AttackSpec:
    """An attack with the options that were set for it; their values may be texts, like "100" or "2/255".

    Raises:
        ValueError: an attack, option or value that is unknown.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise ValueError(f"attack {self.name!r} is unknown: it is one of {', '.join(ATTACKS)}")
        for option in self.options:
            if option not in self.known:
                names = ", ".join(self.known) or "none"
                raise ValueError(f"attack {self.name!r} has no option {option!r}: it has {names}")
        object.__setattr__(self, "options", {option: self._typed(option, v) for option, v in self.options.items()})

    @property
    def known(self) -> dict[str, Any]:
        """All options that may be set, with their defaults."""
        repairs = REPAIRS if self.follows_gradient and self.name != "autoattack" else {}
        return self.entry.options | repairs

    def _typed(self, option: str, value: Any) -> Any:
        """A value that is a text, as one of the default's type."""
        if not isinstance(value, str):
            return value
        default, choices = self.known[option], _CHOICES.get(option, (value,))
        if value not in choices:
            raise ValueError(f"attack {self.name!r}: {option} {value!r} is unknown: it is one of {', '.join(choices)}")
        if isinstance(default, str):
            return value
        number = to_number(f"attack {self.name!r}: {option}", value)
        if not isinstance(default, int):
            return number
        if not number.is_integer():
            raise ValueError(f"attack {self.name!r}: {option} must be an integer, not {value!r}")
        return int(number)

    def __str__(self) -> str:
        """The text that `parse` reads: `apgd:steps=100:loss=margin`."""
        return ":".join([self.name, *(f"{key}={_written(value)}" for key, value in self.options.items())])

    @classmethod
    def parse(cls, text: str) -> "AttackSpec":
        """`"pgd:steps=100:eot=20"` → `AttackSpec("pgd", {"steps": 100, "eot": 20})`.

        Raises:
            ValueError: an unknown attack, option or value.
        """
        name, *settings = text.strip().split(":")
        for setting in settings:
            if "=" not in setting:
                raise ValueError(f"attack {text!r}: {setting!r} is not of the form option=value")
        return cls(name, dict(setting.split("=", 1) for setting in settings))

    @property
    def entry(self) -> Entry:
        return ATTACKS[self.name]

    @property
    def bounded(self) -> bool:
        """Whether its points lie within eps; others are listed apart, with their distances."""
        return self.options.get("form") != "unbounded"

    @property
    def follows_gradient(self) -> bool:
        """Whether it differentiates the model that it attacks."""
        return self.entry.follows_gradient

    def resolved(self, *, eps: float, stochastic: bool) -> dict[str, Any]:
        """All options, with those that were not set, as results save them."""
        every = self._every(eps=eps, stochastic=stochastic)
        return {option: value for option, value in every.items() if option not in _LATER or _LATER[option] != value}

    def _every(self, *, eps: float, stochastic: bool) -> dict[str, Any]:
        options = self.entry.options | self.options
        if "eot" in options and not stochastic:
            options["eot"] = 1  # every draw would be the same
        if options.get("step", 0) is None:
            options["step"] = eps / 4
        return options

    def label(self, *, eps: float, stochastic: bool) -> str:
        """The name that results have, made from the options that run: `apgd100-t9-eot20`.

        It shows the budget where that comes first, the draws, and every option that is not at its default.
        """
        defaults = AttackSpec(self.name)._every(eps=eps, stochastic=stochastic)
        label, own = self.name, self._every(eps=eps, stochastic=stochastic)
        for number, (option, default) in enumerate(defaults.items()):
            value = own[option]
            if number == 0 and option in ("steps", "queries"):
                label += f"{value}"
            elif option == "eot" or not (value == default or (option == "step" and math.isclose(value, default))):
                shown = "-{}" if isinstance(value, str) else f"-{option}{{:g}}"
                label += _SHOWN.get(option, shown).format(value)
        through, smooth, secant = (self.options.get(option) for option in REPAIRS)
        label += f"-through-{through}" if through else ""
        return label + (f"-smooth{smooth:.4g}" if smooth else "") + (f"-secant{secant:.4g}" if secant else "")

    def network(self, model: nn.Module) -> nn.Module:
        """The model for `run`: `model` itself, or with the gradient that `through`, `smooth` and `secant` ask for.

        Raises:
            ValueError: a layer that it does not have.
        """
        through, smooth, secant = (self.options.get(option, default) for option, default in REPAIRS.items())
        return repaired(model, through=through.split("+") if through else [], smooth=smooth, secant=secant)

    def passes(self, *, eps: float, stochastic: bool) -> float:
        """Forward passes for each image that it attacks, at most: a pass with a gradient counts as three."""
        o = self.resolved(eps=eps, stochastic=stochastic)
        each = o.get("eot", 1) * o.get("restarts", 1)
        if "queries" in o:
            return each * o["queries"]
        return GRADIENT * each * o.get("steps", 1) * max(1, o.get("targets") or 1)

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        norm: Norm,
        stochastic: bool,
        seed: int,
        source_models: dict[str, nn.Module],
        on_step: OnStep | None = None,
        on_step_always: bool = False,
    ) -> Tensor:
        """x_adv. `on_step` is not passed to attacks that it would cost passes, unless `on_step_always`.

        Args:
            model: what `network` gave.
        """
        resolved = self.resolved(eps=eps, stochastic=stochastic)
        options = {key: value for key, value in resolved.items() if key not in REPAIRS}
        if (options.get("keep") == "last" or self.name == "fgsm") and not on_step_always:
            on_step = None
        if self.entry.source_models:
            options["source_models"] = list(source_models.values())
        return self.entry.function(model, x, y, eps=eps, norm=norm, seed=seed, on_step=on_step, **options)


def parse_attacks(text: str) -> list[AttackSpec]:
    """`"clean,pgd:steps=100"`: attacks with commas between, each with its options behind colons."""
    return [AttackSpec.parse(one) for one in text.split(",")]


def suite(name: str) -> list[AttackSpec]:
    """The attacks of a named suite.

    Raises:
        ValueError: no suite of that name.
    """
    if name not in SUITES:
        raise ValueError(f"suite {name!r} is unknown: it is one of {', '.join(SUITES)}")
    return parse_attacks(SUITES[name][0])


def _written(value: Any) -> str:
    """Short where that is the same number."""
    short = f"{value:.12g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short
