"""Checks of a model, its images and its labels by one forward pass, before anything is computed."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gsem._env import FEWER, require_room
from gsem.nn.gsem import IntegerNoise
from gsem.rng import seeded

ImagesLike = Float[Tensor, "b c h w"] | np.ndarray
LabelsLike = Int[Tensor, " b"] | np.ndarray
Place = Literal["attribute", "key", "first"]
"""Where an output holds the logits: `output.logits`, `output["logits"]` or `output[0]`."""

# Images of the one forward pass that shows what a model returns.
PROBED = 8
# Nothing but pixels in 0..255 has so large a value: normalised images end at about 3.
BRIGHT = 16

NO_GRADIENT = (
    "the model has no gradient with respect to its images. If a layer of it has none (rounding, a threshold, argmax, "
    'detach), attack a copy that passes it: gsem.straight_through(model, "LAYER"); black-box attacks need no gradient: '
    "square and rays"
)
_INFERENCE_MODE = "inside torch.inference_mode() nothing has a gradient: attack outside it"
_ZERO_GRADIENT = (
    "the gradient of the logits is zero at each of the first {count} images, where attacks that follow it do not move. "
    'gsem.straight_through(model, "LAYER") passes a layer that blocks it; square and rays need no gradient'
)
_PROBABILITIES = (
    "the model returns probabilities, not logits: take off its softmax; attacks on probabilities are weaker"
)
_SQUASHED = (
    "all logits of the first {count} images lie in [0, 1], as behind a sigmoid. If the model ends in one, take it off: "
    "attacks on probabilities are weaker"
)


class NotFinite(ValueError):
    """A logit, a loss or a pixel is NaN or infinite; the image is named."""


class NoGradient(ValueError, RuntimeError):
    """Autograd finds no dependence of the logits on the images. (A RuntimeError, as autograd's own is.)"""


def checked(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    what: str = "label",
    /,
    *,
    eps: float | str,
    norm: str = "Linf",
    **counts: int,
) -> tuple[nn.Module, Float[Tensor, "b c h w"], Int[Tensor, " b"], float]:
    """The arguments of an evaluation or an attack, in the form that the code works with.

    Args:
        model: see `plain_logits`.
        x: images [b, c, h, w] in [0, 1]; a numpy array takes the model's device and floating-point type.
        y: labels [b], integers.
        what: what y holds, for messages: "label" or "target".
        eps: radius, in the unit of the images; a text like "8/255" is a number too.
        norm: "Linf" or "L2".
        counts: integers of at least 1, by name.

    Returns:
        the model as one of plain logits, x and y as tensors, eps as a number.

    Raises:
        ValueError: naming the argument, what it is and what it must be.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model must be a torch.nn.Module, not a {type(model).__name__}")
    x = to_images(x, model)
    y = to_labels(y, x, what)
    eps = to_number("eps", eps)
    if not (eps > 0 and eps < float("inf")):
        raise ValueError(f"eps must be positive, in the unit of images in [0, 1], not {eps}")
    if norm not in ("Linf", "L2"):
        raise ValueError(f"norm {norm!r} is unknown: it is 'Linf' or 'L2'")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {count!r}")
    return plain_logits(model, x, y, what), x, y, eps


def to_number(name: str, value: float | str) -> float:
    """A number, also from a text like "8/255".

    Raises:
        ValueError: a text that is no number.
    """
    if not isinstance(value, str):
        return value
    try:
        top, slash, bottom = value.partition("/")
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name} = {value!r} is neither a number nor a fraction like '8/255'") from None


def to_images(x: ImagesLike, model: nn.Module) -> Float[Tensor, "b c h w"]:
    """Images in [0, 1] as a tensor.

    Raises:
        ValueError: something else, with what makes it images in [0, 1] where that is known.
    """
    if isinstance(x, np.ndarray):
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
        x = torch.from_numpy(np.ascontiguousarray(x))
        require_room(x, like.device, FEWER)
        x = x.to(like.device)
        x = x.to(like.dtype) if x.is_floating_point() else x
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be images [b, c, h, w], a tensor or a numpy array, not a {type(x).__name__}")
    if x.ndim == 4 and not x.is_floating_point():
        raise ValueError(f"x holds {x.dtype}; images are floating-point numbers in [0, 1]: divide by 255 (x / 255)")
    if x.ndim != 4:
        one = "; one image becomes a batch by x[None]" if x.ndim == 3 else ""
        raise ValueError(f"x must be floating-point images [b, c, h, w], not {x.dtype} {tuple(x.shape)}{one}")
    x = x.detach()
    if not len(x) or bool(((x >= 0) & (x <= 1)).all()):
        return x
    bad = ~x.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"images must lie in [0, 1]: image {int(bad.nonzero()[0])} holds a pixel that is NaN or infinite"
        )
    low, high = x.min().item(), x.max().item()
    way = "wrap a network that expects normalised input in gsem.normalized(model, mean, std)"
    if low >= 0 and high > BRIGHT:
        way = "divide them by 255 (x / 255)"
    elif low > -0.01 and high < 1.01:
        way = "what rounding or resizing left outside, x.clamp(0, 1) brings back"
    raise ValueError(f"images must lie in [0, 1], not [{low:g}, {high:g}]; {way}")


def to_labels(y: LabelsLike, x: Tensor, what: str = "label") -> Int[Tensor, " b"]:
    """Labels of the images as an int64 tensor.

    Raises:
        ValueError: not one integer for each image.
    """
    name = {"label": "y"}.get(what, what)
    if isinstance(y, np.ndarray):
        y = torch.from_numpy(np.ascontiguousarray(y)).to(x.device)
        y = y if y.is_floating_point() else y.long()
    if not isinstance(y, Tensor):
        raise ValueError(f"{name} must be {len(x)} labels, a tensor or a numpy array, not a {type(y).__name__}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        hint = ""
        if y.ndim == 2 and len(y) == len(x) and y.shape[1] > 1:
            hint = f"; of one-hot labels take {name}.argmax(1)"
        elif y.shape == x.shape[:1] and not y.is_floating_point():
            hint = f": take {name}.long()"
        raise ValueError(f"{name} must be {len(x)} int64 labels, not {y.dtype} {tuple(y.shape)}{hint}")
    return y


def check_eval_mode(model: nn.Module) -> None:
    """Refuse a BatchNorm or Dropout in train mode.

    Raises:
        ValueError: naming the layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"BatchNorm layer {name or 'the model'!r} is in train mode: an attack would see the statistics "
                "of its own batch, and change them. Call model.eval() first"
            )
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{type(module).__name__} layer {name or 'the model'!r} is in train mode: it would drop other "
                "features in every forward pass. Call model.eval() first"
            )


