"""The battery of known defences and of healthy controls: what an audit must find for each, fixed before it is run.

`make(name, seed, setting)` builds one: small networks are trained for it, and its parameters are drawn from the seed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

import gsem
from audited_models import Fronted, fitted
from gsem.rng import derive_seed
from known_defences import (
    CosineRounding,
    GaussianNoise,
    KWinners,
    Median,
    OneHot,
    PartlyDetached,
    RandomMember,
    ResizedAndPadded,
    Temperature,
    Thermometer,
    TotalVariation,
    WrongBackward,
    sparsified,
)

# The highest accuracy that an audit may leave to a defence that has none, and by how much it may exceed that of an
# adversarially trained network without the defence.
BROKEN, NEAR = 0.05, 0.02
# How far a claim may lie above what is found, in a verdict that calls it right.
CLAIM = 0.05
# What is claimed of a defence: AutoAttack's white-box parts, on one draw, as its standard version does. The claims for
# the controls average over draws.
WHITE_BOX = "apgd:steps=50:eot=1,apgd:steps=50:targets=9:eot=1"
HEALTHY = "apgd:steps=50:eot=5,apgd:steps=50:targets=9:eot=5"


@dataclass(frozen=True, eq=False)
class Setting:
    """The images, the radius and the size of the networks of a battery."""

    source: gsem.data.Dataset
    images: int
    eps: float
    """For networks that were trained on clean images."""
    robust_eps: float
    """For adversarially trained ones, in training and in the audit."""
    width: int
    steps: int
    """Of training."""
    folder: Path | None = None
    """Where trained weights are kept; None: nowhere."""
    networks: dict[str, nn.Module] = field(default_factory=dict, init=False)

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        split = self.source.training()[0]
        return split.held(), split.y

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels, as many of each class."""
        split = self.source.test()
        rows = gsem.data.balanced(split.y, min(self.images, len(split)))
        return gsem.data.to_float(split.x[rows]), split.y[rows]

    def network(
        self,
        kind: str,
        seed: int,
        make: Callable[[], nn.Module],
        *,
        robust: bool = False,
        labels: Callable[[Tensor, Tensor], Tensor] | None = None,
        longer: int = 1,
    ) -> nn.Module:
        """`make()` trained, once for each kind and seed.

        Args:
            robust: on the points of a short PGD instead of clean images.
            labels: of images in [0, 1] and their classes; default: the classes.
            longer: times the setting's steps.
        """
        key = f"{kind}-{seed}"
        if key not in self.networks:
            x, y = self.train
            y = y if labels is None else labels(gsem.data.to_float(x), y)
            kept = None if self.folder is None else self.folder / f"{key}.pt"
            if kept is not None and kept.exists():
                model = make()
                model.load_state_dict(torch.load(kept, weights_only=True))
                model.eval().requires_grad_(False)
            else:
                steps = longer * self.steps
                how = {"rate": 3e-3, "decay": True, "attack": partial(self._attack, steps) if robust else None}
                model = fitted(make, (x, y), derive_seed(seed, kind) % 2**32, steps=steps, **how)
                if kept is not None:
                    torch.save(model.state_dict(), kept)
            self.networks[key] = model
        return self.networks[key]

    def _attack(self, steps: int, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """A short PGD. The radius grows over the first half of the training: from the start with all of it, some
        networks never learn anything."""
        eps = self.robust_eps * min(1.0, (seed + 1) / (steps / 2))
        return gsem.attacks.pgd(model, x, y, eps=eps, step=eps / 2, steps=3, keep="last", eot=1, seed=seed)

    def small(self, **how: Any) -> Callable[[], nn.Sequential]:
        """A function that makes a `small` network for these images."""
        how = {"classes": len(self.source.classes), "inputs": self.source.shape[0], "width": self.width} | how
        return partial(small, **how)

    def plain(self, seed: int) -> nn.Module:
        return self.network("plain", seed, self.small())

    def robust(self, seed: int) -> nn.Module:
        return self.network("robust", seed, self.small(), robust=True)


def digits_setting(images: int = 128, folder: Path | None = None) -> Setting:
    """The battery that a test can afford: each network trains in seconds."""
    return Setting(gsem.data.load("digits"), images, eps=0.25, robust_eps=0.15, width=8, steps=250, folder=folder)


def small(
    classes: int,
    inputs: int,
    width: int,
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
    normalised: bool = True,
    behind_first: Callable[[int], nn.Module] = nn.Identity,
) -> nn.Sequential:
    """Three convolutions (two of stride 2), each with a normalisation and an activation; pooling to 2 × 2; linear.

    Args:
        behind_first: makes what follows the first activation, of its number of channels.
    """
    parts: list[nn.Module] = []
    for number, stride in enumerate((1, 2, 2)):
        outputs = width * 2**number
        parts += [nn.Conv2d(inputs, outputs, 3, stride, padding=1)]
        parts += [nn.BatchNorm2d(outputs)] if normalised else []
        parts += [activation(), *([behind_first(outputs)] if number == 0 else [])]
        inputs = outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * inputs, classes))


