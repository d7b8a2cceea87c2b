"""The binarization test (Zimmermann et al., NeurIPS 2022): does the attack find an adversarial point that was planted?

The network's features stay as they are. For every image a linear readout of them is made that separates two classes:
0 for random points of the ball, 1 for one planted point on its edge. Then the same attack is run on this classifier.
No defence excuses a failure, because the planted point is within eps.
"""

import copy
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Finding, check
from gsem.auditing.context import AuditContext, several
from gsem.nn.contract import NoGradient
from gsem.nn.predict import predict_draws
from gsem.rng import derive_seed, generator, seeded

FOUND, SURE, EASY, HOPELESS = 0.95, 0.99, 0.50, 0.50
STEPS = 100  # of the repaired attack
INNER = 256  # points of the ball that are class 0, half of them corners
CANDIDATES = 8  # corners of the ball, of which the easiest to separate from the inner points is planted
MOST = 512  # images, which is enough
TRIES = 200  # points of the random search that controls the test
# Where the readout's threshold is, as a share of the way from the inner points to the planted one.
CLOSENESS = 0.95
# Share of the mean variance that is added to every direction of the features, for a stable readout.
REG = 0.1
# Attacks whose points never leave the ball, so that each point belongs to one image.
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
        with self.layer.register_forward_pre_hook(lambda module, args: kept.append(args[0])):
            self.model(x)
        return kept[-1].flatten(1)


def features_of(model: nn.Module, x: Tensor) -> Features:
    """`model`'s features, with the layer from which they go into the logits found by running it."""
    last: list[tuple[nn.Module, Tensor]] = []
    with ExitStack() as hooks, torch.no_grad(), seeded(0, x.device):
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
            hooks.enter_context(layer.register_forward_hook(lambda m, args, out: last.append((m, out))))
        logits = model(x[:1])
    fits = bool(last) and last[-1][1].shape == logits.shape
    return Features(model, last[-1][0] if fits else None)


class Binarized(nn.Module):
    """Each image's own readout. Which image a point belongs to follows from a few pixels of it.

    Balls of radius eps around the images do not overlap in these pixels, so that no point can be taken for
    another image's.
    """

    def __init__(self, features: Features, x: Tensor, eps: float, norm: str, weight: Tensor, bias: Tensor):
        super().__init__()
        self.features, self.weight, self.bias = features, weight, bias
        self.p = float("inf") if norm == "Linf" else 2.0
        self.pixels = distinguishing(x, eps, norm)
        self.anchors = x.flatten(1)[:, self.pixels]

    def forward(self, x: Tensor) -> Float[Tensor, "b 2"]:
        with torch.no_grad():
            image = torch.cdist(x.detach().flatten(1)[:, self.pixels], self.anchors, p=self.p).argmin(1)
        gap = (self.features(x) * self.weight[image]).sum(1) + self.bias[image]
        return torch.stack([-gap / 2, gap / 2], dim=1)


def distinguishing(x: Tensor, eps: float, norm: str) -> Tensor:
    """Numbers of so many pixels that all images are farther than 2 eps apart in them; all where that takes all."""
    flat = x.flatten(1)
    order = flat.var(0).argsort(descending=True) if len(x) > 1 else torch.arange(flat.shape[1], device=x.device)
    count = 16
    while count < flat.shape[1] and bool(near(flat[:, order[:count]], eps, norm).tril(-1).any()):
        count *= 2
    return order[:count]


def near(flat: Float[Tensor, "n d"], eps: float, norm: str) -> Bool[Tensor, "n n"]:
    """Whether balls of radius eps around two points may touch."""
    return torch.cdist(flat, flat, p=float("inf") if norm == "Linf" else 2.0) <= 2 * eps * 1.001


@dataclass(frozen=True)
class Planted:
    """Binary classifiers of some images, each with a point planted that it takes for class 1."""

    model: Binarized
    x: Tensor
    flips: Float[np.ndarray, " n"]
    """Share of fresh draws in which the planted point is class 1."""
    clean: Float[np.ndarray, " n"]
    """… in which the image itself is."""


