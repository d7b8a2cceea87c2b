"""The gradient check: is autograd's gradient that of the loss, and if not, which layer blocks it?

Directional derivatives are compared with central differences, on common noise. With L the loss averaged over draws of
the noise, d a direction and g what autograd returns:

    a = (L(x + h·d) − L(x − h·d)) / 2h,      b = ⟨g(x), d⟩,      slope = Σ ab / Σ b²

The loss is the margin: the cross-entropy of a few misclassified images would outweigh that of all others.
With a slope of 1 the gradient is that of the loss; with one of 1.3 the loss changes by three tenths more than the
gradient predicts; with b = 0 and a ≠ 0 the gradient is blocked. Each draw of the noise is the same on both sides of the
difference and in b.

If the loss is curved within h, a differs from b too. In that case b is averaged over the segment from x − h·d to
x + h·d (Gauss–Legendre, 3 points). For a differentiable loss that average equals a, however curved the loss is (the
fundamental theorem of calculus); for a masked gradient it does not.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gsem.attacks._core import random_start
from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Finding, check
from gsem.auditing.context import RESAMPLES, AuditContext
from gsem.evaluation.statistics import bootstrap
from gsem.losses import margin
from gsem.nn.contract import are_probabilities, without_logits
from gsem.nn.gsem import GSeM
from gsem.nn.surrogate import SOFTMAX, Logarithm
from gsem.rng import derive_seed, generator, seeded

HS = (1 / 255, 2 / 255, 4 / 255)
LEAST = 100  # images, for an interval to mean something
SHOWN = 200  # pairs (a, b) kept for a chart
# How far from 1 the interval of a slope may lie.
WITHIN = 0.07
NEARLY = 0.04
# An interval wider than this is no answer.
WIDE = 1.0
# Below so small a share of the differences, the derivative counts as none.
NOTHING = 0.01
# Relative rounding error of a float32 loss; differences that are not well above it mean nothing.
ROUNDING = 1e-6
# Offset of a layer's features, in standard deviations of them: about what 1/255 is to images.
OFFSET = 0.02
# Layers that cannot lose a gradient.
AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Flatten, nn.Identity)
# Behind a layer, a gradient counts as right only with an interval narrower than this: behind a mask it is narrow.
UNSURE = 4 * NEARLY
# Classes of layers that are looked for one after the other, each behind the layers that are passed already.
MOST_KINDS = 4
# Steps of the secants that are tried where the identity is not the gradient of a layer (see `Secant`): about what an
# attack changes in features. With smaller steps an attack finds less.
SECANTS = (0.1, 0.2)
# How far below 1 the slope of a secant may lie. It is no derivative, and where it differs from one at random, Σ b²
# grows and Σ ab does not. A gradient that promises too much hides nothing; the identity may promise far too much.
SECANTS_WITHIN = 0.20
# A probability so near to 1 has, in float32, next to no gradient.
SATURATED = 1e-6

# --- the slope ----------------------------------------------------------------------------------------------------

LogitsAt = Callable[[Tensor], Tensor]
"""From an offset [b, …] of what is probed to logits [b, k]."""


@dataclass(frozen=True)
class Slope:
    """The comparison at one h."""

    h: float
    a: Float[np.ndarray, "n d"]
    """Central differences, of n images in d directions."""
    b: Float[np.ndarray, "n d"]
    """Derivatives by autograd."""
    rounding: float
    """What of a may be rounding."""
    slope: float | None = None
    low: float = 0.0
    high: float = 0.0
    """The slope's 95% bootstrap interval over images; no slope where b is nothing."""

    @property
    def silent(self) -> bool:
        """Whether the loss does not change at all, in float32."""
        return _rms(self.a) < 10 * self.rounding and _rms(self.b) < 10 * self.rounding

    @property
    def blocked(self) -> bool:
        """Whether the loss changes while the gradient is nothing."""
        return not self.silent and _rms(self.b) < NOTHING * _rms(self.a)

    @property
    def unclear(self) -> bool:
        """Whether the interval is too wide for an answer: a few images of many carry all of the gradient."""
        return self.slope is not None and self.high - self.low > WIDE

    def outside(self, by: float, below: float | None = None) -> bool:
        """Whether the interval lies outside [1 − by, 1 + by], or there is no derivative at all.

        Args:
            below: in place of `by`, below 1.
        """
        low = 1 - (by if below is None else below)
        return self.blocked or (self.slope is not None and (self.high < low or self.low > 1 + by))

    def to_dict(self) -> dict[str, Any]:
        interval = {"low": self.low, "high": self.high} if self.slope is not None else {"low": None, "high": None}
        return {"h": self.h, "slope": self.slope, **interval, "blocked": self.blocked}


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def slopes(
    logits: LogitsAt,
    zero: Float[Tensor, "b ..."],
    y: Tensor,
    hs: Sequence[float],
    *,
    draws: int,
    seed: int,
    directions: int = 2,
    along: bool = False,
) -> list[Slope]:
    """Compare derivative and differences at one batch.

    Args:
        logits: logits where the probed images (or features) are offset by its argument.
        zero: an offset of none.
        hs: half lengths of the differences, in the unit of the offset.
        draws: of the noise, common to everything.
        directions: random ±1 directions, beside the sign of the averaged gradient.
        along: average b over the segment, instead of taking it in its middle.
    """
    losses = _Losses(logits, y, draws, seed)
    grad, value = losses.gradient(zero)
    rng = generator(seed, "directions", device=zero.device)
    signs = [
        (torch.randint(0, 2, zero.shape, generator=rng, device=zero.device) * 2 - 1).to(zero.dtype)
        for _ in range(directions + 1)
    ]
    # Where the gradient is zero its sign is no direction: a random one takes its place.
    signs[0] = torch.where(grad == 0, signs[0], grad.sign())
    measured = []
    for h in hs:
        a = torch.stack([(losses(h * d) - losses(-h * d)) / (2 * h) for d in signs], 1)
        b = torch.stack([losses.derivative(h, d) if along else _dot(grad, d) for d in signs], 1)
        measured.append(torch.stack([a, b]))
    size = 1 + float(value.abs().mean())
    # (One copy from the device, at the end.)
    pairs = torch.stack(measured).cpu().numpy()
    return [joined([Slope(h, a, b, ROUNDING * size / h)]) for h, (a, b) in zip(hs, pairs, strict=True)]


