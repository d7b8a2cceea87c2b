"""Forward passes that find out how a layer is called, what it returns, and which axis holds its channels."""

import difflib
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gsem.nn.gsem import eval_flags
from gsem.nn.gsem import noise as noise_of

# Sides of square images to try when the caller gives no example: CIFAR, ImageNet, then the less common.
_SIDES = (32, 224, 64, 28, 16, 8, 96, 128, 256)


def find_layer(model: nn.Module, after: str, argument: str = "after") -> nn.Module:
    if not isinstance(after, str) or after == "":
        raise ValueError(f"{argument} must name a layer inside the model, not {after!r}")
    # With duplicates: a layer that has two names is found by both.
    layers = dict(model.named_modules(remove_duplicate=False))
    if after in layers:
        return layers[after]
    names = [name for name in layers if name]
    near = difflib.get_close_matches(after, names, n=5)
    hint = f"near it are {', '.join(near)}" if near else f"its layers are {_listed(names)}"
    raise ValueError(f"the model has no layer {after!r}: {hint}")


def check_changeable(model: nn.Module, after: str) -> None:
    """Refuse a layer inside a module that would not notice its replacement.

    Raises:
        ValueError: the model, or a part of it that holds the layer, is TorchScript or compiled.
    """
    module: object = model
    for name in [*str(after).split("."), ""]:
        what = "the model" if module is model else f"its {type(module).__name__} around layer {after!r}"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{what} is TorchScript, where no layer can be replaced: insert before scripting or tracing"
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{what} is compiled, and would not see the new layer: insert first, and compile the result (what "
                "torch.compile was given is the compiled network's _orig_mod)"
            )
        module = getattr(module, name, None)


def images(model: nn.Module, example: Tensor | None) -> list[Tensor]:
    """Inputs to try, on the model's device and in its dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(t) for t in tensors):
        raise ValueError("the model has lazy layers whose shapes are not known yet: run it once first")
    like = next((t for t in tensors if t.is_floating_point()), torch.zeros(0))
    if example is not None:
        if not isinstance(example, Tensor) or example.ndim != 4:
            raise ValueError(f"example must be a tensor [b, c, h, w], not {_described(example)}")
        # Integers stay, for networks that take uint8.
        return [example.detach().to(like if example.is_floating_point() else like.device)]
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise ValueError("the model has no Conv2d to guess its input from: pass example=, an input of the model")
    # Two images: BatchNorm without running statistics refuses one.
    return [torch.full((2, conv.in_channels, s, s), 0.5, dtype=like.dtype, device=like.device) for s in _SIDES]


@dataclass
class Seen:
    """What a forward pass showed: the calls of each module, those that gave a feature map, and of one layer the
    last output in full and the number of inputs."""

    image: Tensor
    calls: dict[nn.Module, int]
    maps: set[nn.Module]
    output: object = None
    inputs: int = 1


def probe(model: nn.Module, layer: nn.Module, images: list[Tensor], *, given: bool) -> Seen:
    """What the forward pass of the first image that the model takes shows; `given` by the caller, or guessed.

    Raises:
        ValueError: it takes none of them.
    """
    failure: Exception | None = None
    for image in images:
        try:
            return run(model, layer, image)
        except Exception as error:
            failure = error
    if given:
        raise ValueError(
            f"the model does not run on the example, {_described(images[0])} ({failure}): give one that it takes in "
            "eval mode"
        ) from failure
    shapes = ", ".join(str(list(image.shape)) for image in images)
    raise ValueError(
        f"the model does not run on an input of shape {shapes} ({failure}): pass example=, an input it takes"
    ) from failure


def run(model: nn.Module, layer: nn.Module, image: Tensor) -> Seen:
    """A forward pass in eval mode without noise, which leaves no trace in the model."""
    # (TorchScript takes no hooks: nothing is seen of such parts.)
    seen = Seen(image, {m: 0 for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)}, set())

    def note(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        seen.calls[module] += 1
        if _is_map(output):
            seen.maps.add(module)
        if module is layer:
            # One that is given by name counts as two: a Sequential does not take it.
            seen.output, seen.inputs = output, len(args) + 2 * len(kwargs)

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in seen.calls]
    try:
        # The CPU's random state is always kept; of the accelerators, fork_rng keeps the CUDA devices it is given.
        fork = torch.random.fork_rng([image.device] if image.device.type == "cuda" else [])
        with eval_flags(model), fork, torch.no_grad(), noise_of(model, "off"):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def feature_map(model: nn.Module, after: str, layer: nn.Module, seen: Seen) -> Tensor:
    """The layer's output.

    Raises:
        ValueError: it is no feature map, or the layer is not called once.
    """
    calls = seen.calls[layer]
    if calls == 1 and isinstance(seen.output, Tensor) and _is_map(seen.output):
        return seen.output
    trouble = f"returns {_described(seen.output)}, not a floating tensor [b, c, h, w]"
    if calls == 0:
        trouble = "is not called in a forward pass"
    elif calls > 1:
        trouble = f"is called {calls} times in a forward pass, and a GSeM would follow each"
    fitting = [name for name, m in model.named_modules() if name and seen.calls[m] == 1 and m in seen.maps]
    raise ValueError(f"layer {after!r} {trouble}; layers with such an output are: {_listed(fitting)}")


def channel_axis(model: nn.Module, after: str, layer: nn.Module, seen: Seen) -> Literal[1, 3]:
    """The axis of the channels in the layer's output, [b, c, h, w] or [b, h, w, c]: the one that keeps its size.

    Raises:
        ValueError: images of another size change other axes than two neighbouring ones.

    Warns:
        UserWarning: the axes cannot be distinguished; axis 1 is taken.
    """
    assert isinstance(seen.output, Tensor)
    if type(layer) in (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm):
        return 1
    shape, (h, w) = list(seen.output.shape), seen.image.shape[2:]
    for other in (seen.image[..., : max(h // 2, 1), : max(w // 2, 1)], seen.image.repeat(1, 1, 2, 2)):
        try:
            output = run(model, layer, other).output
        except Exception:
            continue  # not every model takes every size
        changed = [axis for axis in (1, 2, 3) if isinstance(output, Tensor) and output.shape[axis] != shape[axis]]
        if changed in ([2, 3], [1, 2]):
            return 1 if changed == [2, 3] else 3
        if len(changed) > 1:
            raise ValueError(
                f"layer {after!r} gives {shape} for images of {h}×{w}, and of its sizes {len(changed)} change with "
                "them: a GSeM takes [b, c, h, w] or [b, h, w, c], and c stays"
            )
    # In one size only: height and width have the proportion of the image.
    first, last = (abs(math.log(shape[axis] * w / (shape[axis + 1] * h))) for axis in (2, 1))
    if abs(first - last) < 1e-6:
        warnings.warn(
            f"layer {after!r} gives {shape} for images of {h}×{w}, where any axis may be the channels: axis 1 is taken",
            stacklevel=3,
        )
    return 1 if first <= last else 3


def _is_map(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point()


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and type {value.dtype}"
    return f"a {type(value).__name__}"


def _listed(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