class Logits(nn.Module):
    """A model whose output holds the logits, as a model that returns them: [b, c, h, w] → [b, k]."""

    def __init__(self, model: nn.Module, place: Place):
        super().__init__()
        self.model, self.place = model, place
        self.training = model.training  # not train(): it would reach into the model

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        # Where the logits are is known beforehand, so that torch.fx can trace this.
        output = self.model(x)
        if self.place == "attribute":
            return output.logits
        return output["logits"] if self.place == "key" else output[0]


class Scores(nn.Module):
    """A model that returns integers, as one of logits: integer scores [b, k] as they are, classes [b] one-hot."""

    def __init__(self, model: nn.Module, classes: int | None):
        """classes: how many there are, where the model returns classes; one more column takes any other answer."""
        super().__init__()
        self.model, self.classes = model, classes
        self.training = model.training

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        output = self.model(x)
        if self.classes is not None:
            output = F.one_hot(output.long().clamp(-1, self.classes) % (self.classes + 1), self.classes + 1)
        return output.to(x.dtype)


def without_logits(model: nn.Module) -> nn.Module:
    """The network inside what `plain_logits` put around it, with the names of its layers; any other model itself."""
    while type(model) in (Logits, Scores):
        model = cast(nn.Module, model.model)
    return model


def changed_inside(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """`change` of the network inside what `plain_logits` put around it, with the same around it."""
    if type(model) is Logits:
        return Logits(changed_inside(model.model, change), model.place)
    if type(model) is Scores:
        return Scores(changed_inside(model.model, change), model.classes)
    return change(model)


def plain_logits(model: nn.Module, x: Float[Tensor, "b c h w"], y: Int[Tensor, " b"], what: str = "label") -> nn.Module:
    """Check the model on its first images, and wrap it in a `Logits` where its output only holds the logits.

    This takes a forward pass. It leaves torch's random state and the model's noise as they were.

    Args:
        model: images [b, c, h, w] in [0, 1] → logits [b, k]; or an object or dict with `logits`, or a tuple that
            begins with them, of which the logits are taken. Integers, scores [b, k] or classes [b], are taken too; they
            have no gradient. In eval mode.
        x, y: images, and their labels in 0 … k − 1.
        what: what y holds, for messages.

    Raises:
        ValueError: a layer in train mode whose answer depends on it; a model that does not run on the images, writes
            to them, or returns something else; a label that it does not have.
        NotFinite: logits that are NaN or infinite; the image is named.

    Warns:
        UserWarning: where the logits were taken from; a model that returns integers or probabilities, or
            logits in [0, 1] only; a BatchNorm without running statistics.
    """
    check_eval_mode(model)
    # A folded model was made from a model that was checked.
    if not len(x) or hasattr(model, "logits_of_draws"):
        return model
    some = x[:PROBED].detach().clone()
    output = _answer(model, some)
    if not torch.equal(some, x[:PROBED]):
        raise ValueError("the model changes its images in place (like x.mul_(2)): let it work on a copy, x.clone()")
    place = _place(output)
    if place is not None:
        model = Logits(model, place)
    logits = _answer(model, some)
    if place is not None:
        shape = f", {list(logits.shape)} for {len(some)} images"
        _warn(f"the model returns a {type(output).__name__}: {_TAKEN[place]} taken for the logits{shape}")
    if (
        not logits.is_floating_point()
        and not logits.is_complex()
        and logits.ndim in (1, 2)
        and len(logits) == len(some)
    ):
        model, logits = _with_scores(model, some, y, logits)
    _check_logits(logits, some)
    _check_classes(y, logits.shape[1], what)
    _check_modes(model, some, logits)
    if type(model) is not Scores and are_probabilities(logits):
        _warn(_PROBABILITIES)
    elif type(model) is not Scores and bool(((logits >= 0) & (logits <= 1)).all()):
        _warn(_SQUASHED.format(count=len(some)))
    _warn_of_batch_statistics(model)
    return model


def are_probabilities(outputs: Float[Tensor, "b k"]) -> bool:
    """Whether each row is a distribution over the classes."""
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-3).all())