def joined(parts: Sequence[Slope], *, beside: bool = False, seed: int = 0) -> Slope:
    """The comparison at the same h over the images of all parts, or (`beside`) over more points of the same images.

    The interval resamples images, each with all its points and directions.
    """
    axis = 1 if beside else 0
    a, b = np.concatenate([p.a for p in parts], axis), np.concatenate([p.b for p in parts], axis)
    found = Slope(parts[0].h, a, b, max(p.rounding for p in parts))
    if found.silent or found.blocked:
        return found
    ab, bb = (a * b).sum(1), (b * b).sum(1)

    def ratio(counts: np.ndarray) -> np.ndarray:
        return (counts @ ab) / np.maximum(counts @ bb, 1e-300)

    low, high = bootstrap(ratio, len(a), resamples=RESAMPLES, seed=seed, stream="slope")
    return replace(found, slope=float(ab.sum() / bb.sum()), low=low, high=high)


class _Losses:
    """The averaged loss and its gradient, every time on the same draws."""

    def __init__(self, logits: LogitsAt, y: Tensor, draws: int, seed: int):
        self.logits, self.y, self.draws, self.seed = logits, y, draws, seed

    @torch.no_grad()
    def __call__(self, offset: Tensor) -> Tensor:
        total = torch.zeros(len(self.y), dtype=torch.float64, device=offset.device)
        for draw in range(self.draws):
            with seeded(derive_seed(self.seed, "draw", draw), offset.device):
                total += margin(self.logits(offset), self.y).double()
        return total / self.draws

    def gradient(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        grad, total = torch.zeros_like(offset), torch.zeros(len(self.y), device=offset.device)
        for draw in range(self.draws):
            probe = offset.detach().clone().requires_grad_()
            with seeded(derive_seed(self.seed, "draw", draw), offset.device), torch.enable_grad():
                value = margin(self.logits(probe), self.y)
                if value.requires_grad:
                    (part,) = torch.autograd.grad(value.sum(), probe, allow_unused=True)
                    grad += 0 if part is None else part
            total += value.detach()
        return grad / self.draws, total / self.draws

    def derivative(self, h: float, d: Tensor) -> Tensor:
        """⟨g, d⟩ averaged over the segment from −h·d to h·d."""
        nodes, weights = np.polynomial.legendre.leggauss(3)
        parts = [w / 2 * _dot(self.gradient(t * h * d)[0], d) for t, w in zip(nodes, weights, strict=True)]
        return torch.stack(parts).sum(0)


def _dot(grad: Tensor, d: Tensor) -> Tensor:
    return (grad * d).flatten(1).double().sum(1)


# --- the layer that blocks the gradient ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocking:
    """Where the gradient gets lost."""

    layer: str
    """As `named_modules` calls it; empty for the model's own forward."""
    kind: str
    """Its class."""
    before: str | None
    """If it is what the module itself does, not a layer inside: the first layer behind, from which all is well."""
    keeps_shape: bool
    """Whether its output has the shape of its input, so that a straight-through gradient fits."""
    after: str | None = None
    """If it is what the module itself does: the last layer, if the gradient is still wrong at its output."""
    softmax: bool = False
    """Whether it is the softmax at the model's end, in which the gradient vanishes because its logits are large."""

    def __str__(self) -> str:
        if self.softmax:
            place = f"the softmax layer {self.layer!r}" if self.layer else f"the softmax that ends {self.kind}"
            return f"{place}: its logits are so large that it is saturated"
        if self.layer:
            return f"layer {self.layer!r} ({self.kind})"
        where = "" if self.before is None else f", before its layer {self.before!r}"
        where += "" if self.after is None else f", after its layer {self.after!r}"
        return f"the forward of {self.kind} itself{where}"


@dataclass
class _Call:
    """The first call of a module: its input, its output, and the name of the module that called it."""

    name: str
    module: nn.Module
    parent: str | None
    given: Tensor | None = None
    returned: Tensor | None = None


@dataclass(frozen=True)
class _Probe:
    """A model and a batch on which the place is looked for."""

    model: nn.Module
    x: Float[Tensor, "b c h w"]
    y: Tensor
    draws: int
    seed: int

    def slope(self, logits: LogitsAt, zero: Tensor, h: float) -> Slope:
        """The slope at one h in one random direction and that of the gradient, with b averaged over the segment."""
        (found,) = slopes(logits, zero, self.y, [h], draws=self.draws, seed=self.seed, directions=1, along=True)
        return joined([found], seed=self.seed)


def blocking(probe: _Probe, on_progress: Callable[[str], None]) -> Blocking:
    """The innermost module from whose input the gradient is wrong and from whose output it is right.

    From the outside in: of the modules that a module calls, in their order, the first which does that to the
    gradient is looked into next. Where the gradient is wrong at the output of the last of them too, it is what the
    caller does behind it.
    """
    calls, kind = _calls(probe.model, probe.x), type(probe.model).__name__
    call = calls[0]
    right_from: _Call | None = None
    last: _Call | None = None

    def wrong_at(call: _Call, side: str) -> bool:
        on_progress(f"looking for the layer: {side} of {call.name or kind}")
        return _off(probe, call, side)

    while True:
        inside, right_from, last = None, None, None
        for child in [c for c in calls if c.parent == call.name]:
            if child.given is None or child.returned is None:
                continue
            if not wrong_at(child, "input"):
                right_from = child
                break
            if not wrong_at(child, "output"):
                inside = child
                break
            last = child
        if inside is None:
            break
        call = inside
    if isinstance(call.module, AFFINE):
        # Its derivative is exact, so the gradient is lost, or the loss curved, behind it.
        return Blocking("", kind, None, False, call.name)
    assert call.given is not None and call.returned is not None
    before = None if right_from is None else right_from.name
    after = None if last is None or right_from is not None else last.name
    same = call.given.shape == call.returned.shape
    return Blocking(call.name, type(call.module).__name__, before, same, after)


def vanishing(model: nn.Module, probe: _Probe) -> Blocking | None:
    """The innermost module from whose output a gradient comes and to whose input none goes; None where there is none.

    Autograd alone shows it, where the gradient is gone as a whole: no differences are needed.
    """
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        given, returned = args[0] if args else None, output
        if isinstance(returned, Tensor) and returned.is_floating_point() and not returned.requires_grad:
            returned = returned.detach().requires_grad_().clone()  # behind a detach
        for tensor in (given, returned):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.retain_grad()
        calls.setdefault(module, (given, returned))
        return returned

    names = {module: name for name, module in without_logits(model).named_modules() if name}
    with ExitStack() as hooks, torch.enable_grad(), seeded(probe.seed, probe.x.device):
        for module in names:
            hooks.enter_context(module.register_forward_hook(leave))
        margin(model(probe.x.clone().requires_grad_()), probe.y).sum().backward()
    for module, (given, returned) in reversed(calls.items()):
        if isinstance(module, AFFINE) or not isinstance(given, Tensor) or not isinstance(returned, Tensor):
            continue
        if _any(returned.grad) and not _any(given.grad) and not list(module.children()):
            return Blocking(names[module], type(module).__name__, None, given.shape == returned.shape)
    return None


def _any(grad: Tensor | None) -> bool:
    return grad is not None and bool(grad.any())


def ending_softmax(probe: _Probe) -> Blocking | None:
    """The softmax at the model's end, if the gradient is lost in it and nowhere before.

    That is so where the model's outputs are probabilities and the gradient of their logarithm, in which the softmax
    is undone, is the loss's; or where float32 holds nothing but the class of most images, so that no logarithm helps.
    """
    model, x = probe.model, probe.x
    with torch.no_grad(), seeded(probe.seed, x.device):
        outputs = model(x)
    if not are_probabilities(outputs):
        return None
    found = probe.slope(lambda offset: Logarithm(model)(x + offset), torch.zeros_like(x), 1 / 255)
    right = not (found.silent or found.unclear or found.outside(NEARLY))
    saturated = float((outputs.amax(1) > 1 - SATURATED).double().mean()) >= 0.5
    if not right and not saturated:
        return None
    layers = [c for c in _calls(model, x[:1]) if isinstance(c.module, nn.Softmax)]
    same = [c for c in layers if c.returned is not None and c.returned.shape == outputs[:1].shape]
    if same:
        return Blocking(same[-1].name, type(same[-1].module).__name__, None, True, softmax=True)
    return Blocking("", type(model).__name__, None, False, softmax=True)


def _calls(model: nn.Module, x: Tensor) -> list[_Call]:
    """The first call of every module, in order, with the module that called it."""
    calls: list[_Call] = []
    seen: dict[nn.Module, _Call] = {}
    stack: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple) -> None:
        if module not in seen:
            parent = seen[stack[-1]].name if stack else None
            seen[module] = _Call(names[module], module, parent, _tensor(args[0] if args else None))
            calls.append(seen[module])
        stack.append(module)

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        stack.pop()
        if seen[module].returned is None:
            seen[module].returned = _tensor(output)

    names = {model: ""} | {module: name for name, module in without_logits(model).named_modules()}
    with ExitStack() as hooks, torch.no_grad(), seeded(0, x.device):
        for module in names:
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        model(x)
    return calls


