"""RayS (Chen & Gu, KDD 2020): a search over directions that uses the model's labels only."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem._env import exact_float32
from gsem.attacks._active import confirm_broken, confirmation, select
from gsem.attacks._checks import check_result, require_finite
from gsem.attacks._core import expected
from gsem.attacks._types import Images, ImagesLike, LabelsLike, Norm, OnStep, Step
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
    rows = torch.arange(len(x), device=x.device)

    def query(points: Flat, rows: Int[Tensor, " r"], number: int) -> Float[Tensor, " r"]:
        images = points.view(-1, *x.shape[1:])
        values, wrong = expected(model, images, y[rows], margin, eot)
        require_finite(values.isfinite(), rows)
        if on_step is not None:
            on_step(Step(rows, number, images, wrong, wrong))
        return wrong

    def unbroken(points: Flat, rows: Int[Tensor, " r"], wrong: Float[Tensor, " r"]) -> Bool[Tensor, " r"]:
        return ~confirm_broken(model, points.view(-1, *x.shape[1:]), y[rows], wrong, confirm)

    flat = x.flatten(1)
    found = flat.clone()
    with seeded(derive_seed(seed, "model"), x.device):
        left = unbroken(flat, rows, query(flat, rows, 0))
        search = _Search.begin(rows[left], flat[left], tolerance=min(TOLERANCE / size**0.5, limit / 16))
        for number in range(1, queries):
            if not len(search.rows):
                break
            if confirm and number % RECHECK == 0:
                wrong = query(search.points(search.radius), search.rows, number)
                search.recheck(wrong > 0.5)
                continue
            wrong = query(search.proposals(), search.rows, number)
            # A deterministic model is broken at the queried point; for a stochastic one a shorter ray is searched on.
            shorter = search.learn(wrong > 0.5, rng, enough=0.0 if confirm else limit)
            reached = shorter & (search.radius <= limit)
            if bool(reached.any()):
                points = search.points(search.radius.new_tensor(limit) if confirm else search.radius)
                left = unbroken(points, search.rows, reached.to(x.dtype))
                found[search.rows[~left]] = points[~left]
                search = select(search, left)
        found[search.rows] = search.points(search.radius.new_tensor(limit))
    return check_result(found.view_as(x), x, eps=eps, norm=norm)


@dataclass
class _Search:
    """The state of the search, a row per image; every image advances by one query at a time.

    An image either opens a block: it queries the ray with this block flipped, at the best radius less the tolerance.
    Or it bisects: on the flipped ray the label is right at radius `low` and wrong at `high`.
    """

    rows: Int[Tensor, " b"]  # numbers of the images
    x: Flat
    sign: Flat  # the best ray
    radius: Float[Tensor, " b"]  # where it is wrong
    rank: Int[Tensor, "b d"]  # of each pixel, in the order that the blocks cut up
    level: Int[Tensor, " b"]  # 2^level blocks
    block: Int[Tensor, " b"]
    bisecting: Bool[Tensor, " b"]
    low: Float[Tensor, " b"]
    high: Float[Tensor, " b"]
    tolerance: float

    @classmethod
    def begin(cls, rows: Int[Tensor, " b"], x: Flat, *, tolerance: float) -> "_Search":
        """All signs positive. The radius 2, which no image needs, means that none was found yet."""
        count = torch.zeros_like(rows)
        rank = torch.arange(x.shape[1], device=x.device).expand(x.shape).clone()
        none = x.new_zeros(len(x))
        return cls(rows, x, torch.ones_like(x), none + 2, rank, count, count, count > 0, none, none, tolerance)

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

    def learn(self, wrong: Bool[Tensor, " b"], rng: torch.Generator, *, enough: float) -> Bool[Tensor, " b"]:
        """Update from the labels at `proposals`. A binary search ends early at a radius of `enough`.

        Returns:
            which best rays are shorter now.
        """
        trial, bisecting = self.trial(), self.bisecting
        self.low = torch.where(bisecting & ~wrong, trial, torch.where(bisecting, self.low, 0.0))
        self.high = torch.where(wrong, trial, self.high)
        ends = torch.where(bisecting, self.high - self.low <= self.tolerance, ~wrong) | (wrong & (trial <= enough))
        shorter = ends & (bisecting | wrong) & (self.high < self.radius)
        if bool(shorter.any()):
            self.radius = torch.where(shorter, self.high, self.radius)
            self.sign = torch.where(shorter[:, None] & self.flipped(), -self.sign, self.sign)
        self.bisecting = ~ends
        self._next_block(ends, rng)
        return shorter

    def _next_block(self, ends: Bool[Tensor, " b"], rng: torch.Generator) -> None:
        width, size = self.width(), self.x.shape[1]
        self.block = self.block + ends
        full = self.block * width >= size
        self.block = self.block.masked_fill(full, 0)
        self.level = self.level + full
        # After single pixels: all pixels again, and then the halves of another order.
        anew = (full & (width == 1)).nonzero()[:, 0]
        if len(anew):
            self.level[anew] = 0
            order = torch.rand((len(anew), size), generator=rng, device=rng.device)
            self.rank[anew] = order.argsort(1)
