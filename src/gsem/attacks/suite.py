"""Attacks as text, with labels made from the arguments that run; and the named suites."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gsem.attacks import apgd, autoattack, cw, fab, fgsm, pgd, rays, square, transfer
from gsem.attacks._core import Norm, OnStep

EOT = 20  # draws per gradient, loss and decision of an attack on a stochastic model, as published

# The options of each attack that a caller may set, and what they are unless set. `None` depends on the model or
# on eps: see `AttackSpec.resolved`.
ATTACKS: dict[str, dict[str, Any]] = {
    "clean": {},
    "fgsm": {"eot": None, "loss": "ce"},
    "pgd": {"steps": 100, "step": None, "restarts": 1, "eot": None, "loss": "ce", "keep": "best"},
    "cw": {"steps": 100, "form": "margin", "c": 1.0, "searches": 1, "lr": 0.01, "eot": None},
    "apgd": {"steps": 100, "restarts": 1, "targets": 0, "eot": None, "loss": "ce"},
    "fab": {"steps": 100, "restarts": 1, "targets": 0, "eot": None},
    "square": {"queries": 5000, "restarts": 1, "eot": None},
    "rays": {"queries": 10000, "eot": None},
    "transfer": {"steps": 100, "eot": None},
    "autoattack": {"version": "standard", "steps": 100, "queries": 5000, "eot": None},
}
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
# `form` of cw: the margin within eps; the L2 form within eps (L2 only); the L2 form without a bound.
FORMS = ("margin", "l2", "unbounded")
# They ask the model for answers, or follow the gradient of other models.
_BLACK_BOX = ("clean", "square", "rays", "transfer")
_INTEGERS = ("steps", "restarts", "eot", "targets", "queries", "searches")
_NUMBERS = ("step", "c", "lr")
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "apgd": apgd,
    "fab": fab,
    "square": square,
    "rays": rays,
    "transfer": transfer,
    "autoattack": autoattack,
}


@dataclass(frozen=True)
class AttackSpec:
    """An attack with the options that were set for it.

    Raises:
        ValueError: an attack or option that is unknown.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = _options_of(self.name)
        for option in self.options:
            if option not in known:
                names = ", ".join(known) or "it has none"
                raise ValueError(f"attack {self.name!r} has no option {option!r}: {names}")
        form = self.options.get("form", "margin")
        if form not in FORMS:
            raise ValueError(f"attack 'cw': form {form!r} is unknown: it is one of {', '.join(FORMS)}")

    @classmethod
    def parse(cls, text: str) -> "AttackSpec":
        """`"pgd:steps=100:eot=20"` → `AttackSpec("pgd", {"steps": 100, "eot": 20})`.

        Raises:
            ValueError: an unknown attack, option or value.
        """
        name, *settings = text.strip().split(":")
        known = _options_of(name)
        options: dict[str, Any] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or key not in known:
                names = ", ".join(known) or "none"
                raise ValueError(f"attack {text!r}: {setting!r} is no option=value; options of {name}: {names}")
            options[key] = _value(key, value, text)
        return cls(name, options)

    @property
    def bounded(self) -> bool:
        """Whether its points lie within eps; others are listed apart, with their distances."""
        return self.options.get("form") != "unbounded"

    @property
    def follows_gradient(self) -> bool:
        """Whether it differentiates the model that it attacks."""
        return self.name not in _BLACK_BOX

    def resolved(self, *, eps: float, stochastic: bool) -> dict[str, Any]:
        """All options, with those that were not set."""
        options = ATTACKS[self.name] | self.options
        if options.get("eot", 0) is None:
            options["eot"] = EOT
        if "eot" in options and not stochastic:
            options["eot"] = 1  # every draw would be the same
        if options.get("step", 0) is None:
            options["step"] = eps / 4
        return options

    def label(self, *, eps: float, stochastic: bool) -> str:
        """Made from the arguments that run, so that it cannot say anything else: `apgd100-t9-eot20`."""
        if self.name == "clean":
            return "clean"
        o, usual = self.resolved(eps=eps, stochastic=stochastic), ATTACKS[self.name]
        version = o.get("version", "standard")
        label = self.name if version == "standard" else f"{self.name}-{version}"
        budget = o.get("steps", o.get("queries", "")) if self.name != "autoattack" else ""
        label += f"{budget}"
        label += f"-t{o['targets']}" if o.get("targets") else ""
        label += f"-{o['form']}" if o.get("form", "margin") != "margin" else ""
        label += f"-eot{o['eot']}"
        label += f"-{o['loss']}" if o.get("loss", "ce") != "ce" else ""
        label += f"-x{o['restarts']}" if o.get("restarts", 1) > 1 else ""
        label += "-last" if o.get("keep") == "last" else ""
        if self.name == "pgd" and not math.isclose(o["step"], eps / 4):
            label += f"-step{o['step']:.4g}"
        for key in ("c", "lr", "searches", *(("steps", "queries") if self.name == "autoattack" else ())):
            label += f"-{key}{o[key]:g}" if key in o and o[key] != usual[key] else ""
        return label

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
        """x_adv. `on_step` is not passed to attacks that it would cost passes, unless it must see always."""
        if self.name == "clean":
            return x
        o = self.resolved(eps=eps, stochastic=stochastic)
        if (o.get("keep") == "last" or self.name == "fgsm") and not on_step_always:
            on_step = None
        rng: dict[str, Any] = {"seed": seed, "on_step": on_step}
        if self.name == "cw":
            return _cw(model, x, y, eps, norm, o, rng)
        if "targets" in o:
            o["targets"] = o["targets"] or None
        if self.name == "transfer":
            o["source_models"] = list(source_models.values())
        return _FUNCTIONS[self.name](model, x, y, eps=eps, norm=norm, **o, **rng)


def _cw(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: Norm, o: dict[str, Any], rng: dict[str, Any]
) -> Tensor:
    how = {key: o[key] for key in ("steps", "eot")} | rng
    if o["form"] == "margin":
        # The bounded form is PGD on the margin, in either norm.
        return pgd(model, x, y, eps=eps, step=eps / 4, norm=norm, loss="margin", keep="best", **how)
    if o["form"] == "l2" and norm != "L2":
        raise ValueError("cw:form=l2 bounds the L2 norm: evaluate with norm L2, or take form=margin or form=unbounded")
    how |= {key: o[key] for key in ("c", "searches", "lr")}
    return cw(model, x, y, eps=eps if o["form"] == "l2" else None, norm="L2", **how)


def _options_of(name: str) -> dict[str, Any]:
    if name not in ATTACKS:
        raise ValueError(f"attack {name!r} is unknown: it is one of {', '.join(ATTACKS)}")
    return ATTACKS[name]


def _value(key: str, value: str, text: str) -> int | float | str:
    try:
        if key in _INTEGERS:
            return int(value)
        if key in _NUMBERS:
            top, _, bottom = value.partition("/")
            return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"attack {text!r}: {key} = {value!r} is not a number") from None
    return value


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
