"""Which layer blocks the gradient: the comparison of `slopes`, repeated at inner layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsem.auditing.slopes import NEARLY, joined, slopes
from gsem.rng import seeded

# Offset of a layer's features, in standard deviations of them: about what 1/255 is to images.
OFFSET = 0.02
# Layers that cannot lose a gradient.
AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Flatten, nn.Identity)
# An interval wider than this does not say that the gradient is right behind a layer: behind a mask it is narrow.
UNSURE = 4 * NEARLY
# A probability so near to 1 has, in float32, next to no gradient.
SATURATED = 1e-6


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
    """Whether it gives a tensor of the shape it takes, so that a straight-through gradient fits."""
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
    name: str
    module: nn.Module
    parent: str | None
    given: Tensor | None = None
    returned: Tensor | None = None


def blocking(
    model: nn.Module, x: Float[Tensor, "b c h w"], y: Tensor, *, draws: int, seed: int, say: Callable[[str], None]
) -> Blocking:
    """The innermost module from whose input the gradient is wrong and from whose output it is right.

    From the outside in: of the modules that a module calls, in their order, the first which does that to the
    gradient is looked into next. Where the gradient is wrong at the output of the last of them too, it is what the
    caller does behind it.
    """
    calls = _calls(model, x)
    call = calls[0]
    right_from: _Call | None = None
    last: _Call | None = None

    def wrong_at(call: _Call, side: str) -> bool:
        say(f"looking for the layer: {side} of {call.name or type(model).__name__}")
        return _off(model, call, side, x, y, draws=draws, seed=seed)

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
        # Its derivative is exact: what is found there is bent, or lost, behind it.
        return Blocking("", type(model).__name__, None, False, call.name)
    assert call.given is not None and call.returned is not None
    before = None if right_from is None else right_from.name
    after = None if last is None or right_from is not None else last.name
    same = call.given.shape == call.returned.shape
    return Blocking(call.name, type(call.module).__name__, before, same, after)


def ending_softmax(
    model: nn.Module, x: Float[Tensor, "b c h w"], y: Tensor, *, draws: int, seed: int
) -> Blocking | None:
    """The softmax at the model's end, if the gradient is lost in it and nowhere before.

    That is so where the model's outputs are probabilities and the gradient of their logarithm, in which the softmax
    is undone, is the loss's; or where float32 knows nothing but the class of most images, so that no logarithm helps.
    """
    with torch.no_grad(), seeded(seed, x.device):
        outputs = model(x)
    if not probabilities(outputs):
        return None
    (logarithm,) = slopes(
        lambda offset: Logarithm(model)(x + offset),
        torch.zeros_like(x),
        y,
        [1 / 255],
        draws=draws,
        seed=seed,
        directions=1,
        along=True,
    )
    found = joined([logarithm], seed=seed)
    right = not (found.silent or found.unclear or found.outside(NEARLY))
    saturated = float((outputs.amax(1) > 1 - SATURATED).double().mean()) >= 0.5
    if not right and not saturated:
        return None
    layers = [c for c in _calls(model, x[:1]) if isinstance(c.module, nn.Softmax)]
    same = [c for c in layers if c.returned is not None and c.returned.shape == outputs[:1].shape]
    if same:
        return Blocking(same[-1].name, type(same[-1].module).__name__, None, True, softmax=True)
    return Blocking("", type(model).__name__, None, False, softmax=True)


def probabilities(outputs: Float[Tensor, "b k"]) -> bool:
    """Whether each row is a distribution."""
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-3).all())


class Logarithm(nn.Module):
    """The logarithm of a model's probabilities: its logits, but for a constant, where float32 holds them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.model(x)
        return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()


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

    names = {module: name for name, module in model.named_modules()}
    hooks = [h for m in names for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with torch.no_grad(), seeded(0, x.device):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _tensor(value: object) -> Tensor | None:
    return value.detach() if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 else None


def _off(model: nn.Module, call: _Call, side: str, x: Tensor, y: Tensor, *, draws: int, seed: int) -> bool:
    """Whether the slope, of the features that go into a module or come out of it, is off or too uncertain."""
    features = call.given if side == "input" else call.returned
    assert features is not None
    spread = float(features.std())
    if spread == 0:
        return False

    def answer(offset: Tensor) -> Tensor:
        with _offset(call.module, side, offset):
            return model(x)

    how: dict[str, Any] = {"draws": draws, "seed": seed, "directions": 1, "along": True}
    (found,) = slopes(answer, torch.zeros_like(features), y, [OFFSET * spread], **how)
    slope = joined([found], seed=seed)
    return slope.outside(NEARLY) or (slope.slope is not None and slope.high - slope.low > UNSURE)


@contextmanager
def _offset(module: nn.Module, side: str, offset: Tensor) -> Iterator[None]:
    """Add `offset` to what the first call of `module` is given, or returns."""
    done = False

    def before(module: nn.Module, args: tuple) -> Any:
        nonlocal done
        if done:
            return None
        done = True
        return (args[0] + offset, *args[1:])

    def after(module: nn.Module, args: tuple, output: Tensor) -> Any:
        nonlocal done
        if done:
            return None
        done = True
        return output + offset

    if side == "input":
        hook = module.register_forward_pre_hook(before)
    else:
        hook = module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()
