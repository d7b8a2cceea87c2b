"""Projected gradient descent (Madry et al. 2018), with expectation over the model's noise."""

from typing import Literal

import torch
from torch import Tensor, nn

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
            iterate of the path: one that every draw misclassifies before any other, then the highest loss.
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
    worst = Worst(x)
    finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
    rows = torch.arange(len(x), device=x.device)

    def judge(number: int, values: Tensor, wrong: Tensor, *, competes: bool) -> None:
        finite.logical_and_(values.isfinite())
        if observe is not None:
            observe(Step(rows, number, x_adv, values, wrong))
        if competes:
            worst.update(x_adv, values, wrong)

    with stream(split(seed, "model"), x.device):
        for restart in range(restarts):
            if init is None:
                x_adv = random_start(x, eps, norm, generator(seed, "start", restart, device=x.device))
            else:
                x_adv = project(init, x, eps, norm)
            for number in range(steps):
                values, wrong, grad = expected_gradient(search or model, x_adv, y, objective, eot)
                finite &= values.isfinite()
                if keep == "best" or observe is not None:
                    if search is not None:
                        # The twin gives directions only: what a point is worth, the model itself says.
                        values, wrong = expected(model, x_adv, y, objective, eot)
                    judge(number, values, wrong, competes=keep == "best")
                x_adv = ascend(x_adv, x, grad, step, eps, norm)
            if keep == "best" or restarts > 1 or observe is not None:
                judge(steps, *expected(model, x_adv, y, objective, eot), competes=True)
    result = worst.x if keep == "best" or restarts > 1 else x_adv
    return check_result(result, x, eps=eps, norm=norm, finite=finite)
