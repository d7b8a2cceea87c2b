"""Pictures that need the model: adversarial images, the confusion matrix, the loss surface around images."""

import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem._env import require_float64
from gsem.attacks import apgd
from gsem.attacks._types import Norm
from gsem.nn.contract import ImagesLike, LabelsLike, checked
from gsem.nn.folded import fold
from gsem.nn.gsem import noise
from gsem.nn.predict import BATCH, is_stochastic, predict_draws
from gsem.reporting import Pictures, Shown, Surface
from gsem.rng import derive_seed, generator, seeded

STEPS, EOT = 20, 5  # of the attack where no points were kept: a look, not a measurement
DRAWS = 20
SHOWN = 10
SURFACES = 3
GRID, REACH = 21, 1.5  # points along each side of a surface, and how far it goes, in units of eps
SURFACE_DRAWS = 5


def pictures(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str,
    norm: Norm = "Linf",
    points: Float[Tensor, "n c h w"] | None = None,
    how: str = "",
    rows: Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
) -> Pictures:
    """What a report shows of a model: seconds for a small one and a hundred images.

    Args:
        model: images [b, c, h, w] in [0, 1] → logits, in eval mode.
        x, y: images in [0, 1], and their labels.
        eps: radius of the attack, in the unit of the images.
        points: adversarial points of `x` that are known already; found anew by a short APGD unless given.
        how: where the points come from, in words; for those found anew it is said here.
        rows: row of each image in its data set, by which the report numbers them.
        seed: of the attack and of all draws; the caller's random state is not changed.

    Raises:
        ValueError: no images, arguments out of range, or logits that are not finite.
    """
    if not len(x):
        raise ValueError("there are no images to show")
    model, x, y, eps = checked(model, x, y, eps=eps, norm=norm, batch_size=batch_size)
    require_float64(x.device, "a report with pictures")
    started = time.monotonic()
    stochastic = is_stochastic(model, x[:batch_size])
    draws = DRAWS if stochastic else 1
    if points is None:
        eot = EOT if stochastic else 1
        points = attacked(
            model, x, y, eps=eps, norm=norm, eot=eot, seed=derive_seed(seed, "pictures"), batch_size=batch_size
        )
        how = f"points found for this report only, by apgd{STEPS}-eot{eot}: an easier attack than an evaluation's"
    before = predict_draws(model, x, draws=draws, seed=derive_seed(seed, "pictures", "clean"), batch_size=batch_size)
    after = predict_draws(
        model, points, draws=draws, seed=derive_seed(seed, "pictures", "attacked"), batch_size=batch_size
    )
    with torch.no_grad(), seeded(0, x.device):
        classes = model(x[:1]).shape[1]
    chosen = first_of_each(y, SHOWN, right=(before == y).double().mean(0) > 0.5)
    shown = tuple(_shown(x, points, y, before, after, at, rows) for at in chosen)
    surfaces = tuple(
        _surface(model, x[at], points[at], int(y[at]), number, eps=eps, draws=draws, seed=seed, batch_size=batch_size)
        for number, at in enumerate(chosen[:SURFACES])
    )
    return Pictures(
        how=how,
        images=len(x),
        draws=draws,
        eps=eps,
        confusion=confusion(after, y, classes),
        gallery=shown,
        surfaces=surfaces,
        seconds=time.monotonic() - started,
    )


def saved_pictures(
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    points: Float[Tensor, "n c h w"],
    clean: Float[Tensor, " n"],
    attacked: Float[Tensor, " n"],
    *,
    draws: int,
    eps: float,
    how: str,
    rows: Int[np.ndarray, " n"] | None,
) -> Pictures:
    """A gallery of what an evaluation kept, where the model is not there.

    Args:
        clean, attacked: share of draws, 0 to 1, in which the images and the points were right.
    """

    def shown(at: int) -> Shown:
        one, other = x[at].numpy(), points[at].numpy()
        row = None if rows is None else int(rows[at])
        return Shown(one, other, int(y[at]), None, float(clean[at]), None, float(attacked[at]), row)

    gallery = tuple(shown(at) for at in first_of_each(y, SHOWN, right=clean > 0.5))
    metadata: dict[str, Any] = {"how": how, "images": len(x), "draws": draws, "eps": eps}
    return Pictures(**metadata, confusion=None, gallery=gallery, surfaces=(), seconds=0.0)