def _tensor(value: object) -> Tensor | None:
    return value.detach() if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 else None


def _off(probe: _Probe, call: _Call, side: str) -> bool:
    """Whether the slope, of the features that go into a module or come out of it, is off or too uncertain."""
    features = call.given if side == "input" else call.returned
    assert features is not None
    spread = float(features.std())
    if spread == 0:
        return False

    def logits(offset: Tensor) -> Tensor:
        with _offset(call.module, side, offset):
            return probe.model(probe.x)

    found = probe.slope(logits, torch.zeros_like(features), OFFSET * spread)
    return found.outside(NEARLY) or (found.slope is not None and found.high - found.low > UNSURE)


def _offset(module: nn.Module, side: str, offset: Tensor) -> RemovableHandle:
    """Add `offset` to what the first call of `module` is given, or returns, until the handle is removed."""
    done = False

    def add(module: nn.Module, args: tuple, output: Tensor | None = None) -> Any:
        nonlocal done
        if done:
            return None
        done = True
        return (args[0] + offset, *args[1:]) if output is None else output + offset

    return module.register_forward_pre_hook(add) if side == "input" else module.register_forward_hook(add)


# --- the check ----------------------------------------------------------------------------------------------------

_SILENT = (
    "Look at the logits: a saturated or constant output leaves nothing to attack. Attack the logits before the last "
    "non-linearity."
)


