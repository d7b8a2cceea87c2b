"""Another gradient for a network's layers, with the same predictions: what attacks differentiate in its place.

BPDA (Athalye et al., ICML 2018, section 4): the forward pass is the network's own; in the backward pass a layer that
has no useful gradient is replaced by the identity (`straight_through`) or by a module (`surrogate`).
"""

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsem.nn.contract import changed_inside, without_logits
from gsem.nn.folded import FoldedModel, fold
from gsem.nn.gsem import GSeM, pass_through
from gsem.nn.insert import replace_at
from gsem.nn.probe import find_layer

# The name, among layers to pass, of the softmax at the end of a model's own forward, which is no layer.
SOFTMAX = "softmax"
# Offsets of one averaged gradient.
OFFSETS = 10


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
            f"layer {name!r} turns {list(x.shape)} into {list(value.shape)}: a straight-through gradient needs a layer "
            "that keeps the shape. gsem.surrogate(model, LAYER, module) takes the gradient of a module instead"
        )
    return pass_through(x, value)


class Surrogate(nn.Module):
    """A layer whose backward is that of another module; see `surrogate`."""

    def __init__(self, layer: nn.Module, module: nn.Module, name: str):
        super().__init__()
        self.layer, self.module, self.name = layer, module, name
        self.training = layer.training

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return _replaced(self.module(x), self.layer(x.detach()), self.name)


def _replaced(given: Tensor, value: Tensor, name: str) -> Tensor:
    if value.shape != given.shape:
        raise ValueError(
            f"the surrogate of layer {name!r} returns {list(given.shape)}, the layer itself {list(value.shape)}: both "
            "must return the same shape"
        )
    return pass_through(given, value)


class Secant(nn.Module):
    """A layer whose backward, feature by feature, is the slope of its secant: (f(z + h) − f(z − h)) / 2h.

    For layers that act on each feature alone and jump, like a threshold or a quantiser: autograd misses the jumps, and
    the identity counts changes that the layer swallows. A step of an attack moves features by about h.
    """

    def __init__(self, layer: nn.Module, step: float, name: str):
        """step: h, in standard deviations of an image's features at the layer."""
        super().__init__()
        self.layer, self.step, self.name = layer, step, name
        self.training = layer.training

    def forward(self, x: Float[Tensor, "b *s"]) -> Float[Tensor, "b *s"]:
        given = x.detach()
        h = _reach(given, self.step)
        slope = (self.layer(given + h) - self.layer(given - h)) / (2 * h)
        return _sloped(x, self.layer(given), slope, self.name)


class _Sloped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def _reach(x: Tensor, step: float) -> Tensor:
    """[b, 1, …]: so many standard deviations of each image's features."""
    std = x.flatten(1).std(1).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    return step * std.view(-1, *[1] * (x.ndim - 1))


def _sloped(x: Tensor, value: Tensor, slope: Tensor, name: str) -> Tensor:
    return _Sloped.apply(x, _straight(x, value, name), slope)


# Their conditions, and a Function, cannot be traced.
for _name in ("_straight", "_replaced", "_reach", "_sloped"):
    torch.fx.wrap(_name)


def straight_through(model: nn.Module, layer: str | Sequence[str]) -> nn.Module:
    """A copy of `model` in which the gradient passes a layer as if it were the identity; its output is the same.

    The corrected gradient for a layer of one's own that has none, or a useless one: rounding, a threshold, a
    decoder (the straight-through estimator; BPDA with the identity, Athalye et al., ICML 2018, section 4.1). Attack
    the copy, and score the points by the model.

    Args:
        model: any network; it is copied, not changed.
        layer: the name of the layer, as `model.named_modules()` gives it, or several names. Each takes one tensor and
            keeps its shape; its own parameters get no gradient.

    Raises:
        ValueError: no such layer, or a layer inside another one of them; in the forward pass, a layer that changes the
            shape.
    """
    names = [layer] if isinstance(layer, str) else list(layer)
    for name in names:
        find_layer(model, name, "layer")
        if outer := next((other for other in names if name.startswith(f"{other}.")), None):
            raise ValueError(f"layer {name!r} lies inside layer {outer!r}, which is passed as a whole: leave it out")
    model = copy.deepcopy(model)
    for name in names:
        found = find_layer(model, name, "layer")
        if not isinstance(found, StraightThrough):  # (two names of one layer)
            _put(model, found, StraightThrough(found, name))
    return model


