"""Around any torch model: put a GSeM behind a layer of it, or let it take pixels in [0, 1]."""

import copy
import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gsem.module import Gradient, GSeM, pass_through
from gsem.module import noise as noise_of

# Sides of square images to try when the caller gives no example: CIFAR, ImageNet, then the less common.
_SIDES = (32, 224, 64, 28, 16, 8, 96, 128, 256)


def insert(
    model: nn.Module,
    after: str,
    *,
    levels: int = 6,
    noise: int = 4,
    gradient: Gradient = "corrected",
    example: Float[Tensor, "b c h w"] | None = None,
) -> nn.Module:
    """Put a `GSeM` behind the layer named `after`, in place: the layer becomes `Sequential(layer, GSeM)`.

    The weights of the layer are then found under `NAME.0`, so pretrained weights are loaded *before* the
    insertion; the GSeM's, under `NAME.1`, are new (torch's default initialisation, from torch's random stream)
    and want training. The paper's place is behind the stem: its last layer before the first stage.

    The channel count is found by a forward pass in eval mode, which changes neither the model nor torch's random
    state; a second one proves that the GSeM is reached. Axis 1 of the layer's output is taken for the channels:
    a [b, h, w, c] layout cannot be told from [b, c, h, w].

    Args:
        model: any network of images; it is changed, and returned.
        after: the name of the layer, as `model.named_modules()` gives it. A layer that stands under several names
            is replaced under all of them.
        levels, noise, gradient: of the `GSeM`.
        example: an input of the model, for the forward pass; it is taken to the model's device and dtype. Without
            one, square images of the usual sides are tried, with the channels of the first convolution.

    Raises:
        ValueError: no such layer; a layer that is not called exactly once in a forward pass, or whose output is
            not [b, c, h, w]; a model that does not run; arguments that `GSeM` refuses. The model is as before.
    """
    layer = _find(model, after)
    seen = _probe(model, layer, _images(model, example))
    features = _feature_map(model, after, layer, seen)
    gsem = GSeM(features.shape[1], levels=levels, noise=noise, gradient=gradient)
    # The output's device and dtype, not the layer's own: a ReLU has neither.
    gsem.to(device=features.device, dtype=features.dtype).train(layer.training)
    together = nn.Sequential(layer, gsem)
    together.training = layer.training  # not train(): it would reach into the layer
    places = [(m, key) for m in model.modules() for key, child in m._modules.items() if child is layer]
    _replace(places, together)
    # A parent may reach its layer otherwise than as its child, or do more with it than call it.
    try:
        reached = _run(model, gsem, seen.image).calls[gsem] == 1
        trouble = "does not reach it"
    except Exception as error:
        reached = False
        trouble = f"fails: {error}"
    if not reached:
        _replace(places, layer)
        raise ValueError(f"with a Sequential of layer {after!r} and a GSeM in its place, the model {trouble}")
    return model