@check(
    name="gradient",
    question="Do the attacks follow the gradient of the loss?",
    threshold=f"interval outside [{1 - WITHIN:.2f}, {1 + WITHIN:.2f}] at two consecutive h; no derivative",
    reference="section 3 of Athalye et al., ICML 2018 (gradient masking); the comparison is this project's",
    needs="gradient",
)
def gradient(ctx: AuditContext) -> Finding:
    """Slope of central differences on autograd's derivative, at points from which attacks start."""
    found, averaged, suspicious = _compared(ctx, ctx.folded)
    decisive = averaged or found
    outside = [f for f in decisive if f.outside(WITHIN)]
    one = _decisive(decisive, suspicious)
    reason, details = f"{_in_words(one)} on {len(ctx.x)} images", _details(found, averaged)
    if all(f.silent for f in found):
        reason = "the loss does not change at all within 4/255 of the images, so there is nothing to compare"
        return Finding(None, "inconclusive", reason, _SILENT, details=details)
    if outside and not suspicious:
        reason += f"; outside at {' and '.join(map(_distance, outside))} alone, as for a curved loss"
    x, y = (batch[: min(LEAST, ctx.batch_size)] for batch in (_starts(ctx, 0), ctx.y))
    probe = _Probe(ctx.model, x, y, draws=min(4, ctx.draws), seed=ctx.seed)
    ending = ending_softmax(probe) if suspicious or one.unclear else None
    if suspicious or ending is not None:
        return _flagged(ctx, Finding(one.slope, "flag", reason, details=details), probe, ending)
    if one.unclear:
        return Finding(one.slope, "inconclusive", f"{reason}: too wide for an answer", _SILENT, details=details)
    if len(ctx.x) < LEAST:
        reason += f"; the check needs {LEAST}"
        return Finding(one.slope, "inconclusive", reason, f"Give --images {LEAST} or more.", details=details)
    return Finding(one.slope, "pass", reason, details=details)


