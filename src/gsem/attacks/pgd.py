"""Projected gradient descent (Madry et al. 2018), with expectation over the model's noise."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gsem.attacks._active import Confirmer, confirmation
from gsem.attacks._core import (
    Images,
    ImagesLike,
    Labels,
    LabelsLike,
    Norm,
    OnStep,
    Step,
    Targeted,
    WorstSoFar,
    aimed,
    ascend,
    check_result,
    expected,
    expected_gradient,
    project,
    random_start,
    resolve_loss,
)
from gsem.losses import Loss
from gsem.nn.contract import plain_logits, to_number
from gsem.rng import derive_seed, generator, seeded


def pgd(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str,
    step: float | str,
    steps: int,
    target: LabelsLike | int | None = None,
    restarts: int = 1,
    eot: int = 1,
    loss: str | Loss = "ce",
    norm: Norm = "Linf",
    keep: Literal["last", "best"] = "best",
    seed: int = 0,
    settle: bool = True,
    init: ImagesLike | None = None,
    search: nn.Module | None = None,
    on_step: OnStep | None = None,
) -> Images:
    """Perturb images so that their loss rises: `steps` steepest-ascent steps, each projected into the ball.

    Args:
        model: [b, c, h, w] in [0, 1] → logits [b, k], in eval mode.
        x: images [b, c, h, w] in [0, 1]. y: their labels [b], int64.
        eps: radius of the ball, in the unit of the images (8/255 is the field's standard for L∞).
        step: length of one step, same unit.
        target: classes [b], or one for all images, that a targeted attack drives the images towards; y is not used
            then. Their loss is lowered, and an image is broken where it is taken for its target.
        restarts: independent random starts; the worst end counts.
        eot: draws of the model's noise that every gradient, loss and decision is averaged over.
        loss: "ce", "margin", "dlr", or a function (logits [b, k], y [b]) → [b], to be raised.
        keep: "best" returns the worst iterate of the path for the model: a broken one before any other, then the
            one with the highest loss. Broken is a point that every draw misclassifies, and a hundred more if the
            model is stochastic. "last" returns the last iterate: Madry et al.'s attack, foolbox's to the bit, and
            the usual one in adversarial training, with one pass less. Default: "best", as in `gsem.evaluate`.
        settle: whether an image is left alone once it is broken (with keep="best" or restarts); False follows
            every path to its end.
        seed: of the random starts and of the model's noise. The caller's random state is not changed.
        init: starting points [b, c, h, w] instead of random ones; projected into the ball first.
        search: a model whose gradient is followed instead of `model`'s (its low-precision folded model); losses and
            decisions stay with `model`.
        on_step: called with a `Step` at every iterate that is judged.

    Returns:
        x_adv [b, c, h, w], within eps of x and within [0, 1].

    Raises:
        ValueError: arguments out of range, a layer in train mode, NaN logits (the image is named).
    """
    model, x, y, eps = aimed(model, x, y, target, eps=eps, norm=norm, steps=steps, restarts=restarts, eot=eot)
    step = to_number("step", step)
    if search is not None:
        search = plain_logits(search, x, y)
        search = search if target is None else Targeted(search)
    if not step > 0:
        raise ValueError(f"step must be positive, in the unit of the images, not {step}")
    if keep not in ("last", "best"):
        raise ValueError(f"keep {keep!r} is unknown: it is 'last' or 'best'")
    init = None if init is None else torch.as_tensor(init).to(x)
    if init is not None and (init.shape != x.shape or restarts != 1):
        raise ValueError(f"init must have x's shape {tuple(x.shape)} and goes with restarts=1")
    objective = resolve_loss(loss)
    how: dict[str, Any] = {"eps": eps, "norm": norm, "step": step, "steps": steps, "eot": eot, "objective": objective}
    finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
    with seeded(derive_seed(seed, "model"), x.device):
        if keep == "last" and restarts == 1 and on_step is None:
            start = _start(x, init, 0, eps=eps, norm=norm, seed=seed)
            x_adv, finite = pgd_loop(search or model, x, y, start, **how)
        else:
            judge = _Judge(model, search, x, y, keep == "best", restarts > 1, settle, finite, on_step)
            for restart in range(restarts):
                x_adv = judge.pgd_loop(_start(x, init, restart, eps=eps, norm=norm, seed=seed), **how)
    return check_result(x_adv, x, eps=eps, norm=norm, finite=finite)


def pgd_loop(
    model: nn.Module,
    x: Images,
    y: Labels,
    x_adv: Images,
    *,
    eps: float,
    step: float,
    steps: int,
    eot: int,
    objective: Loss,
    norm: Norm = "Linf",
) -> tuple[Images, Bool[Tensor, " b"]]:
    """The steps alone, from `x_adv`: nothing is checked, nothing waits for the device. For training.

    Returns:
        the last iterate, and whether each image's losses were finite on the way.
    """
    finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(steps):
        values, _, grad = expected_gradient(model, x_adv, y, objective, eot)
        finite &= values.isfinite()
        x_adv = ascend(x_adv, x, grad, step, eps, norm)
    return x_adv, finite


@dataclass
class _Judge:
    """Paths whose iterates are observed or compared: by the model, also where another is searched."""

    model: nn.Module
    search: nn.Module | None
    x: Images
    y: Labels
    best: bool
    """Whether every iterate competes, or (with several restarts) the last of each only."""
    several: bool
    settle: bool
    finite: Bool[Tensor, " b"]
    on_step: OnStep | None

    def __post_init__(self) -> None:
        self.worst = WorstSoFar(self.x)
        confirm = confirmation(self.model, self.x) if (self.best or self.several) and self.settle else 0
        self.settling = Confirmer(self.model, self.x, self.y, confirm)

    def pgd_loop(
        self, start: Images, *, eps: float, norm: Norm, step: float, steps: int, eot: int, objective: Loss
    ) -> Images:
        """One restart, on what still stands. Returns the worst point of each image so far, or the last iterates."""
        rows = (~self.worst.broken if self.settle else torch.ones_like(self.worst.broken)).nonzero()[:, 0]
        x, y, x_adv = self.x, self.y, start[rows]
        for number in range(steps + 1):
            ends = number == steps
            competes = self.best or (ends and self.several)
            if not len(rows) or (ends and not competes and self.on_step is None):
                break
            if not ends:
                values, wrong, grad = expected_gradient(self.search or self.model, x_adv, y[rows], objective, eot)
                self.finite[rows] &= values.isfinite()
            if (competes or self.on_step is not None) and (ends or self.search is not None):
                # The folded model gives directions only: what a point is worth, the model itself says.
                values, wrong = expected(self.model, x_adv, y[rows], objective, eot)
                self.finite[rows] &= values.isfinite()
            if self.on_step is not None:
                self.on_step(Step(rows, number, x_adv, values, wrong))
            if competes:
                broken = self.settling(x_adv, values, wrong, rows)
                self.worst.update(x_adv, values, broken, rows)
                if self.settle and not ends and bool(broken.any()):
                    rows, x_adv, grad = rows[~broken], x_adv[~broken], grad[~broken]
            if not ends:
                x_adv = ascend(x_adv, x[rows], grad, step, eps, norm)
        return self.worst.x if self.best or self.several else x_adv


def _start(x: Images, init: Images | None, restart: int, *, eps: float, norm: Norm, seed: int) -> Images:
    if init is not None:
        return project(init, x, eps, norm)
    return random_start(x, eps, norm, generator(seed, "start", restart, device=x.device))