def logits_place(model: nn.Module, x: Float[Tensor, "b c h w"], num_classes: int) -> Place | None:
    """Where a network that is to be trained holds its logits, in train mode and in eval mode; None: it returns them.

    The network is not changed: a copy of it runs.

    Args:
        x: a few images like those of the data.
        num_classes: of the data.

    Raises:
        ValueError: a network that cannot be copied, does not run on the images, returns something else, holds its
            logits elsewhere in train mode than in eval mode, or has not one logit for each class.
    """
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied by copy.deepcopy ({type(error).__name__}: {error}), as averaged weights and "
            "the attack need"
        ) from error
    trained, evaluated = (_answer(model.train(mode), x) for mode in (True, False))
    place = _place(evaluated)
    if _place(trained) != place:
        raise ValueError(
            f"the model returns a {type(evaluated).__name__} in eval mode, a {type(trained).__name__} in train mode: "
            "wrap it in a module that returns the logits in both"
        )
    logits = evaluated if place is None else _answer(Logits(model, place), x)
    _check_logits(logits, x)
    if logits.shape[1] != num_classes:
        raise ValueError(f"the model returns {logits.shape[1]} logits, but the data have {num_classes} classes")
    return place


def check_gradient(model: nn.Module, x: Float[Tensor, "b c h w"]) -> None:
    """Check that the model has the gradient that white-box attacks follow.

    Raises:
        NoGradient: in autograd, the logits do not depend on the images.

    Warns:
        UserWarning: a gradient that is zero at each of the first images.
    """
    some = x[:PROBED].detach().requires_grad_()
    with _untouched(model, x.device), torch.enable_grad():
        logits = model(some)
        # Weights that no symmetry of the classes cancels; the plain sum of a softmax has no gradient, for one.
        weights = torch.cos(torch.arange(logits.shape[1], device=x.device, dtype=logits.dtype)).expand_as(logits)
        grad = gradient(logits, some, weights)
    if not bool(grad.any()):
        _warn(_ZERO_GRADIENT.format(count=len(some)))


def gradient(value: Tensor, x: Tensor, weights: Tensor | None = None, *, retain_graph: bool = False) -> Tensor:
    """The gradient of a number (or, weighted, of several) with respect to x.

    Raises:
        NoGradient: there is none.
    """
    found: Tensor | None = None
    if value.requires_grad:
        (found,) = torch.autograd.grad(value, x, weights, retain_graph=retain_graph, allow_unused=True)
    if found is None:
        raise NoGradient(NO_GRADIENT if not torch.is_inference_mode_enabled() else _INFERENCE_MODE)
    return found


_TAKEN = {"attribute": "its .logits are", "key": "its ['logits'] are", "first": "its first element is"}


