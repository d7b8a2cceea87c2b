"""The fast gradient (sign) method (Goodfellow et al. 2015): one step of full length."""

from torch import nn

from gsem.attacks._core import Images, ImagesLike, LabelsLike, Norm, OnStep
from gsem.attacks.pgd import pgd
from gsem.losses import Loss


def fgsm(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str,
    target: LabelsLike | int | None = None,
    norm: Norm = "Linf",
    loss: str | Loss = "ce",
    eot: int = 1,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Images:
    """x + eps · sign of the loss's gradient (L2: eps along the gradient), clipped to [0, 1].

    A weak attack: use it to compare with older figures, not to judge a model.

    Args, returns and errors: as in `pgd`, with one step from the image itself.
    """
    how = {"eps": eps, "step": eps, "steps": 1, "init": x, "target": target, "norm": norm, "loss": loss, "keep": "last"}
    return pgd(model, x, y, **how, eot=eot, seed=seed, on_step=on_step)  # type: ignore[arg-type]