def _compared(ctx: AuditContext, network: nn.Module, below: float = WITHIN) -> tuple[list[Slope], list[Slope], bool]:
    """The slopes of a folded model; where they are suspicious, those with b averaged too; whether they still are."""
    found = compare(ctx, network)
    if not _consecutive(found, below) or all(f.blocked for f in found):
        return found, [], _consecutive(found, below)
    ctx.on_progress("again, with the derivative averaged over the segment")
    averaged = compare(ctx, network, along=True)
    return found, averaged, _consecutive(averaged, below)


def _decisive(found: list[Slope], suspicious: bool, below: float = WITHIN) -> Slope:
    """The slope at the first h outside the bounds if the check is flagged, else at the first h."""
    return next((f for f in found if suspicious and f.outside(WITHIN, below)), found[0])


def compare(ctx: AuditContext, network: nn.Module, *, along: bool = False) -> list[Slope]:
    """The slopes of a folded model at each of `HS` over all images."""
    # Another point of an image is worth more than another draw of the noise; small images have few features whose
    # changes could be averaged, and need more points.
    points = (1 if ctx.quick else 2) * min(8, max(4, 2048 // ctx.x[0].numel())) // (2 if along else 1)
    by_point = []
    for point in range(points):
        parts = []
        ctx.on_progress(f"central differences, {len(ctx.x)} images, point {point + 1} of {points}")
        for first, _, y in ctx.batches():
            x, seed = _starts(ctx, first, point), derive_seed(ctx.seed, "gradient", first, point)

            def logits(offset: Tensor, x: Tensor = x) -> Tensor:
                return network(x + offset)

            parts.append(slopes(logits, torch.zeros_like(x), y, HS, draws=ctx.few_draws, seed=seed, along=along))
        by_point.append([joined(same_h) for same_h in zip(*parts, strict=True)])
    return [joined(same_h, beside=True, seed=ctx.seed) for same_h in zip(*by_point, strict=True)]


def _starts(ctx: AuditContext, first: int, point: int = 0) -> Tensor:
    # As attacks start: anywhere in the ball. Pixels of 0, 128 or 255 may lie on a quantiser's very edge. Far enough
    # from black and white for both sides of the difference to be images.
    x = ctx.x[first : first + ctx.batch_size]
    rng = generator(ctx.seed, "gradient", "start", first, point, device=x.device)
    return random_start(x, ctx.eps, ctx.norm, rng).clamp(max(HS), 1 - max(HS))


def _consecutive(found: list[Slope], below: float = WITHIN) -> bool:
    return any(one.outside(WITHIN, below) and other.outside(WITHIN, below) for one, other in pairwise(found))


def _in_words(one: Slope) -> str:
    if one.slope is None:
        return f"the loss changes within {_distance(one)}, and its gradient is next to nothing,"
    form = ".3g" if one.unclear else ".2f"
    return f"slope {one.slope:{form}} [{one.low:{form}}, {one.high:{form}}] at h = {_distance(one)}"


def _distance(one: Slope) -> str:
    return f"{round(one.h * 255)}/255"


def _details(found: list[Slope], averaged: list[Slope]) -> dict[str, Any]:
    pairs = np.stack([found[0].a.ravel(), found[0].b.ravel()], axis=1)
    details: dict[str, Any] = {
        "points": [f.to_dict() for f in found],
        "pairs": [[float(a), float(b)] for a, b in pairs[:: max(1, len(pairs) // SHOWN)]],
        "pairs_h": found[0].h,
    }
    return details | ({"along": [f.to_dict() for f in averaged]} if averaged else {})


def _flagged(ctx: AuditContext, finding: Finding, probe: _Probe, ending: Blocking | None) -> Finding:
    """Name the place (the ending softmax, or a layer that is looked for), go around it, and ask and attack again."""
    where = ending or blocking(probe, ctx.on_progress)
    details = (finding.details or {}) | {"layer": where.layer, "where": str(where)}
    finding = replace(finding, reason=f"{finding.reason}; what blocks it is {where}", details=details)
    names = passable(ctx.model, where)
    if not names:
        # Nothing to pass: a gradient averaged over a neighbourhood, if there is any, and attacks without one.
        smoothed = [] if finding.figure is None else [ctx.smoothed]
        after = ctx.cascade([*smoothed, *ctx.black_box], ctx.white_box, "around", skip_known=True)
        finding = replace(finding, advice="Attack without this gradient: see the check blackbox.")
        way = "a gradient averaged over Gaussian offsets, and black-box attacks," if smoothed else "black-box attacks"
        return ctx.mitigated(finding, way, [*smoothed, *ctx.black_box], after, again=None, answered=False)
    if SOFTMAX in names:
        # The cross-entropy would put back the softmax that the logarithm takes away.
        attacks = [AttackSpec("apgd", ctx.effort | {"loss": "margin", "through": SOFTMAX})]
        way = "loss=margin on the logits before the softmax, or on the logarithm of the output"
        again, answered = _again(ctx, attacks[0])
    else:
        names, again, answered = _all_passed(ctx, probe, names)
        attacks = _with(ctx.following, through="+".join(names))
        way = _in_python(ctx.model, names)
        if not answered and not _all_corrected(ctx.model, names):
            way += ", or the slope of its secant in place of the identity,"
            secants = [_with(attacks, secant=step) for step in SECANTS]
            asked = [(again, answered), *(_again(ctx, each[0]) for each in secants)]
            again, answered = min(asked, key=lambda one: (not one[1], abs((one[0] or 0.0) - 1)))
            attacks = [*attacks, *(a for each in secants for a in each)]
    after = ctx.cascade(attacks, ctx.white_box, "surrogate", skip_known=True)
    finding = replace(finding, advice=f"Attack with {way} (through={attacks[0].options['through']}).")
    return ctx.mitigated(finding, way, attacks, after, again=again, answered=answered)


def passable(model: nn.Module, where: Blocking) -> list[str]:
    """The layers that the gradient is to pass: the one that blocks it, and all others of its class.

    A network that repeats a layer of its own which blocks the gradient would otherwise be searched once for each.
    """
    layers = dict(without_logits(model).named_modules())
    if where.softmax and not where.layer:
        return [SOFTMAX]
    if not where.layer or not (where.keeps_shape or isinstance(layers[where.layer], GSeM)):
        return []
    kind = type(layers[where.layer])
    if kind.__module__.startswith("torch."):
        return [where.layer]
    return [name for name, layer in layers.items() if type(layer) is kind]


def _all_passed(ctx: AuditContext, probe: _Probe, names: list[str]) -> tuple[list[str], float | None, bool]:
    """Pass further layers until the gradient is that of the loss, or none that could be passed is found.

    Returns:
        the layers, the check's figure for the network that passes them, and whether it passes the check.
    """
    for _ in range(MOST_KINDS):
        attack = AttackSpec("apgd", {"through": "+".join(names)})
        again, answered = _again(ctx, attack)
        if answered:
            break
        passed = attack.network(ctx.model)
        where = vanishing(passed, probe) or blocking(replace(probe, model=passed), ctx.on_progress)
        # (Of a layer that is passed already, the identity is no exact derivative.)
        further = [] if _inside(where.layer, names) else passable(ctx.model, where)
        further = [name for name in further if not _inside(name, names)]
        if not further:
            break
        names = [name for name, _ in without_logits(ctx.model).named_modules() if name in {*names, *further}]
    return names, again, answered


def _inside(name: str, others: Sequence[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in others)


def _again(ctx: AuditContext, attack: AttackSpec) -> tuple[float | None, bool]:
    """The check's figure for the network that a repaired attack differentiates, and whether it passes."""
    below = SECANTS_WITHIN if attack.options.get("secant") else WITHIN
    found, averaged, suspicious = _compared(ctx, ctx.network(attack), below)
    one = _decisive(averaged or found, suspicious, below)
    return one.slope, not (suspicious or one.unclear or all(f.silent for f in found))


def _with(attacks: Sequence[AttackSpec], **options: Any) -> list[AttackSpec]:
    return [replace(a, options=a.options | options) for a in attacks]


def _all_corrected(model: nn.Module, names: list[str]) -> bool:
    """Whether all of these layers are GSeMs, which have a corrected gradient of their own."""
    return all(isinstance(without_logits(model).get_submodule(name), GSeM) for name in names)


def _in_python(model: nn.Module, names: list[str]) -> str:
    if _all_corrected(model, names):
        which = f"layer {names[0]!r}" if len(names) == 1 else f"layers {', '.join(map(repr, names))}"
        return f'the {which} set to gradient="corrected"'
    shown = ", ".join(f'"{name}"' for name in names)
    return f"gsem.straight_through(model, {shown if len(names) == 1 else f'[{shown}]'})"