# --- the cases -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network, and what its audit must come to."""

    model: nn.Module
    undefended: nn.Module
    """The same network without the defence, or one trained alike; of a control, the model itself."""
    x: Tensor
    y: Tensor
    eps: float
    attacks: str
    """Whose result is claimed."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What was drawn from the seed."""
    robust: bool = False
    """Whether the network was trained adversarially."""
    overstated: bool = False
    """Whether its claim is certainly too high: no attack of `attacks` gets a gradient."""
    control: bool = False
    layers: tuple[str, ...] = ()
    """Where the gradient is blocked."""

    def bound(self, undefended: float) -> float | None:
        """The highest accuracy that the audit may leave, from that of the undefended network; None for a control."""
        if self.control:
            return None
        return undefended + NEAR if self.robust else BROKEN

    def faults(self, verdict: str, claimed: float | None, found: float, undefended: float) -> list[str]:
        """In what an audit fails this case; nothing if it does not.

        Args:
            claimed: None where none of the attacks can be run.
            undefended: accuracy of the undefended network under the standard suite.
        """
        if self.control:
            return [] if verdict == "TRUSTED" else [f"a healthy network is {verdict}"]
        faults = []
        bound = self.bound(undefended)
        if bound is not None and found > bound + 1e-9:
            faults.append(f"found {found:.1%}, over {bound:.1%}")
        if verdict not in ("OVERSTATED", "TRUSTED"):
            faults.append(f"the verdict is {verdict}")
        elif verdict == "TRUSTED" and claimed is not None and (self.overstated or claimed - found > CLAIM):
            faults.append(f"TRUSTED, though claimed {claimed:.1%} and found {found:.1%}")
        return faults


class Drawn:
    """Parameters drawn from a seed, each by its name, and noted in `values`."""

    def __init__(self, *names: str | int):
        self.seed, self.values = derive_seed(0, *names), dict[str, Any]()

    def _uniform(self, name: str) -> float:
        return float(torch.rand((), generator=gsem.rng.generator(self.seed, name), dtype=torch.float64))

    def between(self, name: str, low: float, high: float) -> float:
        """Uniform; uniform in the logarithm where high is ten times low or more."""
        u = self._uniform(name)
        value = low * (high / low) ** u if high >= 10 * low else low + (high - low) * u
        self.values[name] = float(f"{value:.3g}")
        return self.values[name]

    def one_of(self, name: str, *choices: Any) -> Any:
        self.values[name] = choices[int(self._uniform(name) * len(choices))]
        return self.values[name]

    def some(self, name: str, share: float, count: int) -> Tensor:
        """[count] bool, True in so large a share."""
        order = torch.randperm(count, generator=gsem.rng.generator(self.seed, name))
        return order < max(1, round(share * count))


Make = Callable[[Setting, int, Drawn], dict[str, Any]]
"""(setting, seed, drawn) → the fields of the case that are its own."""


