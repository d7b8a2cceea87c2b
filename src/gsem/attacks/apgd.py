"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum and a step size that is halved by a rule; APGD-T."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gsem._env import exact_float32
from gsem.attacks._active import Remaining, cascade, select
from gsem.attacks._checks import aimed, check_result, checked_init, resolve_loss
from gsem.attacks._confirm import Confirmer, confirmation
from gsem.attacks._core import (
    ascend,
    averaged,
    expected_logits,
    nearest_wrong_classes,
    project,
    starting_points,
    strongest_wrong_classes,
)
from gsem.attacks._types import Images, ImagesLike, Labels, LabelsLike, Norm, OnStep
from gsem.losses import Loss, dlr_towards, margin_towards
from gsem.rng import derive_seed, generator, seeded

Order = Literal["logits", "malt"]

# The paper's constants: share of rising steps below which the step is halved, momentum, first and last checkpoint.
RHO = 0.75
MOMENTUM = 0.75
FIRST, LESS, LEAST = 0.22, 0.03, 0.06


@exact_float32()
def apgd(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str,
    target: LabelsLike | int | None = None,
    norm: Norm = "Linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str | Loss = "ce",
    targets: int = 0,
    order: Order = "logits",
    eot: int = 1,
    stop_broken: bool = True,
    seed: int = 0,
    init: ImagesLike | None = None,
    on_step: OnStep | None = None,
) -> Images:
    """Auto-PGD: no step size to tune. Gradients, the losses that steer the step, and decisions average over draws.

    Args:
        model: [b, c, h, w] in [0, 1] → logits [b, k], in eval mode.
        x: images [b, c, h, w] in [0, 1]. y: their labels [b], int64.
        eps: radius of the ball, in the unit of the images.
        target: classes [b], or one for all images, that a targeted attack drives the images towards; y is not used
            then. `loss` towards them is lowered, and an image is broken where it is taken for its target.
        steps: gradients per restart (and target).
        restarts: independent random starts; later ones work on the images that are not broken yet.
        loss: "ce", "margin", "dlr", "pm" (the probability margin), or a function (logits [b, k], y [b]) → [b], to be
            raised.
        targets: 0 runs the untargeted attack. More (AutoAttack: 9) run APGD-T: in place of `loss`, the targeted DLR
            loss towards each of so many wrong classes, one after the other.
        order: of these classes. "logits": those with the highest clean logits first. "malt": those whose linearised
            boundary is nearest first (`nearest_wrong_classes`), for one gradient more of each image and wrong class.
        eot: draws of the model's noise that every gradient, loss and decision is averaged over.
        stop_broken: whether the search stops for an image once it is broken; False follows every path to its end.
        seed: of the random starts and of the model's noise. The caller's random state is not changed.
        init: starting points [b, c, h, w] instead of random ones.
        on_step: called with a `Step` at every iterate.

    Returns:
        x_adv [b, c, h, w], within eps of x and within [0, 1]: a broken point of each image where one was found,
        else that with the highest margin among x itself and the points of the highest loss, one of each path.

    Raises:
        ValueError: arguments out of range, a layer in train mode, too few classes for the loss, NaN logits.

    Warns:
        UserWarning: where fewer than four classes leave no targeted DLR, and the targeted margin is used.
    """
    model, x, y, eps = aimed(
        model, x, y, target, eps=eps, norm=norm, targets=targets, steps=steps, restarts=restarts, eot=eot
    )
    init = checked_init(init, x, restarts)
    objective = resolve_loss(loss)
    if order not in ("logits", "malt"):
        raise ValueError(f"order {order!r} is unknown: it is 'logits' or 'malt'")
    if not len(x):
        return x.clone()

    def run(target: Tensor | None, rows: Tensor, seed: int, on_step: OnStep | None) -> Images:
        own = None if init is None else init[rows]
        start = starting_points(x[rows], own, eps, norm, generator(seed, "start", device=x.device))
        path = _Path.begin(start, x[rows], y[rows], None if target is None else target[rows], eps)
        with seeded(derive_seed(seed, "model"), x.device):
            return _apgd_loop(
                model, path, objective, eps=eps, norm=norm, steps=steps, eot=eot, confirm=confirm, on_step=on_step
            )

    with seeded(derive_seed(seed, "model"), x.device):
        confirm = confirmation(model, x) if stop_broken else None
        classes: list[Tensor | None] = [None]
        if targets:
            logits = expected_logits(model, x, eot)
            if (k := logits.shape[1]) < 4:
                problem = f"the targeted DLR loss needs 4 classes, the model has {k}: the targeted margin is used"
                warnings.warn(problem, stacklevel=2)
            if order == "malt":
                classes = [*nearest_wrong_classes(model, x, y, targets, norm=norm, eot=eot)]
            else:
                classes = [*strongest_wrong_classes(logits, y, targets)]
        runs = [partial(run, target) for _ in range(restarts) for target in classes]
        x_adv = cascade(model, x, y, runs, eot=eot, confirm=confirm, seed=seed, on_step=on_step)
    return check_result(x_adv, x, eps=eps, norm=norm)


