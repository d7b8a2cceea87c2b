"""Checks of an attack's arguments before it begins, of its losses on the way, and of the points that it returns."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gsem.attacks._core import Targeted, distances
from gsem.attacks._types import Images, ImagesLike, LabelsLike, Norm
from gsem.losses import LOSSES, Loss
from gsem.nn.contract import NotFinite, checked


def aimed(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    target: LabelsLike | int | None,
    *,
    eps: float | str,
    norm: str,
    targets: int = 0,
    **counts: int,
) -> tuple[nn.Module, Tensor, Tensor, float]:
    """`checked` arguments of an attack. With a target: a `Targeted` model, and the targets in the place of y."""
    if targets:
        counts["targets"] = targets
        if target is not None:
            raise ValueError("give target, the classes to reach, or targets, a number of wrong classes; not both")
    if target is None:
        return checked(model, x, y, eps=eps, norm=norm, **counts)
    if isinstance(target, int):
        target = torch.full((len(x),), target)
    model, x, y, radius = checked(model, x, target, "target", eps=eps, norm=norm, **counts)
    return Targeted(model), x, y.to(x.device), radius


def checked_init(init: ImagesLike | None, x: Images, restarts: int) -> Images | None:
    """Starting points that the caller gives, in the form of x."""
    if init is None:
        return None
    init = torch.as_tensor(init).to(x)
    if init.shape != x.shape or restarts != 1:
        raise ValueError(f"init must have x's shape {tuple(x.shape)}, and restarts must be 1")
    return init


def resolve_loss(loss: str | Loss) -> Loss:
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is unknown: it is one of {', '.join(LOSSES)}, or a function")
    return LOSSES[loss]


def _refuse(
    bad: Bool[Tensor, " r"], what: str, rows: Int[Tensor, " r"] | None = None, error: type[ValueError] = ValueError
) -> None:
    if bool(bad.any()):
        image = int(bad.nonzero()[0, 0]) if rows is None else int(rows[bad][0])
        raise error(f"image {image} of the attacked batch: {what}")


def require_finite(finite: Bool[Tensor, " r"], rows: Int[Tensor, " r"] | None = None) -> None:
    """Refuse losses that are not finite.

    Args:
        finite: whether the loss of each image is.
        rows: numbers of the images; default: 0, 1, …

    Raises:
        NotFinite: naming the first image whose loss is NaN or infinite.
    """
    _refuse(~finite, "the model's loss is NaN or infinite there", rows, NotFinite)


def check_result(x_adv: Images, x: Images, *, eps: float, norm: Norm) -> Images:
    """`x_adv`, if it keeps to the threat model.

    Raises:
        NotFinite: naming the first image with pixels that are NaN or infinite.
        ValueError: naming the first that leaves [0, 1], or lies farther than eps from its original (by more than
            rounding: 1e-6 for L∞, 1e-5 relative for L2).
    """
    flat = x_adv.flatten(1)
    infinite, outside = ~flat.isfinite().all(1), ((flat < 0) | (flat > 1)).any(1)
    linf, l2 = distances(x_adv, x)
    far = linf > eps + 1e-6 if norm == "Linf" else l2 > eps * (1 + 1e-5) + 1e-6
    if bool((infinite | outside | far).any()):  # (looked at once, since a GPU waits here)
        _refuse(infinite, "the attack returned NaN or infinite pixels", error=NotFinite)
        _refuse(outside, "the attack left [0, 1]")
        _refuse(far, f"the attack returned a point farther than eps = {eps:g} ({norm}) from the image")
    return x_adv
