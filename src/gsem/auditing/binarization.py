"""The binarization test (Zimmermann et al., NeurIPS 2022): does the attack find an adversarial point that was planted?

The network's features stay as they are. For every image a linear readout of them is made that tells two classes
apart: 0 for random points of the ball, 1 for one planted point on its edge. Then the same attack is run on this
classifier. It knows of no defence that could make it fail, because the planted point is within eps.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Check
from gsem.auditing.context import AuditContext, percent, several
from gsem.nn.predict import predict_draws
from gsem.rng import derive_seed, generator, seeded

FOUND, SURE, EASY, HOPELESS = 0.95, 0.99, 0.50, 0.50
INNER = 256  # points of the ball that are class 0, half of them corners
CANDIDATES = 8  # corners of the ball, of which the easiest to tell apart is planted
MOST = 512  # images, which is enough
TRIES = 200  # points of the random search that controls the test
# How far from the inner points towards the planted one the readout changes its mind.
CLOSENESS = 0.95
# Share of the mean variance that is added to every direction of the features, for a stable readout.
REG = 0.1
# Attacks whose points never leave the ball, so that a point tells which image it belongs to.
BOUND = ("pgd", "apgd", "fgsm", "cw", "square")


class Features(nn.Module):
    """What the last linear layer is given; the logits where there is none."""

    def __init__(self, model: nn.Module, layer: nn.Module | None):
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Tensor) -> Float[Tensor, "b d"]:
        if self.layer is None:
            return self.model(x).flatten(1)
        kept: list[Tensor] = []
        hook = self.layer.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        try:
            self.model(x)
        finally:
            hook.remove()
        return kept[-1].flatten(1)


def features_of(model: nn.Module, x: Tensor) -> Features:
    """`model`'s features, with the layer from which they go into the logits found by running it."""
    last: list[tuple[nn.Module, Tensor]] = []
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, args, out: last.append((m, out))) for m in linear]
    try:
        with torch.no_grad(), seeded(0, x.device):
            logits = model(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    fits = bool(last) and last[-1][1].shape == logits.shape
    return Features(model, last[-1][0] if fits else None)


class Binarized(nn.Module):
    """Each image's own readout. Which image a point belongs to is told by a few pixels of it.

    Balls of radius eps around the images do not overlap in these pixels, so that no point can be taken for
    another image's.
    """

    def __init__(self, features: Features, x: Tensor, eps: float, norm: str, weight: Tensor, bias: Tensor):
        super().__init__()
        self.features, self.weight, self.bias = features, weight, bias
        self.p = float("inf") if norm == "Linf" else 2.0
        self.pixels = distinguishing(x, eps, self.p)
        self.anchors = x.flatten(1)[:, self.pixels]

    def forward(self, x: Tensor) -> Float[Tensor, "b 2"]:
        with torch.no_grad():
            image = torch.cdist(x.detach().flatten(1)[:, self.pixels], self.anchors, p=self.p).argmin(1)
        gap = (self.features(x) * self.weight[image]).sum(1) + self.bias[image]
        return torch.stack([-gap / 2, gap / 2], dim=1)


def distinguishing(x: Tensor, eps: float, p: float) -> Tensor:
    """Numbers of so many pixels that all images are farther than 2 eps apart in them; all where that takes all."""
    flat = x.flatten(1)
    order = flat.var(0).argsort(descending=True) if len(x) > 1 else torch.arange(flat.shape[1], device=x.device)
    count = 16
    while count < flat.shape[1] and bool(_too_near(flat[:, order[:count]], eps, p).any()):
        count *= 2
    return order[:count]


def _too_near(flat: Tensor, eps: float, p: float) -> Tensor:
    """[n] whether an earlier image lies within 2 eps."""
    near = torch.cdist(flat, flat, p=p) <= 2 * eps * 1.001
    return near.tril(-1).any(1)


@dataclass(frozen=True)
class Planted:
    """Binary classifiers of the images numbered `rows`, each with a point that it takes for class 1."""

    model: Binarized
    rows: Tensor
    x: Tensor
    points: Tensor
    flips: Float[np.ndarray, " n"]
    """Share of fresh draws in which the planted point is class 1."""
    clean: Float[np.ndarray, " n"]
    """… in which the image itself is."""


def plant(s: AuditContext, x: Tensor, rows: Tensor) -> Planted:
    """A readout and a boundary point for every image."""
    features = features_of(s.model, x)
    seed = derive_seed(s.seed, "binarization")
    rng = generator(seed, "points", device=x.device)
    inner = torch.stack(
        [(_corner if number % 2 else _inside)(s, x, rng) for number in range(INNER // 2 if s.quick else INNER)]
    )
    corners = torch.stack([_corner(s, x, rng) for _ in range(CANDIDATES)])
    few, many = (4, 40) if s.stochastic else (1, 1)

    def drawn(at: Tensor, draws: int) -> Float[Tensor, "draws n d"]:
        return torch.stack([features(at) for _ in range(draws)])

    with torch.no_grad(), seeded(derive_seed(seed, "fit"), x.device):
        s.say("the binarization test: readouts")
        zeros = torch.cat([drawn(point, 1) for point in inner] + [drawn(x, few * 5 if s.stochastic else 1)]).double()
        looks = torch.stack([drawn(corner, few) for corner in corners]).double()
        best = torch.stack([_separation(zeros, ones) for ones in looks]).argmax(0)
        made = corners[best, torch.arange(len(x), device=x.device)]
        ones, held = drawn(made, many).double(), drawn(made, many).double()
    fitted = [_readout(zeros[:, i], ones[:, i], held[:, i]) for i in range(len(x))]
    weights, biases = ([part[i].to(x.dtype) for part in fitted] for i in (0, 1))
    model = Binarized(features, x, s.eps, s.norm, torch.stack(weights), torch.stack(biases))
    model.eval()
    flips, clean = (_class_one(s, model, at, derive_seed(seed, name)) for at, name in ((made, "planted"), (x, "clean")))
    return Planted(model, rows, x, made, flips, clean)


def _inside(s: AuditContext, x: Tensor, rng: torch.Generator) -> Tensor:
    if s.norm == "Linf":
        offset = (torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype) * 2 - 1) * s.eps
        return (x + offset).clamp(0, 1)
    share = torch.rand((len(x), 1, 1, 1), generator=rng, device=x.device, dtype=x.dtype)
    return (x + (_corner(s, x, rng) - x) * share).clamp(0, 1)


def _corner(s: AuditContext, x: Tensor, rng: torch.Generator) -> Tensor:
    """A point at distance eps, in a random direction, from the image, and in [0, 1]."""
    if s.norm == "Linf":
        sign = torch.randint(0, 2, x.shape, generator=rng, device=x.device).to(x.dtype) * 2 - 1
        # Towards the inside where the pixel has no room, so that the point lies on the edge in every pixel.
        sign = torch.where(x + sign * s.eps > 1, -1.0, torch.where(x + sign * s.eps < 0, 1.0, sign))
        return (x + sign * s.eps).clamp(0, 1)
    offset = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return (x + s.eps * offset / offset.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)


def _separation(zeros: Float[Tensor, "m n d"], ones: Float[Tensor, "k n d"]) -> Float[Tensor, " n"]:
    """How far the ones' mean lies from the zeros', in their spread, feature by feature."""
    # A feature that is silent but at one corner would win by far, and no gradient leads there.
    variance = zeros.var(0)
    variance = variance + variance.mean(1, keepdim=True)
    return ((ones.mean(0) - zeros.mean(0)).square() / variance.clamp_min(1e-12)).sum(1)


def _readout(
    zeros: Float[Tensor, "m d"], ones: Float[Tensor, "k d"], held: Float[Tensor, "k d"]
) -> tuple[Tensor, Tensor]:
    """(weight [d], bias): Fisher's discriminant, with the threshold before the ones.

    Where there is noise the threshold is set by draws `held` out of the fit: on its own the fit looks too good.
    """
    centre, target = zeros.mean(0), ones.mean(0)
    spread = zeros - centre
    scatter = spread.T @ spread / len(spread)
    if len(ones) > 1:
        beside = ones - target
        scatter = scatter + beside.T @ beside / len(ones)
    size = scatter.diagonal().mean().clamp_min(1e-12)
    scatter = scatter + REG * size * torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)
    weight = torch.linalg.solve(scatter, target - centre)
    from_, to = zeros @ weight, held @ weight
    if len(ones) > 1:
        threshold = to.mean() - 3 * to.std()  # so low that the ones pass in over 99 of 100 draws
    else:
        threshold = from_.max() + CLOSENESS * (to[0] - from_.max())
    scale = (to.mean() - from_.mean()).abs().clamp_min(1e-12) / 4
    return weight / scale, -threshold / scale


def _class_one(s: AuditContext, model: nn.Module, at: Tensor, seed: int) -> np.ndarray:
    draws = s.draws
    return (
        (predict_draws(model, at, draws=draws, seed=seed, batch_size=s.batch_size) == 1).double().mean(0).cpu().numpy()
    )


def fitting(s: AuditContext) -> list[AttackSpec]:
    """The audited attacks as they run on two classes: the losses and targets that need more are the margin's."""
    found = []
    for attack in [*s.white, *s.black]:
        if attack.name not in BOUND:
            continue
        options = dict(attack.options)
        if options.get("loss") == "dlr" or options.pop("targets", 0):
            options["loss"] = "margin"
        if AttackSpec(attack.name, options) not in found:
            found.append(AttackSpec(attack.name, options))
    return found


def binarization(s: AuditContext) -> Check:
    """Plant, attack, count; and count what random search alone finds."""
    check = Check(
        name="binarization",
        title="Does the attack find a planted adversarial point?",
        figure=None,
        threshold=f"under {FOUND:.2f} of the planted points found; no answer where random search finds {EASY:.2f}",
        outcome="inconclusive",
        reason="",
        advice="",
        reference="Zimmermann et al., NeurIPS 2022",
    )
    attacks = fitting(s)
    if not attacks:
        return replace(check, reason=f"none of the attacks stays within eps on its way: {', '.join(BOUND)} do")
    p = float("inf") if s.norm == "Linf" else 2.0
    apart = torch.cdist(s.x.flatten(1), s.x.flatten(1), p=p) > 2 * s.eps * 1.001
    rows = _separate(apart)[:MOST]
    planted = plant(s, s.x[rows], rows)
    fair = (planted.flips >= SURE) & (planted.clean <= 0.05)
    details: dict[str, Any] = {
        "images": len(rows),
        "planted": int(fair.sum()),
        "attacks": [s.label(a) for a in attacks],
    }
    if fair.sum() < len(rows) / 2:
        reason = (
            f"a point on the edge of the ball could be told from the points inside, in 99 of 100 draws, for "
            f"{int(fair.sum())} of {several(len(rows), 'images')} only"
        )
        return replace(check, reason=reason, advice=_NO_ANSWER, details=details)
    found = _attacked(s, planted, attacks)[fair]
    by_chance = _random_search(s, planted)[fair]
    share, control = float(found.mean()), float(by_chance.mean())
    details |= {"found": share, "random_search": control, "planted_flips": float(planted.flips[fair].mean())}
    details["images_not_found"] = rows.cpu().numpy()[fair][~found].tolist()
    reason = (
        f"of {several(int(fair.sum()), 'planted points')} the attack finds {percent(share)}, "
        f"random search {percent(control)}"
    )
    check = replace(check, figure=share, reason=reason, details=details)
    if control >= EASY:
        return replace(check, advice=_NO_ANSWER)
    if share >= FOUND:
        return replace(check, outcome="pass")
    return replace(check, outcome="flag", invalidates=share < HOPELESS, advice=_WEAK)


_NO_ANSWER = "The test has no answer for this model: rely on the other checks, and do not call the number proven."
_WEAK = "The attack is too weak to measure with: more steps, restarts and draws, other losses, or a better gradient."


def _separate(apart: Tensor) -> Tensor:
    """Numbers of images of which each two are apart, taken in order."""
    taken: list[int] = []
    for number in range(len(apart)):
        if not taken or bool(apart[number, taken].all()):
            taken.append(number)
    return torch.tensor(taken, device=apart.device)


def _attacked(s: AuditContext, planted: Planted, attacks: list[AttackSpec]) -> np.ndarray:
    """[n] whether an attack ends at a point of class 1, by most draws."""
    zeros = torch.zeros(len(planted.x), dtype=torch.int64, device=planted.x.device)
    found = np.zeros(len(planted.x), dtype=bool)
    for attack in attacks:
        rows = torch.from_numpy(np.flatnonzero(~found)).to(planted.x.device)
        if not len(rows):
            break
        s.say(f"the binarization test: {s.label(attack)} on {several(len(rows), 'images')}")
        seed = derive_seed(s.seed, "binarization", s.label(attack))
        how: dict[str, Any] = {"eps": s.eps, "norm": s.norm, "stochastic": s.stochastic, "source_models": {}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x_adv = attack.run(planted.model, planted.x[rows], zeros[rows], seed=seed, **how)
        ones = _class_one(s, planted.model, x_adv, derive_seed(seed, "scoring"))
        found[rows.cpu().numpy()] = ones > 0.5
    return found


def _random_search(s: AuditContext, planted: Planted) -> np.ndarray:
    """[n] whether one of many random points is of class 1, half of them corners of the ball."""
    rng = generator(s.seed, "binarization", "control", device=planted.x.device)
    found = np.zeros(len(planted.x), dtype=bool)
    draws = 3 if s.stochastic else 1
    s.say("the binarization test: random search")
    for number in range(TRIES):
        at = (_corner if number % 2 else _inside)(s, planted.x, rng)
        seed = derive_seed(s.seed, "binarization", "control", number)
        ones = (predict_draws(planted.model, at, draws=draws, seed=seed, batch_size=s.batch_size) == 1).double().mean(0)
        found |= ones.cpu().numpy() == 1
    return found