def checkpoints(steps: int) -> Iterator[int]:
    """Numbers of gradients after which the step may be halved: 22, 41, 57, 70, 80, 87, 93, 99 of 100 (section 3.1)."""
    at, gap = 0, max(1, int(FIRST * steps))
    while at + gap < steps:
        at += gap
        yield at
        gap = max(gap - max(1, int(LESS * steps)), max(1, int(LEAST * steps)))


@dataclass
class _Path:
    """APGD's state, a row per image that is not broken yet."""

    remaining: Remaining
    x: Tensor
    y: Tensor
    target: Tensor | None
    x_adv: Tensor
    before: Tensor  # the iterate before x_adv
    value: Tensor  # loss at x_adv
    best: Tensor
    best_grad: Tensor
    best_value: Tensor
    checked: Tensor  # best loss at the last checkpoint
    step: Tensor
    halved: Tensor  # whether the step was halved at the last checkpoint
    rose: Tensor  # steps since then at which the loss rose

    @classmethod
    def begin(cls, start: Images, x: Images, y: Labels, target: Tensor | None, eps: float) -> "_Path":
        low = x.new_full((len(x),), float("-inf"))
        return cls(
            remaining=Remaining(torch.arange(len(x), device=x.device)),
            x=x,
            y=y,
            target=target,
            x_adv=start,
            before=start,
            value=low,
            best=start,
            best_grad=torch.zeros_like(x),
            best_value=low,
            checked=low,
            step=x.new_full((len(x), 1, 1, 1), 2 * eps),
            halved=torch.ones(len(x), dtype=torch.bool, device=x.device),
            rose=torch.zeros(len(x), dtype=torch.int64, device=x.device),
        )

    def loss(self, objective: Loss) -> Loss:
        target = self.target
        if target is None:
            return objective
        return lambda logits, y: (dlr_towards if logits.shape[1] > 3 else margin_towards)(target)(logits, y)

    def update(self, value: Tensor, grad: Tensor | None) -> None:
        """Record the loss (and its gradient) at x_adv."""
        self.rose += (value > self.value) & self.value.isfinite()  # (the start has nothing to rise from)
        self.value = value
        better = value > self.best_value
        self.best_value = torch.where(better, value, self.best_value)
        pick = better[:, None, None, None]
        self.best = torch.where(pick, self.x_adv, self.best)
        if grad is not None:
            self.best_grad = torch.where(pick, grad, self.best_grad)

    def check(self, since: int, grad: Tensor) -> Tensor:
        """At a checkpoint, `since` steps after the last: where the loss rises too rarely, halve the step and return to
        the best point. Returns the gradient at the points from which the path continues."""
        stuck = ~self.halved & (self.checked >= self.best_value)
        halve = (self.rose <= RHO * since) | stuck
        pick = halve[:, None, None, None]
        self.step = torch.where(pick, self.step / 2, self.step)
        self.x_adv = torch.where(pick, self.best, self.x_adv)
        self.halved, self.checked = halve, self.best_value
        self.rose = torch.zeros_like(self.rose)
        return torch.where(pick, self.best_grad, grad)


def _apgd_loop(
    model: nn.Module,
    path: _Path,
    objective: Loss,
    *,
    eps: float,
    norm: Norm,
    steps: int,
    eot: int,
    confirm: int | None,
    on_step: OnStep | None,
) -> Images:
    """One restart, for one target. `confirm` None follows every path to its end."""
    result, remaining = path.x_adv.clone(), path.remaining
    confirmer = None if confirm is None else Confirmer(model, path.x, path.y, confirm)
    marks, last = checkpoints(steps), 0
    mark = next(marks, None)
    for number in range(steps + 1):
        ends, loss = number == steps, path.loss(objective)
        value, wrong, grad = averaged(model, path.x_adv, path.y, loss, eot, differentiate=not ends)
        remaining.require_finite(value.isfinite())
        if on_step is not None:
            on_step(remaining.step(number, path.x_adv, value, wrong))
        path.update(value, grad)
        broken = None
        if confirmer is not None:
            broken, point, _ = remaining.broken(path.x_adv, value, wrong, confirmer, last=ends)
            remaining.record(result, point, broken)
        kept = remaining.drop(broken)
        if kept is not None:
            path, grad = select(path, kept), None if grad is None else grad[kept]
        if grad is None or not len(remaining):
            break
        if number == mark:
            grad, last, mark = path.check(number - last, grad), number, next(marks, None)
        ahead = ascend(path.x_adv, path.x, grad, path.step, eps, norm)
        if number:
            # (The first step has no momentum: nothing came before it.)
            ahead = path.x_adv + MOMENTUM * (ahead - path.x_adv) + (1 - MOMENTUM) * (path.x_adv - path.before)
            ahead = project(ahead, path.x, eps, norm)
        path.before, path.x_adv = path.x_adv, ahead
    remaining.finish()
    remaining.record(result, path.best)
    return result
