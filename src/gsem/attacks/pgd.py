"""Projected gradient descent (Madry et al. 2018), with expectation over the model's noise."""

from typing import Literal

import torch
from torch import nn

from gsem.attacks._core import (
    Images,
    Labels,
    Norm,
    Observer,
    Step,
    Worst,
    ascend,
    check_arguments,
    check_eval_mode,
    check_result,
    expected,
    expected_gradient,
    project,
    random_start,
    resolve_loss,
)
from gsem.attacks._standing import Settling, confirmation
from gsem.losses import Loss
from gsem.streams import generator, split, stream


def pgd(
    model: nn.Module,
    x: Images,
    y: Labels,
    *,
    eps: float,
    step: float,
    steps: int,
    restarts: int = 1,
    eot: int = 1,
    loss: str | Loss = "ce",
    norm: Norm = "Linf",
    keep: Literal["last", "best"] = "last",
    seed: int = 0,
    settle: bool = True,
    init: Images | None = None,
    search: nn.Module | None = None,
    observe: Observer | None = None,
) -> Images:
    """Perturb images so that their loss rises: `steps` steepest-ascent steps, each projected into the ball.

    Args:
        model: [b, c, h, w] in [0, 1] → logits [b, k], in eval mode.
        x: images [b, c, h, w] in [0, 1]. y: their labels [b], int64.
        eps: radius of the ball, in the unit of the images (8/255 is the field's standard for L∞).
        step: length of one step, same unit.
        restarts: independent random starts; the worst end counts.
        eot: draws of the model's noise that every gradient, loss and decision is averaged over.
        loss: "ce", "margin", "dlr", or a function (logits [b, k], y [b]) → [b], to be raised.
        keep: "last" returns the last iterate (the textbook's attack, and the one of training); "best" the worst
            iterate of the path: a broken one before any other, then the highest loss. Broken is a point that every
            draw misclassifies, and a hundred more if the model is stochastic.
        settle: whether an image is left alone once it is broken (with keep="best" or restarts); False follows
            every path to its end.
        seed: of the random starts and of the model's noise. The caller's random state is not changed.
        init: starting points [b, c, h, w] instead of random ones; projected into the ball first.
        search: a model whose gradient is followed instead of `model`'s (its low-precision twin); losses and
            decisions stay with `model`.
        observe: called with a `Step` at every iterate that is judged.

    Returns:
        x_adv [b, c, h, w], within eps of x and within [0, 1].

    Raises:
        ValueError: arguments out of range, BatchNorm in train mode, NaN logits (the image is named).
    """
    check_arguments(model, x, y, eps=eps, norm=norm, steps=steps, restarts=restarts, eot=eot)
    if search is not None:
        check_eval_mode(search)
    if not step > 0:
        raise ValueError(f"step must be positive, in the unit of the images, not {step}")
    if keep not in ("last", "best"):
        raise ValueError(f"keep {keep!r} is unknown: it is 'last' or 'best'")
    if init is not None and (init.shape != x.shape or restarts != 1):
        raise ValueError(f"init must have x's shape {tuple(x.shape)} and goes with restarts=1")
    objective = resolve_loss(loss)
    compared = keep == "best" or restarts > 1
    finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
    worst = Worst(x)
    with stream(split(seed, "model"), x.device):
        settling = Settling(model, x, y, confirmation(model, x) if compared and settle else 0)
        for restart in range(restarts):
            standing = ~worst.broken if settle else torch.ones_like(finite)
            rows = standing.nonzero()[:, 0]
            x_adv = _start(x, init, restart, eps=eps, norm=norm, seed=seed)[rows]
            for number in range(steps + 1):
                ends = number == steps
                competes = keep == "best" or (ends and restarts > 1)
                judged = competes or observe is not None
                if not len(rows) or (ends and not judged):
                    break
                if not ends:
                    values, wrong, grad = expected_gradient(search or model, x_adv, y[rows], objective, eot)
                    finite[rows] &= values.isfinite()
                if judged and (ends or search is not None):
                    # The twin gives directions only: what a point is worth, the model itself says.
                    values, wrong = expected(model, x_adv, y[rows], objective, eot)
                    finite[rows] &= values.isfinite()
                if observe is not None:
                    observe(Step(rows, number, x_adv, values, wrong))
                if competes:
                    broken = settling(x_adv, values, wrong, rows)
                    worst.update(x_adv, values, broken, rows)
                    if settle and not ends and bool(broken.any()):
                        rows, x_adv, grad = rows[~broken], x_adv[~broken], grad[~broken]
                if not ends:
                    x_adv = ascend(x_adv, x[rows], grad, step, eps, norm)
    return check_result(worst.x if compared else x_adv, x, eps=eps, norm=norm, finite=finite)


def _start(x: Images, init: Images | None, restart: int, *, eps: float, norm: Norm, seed: int) -> Images:
    if init is not None:
        return project(init, x, eps, norm)
    return random_start(x, eps, norm, generator(seed, "start", restart, device=x.device))