def plant(ctx: AuditContext, x: Tensor) -> Planted:
    """A readout and a boundary point for every image."""
    features = features_of(ctx.model, x)
    seed = derive_seed(ctx.seed, "binarization")
    rng = generator(seed, "points", device=x.device)
    # (One after the other: 256 copies of the images might not fit in the device's memory.)
    inner = ((_corner if n % 2 else _inside)(ctx, x, rng) for n in range(INNER // 2 if ctx.quick else INNER))
    few, many = (4, 40) if ctx.stochastic else (1, 1)

    def drawn(at: Tensor, draws: int) -> Float[Tensor, "draws n d"]:
        return torch.stack([features(at) for _ in range(draws)])

    with torch.no_grad(), seeded(derive_seed(seed, "fit"), x.device):
        ctx.on_progress("the binarization test: readouts")
        zeros = torch.cat([drawn(point, 1) for point in inner] + [drawn(x, few * 5 if ctx.stochastic else 1)]).double()
        corners = torch.stack([_corner(ctx, x, rng) for _ in range(CANDIDATES)])
        looks = torch.stack([drawn(corner, few) for corner in corners]).double()
        best = torch.stack([_separation(zeros, ones) for ones in looks]).argmax(0)
        made = corners[best, torch.arange(len(x), device=x.device)]
        ones, held = drawn(made, many).double(), drawn(made, many).double()
    fitted = [_readout(zeros[:, i], ones[:, i], held[:, i]) for i in range(len(x))]
    weights, biases = ([part[i].to(x.dtype) for part in fitted] for i in (0, 1))
    model = Binarized(features, x, ctx.eps, ctx.norm, torch.stack(weights), torch.stack(biases))
    model.eval()
    flips, clean = (
        _class_one(ctx, model, at, ctx.draws, derive_seed(seed, name)) for at, name in ((made, "planted"), (x, "clean"))
    )
    return Planted(model, x, flips, clean)


def _inside(ctx: AuditContext, x: Tensor, rng: torch.Generator) -> Tensor:
    if ctx.norm == "Linf":
        offset = (torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype) * 2 - 1) * ctx.eps
        return (x + offset).clamp(0, 1)
    share = torch.rand((len(x), 1, 1, 1), generator=rng, device=x.device, dtype=x.dtype)
    return (x + (_corner(ctx, x, rng) - x) * share).clamp(0, 1)


def _corner(ctx: AuditContext, x: Tensor, rng: torch.Generator) -> Tensor:
    """A point at distance eps, in a random direction, from the image, and in [0, 1]."""
    if ctx.norm == "Linf":
        sign = torch.randint(0, 2, x.shape, generator=rng, device=x.device).to(x.dtype) * 2 - 1
        # Towards the inside where the pixel has no room, so that the point lies on the edge in every pixel.
        sign = torch.where(x + sign * ctx.eps > 1, -1.0, torch.where(x + sign * ctx.eps < 0, 1.0, sign))
        return (x + sign * ctx.eps).clamp(0, 1)
    offset = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return (x + ctx.eps * offset / offset.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)


def _separation(zeros: Float[Tensor, "m n d"], ones: Float[Tensor, "k n d"]) -> Float[Tensor, " n"]:
    """How far the ones' mean lies from the zeros', in their spread, feature by feature."""
    # Otherwise a feature that is zero except at one corner would win by far, and attacks have no gradient towards it.
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
    # (`solve` would make the CPU wait, for each image. The matrix is positive definite.)
    weight = torch.linalg.solve_ex(scatter, target - centre).result
    from_, to = zeros @ weight, held @ weight
    if len(ones) > 1:
        threshold = to.mean() - 3 * to.std()  # so low that the ones pass in over 99 of 100 draws
    else:
        threshold = from_.max() + CLOSENESS * (to[0] - from_.max())
    scale = (to.mean() - from_.mean()).abs().clamp_min(1e-12) / 4
    return weight / scale, -threshold / scale


def _class_one(ctx: AuditContext, model: nn.Module, at: Tensor, draws: int, seed: int) -> Float[np.ndarray, " n"]:
    """Share of draws in which each point is class 1."""
    found = predict_draws(model, at, draws=draws, seed=seed, batch_size=ctx.batch_size)
    return (found == 1).double().mean(0).cpu().numpy()


def fitting(ctx: AuditContext) -> list[AttackSpec]:
    """The audited attacks as they run on two classes: the losses and targets that need more are the margin's."""
    return _on_two_classes([*ctx.white, *ctx.black] or ctx.black_box)


def _on_two_classes(attacks: Sequence[AttackSpec]) -> list[AttackSpec]:
    found = []
    for attack in attacks:
        if attack.name not in BOUND:
            continue
        options = dict(attack.options)
        if options.get("loss") == "dlr" or options.pop("targets", 0):
            options["loss"] = "margin"
        if AttackSpec(attack.name, options) not in found:
            found.append(AttackSpec(attack.name, options))
    return found


_NO_ANSWER = "The test has no answer for this model: rely on the other checks, and do not call the number proven."
_WEAK = "The attack is too weak to measure with: more steps, restarts and draws, other losses, or a better gradient."


@check(
    name="binarization",
    question="Does the attack find a planted adversarial point?",
    threshold=f"under {FOUND:.2f} of the planted points found; no answer where random search finds {EASY:.2f}",
    reference="Zimmermann et al., NeurIPS 2022",
)
def binarization(ctx: AuditContext) -> Finding:
    """Plant, attack, count; and count what random search alone finds."""
    attacks = fitting(ctx)
    if not attacks:
        return Finding(None, "inconclusive", f"none of the attacks stays within eps on its way: {', '.join(BOUND)} do")
    rows = _separate(~near(ctx.x.flatten(1), ctx.eps, ctx.norm))[:MOST]
    planted = plant(ctx, ctx.x[rows])
    fair = (planted.flips >= SURE) & (planted.clean <= 0.05)
    details: dict[str, Any] = {
        "images": len(rows),
        "planted": int(fair.sum()),
        "attacks": [ctx.label(a) for a in attacks],
    }
    if fair.sum() < len(rows) / 2:
        reason = (
            f"a point on the edge of the ball could be separated from the points inside, in 99 of 100 draws, for "
            f"{int(fair.sum())} of {several(len(rows), 'images')} only"
        )
        return Finding(None, "inconclusive", reason, _NO_ANSWER, details=details)
    found = _attacked(ctx, planted, attacks)[fair]
    by_chance = _random_search(ctx, planted)[fair]
    share, control = float(found.mean()), float(by_chance.mean())
    details |= {"found": share, "random_search": control, "planted_flips": float(planted.flips[fair].mean())}
    details["images_not_found"] = rows.cpu().numpy()[fair][~found].tolist()
    reason = (
        f"of {several(int(fair.sum()), 'planted points')} the attack finds {share:.1%}, random search {control:.1%}"
    )
    if control >= EASY:
        return Finding(share, "inconclusive", reason, _NO_ANSWER, details=details)
    if share >= FOUND:
        return Finding(share, "pass", reason, details=details)
    return _with_repairs(ctx, Finding(share, "flag", reason, _WEAK, details=details), planted, fair, found)


def _with_repairs(
    ctx: AuditContext, finding: Finding, planted: Planted, fair: np.ndarray, found: np.ndarray
) -> Finding:
    """The flag, and what the repaired attacks and black-box attacks find of what was not found."""
    margin = [] if ctx.no_gradient else [AttackSpec("apgd", ctx.effort | {"steps": STEPS, "loss": "margin"})]
    attacks = _on_two_classes([*margin, *ctx.repairs, *ctx.black_box])
    left = np.flatnonzero(fair)[~found]
    more = _attacked(ctx, planted, attacks, at=left)[left]
    again = float((found.sum() + more.sum()) / len(found))
    answered = again >= FOUND
    reason = f"{finding.reason}; with {', '.join(ctx.label(a) for a in attacks)} it is {again:.1%}"
    return replace(finding, reason=reason, again=again, answered=answered)


def _separate(apart: Tensor) -> Tensor:
    """Numbers of images of which each two are apart, taken in order."""
    known = apart.cpu().numpy()
    taken: list[int] = []
    for number in range(len(known)):
        if known[number, taken].all():
            taken.append(number)
    return torch.tensor(taken, dtype=torch.int64, device=apart.device)


def _attacked(
    ctx: AuditContext, planted: Planted, attacks: list[AttackSpec], at: np.ndarray | None = None
) -> np.ndarray:
    """[n] whether an attack ends at a point of class 1, by most draws.

    Args:
        at: numbers of the images to attack; default: all. The others count as found.
    """
    zeros = torch.zeros(len(planted.x), dtype=torch.int64, device=planted.x.device)
    found = np.isin(np.arange(len(planted.x)), at, invert=True) if at is not None else np.zeros(len(planted.x), bool)
    for attack in attacks:
        rows = torch.from_numpy(np.flatnonzero(~found)).to(planted.x.device)
        if not len(rows):
            break
        ctx.on_progress(f"the binarization test: {ctx.label(attack)} on {several(len(rows), 'images')}")
        seed = derive_seed(ctx.seed, "binarization", ctx.label(attack))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                x_adv = attack.run(
                    _repaired(ctx, planted.model, attack),
                    planted.x[rows],
                    zeros[rows],
                    eps=ctx.eps,
                    norm=ctx.norm,
                    stochastic=ctx.stochastic,
                    seed=seed,
                    source_models={},
                )
            except NoGradient:  # of the features: the attack finds nothing
                continue
        ones = _class_one(ctx, planted.model, x_adv, ctx.draws, derive_seed(seed, "scoring"))
        found[rows.cpu().numpy()] = ones > 0.5
    return found


def _repaired(ctx: AuditContext, model: Binarized, attack: AttackSpec) -> nn.Module:
    """The classifiers, with the gradient of their features that the attack's options ask for."""
    network = attack.network(ctx.model)
    if network is ctx.model:
        return model
    repaired = copy.copy(model)
    repaired._modules = {**model._modules, "features": features_of(network, ctx.x)}
    return repaired


def _random_search(ctx: AuditContext, planted: Planted) -> np.ndarray:
    """[n] whether one of many random points is of class 1, half of them corners of the ball."""
    rng = generator(ctx.seed, "binarization", "control", device=planted.x.device)
    found = torch.zeros(len(planted.x), dtype=torch.bool, device=planted.x.device)
    draws = 3 if ctx.stochastic else 1
    ctx.on_progress("the binarization test: random search")
    for number in range(TRIES):
        at = (_corner if number % 2 else _inside)(ctx, planted.x, rng)
        seed = derive_seed(ctx.seed, "binarization", "control", number)
        drawn = predict_draws(planted.model, at, draws=draws, seed=seed, batch_size=ctx.batch_size)
        found |= (drawn == 1).all(0)
    return found.cpu().numpy()
