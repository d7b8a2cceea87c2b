"""A list of attacks on a model, judged on draws of its noise that no attack has seen."""

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gsem.attacks import NotFinite, counting, pgd
from gsem.attacks._core import Norm, check_arguments, check_result, distances
from gsem.checkpoint import write_atomically
from gsem.predict import BATCH, correct_draws, is_stochastic
from gsem.streams import split, stream
from gsem.twin import search_twin

BOOTSTRAP = 10_000

# The options of each attack that a caller may set, and what they are unless set. `None` depends on the model or
# on eps: see `Attack.resolved`.
ATTACKS: dict[str, dict[str, Any]] = {
    "clean": {},
    "pgd": {"steps": 100, "step": None, "restarts": 1, "eot": None, "loss": "ce", "keep": "best"},
}
EOT = 20  # draws per gradient, loss and decision of an attack on a stochastic model, as published


class Interval(NamedTuple):
    """An estimate with its 95% bootstrap interval over images."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Attack:
    """An attack with the options that were set for it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = _options_of(self.name)
        for option in self.options:
            if option not in known:
                names = ", ".join(known) or "it has none"
                raise ValueError(f"attack {self.name!r} has no option {option!r}: {names}")

    @classmethod
    def parse(cls, text: str) -> "Attack":
        """`"pgd:steps=100:eot=20"` → `Attack("pgd", {"steps": 100, "eot": 20})`.

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

    def resolved(self, *, eps: float, stochastic: bool) -> dict[str, Any]:
        """All options, with those that were not set."""
        options = ATTACKS[self.name] | self.options
        if options.get("eot", 0) is None:
            options["eot"] = EOT if stochastic else 1
        if options.get("step", 0) is None:
            options["step"] = eps / 4
        return options

    def label(self, *, eps: float, stochastic: bool) -> str:
        """Made from the arguments that run, so that it cannot say anything else: `pgd100-eot20`."""
        if self.name == "clean":
            return "clean"
        o = self.resolved(eps=eps, stochastic=stochastic)
        label = f"{self.name}{o['steps']}-eot{o['eot']}"
        label += f"-{o['loss']}" if o["loss"] != "ce" else ""
        label += f"-x{o['restarts']}" if o["restarts"] > 1 else ""
        label += "-last" if o["keep"] == "last" else ""
        return label + ("" if math.isclose(o["step"], eps / 4) else f"-step{o['step']:.4g}")


def _options_of(name: str) -> dict[str, Any]:
    if name not in ATTACKS:
        raise ValueError(f"attack {name!r} is unknown: it is one of {', '.join(ATTACKS)}")
    return ATTACKS[name]


def _value(key: str, value: str, text: str) -> int | float | str:
    try:
        if key in ("steps", "restarts", "eot"):
            return int(value)
        if key == "step":
            top, _, bottom = value.partition("/")
            return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"attack {text!r}: {key} = {value!r} is not a number") from None
    return value


def parse_attacks(text: str) -> list[Attack]:
    """`"clean,pgd:steps=100"`: attacks with commas between, each with its options behind colons."""
    return [Attack.parse(one) for one in text.split(",")]


@dataclass(frozen=True)
class Scores:
    """What one attack did, per image."""

    label: str
    correct: Int[np.ndarray, " n"]
    """Scoring draws in which the image was still classified as its label."""
    linf: Float[np.ndarray, " n"]
    l2: Float[np.ndarray, " n"]
    forwards: int
    gradients: int
    """Image rows passed through the network by the attack: without and with a gradient."""
    seconds: float
    x_adv: Float[np.ndarray, "n c h w"] | None = None


@dataclass(frozen=True)
class Result:
    """An evaluation: for each attack, per image, how many scoring draws stayed right."""

    scores: list[Scores]
    y: Int[np.ndarray, " n"]
    facts: dict[str, Any]
    """eps, norm, draws, seed, stochastic, images, options of each attack, versions."""

    @property
    def draws(self) -> int:
        return self.facts["draws"]

    def __getitem__(self, label: str) -> Scores:
        for scores in self.scores:
            if scores.label == label:
                return scores
        raise KeyError(f"no attack {label!r} in this result: {', '.join(s.label for s in self.scores)}")

    def expected(self, label: str) -> Interval:
        """Expected accuracy under an attack: the mean of 1 − p over images, p the share of wrong scoring draws."""
        right = self[label].correct / self.draws
        chance = np.random.Generator(np.random.PCG64(split(self.facts["seed"], "bootstrap")))
        # A resample of n images is a multinomial count of each; in blocks, so that memory stays small.
        n, means = len(right), []
        for _ in range(BOOTSTRAP // 500):
            means.append(chance.multinomial(n, np.full(n, 1 / n), size=500) @ right / n)
        low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
        return Interval(float(right.mean()), float(low), float(high))

    def to_dict(self) -> dict[str, Any]:
        """The summary: facts, and each attack's accuracy with its interval and cost."""
        rows = [
            {
                "attack": s.label,
                **self.expected(s.label)._asdict(),
                "forwards": s.forwards,
                "gradients": s.gradients,
                "seconds": s.seconds,
            }
            for s in self.scores
        ]
        return {"facts": self.facts, "attacks": rows}

    def save(self, path: str | Path) -> Path:
        """`PATH.json`, the summary, and `PATH.npz`, everything per image. PATH may carry either ending.

        Returns:
            PATH without an ending.
        """
        path = _with_ending(path, "")
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {"y": self.y}
        for number, s in enumerate(self.scores):
            arrays |= {f"{number}.correct": s.correct, f"{number}.linf": s.linf, f"{number}.l2": s.l2}
            if s.x_adv is not None:
                arrays[f"{number}.x_adv"] = s.x_adv
        meta = json.dumps(self.to_dict())
        beside = path.with_name(f".{path.name}.writing.npz")
        arrays["meta"] = np.array(meta)
        np.savez_compressed(beside, **arrays)  # type: ignore[arg-type]  # (its stub takes them for its flag)
        beside.replace(_with_ending(path, ".npz"))
        write_atomically(_with_ending(path, ".json"), json.dumps(self.to_dict(), indent=2).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """What `save` wrote."""
        with np.load(_with_ending(path, ".npz"), allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            scores = [
                Scores(
                    label=row["attack"],
                    **{key: file[f"{number}.{key}"] for key in ("correct", "linf", "l2")},
                    **{key: row[key] for key in ("forwards", "gradients", "seconds")},
                    x_adv=file.get(f"{number}.x_adv"),
                )
                for number, row in enumerate(meta["attacks"])
            ]
            return cls(scores, file["y"], meta["facts"])


def _with_ending(path: str | Path, ending: str) -> Path:
    # Not with_suffix alone: of "pgd-eps0.15" it would take ".15" for an ending.
    path = Path(path)
    path = path.with_suffix("") if path.suffix in (".json", ".npz") else path
    return path.with_name(path.name + ending)


def evaluate(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    attacks: str | Sequence[Attack | str] = ("clean", "pgd"),
    *,
    eps: float,
    norm: Norm = "Linf",
    draws: int = 100,
    seed: int = 0,
    batch: int = BATCH,
    keep_images: bool = False,
    report: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Attack `model`, then score what the attacks returned on noise that they have not seen.

    The attacks search on the model's float32 twin; the score is the true model's, in float32. A stochastic model
    is noticed by itself: attacks then average over 20 draws (their `eot`), and every point is scored on `draws`
    fresh ones. For a deterministic model one draw is used.

    Args:
        model: images [b, c, h, w] in [0, 1] → logits, in eval mode.
        x, y: images in [0, 1], and their labels (int64).
        attacks: `Attack`s, or their texts: `["clean", "pgd:steps=100:eot=20:restarts=2"]`, `"clean,pgd"`.
        eps: radius of the threat model, in the unit of the images.
        draws: scoring draws for each image and attack.
        seed: of every random stream used; the caller's random state is not changed.
        batch: images attacked at once.
        keep_images: keep the adversarial examples in the result.
        report: called as (label, images done, images) while an attack goes on.

    Raises:
        ValueError: an unknown attack or option, arguments out of range, logits that are not finite.
    """
    if not len(x):
        raise ValueError("there are no images to evaluate on")
    if norm == "Linf" and eps > 1:
        raise ValueError(f"eps = {eps:g}, but images lie in [0, 1]: it must be at most 1 (8/255, not 8)")
    check_arguments(model, x, y, eps=eps, norm=norm, draws=draws, batch=batch)
    attacks = attacks.split(",") if isinstance(attacks, str) else attacks
    chosen = [Attack.parse(a) if isinstance(a, str) else a for a in attacks]
    _check_labels(model, x, y)
    stochastic = is_stochastic(model, x[:batch])
    draws = draws if stochastic else 1
    labels = [a.label(eps=eps, stochastic=stochastic) for a in chosen]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the same attack twice: {', '.join(labels)}")
    facts = {
        "images": len(x),
        "eps": eps,
        "norm": norm,
        "draws": draws,
        "stochastic": stochastic,
        "seed": seed,
        "options": {lb: a.resolved(eps=eps, stochastic=stochastic) for lb, a in zip(labels, chosen, strict=True)},
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": str(x.device),
    }
    twin = search_twin(model)
    scores = []
    for attack, label in zip(chosen, labels, strict=True):
        started = time.monotonic()
        counted = counting(twin)
        function = pgd if attack.name == "pgd" else _unchanged
        how = attack.resolved(eps=eps, stochastic=stochastic) | {"eps": eps, "norm": norm}
        x_adv = _in_batches(function, counted, x, y, batch, split(seed, "search", label), label, report, how)
        seconds = time.monotonic() - started
        right = correct_draws(model, x_adv, y, draws=draws, seed=split(seed, "scoring", label))
        linf, l2 = (d.cpu().numpy() for d in distances(x_adv, x))
        kept = x_adv.cpu().numpy() if keep_images else None
        cost = (counted.forwards, counted.gradients, seconds)
        scores.append(Scores(label, right.cpu().numpy(), linf, l2, *cost, kept))
    return Result(scores, y.cpu().numpy(), facts)


def _unchanged(model: nn.Module, x: Tensor, y: Tensor, **how: Any) -> Tensor:
    return x


def _in_batches(
    attack: Callable[..., Tensor],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    batch: int,
    seed: int,
    label: str,
    report: Callable[[str, int, int], None] | None,
    how: dict[str, Any],
) -> Tensor:
    """The attack's points for all images; each batch has its own stream of chance."""
    parts = []
    for first in range(0, len(x), batch):
        one = slice(first, first + batch)
        try:
            parts.append(attack(model, x[one], y[one], seed=split(seed, first), **how))
        except NotFinite as error:
            raise NotFinite(f"{label}, images from {first}: {error}") from None
        if report is not None:
            report(label, min(first + batch, len(x)), len(x))
    return check_result(torch.cat(parts), x, eps=how["eps"], norm=how["norm"])


@torch.no_grad()
def _check_labels(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with stream(0, x.device):
        classes = model(x[:1]).shape[1]
    outside = (y < 0) | (y >= classes)
    if outside.any():
        image = int(outside.nonzero()[0])
        raise ValueError(f"image {image} has label {int(y[image])}, but the model tells {classes} classes apart")