def attacked(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: Norm, eot: int, seed: int, batch_size: int
) -> Float[Tensor, "n c h w"]:
    """Points of a short APGD on cross-entropy."""
    folded = fold(model)
    parts = []
    for first in range(0, len(x), batch_size):
        one, own = slice(first, first + batch_size), derive_seed(seed, first)
        parts.append(apgd(folded, x[one], y[one], eps=eps, norm=norm, steps=STEPS, eot=eot, seed=own))
    return torch.cat(parts)


def confusion(
    found: Int[Tensor, "draws n"], y: Int[Tensor, " n"], classes: int
) -> Float[np.ndarray, "classes classes"]:
    """Images by label (row) and answer (column), each image counted with the share of draws that gave the answer."""
    pairs = (y * classes + found).flatten()
    counts = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    return (counts.to(torch.float64) / len(found)).cpu().numpy()


def first_of_each(y: Int[Tensor, " n"], count: int, right: Bool[Tensor, " n"]) -> list[int]:
    """Numbers of at most `count` images: of those that are right without an attack the first of each class, then the
    second of each, …; where there are too few of them, the others in the same order.

    Of an image that is wrong already there is nothing to see. What the attack does has no part in the choice.
    """
    labels, seen = y.tolist(), right.tolist()
    turns: dict[tuple[bool, int], int] = {}
    order = []
    for at, (label, good) in enumerate(zip(labels, seen, strict=True)):
        turns[good, label] = turns.get((good, label), -1) + 1
        order.append((not good, turns[good, label], label, at))
    return [at for *_, at in sorted(order)[:count]]


def _shown(
    x: Tensor,
    points: Tensor,
    y: Tensor,
    before: Tensor,
    after: Tensor,
    at: int,
    rows: Int[np.ndarray, " n"] | None,
) -> Shown:
    label = int(y[at])

    def told(found: Tensor) -> tuple[int, float]:
        return int(found[:, at].mode().values), float((found[:, at] == label).double().mean())

    (clean, clean_right), (answer, right) = told(before), told(after)
    return Shown(
        x=x[at].cpu().numpy(),
        x_adv=points[at].cpu().numpy(),
        label=label,
        clean=clean,
        clean_right=clean_right,
        attacked=answer,
        attacked_right=right,
        row=None if rows is None else int(rows[at]),
    )


@torch.no_grad()
def _surface(
    model: nn.Module,
    x: Float[Tensor, "c h w"],
    x_adv: Float[Tensor, "c h w"],
    y: int,
    number: int,
    *,
    eps: float,
    draws: int,
    seed: int,
    batch_size: int,
) -> Surface:
    """The margin at x + a · (x_adv − x) + b · r, r random signs of length eps.

    All points of the plane see the same draws of a GSeM's noise, so that their differences are the image's.
    """
    rng = generator(seed, "surface", number, device=x.device)
    signs = torch.randint(2, x.shape, generator=rng, device=x.device).to(x.dtype) * 2 - 1
    towards, across = x_adv - x, eps * signs
    if float(towards.abs().max()) == 0:  # the attack left it where it was
        towards = eps * across.roll(1, -1).sign()
    along = torch.linspace(-REACH, REACH, GRID, device=x.device)
    b, a = (grid.flatten()[:, None, None, None] for grid in torch.meshgrid(along, along, indexing="ij"))
    plane = (x + a * towards + b * across).clamp(0, 1)
    margin = torch.zeros(len(plane), device=x.device)
    count = min(draws, SURFACE_DRAWS)
    for draw in range(count):
        own = derive_seed(seed, "surface", number, draw)
        with seeded(own, x.device), noise(model, "frozen", seed=own) if draws > 1 else noise(model, "fresh"):
            logits = torch.cat([model(plane[first : first + batch_size]) for first in range(0, len(plane), batch_size)])
        others = logits.clone()
        others[:, y] = -torch.inf
        margin += (others.amax(1) - logits[:, y]) / count
    return Surface(number, along.cpu().numpy(), margin.view(GRID, GRID).cpu().numpy())