def _place(output: object) -> Place | None:
    if isinstance(output, Tensor):
        return None
    if isinstance(getattr(output, "logits", None), Tensor):
        return "attribute"
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return "key"
    if isinstance(output, tuple | list) and len(output) and isinstance(output[0], Tensor):
        return "first"
    keys = f" with the keys {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
    raise ValueError(
        f"the model returns a {type(output).__name__}{keys}, not logits [b, k]: give a tensor, an object or dict with "
        "logits, or a tuple that begins with them"
    )


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Forward passes in here leave torch's random state, and the seeded noise of the model, where they were."""
    keys = [(m.key, m.key.clone()) for m in model.modules() if isinstance(m, IntegerNoise)]
    try:
        with seeded(0, device):
            yield
    finally:
        for key, former in keys:
            key.copy_(former)


def _answer(model: nn.Module, some: Tensor) -> Tensor:
    try:
        with _untouched(model, some.device), torch.no_grad():
            return model(some)
    except ValueError:
        raise
    except Exception as error:
        shape, reason = list(some.shape), f"{type(error).__name__}: {' '.join(str(error).split())}"
        if shape[3] in (1, 3, 4) and shape[1] > 4:
            reason += ". Are the images [b, h, w, c]? x.permute(0, 3, 1, 2) makes them [b, c, h, w]"
        images = f"images {shape} ({some.dtype}, {some.device})"
        raise ValueError(f"the model does not run on {images}: {reason}") from error


def _with_scores(model: nn.Module, some: Tensor, y: Tensor, output: Tensor) -> tuple[nn.Module, Tensor]:
    """A model that returns integers as one of logits, and its logits."""
    classes = None if output.ndim == 2 else int(max(y.max(), output.max())) + 1
    what = "classes" if output.ndim == 1 else "integer scores"
    _warn(f"the model returns {what}, which have no gradient: black-box attacks alone (square, rays) can be made on it")
    model = Scores(model, classes)
    return model, _answer(model, some)


def _check_logits(logits: Tensor, some: Tensor) -> None:
    if logits.ndim != 2 or len(logits) != len(some) or not logits.is_floating_point():
        one = "; one logit z for two classes becomes two by torch.stack([-z, z], 1)" if logits.ndim == 1 else ""
        raise ValueError(
            f"for images {list(some.shape)} the model returns {logits.dtype} {list(logits.shape)}, not floating-point "
            f"logits [{len(some)}, k]{one}"
        )
    if logits.shape[1] == 1:
        raise ValueError(
            "the model returns one logit for each image; one logit z for two classes becomes two by "
            "torch.cat([-z, z], 1)"
        )
    bad = ~logits.isfinite().all(1)
    if bool(bad.any()):
        raise NotFinite(f"image {int(bad.nonzero()[0])}: the model's logits are not finite")


def _check_classes(y: Tensor, classes: int, what: str) -> None:
    outside = (y < 0) | (y >= classes)
    if not bool(outside.any()):
        return
    image = int(outside.nonzero()[0])
    problem = f"image {image} has {what} {int(y[image])}, but the model has {classes} classes"
    if int(y.min()) == 1 and int(y.max()) == classes:
        problem += "; labels start at 0: take y - 1"
    raise ValueError(problem)


def _warn_of_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            _warn(
                f"BatchNorm layer {name or 'the model'!r} keeps no running statistics (track_running_stats=False): an "
                "image's logits depend on the other images of its batch, and so do the accuracies"
            )
            return


def _check_modes(model: nn.Module, some: Tensor, logits: Tensor) -> None:
    """Refuse a module of any other kind whose output differs in eval mode, like F.dropout(x, training=self.training).

    (Only where two passes on the same random numbers agree can a third one show it.)
    """
    named = [(name, module) for name, module in model.named_modules() if module.training]
    if not named or not torch.equal(_answer(model, some), logits) or not _differs(model, some, logits, named):
        return
    one = [(name, module) for name, module in named if _differs(model, some, logits, [(name, module)])] or named
    name, module = one[0]
    raise ValueError(
        f"layer {name or 'the model'!r} ({type(module).__name__}) is in train mode, where its output differs. "
        "Call model.eval() first"
    )


def _differs(model: nn.Module, some: Tensor, logits: Tensor, named: list[tuple[str, nn.Module]]) -> bool:
    # Flag by flag: a train() or eval() of the model's own may do more than set them.
    for _, module in named:
        module.training = False
    try:
        # (In eval mode, torch computes attention by another kernel: rounding differs.)
        return not torch.allclose(_answer(model, some), logits, rtol=1e-3, atol=1e-4)
    finally:
        for _, module in named:
            module.training = True


def _warn(text: str) -> None:
    """At the line outside this package that called."""
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("gsem.", "contextlib")):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(text, stacklevel=depth)