def surrogate(model: nn.Module, layer: str, module: nn.Module) -> nn.Module:
    """A copy of `model` in which a layer has the gradient of `module`; its output is the same.

    For a layer that changes the shape, or whose gradient is better approximated by something else than the identity:
    a decoder by an interpolation, a hard decision by a soft one (BPDA, Athalye et al., ICML 2018, section 4.2). Attack
    the copy, and score the points by the model; `gsem.audit(model, ..., surrogate=copy)` does both.

    Args:
        model: any network; it is copied, not changed.
        layer: the name of the layer, as `model.named_modules()` gives it. It takes one tensor.
        module: takes what the layer takes, and returns the shape that it returns. It is used as it is.

    Raises:
        ValueError: no such layer; in the forward pass, a module that returns another shape.
    """
    find_layer(model, layer, "layer")
    model = copy.deepcopy(model)
    found = find_layer(model, layer, "layer")
    _put(model, found, Surrogate(found, module, layer))
    return model


def _put(model: nn.Module, found: nn.Module, other: nn.Module) -> None:
    """`other` in the place of a layer, under all of its names."""
    replace_at([(m, key) for m in model.modules() for key, child in m._modules.items() if child is found], other)


class SmoothedGradient(nn.Module):
    """A model whose gradient is averaged over Gaussian offsets of the image; its output is the model's own.

    For activations that jump, whose gradient at one point does not predict a step (Tramèr et al., NeurIPS 2020, on
    k-winners-take-all).
    """

    def __init__(self, model: nn.Module, std: float, offsets: int = OFFSETS):
        """std: of the offsets, in the unit of the images. They come from torch's random stream."""
        super().__init__()
        self.model, self.std, self.offsets = model, std, offsets
        self.training = model.training

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return self.model(x)
        with torch.no_grad():
            value = self.model(x)
        around = sum((self.model(x + self.std * torch.randn_like(x)) for _ in range(self.offsets)), torch.zeros(()))
        assert isinstance(around, Tensor)
        return pass_through(around / self.offsets, value)


class Logarithm(nn.Module):
    """The logarithm of a model's probabilities: its logits, but for a constant, where float32 holds them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        outputs = self.model(x)
        return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()


def repaired(model: nn.Module, *, through: Sequence[str] = (), smooth: float = 0.0, secant: float = 0.0) -> nn.Module:
    """`model` with the same predictions and another gradient, for attacks to differentiate.

    Args:
        model: a network, or a folded model, of whose network the result is folded anew.
        through: names of layers that the gradient passes: a GSeM takes its corrected gradient, any other layer a
            straight-through one. `SOFTMAX`, where no layer has that name: the logarithm of the output is attacked.
        smooth: standard deviation of Gaussian offsets over which the gradient is averaged, in the unit of the images.
        secant: step of the `Secant` that those layers have in place of the identity; 0: the identity.

    Raises:
        ValueError: no such layer; a secant without layers; in the forward pass, a layer that changes the shape.
    """
    if secant and not through:
        raise ValueError("secant is for the layers of through: name them, like through=LAYER:secant=0.1")
    network = model.source if isinstance(model, FoldedModel) else model
    ends = SOFTMAX in through and SOFTMAX not in dict(without_logits(network).named_modules(remove_duplicate=False))
    through = [name for name in through if not (ends and name == SOFTMAX)]
    if through:
        passed = changed_inside(network, partial(_passed, layers=through, secant=secant))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a network that cannot be folded: the caller has folded it before
            model = fold(passed) if isinstance(model, FoldedModel) else passed
    model = Logarithm(model) if ends else model
    return SmoothedGradient(model, smooth) if smooth else model


def _passed(network: nn.Module, layers: Sequence[str], secant: float) -> nn.Module:
    others = [name for name in layers if not isinstance(find_layer(network, name, "layer"), GSeM)]
    network = straight_through(network, others)
    for name in layers:
        module = network.get_submodule(name)
        if isinstance(module, GSeM):
            module.gradient = "corrected"
        elif secant and isinstance(module, StraightThrough):
            _put(network, module, Secant(module.layer, secant, name))
    return network