def _replace(places: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    for parent, key in places:
        setattr(parent, key, module)


def _find(model: nn.Module, after: str, argument: str = "after") -> nn.Module:
    if not isinstance(after, str) or after == "":
        raise ValueError(f"{argument} must name a layer inside the model, not {after!r}")
    # With duplicates: a layer that stands under two names is found by both.
    layers = dict(model.named_modules(remove_duplicate=False))
    if after in layers:
        return layers[after]
    names = [name for name in layers if name]
    near = difflib.get_close_matches(after, names, n=5)
    hint = f"near it are {', '.join(near)}" if near else f"its layers are {_listed(names)}"
    raise ValueError(f"the model has no layer {after!r}: {hint}")


def _images(model: nn.Module, example: Tensor | None) -> list[Tensor]:
    """Inputs to try, on the model's device and in its dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(t) for t in tensors):
        raise ValueError("the model has lazy layers whose shapes are not known yet: run it once first")
    like = next((t for t in tensors if t.is_floating_point()), torch.zeros(0))
    if example is not None:
        if not isinstance(example, Tensor) or example.ndim != 4:
            raise ValueError(f"example must be a tensor [b, c, h, w], not {_described(example)}")
        return [example.detach().to(like)]
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise ValueError("the model has no Conv2d to guess its input from: pass example=, an input of the model")
    # Two images: BatchNorm without running statistics refuses one.
    return [torch.full((2, conv.in_channels, s, s), 0.5, dtype=like.dtype, device=like.device) for s in _SIDES]


@dataclass
class _Seen:
    """What a forward pass showed: the calls of each module, those that gave a feature map, an output in full."""

    image: Tensor
    calls: dict[nn.Module, int]
    maps: set[nn.Module]
    output: object = None


def _probe(model: nn.Module, layer: nn.Module, images: list[Tensor]) -> _Seen:
    """What the forward pass of the first image that the model takes shows."""
    failure: Exception | None = None
    for image in images:
        try:
            return _run(model, layer, image)
        except Exception as error:
            failure = error
    shapes = ", ".join(str(list(image.shape)) for image in images)
    raise ValueError(
        f"the model does not run on an input of shape {shapes} ({failure}): pass example=, an input it takes"
    ) from failure


def _run(model: nn.Module, layer: nn.Module, image: Tensor) -> _Seen:
    """A forward pass; of `layer`, the last output is kept."""
    seen = _Seen(image, dict.fromkeys(model.modules(), 0), set())

    def note(module: nn.Module, args: tuple, output: object) -> None:
        seen.calls[module] += 1
        if _is_map(output):
            seen.maps.add(module)
        if module is layer:
            seen.output = output

    hooks = [m.register_forward_hook(note) for m in seen.calls]
    try:
        with _undisturbed(model, image.device):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradient or noise; training flags, noise and torch's random state return at the end."""
    training = {m: m.training for m in model.modules()}
    # The CPU's state is always kept; of the accelerators, fork_rng needs to be told CUDA's devices.
    fork = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        # Flag by flag: a train() or eval() of the model's own may do more than set them.
        for m in training:
            m.training = False
        with fork, torch.no_grad(), noise_of(model, "off"):
            yield
    finally:
        for m, flag in training.items():
            m.training = flag


def _feature_map(model: nn.Module, after: str, layer: nn.Module, seen: _Seen) -> Tensor:
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


def _is_map(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point()


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and type {value.dtype}"
    return f"a {type(value).__name__}"


def _listed(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


class Normalized(nn.Module):
    """`model((x − mean) / std)`; see `normalized`."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor):
        super().__init__()
        self.model = model
        # Not persistent: they are arguments, as levels and noise are, and the state dict stays the network's own
        # under `model.`.
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.model((x - self.mean) / self.std)


def normalized(model: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]) -> nn.Module:
    """A network that wants normalised input, as one of pixels in [0, 1], so that eps stays in pixels.

    The result maps x to `model((x − mean) / std)`, and has the model's device, dtype and mode. The state dict is
    the model's with `model.` before its names.

    Args:
        model: the network; it is wrapped, not copied.
        mean, std: one number per channel, or one for all channels; in units of pixels in [0, 1].

    Raises:
        ValueError: a value that is not finite, a std that is not positive, or lengths that differ.
    """
    means, stds = _numbers("mean", mean), _numbers("std", std)
    if len(means) != len(stds) and not (isinstance(mean, int | float) or isinstance(std, int | float)):
        raise ValueError(f"mean has {len(means)} values and std has {len(stds)}: give one of each per channel")
    if min(stds) <= 0:
        raise ValueError(f"std must be positive, not {stds}")
    like = next((t for t in model.parameters() if t.is_floating_point()), torch.zeros(0))
    buffers = (torch.tensor(v, dtype=like.dtype, device=like.device).view(1, -1, 1, 1) for v in (means, stds))
    wrapped = Normalized(model, *buffers)
    wrapped.training = model.training  # not train(): it would reach into the model
    return wrapped


class StraightThrough(nn.Module):
    """A layer whose backward is the identity; see `straight_through`."""

    def __init__(self, layer: nn.Module, name: str):
        super().__init__()
        self.layer, self.name = layer, name
        self.training = layer.training  # not train(): it would reach into the layer

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return _straight(x, self.layer(x.detach()), self.name)


def _straight(x: Tensor, value: Tensor, name: str) -> Tensor:
    if value.shape != x.shape:
        raise ValueError(
            f"layer {name!r} turns {list(x.shape)} into {list(value.shape)}: a straight-through gradient needs a "
            "layer that keeps the shape"
        )
    return pass_through(x, value)


torch.fx.wrap("_straight")  # its condition cannot be traced


def straight_through(model: nn.Module, layer: str) -> nn.Module:
    """A copy of `model` in which the gradient passes the layer as if it were the identity; its answers are the same.

    The corrected gradient for a layer of one's own that has none, or a useless one: rounding, a threshold, a
    decoder (the straight-through estimator; BPDA with the identity, Athalye et al., ICML 2018, section 4.1). Attack
    the copy, judge by the model.

    Args:
        model: any network; it is copied, not changed.
        layer: the name of the layer, as `model.named_modules()` gives it. It takes one tensor and keeps its shape;
            its own parameters get no gradient.

    Raises:
        ValueError: no such layer; in the forward pass, a layer that changes the shape.
    """
    _find(model, layer, "layer")
    model = copy.deepcopy(model)
    found = dict(model.named_modules(remove_duplicate=False))[layer]
    places = [(m, key) for m in model.modules() for key, child in m._modules.items() if child is found]
    _replace(places, StraightThrough(found, layer))
    return model


def _numbers(name: str, value: float | Sequence[float]) -> list[float]:
    try:
        numbers = [float(value)] if isinstance(value, int | float) else [float(v) for v in value]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number or a sequence of numbers, not {value!r}") from error
    if not numbers or not all(math.isfinite(v) for v in numbers):
        raise ValueError(f"{name} must be one finite number or more, not {value!r}")
    return numbers
