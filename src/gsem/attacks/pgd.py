"""PGD (Madry et al. 2018), with expectation over the model's noise, and FGSM (Goodfellow et al. 2015)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gsem._env import exact_float32
from gsem.attacks._active import Remaining, WorstSoFar
from gsem.attacks._checks import aimed, check_result, checked_init, require_finite, resolve_loss
from gsem.attacks._confirm import Confirmer, confirmation
from gsem.attacks._core import Targeted, also_wrong_unfolded, ascend, expected, expected_gradient, starting_points
from gsem.attacks._types import Images, ImagesLike, Labels, LabelsLike, Norm, OnStep
from gsem.losses import Loss
from gsem.nn.contract import plain_logits, to_number
from gsem.rng import derive_seed, generator, seeded


@exact_float32()
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
    stop_broken: bool = True,
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
            then. Their loss is lowered, and an image is broken where it is classified as its target.
        restarts: independent random starts, of which the worst point is returned.
        eot: draws of the model's noise that every gradient, loss and decision is averaged over.
        loss: "ce", "margin", "dlr", "pm" (the probability margin), or a function (logits [b, k], y [b]) → [b], to be
            raised.
        keep: "best" returns the worst iterate of the path for the model: a broken one before any other, then the
            one with the highest loss. Broken is a point that every draw misclassifies, and a hundred more if the
            model is stochastic. "last" returns the last iterate: Madry et al.'s attack, foolbox's to the bit, and
            the usual one in adversarial training, with one pass less. Default: "best", as in `gsem.evaluate`.
        stop_broken: whether the search stops for an image once it is broken (with keep="best" or restarts); False
            follows every path to its end.
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
    init = checked_init(init, x, restarts)
    objective = resolve_loss(loss)
    with seeded(derive_seed(seed, "model"), x.device):
        rngs = (generator(seed, "start", restart, device=x.device) for restart in range(restarts))
        starts = (starting_points(x, init, eps, norm, rng) for rng in rngs)
        if keep == "last" and restarts == 1 and on_step is None:
            x_adv, finite = pgd_loop(
                search or model,
                x,
                y,
                next(starts),
                eps=eps,
                norm=norm,
                step=step,
                steps=steps,
                eot=eot,
                objective=objective,
            )
            require_finite(finite)
        else:
            judge = _Judge(model, search, x, y, objective, eot, keep == "best", restarts > 1, stop_broken, on_step)
            for start in starts:
                x_adv = judge.follow(start, steps, partial(ascend, step=step, eps=eps, norm=norm))
    return check_result(x_adv, x, eps=eps, norm=norm)


@exact_float32()
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
    """The fast gradient (sign) method: x + eps · sign of the loss's gradient (L2: eps along it), clipped to [0, 1].

    A weak attack: use it to compare with older figures, not to judge a model.

    Args, returns and errors: as in `pgd`, with one step from the image itself.
    """
    one_step = partial(pgd, eps=eps, step=eps, steps=1, init=x, keep="last")
    return one_step(model, x, y, target=target, norm=norm, loss=loss, eot=eot, seed=seed, on_step=on_step)


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
    """Paths whose iterates are observed or compared: by `model`, also where the gradient is that of `search`."""

    model: nn.Module
    search: nn.Module | None
    x: Images
    y: Labels
    objective: Loss
    eot: int
    every: bool  # whether every iterate may be the one that is returned,
    last: bool  # or (with several restarts) the last one of each path
    stop_broken: bool
    on_step: OnStep | None

    def __post_init__(self) -> None:
        self.worst = WorstSoFar(self.x)
        self.confirm = confirmation(self.model, self.x) if (self.every or self.last) and self.stop_broken else 0
        self.confirmer = Confirmer(self.model, self.x, self.y, self.confirm)

    def follow(self, start: Images, steps: int, ascend: Callable[[Images, Images, Images], Images]) -> Images:
        """One path, for the remaining images: `ascend` makes (x_adv, x, gradient) the next x_adv.

        Returns:
            the worst point of each image so far, or the last iterates where none is kept.
        """
        remaining = Remaining((~self.worst.broken | (not self.stop_broken)).nonzero()[:, 0])
        x_adv = start[remaining.rows]
        for number in range(steps + 1):
            ends, y = number == steps, self.y[remaining.rows]
            competes = self.every or (ends and self.last)
            if not len(remaining) or (ends and not competes and self.on_step is None):
                break
            if not ends:
                values, wrong, grad = expected_gradient(self.search or self.model, x_adv, y, self.objective, self.eot)
                remaining.require_finite(values.isfinite())
            if (competes or self.on_step is not None) and (ends or self.search is not None):
                # The search model gives directions only: points are judged by the model itself.
                values, wrong = expected(self.model, x_adv, y, self.objective, self.eot)
                remaining.require_finite(values.isfinite())
            if self.on_step is not None:
                self.on_step(remaining.step(number, x_adv, values, wrong))
            broken = None
            if competes:
                broken, point, value = remaining.broken(x_adv, values, wrong, self.confirmer, last=ends)
                self.worst.update(point, value, broken, remaining.rows)
            if not ends:
                kept = remaining.drop(broken if self.stop_broken else None)
                if kept is not None:
                    x_adv, grad = x_adv[kept], grad[kept]
                x_adv = ascend(x_adv, self.x[remaining.rows], grad)
        remaining.finish()
        if self.last and self.stop_broken and not self.confirm:
            self.worst.broken = also_wrong_unfolded(self.model, self.worst.x, self.y, self.worst.broken)
        return self.worst.x if self.every or self.last else x_adv
