"""What needs the model: adversarial images, the confusion matrix, the margin around images; and the gallery's PNGs."""

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn

from gsem._env import exact_float32, require_float64
from gsem.attacks import apgd
from gsem.attacks._types import Norm
from gsem.nn.contract import ImagesLike, LabelsLike, checked
from gsem.nn.folded import fold
from gsem.nn.gsem import noise
from gsem.nn.predict import BATCH, is_stochastic, predict_draws
from gsem.rng import derive_seed, generator, seeded

STEPS, EOT = 20, 5  # of the short attack that is run where no points were saved
DRAWS = 20
SHOWN = 10
SURFACES = 3
GRID, REACH = 21, 1.5  # points along each side of a surface, and its half width in units of eps
SURFACE_DRAWS = 5


@dataclass(frozen=True, eq=False)
class Shown:
    """An image of the gallery, before and after the attack."""

    x: Float[np.ndarray, "c h w"]
    """In [0, 1]."""
    x_adv: Float[np.ndarray, "c h w"]
    label: int
    clean: int | None
    """The most frequent prediction for `x`; None where only the share of right predictions is known."""
    clean_right: float
    """Share of draws, 0 to 1, that predict the label for `x`."""
    attacked: int | None
    """The most frequent prediction for `x_adv`."""
    attacked_right: float
    row: int | None = None
    """Row of the image in the data set, from 0, where it is known."""


@dataclass(frozen=True, eq=False)
class Surface:
    """The margin around an image, on a plane through it."""

    number: int
    """Place of the image in the gallery, from 0."""
    along: Float[np.ndarray, " k"]
    """Coordinates of the grid, the same in both directions, in units of eps."""
    margin: Float[np.ndarray, "k k"]
    """Highest other logit minus the label's, averaged over draws, [across, towards x_adv]. Above 0: misclassified."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What is computed with the model itself."""

    origin: str
    """Where the adversarial points come from, in words: `points of the evaluation's attacks (apgd100)`."""
    images: int
    draws: int
    eps: float
    gallery: tuple[Shown, ...]
    surfaces: tuple[Surface, ...] = ()
    confusion: Float[np.ndarray, "classes classes"] | None = None
    """Row: label, column: prediction. Each image counts with the share of its draws that give the prediction. None
    where the predictions are not known."""
    seconds: float = 0.0


@dataclass(frozen=True)
class GalleryImage:
    """An image of the gallery, ready for a page."""

    number: str
    """`Row 412` of the data set; `Image 3` of the gallery where the row is not known."""
    x: str
    """The image as a data: URI, like `change` and `x_adv`."""
    change: str
    x_adv: str
    label: str
    before: str
    """The predictions for the image, in words."""
    after: str
    """The predictions for the adversarial image, in words."""
    broken: bool
    small: bool
    """Few pixels, which are drawn as squares."""


@exact_float32()
def pictures(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str,
    norm: Norm = "Linf",
    points: Float[Tensor, "n c h w"] | None = None,
    origin: str = "",
    rows: Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
) -> Pictures:
    """The confusion matrix under attack, the gallery and the loss surfaces of a model.

    For a small model and a hundred images this takes seconds.

    Args:
        model: images [b, c, h, w] in [0, 1] → logits, in eval mode.
        x, y: images in [0, 1], and their labels.
        eps: radius of the attack, in the unit of the images.
        points: adversarial points of `x` that are known already. Default: a short APGD finds new ones.
        origin: where the points come from, in words. Not needed for new points.
        rows: row of each image in its data set; the report numbers the images by it.
        seed: seed of the attack and of all draws; the caller's random state is not changed.

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
        origin = f"points found for this report by apgd{STEPS}-eot{eot}, a weaker attack than an evaluation's"
    predictions = [
        predict_draws(model, images, draws=draws, seed=derive_seed(seed, "pictures", stream), batch_size=batch_size)
        for images, stream in ((x, "clean"), (points, "attacked"))
    ]
    with torch.no_grad(), seeded(0, x.device):
        classes = model(x[:1]).shape[1]
    right = [(found == y).double().mean(0) for found in predictions]
    most = [found.mode(0).values for found in predictions]
    chosen = first_of_each(y, SHOWN, right=right[0] > 0.5)
    surfaces = tuple(
        _surface(model, x[at], points[at], int(y[at]), number, eps=eps, draws=draws, seed=seed, batch_size=batch_size)
        for number, at in enumerate(chosen[:SURFACES])
    )
    return Pictures(
        origin=origin,
        images=len(x),
        draws=draws,
        eps=eps,
        gallery=shown_images(x, points, y, chosen, rows, right, most),
        surfaces=surfaces,
        confusion=confusion(predictions[1], y, classes),
        seconds=time.monotonic() - started,
    )


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
    """Images by label (row) and prediction (column); each counts with the share of its draws that predict it."""
    pairs = (y * classes + found).flatten()
    counts = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    return (counts.to(torch.float64) / len(found)).cpu().numpy()


def first_of_each(y: Int[Tensor, " n"], count: int, right: Bool[Tensor, " n"]) -> list[int]:
    """Indices of at most `count` images: the first of each class, then the second of each, and so on.

    Images that are right without an attack come before all others, since an attack on a misclassified image shows
    nothing. The outcome of the attack does not matter for the choice.
    """
    labels, seen = y.tolist(), right.tolist()
    turns: dict[tuple[bool, int], int] = {}
    order = []
    for at, (label, good) in enumerate(zip(labels, seen, strict=True)):
        turns[good, label] = turns.get((good, label), -1) + 1
        order.append((not good, turns[good, label], label, at))
    return [at for *_, at in sorted(order)[:count]]


def shown_images(
    x: Tensor,
    points: Tensor,
    y: Tensor,
    chosen: Sequence[int],
    rows: Int[np.ndarray, " n"] | None,
    right: Sequence[Tensor],
    most: Sequence[Tensor] | None,
) -> tuple[Shown, ...]:
    """The chosen images of a gallery.

    Args:
        chosen: their indices (see `first_of_each`).
        right: per image the share of draws that are right, without and with the attack.
        most: per image the most frequent prediction, without and with the attack; None where it is not known.
    """
    return tuple(
        Shown(
            x=x[at].cpu().numpy(),
            x_adv=points[at].cpu().numpy(),
            label=int(y[at]),
            clean=None if most is None else int(most[0][at]),
            clean_right=float(right[0][at]),
            attacked=None if most is None else int(most[1][at]),
            attacked_right=float(right[1][at]),
            row=None if rows is None else int(rows[at]),
        )
        for at in chosen
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

    All points of the plane use the same draws of a GSeM's noise, so that they differ by the image alone.
    """
    rng = generator(seed, "surface", number, device=x.device)
    signs = torch.randint(2, x.shape, generator=rng, device=x.device).to(x.dtype) * 2 - 1
    towards, across = x_adv - x, eps * signs
    if float(towards.abs().max()) == 0:  # the attack returned the image itself
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


