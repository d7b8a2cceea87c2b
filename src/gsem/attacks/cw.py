"""Carlini & Wagner (2017): the L2 form, which minimises the perturbation itself, and the bounded margin form."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsem._env import exact_float32
from gsem.attacks._active import Remaining, WorstSoFar
from gsem.attacks._checks import aimed, check_result, require_finite
from gsem.attacks._confirm import Confirmer, confirm_broken, confirmation
from gsem.attacks._core import expected, expected_gradient, project
from gsem.attacks._types import Images, ImagesLike, Labels, LabelsLike, Norm, OnStep
from gsem.attacks.pgd import pgd
from gsem.losses import margin
from gsem.rng import derive_seed, seeded

TOP = 1 - 1e-6  # of tanh, so that black and white pixels keep a gradient and a finite inverse


@exact_float32()
def cw(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str | None = None,
    target: LabelsLike | int | None = None,
    norm: str = "L2",
    steps: int = 100,
    c: float = 1.0,
    searches: int = 1,
    lr: float = 0.01,
    kappa: float = 0.0,
    eot: int = 1,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Images:
    """Carlini & Wagner's attack.

    L2 form (their section V): minimise |x_adv − x|² + c · max(−margin, −kappa) by Adam over w, x_adv = (tanh w + 1)/2;
    with several `searches`, c is searched by bisection for each image.

    L∞ form, as the field uses their name with a bound: PGD on the margin, best point of the path, step eps/4.

    Args:
        model: [b, c, h, w] in [0, 1] → logits [b, k], in eval mode.
        x: images [b, c, h, w] in [0, 1]. y: their labels [b], int64.
        eps: radius of the ball. None (L2 only): no bound; the smallest perturbation that breaks is returned.
        target: classes [b], or one for all images, that a targeted attack drives the images towards; y is not used
            then. The margin is that of the target over all others, and an image is broken where it is classified as it.
        norm: "L2" or "Linf".
        steps: gradients per search.
        c: weight of the margin in the first search.
        searches: of c; 1 keeps the given one (the published form of the paper that this package implements).
        lr: learning rate of Adam, in w. kappa: the margin, in logits, up to which a broken point is pushed further.
        eot: draws of the model's noise that every gradient, loss and decision is averaged over.
        seed: of the model's noise. The caller's random state is not changed.
        on_step: called with a `Step` at every iterate; its loss is the margin.

    Returns:
        x_adv [b, c, h, w] in [0, 1]. Bounded: within eps, a broken point of each image where one was found (points
        that lie farther are projected into the ball and judged there), else that with the highest margin. Unbounded:
        the nearest broken point, else the image itself.

    Raises:
        ValueError: arguments out of range, no eps for L∞, a layer in train mode, NaN logits.
    """
    bound = 1.0 if eps is None else eps
    model, x, y, bound = aimed(model, x, y, target, eps=bound, norm=norm, steps=steps, searches=searches, eot=eot)
    radius = math.inf if eps is None else bound
    if norm == "Linf":
        if eps is None:
            raise ValueError("the L∞ form of C&W is bounded: give eps (8/255 is the field's standard)")
        budget = {"steps": steps, "eot": eot, "seed": seed, "on_step": on_step}
        return cw_form(model, x, y, eps=radius, norm="Linf", form="margin", c=c, searches=searches, lr=lr, **budget)
    for name, value in (("c", c), ("lr", lr)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, not {value}")
    if not kappa >= 0:
        raise ValueError(f"kappa must be at least 0, in logits, not {kappa}")
    if not len(x):
        return x.clone()
    with seeded(derive_seed(seed, "model"), x.device):
        search = _Search(model, x, y, radius, eot, kappa, on_step)
        weight, low = x.new_full((len(x),), c), x.new_zeros(len(x))
        high = x.new_full((len(x),), math.inf)
        for _ in range(searches):
            rows = search.unfinished()
            if not len(rows):
                break
            reached = search.descend(rows, weight, steps, lr)
            high = torch.where(reached, torch.minimum(high, weight), high)
            low = torch.where(reached, low, torch.maximum(low, weight))
            weight = torch.where(high.isinf(), weight * 10, (low + high) / 2)
    if eps is None:
        return search.nearest
    return check_result(search.worst.x, x, eps=radius, norm="L2")


def cw_form(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm,
    form: Literal["margin", "l2", "unbounded"],
    c: float,
    searches: int,
    lr: float,
    **budget: Any,
) -> Images:
    """C&W in one of its forms, as a list of attacks names it.

    Args:
        form: "margin" is PGD on the margin within eps, in either norm; "l2" is the L2 form within eps; "unbounded" is
            the L2 form without a bound. c, searches and lr belong to the L2 form.
        budget: steps, eot, seed and on_step.

    The other arguments, what is returned and raised: as in `cw`.
    """
    if form == "margin":
        return pgd(model, x, y, eps=eps, step=eps / 4, norm=norm, loss="margin", **budget)
    if form == "l2" and norm != "L2":
        raise ValueError("cw:form=l2 bounds the L2 norm: evaluate with norm L2, or take form=margin or form=unbounded")
    return cw(model, x, y, eps=eps if form == "l2" else None, c=c, searches=searches, lr=lr, **budget)


class _Search:
    """The points found so far for each image, over all searches of c."""

    def __init__(
        self, model: nn.Module, x: Images, y: Labels, radius: float, eot: int, kappa: float, on_step: OnStep | None
    ):
        self.model, self.x, self.y = model, x, y
        self.radius, self.eot, self.kappa, self.on_step = radius, eot, kappa, on_step
        self.confirm = confirmation(model, x)
        self.confirmer = Confirmer(model, x, y, self.confirm, spaced=False)
        self.worst = WorstSoFar(x)
        self.nearest, self.distance = x.clone(), x.new_full((len(x),), math.inf)
        values, wrong = expected(model, x, y, margin, eot)
        require_finite(values.isfinite())
        clean = confirm_broken(model, x, y, wrong, self.confirm)
        self.worst.update(x, values, clean)
        self.distance[clean] = 0.0
        self.number = 0

    def unfinished(self) -> Tensor:
        """Numbers of the images that are still worked on: with a bound, those not broken within it."""
        open_ = self.distance > 0 if math.isinf(self.radius) else ~self.worst.broken
        return open_.nonzero()[:, 0]

    def descend(self, rows: Tensor, weight: Tensor, steps: int, lr: float) -> Tensor:
        """One search: Adam from each image. Returns [b], whether it broke the image at all."""
        remaining = Remaining(rows)
        reached = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        w = torch.atanh((2 * self.x[rows] - 1) * TOP)
        first, second = torch.zeros_like(w), torch.zeros_like(w)
        for number in range(1, steps + 1):
            rows = remaining.rows
            x_adv = (torch.tanh(w) + 1) / 2
            margins, grad = self._judge(x_adv, remaining, reached)
            # d/dx_adv of |x_adv − x|² + c · max(−margin, −kappa); then through tanh.
            pulled = (margins < self.kappa) * weight[rows]
            slope = 2 * (x_adv - self.x[rows]) - pulled[:, None, None, None] * grad
            slope = slope * 2 * x_adv * (1 - x_adv)
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope.square()
            stride = lr * (first / (1 - 0.9**number)) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
            w = w - stride
            kept = remaining.drop(None if math.isinf(self.radius) else self.worst.broken[rows])
            if kept is not None:
                w, first, second = w[kept], first[kept], second[kept]
            if not len(remaining):
                return reached
        self._judge((torch.tanh(w) + 1) / 2, remaining, reached, last=True)
        remaining.finish()
        return reached

    def _judge(self, x_adv: Images, remaining: Remaining, reached: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
        """Keep what is nearer or worse than the points so far. Returns the margins and their gradient."""
        rows = remaining.rows
        margins, wrong, grad = expected_gradient(self.model, x_adv, self.y[rows], margin, self.eot)
        remaining.require_finite(margins.isfinite())
        if self.on_step is not None:
            self.on_step(remaining.step(self.number, x_adv, margins, wrong))
            self.number += 1

        # Only a point that is nearer than the nearest so far is confirmed by more draws.
        length = (x_adv - self.x[rows]).flatten(1).norm(dim=1)
        closer = ((length < self.distance[rows]) & (wrong == 1)).to(wrong.dtype)
        broken, point, nearness = remaining.broken(x_adv, -length, closer, self.confirmer, last=last)
        self.nearest[rows] = torch.where(broken[:, None, None, None], point, self.nearest[rows])
        self.distance[rows] = torch.where(broken, -nearness, self.distance[rows])
        reached[rows] |= broken | (wrong == 1)
        if not math.isinf(self.radius):
            inside = -nearness <= self.radius
            self.worst.update(point, torch.where(inside, margins, -math.inf), broken & inside, rows)
            self._project(point, broken & ~inside, remaining, last)
        return margins, grad

    def _project(self, point: Images, far: Tensor, remaining: Remaining, last: bool) -> None:
        """Broken points outside the ball are projected into it and compared with the worst."""
        if not remaining.decided:
            return
        which = remaining.only(far)
        if len(which):
            at, far = remaining.rows[which], (far & remaining.live)[which]
            point = project(point[which], self.x[at], self.radius, "L2")
            values, wrong = expected(self.model, point, self.y[at], margin, self.eot)
            broken = confirm_broken(self.model, point, self.y[at], torch.where(far, wrong, 0.0), self.confirm)
            self.worst.update(point, torch.where(far, values, -math.inf), broken, at)
