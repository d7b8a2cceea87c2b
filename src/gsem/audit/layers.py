"""Which layer blocks the gradient: the comparison of `slopes`, made from inside the network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsem.audit.slopes import NEARLY, joined, slopes
from gsem.streams import stream

# Offset of a layer's features, in standard deviations of them: about what 1/255 is to images.
OFFSET = 0.02


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

    def __str__(self) -> str:
        if self.layer:
            return f"layer {self.layer!r} ({self.kind})"
        before = "" if self.before is None else f", before its layer {self.before!r}"
        return f"the forward of {self.kind} itself{before}"


@dataclass
class _Call:
    name: str
    module: nn.Module
    parent: str | None
    given: Tensor | None = None
    returned: Tensor | None = None


def blocking(
    model: nn.Module, x: Float[Tensor, "b c h w"], y: Tensor, *, draws: int, seed: int, say: Callable[[str], None]
) -> Blocking | None:
    """The innermost module from whose input the gradient is wrong and from whose output it is right.

    From the outside in: of the modules that a module calls, in their order, the first which does that to the
    gradient is looked into next. None where the wrong is not between one module's input and its output.
    """
    calls = _calls(model, x)
    call = calls[0]
    right_from: str | None = None

    def wrong_at(call: _Call, side: str) -> bool:
        say(f"looking for the layer: {side} of {call.name or type(model).__name__}")
        return _off(model, call, side, x, y, draws=draws, seed=seed)

    while True:
        inside, right_from = None, None
        for child in [c for c in calls if c.parent == call.name]:
            if child.given is None or child.returned is None:
                continue
            if not wrong_at(child, "input"):
                right_from = child.name
                break
            if not wrong_at(child, "output"):
                inside = child
                break
        if inside is None:
            break
        call = inside
    if call is calls[0] and right_from is None and any(c.parent == call.name for c in calls):
        return None  # wrong from every layer on: it is not in one place
    assert call.given is not None and call.returned is not None
    return Blocking(call.name, type(call.module).__name__, right_from, call.given.shape == call.returned.shape)


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
        with torch.no_grad(), stream(0, x.device):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _tensor(value: object) -> Tensor | None:
    return value.detach() if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 else None


def _off(model: nn.Module, call: _Call, side: str, x: Tensor, y: Tensor, *, draws: int, seed: int) -> bool:
    """Whether the slope is off, of the features that go into a module or come out of it."""
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
    return joined([found], seed=seed).outside(NEARLY)


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
