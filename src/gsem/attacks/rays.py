"""RayS (Chen & Gu, KDD 2020): a search over directions that uses the model's labels only."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem._env import exact_float32
from gsem.attacks._active import Remaining, select
from gsem.attacks._checks import check_result
from gsem.attacks._confirm import Confirmer, confirmation
from gsem.attacks._core import expected
from gsem.attacks._types import Images, ImagesLike, LabelsLike, Norm, OnStep
from gsem.losses import margin
from gsem.nn.contract import checked
from gsem.rng import derive_seed, generator, seeded

# The binary search ends when the perturbations at its two ends differ by this L2 length (the paper's), in the unit of
# the images.
TOLERANCE = 1e-3
# Every so many queries the best ray of a stochastic model is queried again; if the label is right there, its radius
# grows by this factor.
RECHECK, GROWTH = 20, 1.1

Flat = Float[Tensor, "b d"]  # an image as one row: d = c·h·w


@exact_float32()
def rays(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str,
    norm: Norm = "Linf",
    queries: int = 10000,
    eot: int = 1,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Images:
    """Hard-label attack: the shortest ray x + r·d, d ∈ {−1, 1}^pixels, along which the label changes.

    Blocks of signs are flipped, ever smaller ones. A flip is kept if the label is wrong at the best radius so far;
    a binary search then finds the new radius. Points are clipped to [0, 1]. After single pixels the hierarchy of
    blocks starts anew, over the pixels in a random order (the paper continues with single pixels, which ends in
    the first ray that no single flip improves).

    With a stochastic model a label is the majority's: a point counts as wrong if more than half of `eot` draws
    are. A radius found by luck would stop the search, as no other ray is that short: every 20 queries the best ray
    is queried again, and its radius grows by a tenth if the label is right there.

    Args:
        model: [b, c, h, w] in [0, 1] → logits [b, k], in eval mode; only its labels are used, and it need not be
            differentiable.
        x: images [b, c, h, w] in [0, 1]. y: their labels [b], int64.
        eps: radius of the ball, in the unit of the images.
        norm: "Linf", or "L2": then the ray is the sign direction divided by √(c·h·w), of length 1.
        queries: label decisions, of `eot` draws each, for each image. The search of an image ends with the
            query that brings its radius to eps or less, if the point is broken. For a stochastic model that is the
            point at radius eps, and a hundred more draws of it must be wrong (they are not counted as queries).
        seed: of the orders of pixels and of the model's noise. The caller's random state is not changed.
        on_step: called with a `Step` at every query; its loss is the share of wrong draws.

    Returns:
        x_adv [b, c, h, w], within eps of x and within [0, 1]; the point at radius eps along the best ray where none
        is broken; x itself where the model is wrong already.

    Raises:
        ValueError: arguments out of range, a layer in train mode, NaN logits (the image is named).
    """
    model, x, y, eps = checked(model, x, y, eps=eps, norm=norm, queries=queries, eot=eot)
    x = x.detach()
    confirm = confirmation(model, x)
    size = x.shape[1:].numel()
    # Radii are those of a single pixel here: the L2 length of a sign direction is √d times that.
    limit = eps if norm == "Linf" else eps / size**0.5
    rng = generator(seed, "orders", device=x.device)

    labels = _Labels(model, x.shape[1:], y, eot, Confirmer(model, x, y, confirm, spaced=False), on_step)
    flat = x.flatten(1)
    found = flat.clone()
    with seeded(derive_seed(seed, "model"), x.device):
        everything = Remaining(torch.arange(len(x), device=x.device))
        wrong = labels.query(flat, everything, 0)
        everything.finish()
        rows = (~labels.confirmer(x, wrong, wrong, everything.rows)).nonzero()[:, 0]
        search = _Search.begin(flat[rows], tolerance=min(TOLERANCE / size**0.5, limit / 16))
        found[rows] = _rays_loop(labels, search, Remaining(rows), limit=limit, queries=queries, rng=rng)
    return check_result(found.view_as(x), x, eps=eps, norm=norm)


@dataclass(frozen=True)
class _Labels:
    """The model, as far as the attack sees it."""

    model: nn.Module
    shape: torch.Size
    y: Int[Tensor, " n"]
    eot: int
    confirmer: Confirmer
    on_step: OnStep | None

    def query(self, points: Flat, remaining: Remaining, number: int) -> Float[Tensor, " r"]:
        """The share of wrong draws at points of the remaining images."""
        images = points.view(-1, *self.shape)
        values, wrong = expected(self.model, images, self.y[remaining.rows], margin, self.eot)
        remaining.require_finite(values.isfinite())
        if self.on_step is not None:
            self.on_step(remaining.step(number, images, wrong, wrong))
        return wrong


def _rays_loop(
    labels: _Labels, search: "_Search", remaining: Remaining, *, limit: float, queries: int, rng: torch.Generator
) -> Flat:
    """The search, after one query of the images themselves. Returns the points of the remaining images."""
    confirm, result = labels.confirmer.confirm, search.x.clone()
    # The last query that may break an image: not one of the best ray again.
    end = queries - 2 if confirm and (queries - 1) % RECHECK == 0 else queries - 1
    for number in range(1, queries):
        if not len(remaining):
            break
        if confirm and number % RECHECK == 0:
            wrong = labels.query(search.points(search.radius), remaining, number)
            search.recheck(wrong > 0.5)
            continue
        wrong = labels.query(search.proposals(), remaining, number)
        # A deterministic model is broken at the queried point; for a stochastic one a shorter ray is searched on.
        shorter = search.learn(wrong > 0.5, remaining, rng, enough=0.0 if confirm else limit)
        reached, broken = shorter & (search.radius <= limit), None
        if remaining.marked or bool(reached.any()):
            points = search.points(torch.full_like(search.radius, limit) if confirm else search.radius)
            images, share = points.view(-1, *labels.shape), reached.to(wrong.dtype)
            broken, at, _ = remaining.broken(images, -search.radius, share, labels.confirmer, last=number == end)
            remaining.record(result, at.flatten(1), broken)
        kept = remaining.drop(broken)
        if kept is not None:
            search = select(search, kept)
    remaining.finish()
    remaining.record(result, search.points(torch.full_like(search.radius, limit)))
    return result


@dataclass
class _Search:
    """The state of the search, a row per image; every image advances by one query at a time.

    An image either opens a block: it queries the ray with this block flipped, at the best radius less the tolerance.
    Or it bisects: on the flipped ray the label is right at radius `low` and wrong at `high`.
    """

    x: Flat
    sign: Flat  # the best ray
    radius: Float[Tensor, " b"]  # where it is wrong
    rank: Int[Tensor, "b d"]  # of each pixel, in the order that the blocks cut up
    level: Int[Tensor, " b"]  # 2^level blocks
    block: Int[Tensor, " b"]
    bisecting: Bool[Tensor, " b"]
    anew: Bool[Tensor, " b"]  # whether the hierarchy of blocks is to start over
    low: Float[Tensor, " b"]
    high: Float[Tensor, " b"]
    tolerance: float

    @classmethod
    def begin(cls, x: Flat, *, tolerance: float) -> "_Search":
        """All signs positive. The radius 2, which no image needs, means that none was found yet."""
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        rank = torch.arange(x.shape[1], device=x.device).expand(x.shape).clone()
        none, no = x.new_zeros(len(x)), count > 0
        return cls(x, torch.ones_like(x), none + 2, rank, count, count, no, no, none, none, tolerance)

    def points(self, radius: Tensor) -> Flat:
        """On the best rays."""
        return torch.addcmul(self.x, radius.view(-1, 1), self.sign).clamp_(0, 1)

    def trial(self) -> Float[Tensor, " b"]:
        """The radius of the next query."""
        return torch.where(self.bisecting, (self.low + self.high) / 2, (self.radius - self.tolerance).clamp(0, 1))

    def proposals(self) -> Flat:
        """On the best rays with a block flipped."""
        steps = self.trial()[:, None] * self.sign
        return (self.x + torch.where(self.flipped(), -steps, steps)).clamp_(0, 1)

    def width(self) -> Int[Tensor, " b"]:
        """Pixels in a block: d / 2^level, rounded up."""
        blocks = 2**self.level
        return (self.x.shape[1] + blocks - 1) // blocks

    def flipped(self) -> Bool[Tensor, "b d"]:
        width = self.width()
        first = (self.block * width)[:, None]
        return (self.rank >= first) & (self.rank < first + width[:, None])

    def recheck(self, wrong: Bool[Tensor, " b"]) -> None:
        """Lengthen the best rays that were queried again and are not wrong."""
        self.radius = torch.where(wrong, self.radius, (self.radius * GROWTH).clamp_max(2))

    def learn(
        self, wrong: Bool[Tensor, " b"], remaining: Remaining, rng: torch.Generator, *, enough: float
    ) -> Bool[Tensor, " b"]:
        """Update from the labels at `proposals`. A binary search ends early at a radius of `enough`.

        Returns:
            which best rays are shorter now.
        """
        trial, bisecting = self.trial(), self.bisecting
        self.low = torch.where(bisecting & ~wrong, trial, torch.where(bisecting, self.low, 0.0))
        self.high = torch.where(wrong, trial, self.high)
        ends = torch.where(bisecting, self.high - self.low <= self.tolerance, ~wrong) | (wrong & (trial <= enough))
        shorter = ends & (bisecting | wrong) & (self.high < self.radius)
        if remaining.marked or bool(shorter.any()):
            self.radius = torch.where(shorter, self.high, self.radius)
            self.sign = torch.where(shorter[:, None] & self.flipped(), -self.sign, self.sign)
        self.bisecting = ~ends
        self._next_block(ends, remaining, rng)
        return shorter

    def _next_block(self, ends: Bool[Tensor, " b"], remaining: Remaining, rng: torch.Generator) -> None:
        width, size = self.width(), self.x.shape[1]
        self.block = self.block + ends
        full = self.block * width >= size
        self.block = self.block.masked_fill(full, 0)
        self.level = self.level + full
        # After single pixels: all pixels again, and then the halves of another order. (On an accelerator, which orders
        # all images, single pixels again until then.)
        self.anew = self.anew | (full & (width == 1))
        anew = self.anew & ~self.bisecting
        if remaining.marked:
            if remaining.phase == 0:
                order = remaining.drawn(lambda b: torch.rand((b, size), generator=rng, device=rng.device)).argsort(1)
                self.rank = torch.where(anew[:, None], order, self.rank)
                self.level, self.block, self.anew = (
                    t.masked_fill(anew, 0) for t in (self.level, self.block, self.anew)
                )
        elif len(at := anew.nonzero()[:, 0]):
            self.level[at] = self.block[at] = 0
            self.anew[at] = False
            self.rank[at] = torch.rand((len(at), size), generator=rng, device=rng.device).argsort(1)