def _in_front(kind: str, front: Callable[[Drawn, Setting], nn.Module], **fields: Any) -> Make:
    """A network trained behind something that changes the image."""

    def make(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
        before = front(drawn, setting)
        inputs = before(torch.zeros(1, *setting.source.shape)).shape[1]
        model = setting.network(kind, seed, lambda: Fronted(before, setting.small(inputs=inputs)()))
        return {"model": model, "undefended": setting.plain(seed), "layers": ("front",)} | fields

    return make


def _kwta(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
    share = drawn.between("share", 0.1, 0.2)
    model = setting.network("kwta", seed, setting.small(activation=partial(KWinners, share)))
    return {"model": model, "undefended": setting.plain(seed)}


def _behind_first(kind: type[nn.Module], drawn: Drawn, setting: Setting, network: nn.Module, share: float) -> nn.Module:
    """The network with a defence behind its first activation, in this share of the channels."""
    some = drawn.some("channels", share, setting.width)
    changed = kind(some if kind is PartlyDetached else torch.where(some, -1.0, 1.0))
    model = nn.Sequential(*network)
    model[3] = changed
    return model.eval()


def _detached(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
    plain = setting.plain(seed)
    model = _behind_first(PartlyDetached, drawn, setting, plain, drawn.between("share", 0.5, 0.9))
    return {"model": model, "undefended": plain, "layers": ("3",)}


def _wrong(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
    plain = setting.plain(seed)
    model = _behind_first(WrongBackward, drawn, setting, plain, drawn.between("share", 0.4, 0.6))
    return {"model": model, "undefended": plain, "layers": ("3",)}


def _temperature(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
    plain = setting.plain(seed)
    return {"model": nn.Sequential(plain, Temperature(drawn.between("factor", 100, 1000))).eval(), "undefended": plain}


def _onehot(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
    plain = setting.plain(seed)
    return {"model": OneHot(plain).eval(), "undefended": plain, "overstated": True}


def _ensemble(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
    members, source = drawn.one_of("members", 2, 3), drawn.one_of("source", "torch", "numpy", "python")
    networks = [setting.network(f"plain{number or ''}", seed, setting.small()) for number in range(members)]
    return {"model": RandomMember(networks, source).eval(), "undefended": networks[0]}


def _meansparse(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
    robust = setting.robust(seed)
    images = gsem.data.to_float(setting.train[0][:1000])
    model = sparsified(robust, images, drawn.between("threshold", 0.2, 0.5))
    return {"model": model, "undefended": robust, "robust": True, "layers": ("1.1", "5.1", "8.1")}


DEFENCES: dict[str, Make] = {
    "dct": _in_front("dct", lambda d, _: CosineRounding(d.between("step", 0.03, 0.08)), overstated=True),
    "thermometer": _in_front("thermometer", lambda d, _: Thermometer(d.one_of("levels", 8, 12, 16)), overstated=True),
    "kwta": _kwta,
    "resize": _in_front(
        "resize",
        lambda d, s: ResizedAndPadded(
            max(s.source.shape[1] + 2, s.source.shape[1] * 9 // 8), d.one_of("source", "torch", "numpy", "python")
        ),
    ),
    "noise": _in_front("noise", lambda d, s: GaussianNoise(d.between("std", 0.3 * s.eps, 0.5 * s.eps))),
    "tv": _in_front("tv", lambda d, _: TotalVariation(d.between("weight", 0.03, 0.1)), overstated=True),
    "median": _in_front("median", lambda d, _: Median(d.one_of("size", 2, 3)), overstated=True),
    "temperature": _temperature,
    "detached": _detached,
    "wrong": _wrong,
    "ensemble": _ensemble,
    "meansparse": _meansparse,
    "onehot": _onehot,
}


def halves_of(x: Tensor, y: Tensor) -> Tensor:
    """Two classes: the even and the odd of the classes."""
    return y % 2


def parts_of(x: Tensor, y: Tensor, train: tuple[Tensor, Tensor], parts: int) -> Tensor:
    """Each class divided into so many parts, the clusters of its training images."""
    labels = torch.zeros_like(y)
    small, all_train = (F.adaptive_avg_pool2d(images, 8).flatten(1) for images in (x, gsem.data.to_float(train[0])))
    for label in y.unique():
        centres, _ = kmeans2(all_train[train[1] == label].double().numpy(), parts, seed=0, minit="++")
        near = torch.cdist(small[y == label].double(), torch.from_numpy(centres)).argmin(1)
        labels[y == label] = label * parts + near
    return labels


def _control(
    kind: str, make: Callable[[Setting], Callable[[], nn.Module]], *, robust: bool = True, longer: int = 1
) -> Make:
    def case(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
        model = setting.network(kind, seed, make(setting), robust=robust, longer=longer)
        return {"model": model, "undefended": model, "robust": robust}

    return case


def _relabelled(kind: str, count: Callable[[Setting], int], labels: Callable[[Setting], Any]) -> Make:
    def case(setting: Setting, seed: int, drawn: Drawn) -> dict[str, Any]:
        make, of = setting.small(classes=count(setting)), labels(setting)
        model = setting.network(kind, seed, make, robust=True, labels=of)
        return {"model": model, "undefended": model, "robust": True, "y": of(*setting.test)}

    return case


def _attention(setting: Setting) -> Callable[[], nn.Module]:
    c = setting.source.shape[0]
    return partial(gsem.create_model, "vit2x32", num_classes=len(setting.source.classes), in_channels=c)


CONTROLS: dict[str, Make] = {
    "plain": _control("plain", lambda setting: setting.small(), robust=False),
    "relu": _control("robust", lambda setting: setting.small()),
    "gelu": _control("gelu", lambda setting: setting.small(activation=nn.GELU, normalised=False)),
    "attention": _control("attention", _attention, longer=3),
    "binary": _relabelled("binary", lambda setting: 2, lambda setting: halves_of),
    "hundred": _relabelled(
        "hundred",
        lambda setting: 10 * len(setting.source.classes),
        lambda setting: partial(parts_of, train=setting.train, parts=10),
    ),
    "gsem": _control("gsem", lambda setting: setting.small(behind_first=gsem.GSeM)),
}
CASES = DEFENCES | CONTROLS


def make(name: str, seed: int, setting: Setting) -> Case:
    """The case of that name: its networks trained, its parameters drawn from the seed."""
    drawn, control = Drawn(name, seed), name in CONTROLS
    with torch.random.fork_rng():
        own = CASES[name](setting, seed, drawn)
    x, y = setting.test
    eps = setting.robust_eps if own.get("robust") else setting.eps
    fields = {"x": x, "y": y, "eps": eps, "attacks": HEALTHY if control else WHITE_BOX, "control": control}
    return Case(**fields | {"parameters": drawn.values} | own)