def png(x: Float[np.ndarray, "c h w"]) -> str:
    """A PNG as a data: URI. Values outside [0, 1] are clipped; of two or four channels the first is taken."""
    values = np.clip(np.rint(np.asarray(x, dtype=np.float64) * 255), 0, 255).astype(np.uint8)
    pixels_ = values.transpose(1, 2, 0) if len(values) == 3 else values[0]
    boxed = io.BytesIO()
    Image.fromarray(pixels_).save(boxed, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(boxed.getvalue()).decode()


def gallery(p: Pictures, class_name: Callable[[int], str]) -> list[GalleryImage]:
    """The images of the gallery, ready for a page.

    Args:
        class_name: the name of a label.
    """
    return [_gallery_image(shown, image_number(shown, i), p.draws, class_name) for i, shown in enumerate(p.gallery)]


def image_number(shown: Shown, place: int) -> str:
    """`Row 412` of the data set; `Image 3` of the gallery where the row is not known."""
    return f"Image {place + 1}" if shown.row is None else f"Row {shown.row}"


def gallery_choice(p: Pictures) -> str:
    """Which images the gallery shows, as a sentence."""
    right = sum(shown.clean_right > 0.5 for shown in p.gallery)
    mostly = " in most draws" if p.draws > 1 else ""
    rows = ", numbered by their rows in the data set" if all(shown.row is not None for shown in p.gallery) else ""
    if right == len(p.gallery):
        return f"Images that are right without an attack{mostly}, class by class{rows}."
    others = f"Images class by class{rows}: only {right} of these {len(p.gallery)} are right without an attack{mostly}"
    return f"{others}; there are no more such images among {p.images}."


def _gallery_image(s: Shown, number: str, draws: int, class_name: Callable[[int], str]) -> GalleryImage:
    def predictions(most: int | None, right: float) -> str:
        wrong = "" if most in (None, s.label) else f"taken for {class_name(most)}"
        if draws == 1:
            return "right" if right == 1 else wrong or "wrong"
        count = f"right in {round(right * draws)} of {draws} draws"
        return f"{count}, mostly {wrong}" if wrong else count

    # The change is scaled to the range from black to white; grey is no change.
    largest = float(np.abs(s.x_adv - s.x).max())
    before, after = predictions(s.clean, s.clean_right), predictions(s.attacked, s.attacked_right)
    if not largest:
        # An attack that breaks nothing returns the point of the highest margin, which may be the image itself.
        right = s.clean == s.label if s.clean is not None else s.clean_right > 0.5
        after += "; the attack found no point closer to an error than the image" if right else "; wrong already"
    return GalleryImage(
        number=number,
        x=png(s.x),
        change=png(0.5 + (s.x_adv - s.x) / (2 * (largest or 1.0))),
        x_adv=png(s.x_adv),
        label=class_name(s.label),
        before=before,
        after=after,
        broken=s.attacked_right < 0.5,
        small=s.x.shape[-1] < 128,
    )
