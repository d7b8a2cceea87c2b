"""Insert a GSeM into any torch model, or normalise its input."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsem.nn.gsem import Gradient, GSeM
from gsem.nn.probe import channel_axis, check_changeable, feature_map, find_layer, images, probe, run


def insert(
    model: nn.Module,
    after: str,
    *,
    levels: int = 6,
    noise: int = 4,
    gradient: Gradient = "corrected",
    quantiser: bool = True,
    example: Float[Tensor, "b c h w"] | None = None,
) -> nn.Module:
    """Put a `GSeM` behind the layer named `after`, in place: the layer becomes `Sequential(layer, GSeM)`.

    The weights of the layer are then found under `NAME.0`, so pretrained weights are loaded *before* the
    insertion; the GSeM's, under `NAME.1`, are new (torch's default initialisation, from torch's random stream)
    and must be trained. The paper's place is behind the stem: its last layer before the first stage.

    The channels are found by a forward pass in eval mode, which changes neither the model nor torch's random state;
    a last one checks that the GSeM is called. The axis of the channels is the one that keeps its size when the
    image's size changes. Behind a layer of [b, h, w, c] (as in Swin) the GSeM is placed between two permutations, and
    its weights are under `NAME.1.gsem`. If the model takes images of one size only, the axes of height and width are
    those in the proportion of the image; where all three are alike, axis 1 is taken, with a warning.

    Args:
        model: any network of images; it is changed, and returned.
        after: the name of the layer, as `model.named_modules()` gives it. A layer that has several names
            is replaced under all of them.
        levels, noise, gradient, quantiser: of the `GSeM`.
        example: an input of the model, for the forward pass; it is taken to the model's device and, unless it holds
            integers, to its dtype. Without one, square images of the usual sides are tried, with the channels of the
            first convolution.

    Raises:
        ValueError: no such layer; a layer that is not called exactly once in a forward pass, or whose output is
            no feature map; a model that does not run, that is compiled, or that is TorchScript; arguments that `GSeM`
            refuses. The model is as before.

    Warns:
        UserWarning: the channels cannot be distinguished from height and width; axis 1 is taken.
    """
    check_changeable(model, after)
    layer = find_layer(model, after)
    seen = probe(model, layer, images(model, example), given=example is not None)
    features = feature_map(model, after, layer, seen)
    axis = channel_axis(model, after, layer, seen)
    gsem = GSeM(features.shape[axis], levels, noise, gradient, quantiser)
    behind = gsem if axis == 1 else ChannelsLast(gsem)
    # The output's device and dtype, not the layer's own: a ReLU has neither.
    behind.to(device=features.device, dtype=features.dtype).train(layer.training)
    together = (nn.Sequential if seen.inputs == 1 else _SequentialOfSeveral)(layer, behind)
    together.training = layer.training  # not train(): it would reach into the layer
    places = [(m, key) for m in model.modules() for key, child in m._modules.items() if child is layer]
    replace_at(places, together)
    # A parent may reach its layer otherwise than as its child, or do more with it than call it.
    try:
        reached = run(model, gsem, seen.image).calls[gsem] == 1
        trouble = "does not reach it"
    except Exception as error:
        reached = False
        trouble = f"fails: {error}"
    if not reached:
        replace_at(places, layer)
        raise ValueError(f"with a Sequential of layer {after!r} and a GSeM in its place, the model {trouble}")
    return model


class ChannelsLast(nn.Module):
    """A `GSeM` of feature maps [b, h, w, c]."""

    def __init__(self, gsem: GSeM):
        super().__init__()
        self.gsem = gsem

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.gsem(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _SequentialOfSeveral(nn.Sequential):
    """A Sequential whose first module takes several inputs."""

    def forward(self, *args, **kwargs):
        return self[1](self[0](*args, **kwargs))


def replace_at(places: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Put `module` under each of these names of these parents."""
    for parent, key in places:
        setattr(parent, key, module)


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
    """Wrap a network that expects normalised input, so that it takes pixels in [0, 1] and eps stays in pixels.

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


# Usual means and standard deviations of the training pixels in [0, 1].
NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def normalization(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of a name of `NORMALIZATION`, or of a text like `0.5,0.5,0.5/0.2,0.2,0.2`.

    Raises:
        ValueError: neither of them.
    """
    if text in NORMALIZATION:
        return NORMALIZATION[text]
    try:
        mean, std = (tuple(float(word) for word in part.split(",")) for part in text.split("/"))
    except ValueError:
        known = ", ".join(NORMALIZATION)
        raise ValueError(
            f"--normalize {text!r} is none of {known}, nor MEAN/STD like 0.5,0.5,0.5/0.2,0.2,0.2"
        ) from None
    return mean, std


def _numbers(name: str, value: float | Sequence[float]) -> list[float]:
    try:
        numbers = [float(value)] if isinstance(value, int | float) else [float(v) for v in value]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number or a sequence of numbers, not {value!r}") from error
    if not numbers or not all(math.isfinite(v) for v in numbers):
        raise ValueError(f"{name} must be one finite number or more, not {value!r}")
    return numbers
