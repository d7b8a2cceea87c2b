"""Square Attack (Andriushchenko et al., ECCV 2020): a random search that uses the model's margins only."""

from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gsem._env import exact_float32
from gsem.attacks._active import READ_EVERY, Remaining, cascade
from gsem.attacks._checks import aimed, check_result
from gsem.attacks._confirm import Confirmer, confirmation
from gsem.attacks._core import expected
from gsem.attacks._types import Images, ImagesLike, Labels, LabelsLike, Norm, OnStep
from gsem.losses import margin
from gsem.rng import derive_seed, generator, reseed, seeded

# The share of the image that a square covers is halved after each of these proposals: the paper's schedule for
# 10000 queries, which the standard suite leaves as it is for its 5000.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Queries of a stochastic model between two draws of fresh noise; see `_search`.
REDRAW = 25
# On an accelerator, where images leave only with a new draw, so that no batch size decides when noise is drawn.
REDRAW_MARKED = 2 * READ_EVERY

Flat = Float[Tensor, "b d"]  # an image as one row: d = c·h·w


@exact_float32()
def square(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str,
    target: LabelsLike | int | None = None,
    norm: Norm = "Linf",
    queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    eot: int = 1,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Images:
    """Random search without gradients: squares are repainted at random, and kept where the margin rises.

    The margin of a stochastic model is averaged over `eot` draws. Proposal and incumbent are compared on the same
    draws, and every 25 queries (on a GPU: 20) the incumbent is queried again on new ones, which counts as a query: so
    neither a lucky draw nor a point that fits one set of draws stops the search for long.

    Args:
        model: [b, c, h, w] in [0, 1] → logits [b, k], in eval mode; it need not be differentiable.
        x: images [b, c, h, w] in [0, 1]. y: their labels [b], int64.
        eps: radius of the ball, in the unit of the images.
        target: classes [b], or one for all images, that a targeted attack drives the images towards; y is not used
            then. The margin is that of the target over all others, and an image is broken where it is classified as it.
        norm: "Linf" (perturbations of ±eps) or "L2".
        queries: evaluations of the draw-averaged margin, for each image and restart. The search of an
            image ends with the query that breaks it: every draw of it is wrong, and a hundred more if the model is
            stochastic (these are not counted, nor one evaluation of each image and one of each restart's result).
        p_init: share of the image that the first squares cover, in (0, 1].
        restarts: independent runs, each on the images that are not broken yet.
        eot: draws of the model's noise that every margin is averaged over.
        seed: of the squares and of the model's noise. The caller's random state is not changed.
        on_step: called with a `Step` at every query: the queried points, their margins, the share of wrong draws.

    Returns:
        x_adv [b, c, h, w], within eps of x and within [0, 1]; the point with the highest margin where none is
        broken; x itself where the model is wrong already.

    Raises:
        ValueError: arguments out of range, a layer in train mode, NaN logits (the image is named).

    Source: algorithms 1 to 3 of the paper. As in its authors' code, a square that would change nothing is not
    queried. Squares reach every row and column; in that code they do not reach the last ones.
    """
    model, x, y, eps = aimed(model, x, y, target, eps=eps, norm=norm, queries=queries, restarts=restarts, eot=eot)
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init must be a share of the image in (0, 1], not {p_init}")
    x = x.detach()
    confirm = confirmation(model, x)
    squares = _Linf(eps, p_init) if norm == "Linf" else _L2(eps, p_init)

    def run(rows: Tensor, seed: int, on_step: OnStep | None) -> Images:
        return _search(
            model, x[rows], y[rows], squares, queries=queries, eot=eot, confirm=confirm, seed=seed, on_step=on_step
        )

    x_adv = cascade(model, x, y, [run] * restarts, eot=eot, confirm=confirm, seed=seed, on_step=on_step)
    return check_result(x_adv, x, eps=eps, norm=norm)


def _share(p_init: float, proposal: int) -> float:
    """The share of the image that the proposal of this number, from 0, covers."""
    return p_init / 2 ** bisect_left(HALVED_AFTER, proposal)


@dataclass
class _Patch:
    """Pixels to repaint in each image: their numbers in its row, their values now and their proposed ones."""

    at: Int[Tensor, "b n"]
    old: Float[Tensor, "b n"]
    new: Float[Tensor, "b n"]


def _search(
    model: nn.Module,
    x: Images,
    y: Labels,
    squares: "_Linf | _L2",
    *,
    queries: int,
    eot: int,
    confirm: int,
    seed: int,
    on_step: OnStep | None,
) -> Images:
    """One run, on the remaining images; `confirm` is 0 for a deterministic model.

    A stochastic model gets the same noise, query after query, until it is redrawn. Two points that differ by a
    small square then differ by that square's effect, and not by the far larger one of their noise. With the noise
    the incumbent's margin is measured anew: the maximum over many draws, kept, would freeze the search. The same
    holds, with less precision, for a model whose noise does not come from torch's stream.

    Only the square's own pixels are read and written; no query costs a pass over the images but the model's.
    """
    rng = generator(seed, "squares", device=x.device)
    shape = x.shape[1:]
    found = squares.start(x, rng)
    remaining = Remaining(torch.arange(len(x), device=x.device))
    confirmer = Confirmer(model, x, y, confirm, spaced=False)
    x, z = x.flatten(1), found.flatten(1).clone()
    best = x.new_full((len(x),), float("-inf"))
    drawn, redraw = 0, REDRAW_MARKED if remaining.marked else REDRAW
    with seeded(derive_seed(seed, "model"), x.device):
        for number in range(queries):
            if confirm and number - drawn == redraw:
                drawn = number
            patches: list[_Patch] = []
            if number == drawn:
                best = torch.full_like(best, float("-inf"))  # the incumbent is the proposal
            elif number:
                patches = squares.propose(z, x, shape, number - 1, remaining, rng)
            for patch in patches:
                z.scatter_(1, patch.at, patch.new)
            if confirm:
                reseed(derive_seed(seed, "noise", drawn), x.device)
            point = z.view(-1, *shape)
            values, wrong = expected(model, point, y, margin, eot)
            remaining.require_finite(values.isfinite())  # (a NaN would pass for a low margin)
            if on_step is not None:
                on_step(remaining.step(number, point.clone(), values, wrong))  # the search works in place
            if confirm:
                reseed(derive_seed(seed, "confirm", number), x.device)
            broken, at, _ = remaining.broken(point, values, wrong, confirmer, last=number == queries - 1)
            remaining.record(found, at, broken)
            better = broken | (values > best)
            best = torch.where(better, values, best)
            for patch in patches:
                z.scatter_(1, patch.at, torch.where(better[:, None], patch.new, patch.old))
            kept = remaining.drop(broken, cut=not (confirm and remaining.marked) or number + 1 - drawn == redraw)
            if kept is not None:
                x, y, z, best = (t[kept] for t in (x, y, z, best))
                if not len(remaining):
                    break
                # Noise belongs to positions in the batch, and the remaining images have moved: the noise is redrawn.
                drawn = number + 1 if confirm else drawn
    remaining.finish()
    remaining.record(found, z.view(-1, *shape))
    return found


@dataclass
class _Squares:
    """The start and the proposals for one norm. The offsets of a square's pixels are kept from query to query."""

    eps: float
    p_init: float
    side: int = 0
    offsets: Int[Tensor, " n"] = field(default_factory=lambda: torch.empty(0))

    def fit(self, side: int, shape: torch.Size, device: torch.device) -> None:
        """Squares have this many pixels a side from now on."""
        c, h, w = shape
        self.side = side
        channel, line, column = (torch.arange(n, device=device) for n in (c, side, side))
        self.offsets = (channel[:, None, None] * h * w + line[:, None] * w + column).flatten()


def _corners(remaining: Remaining, side: int, shape: torch.Size, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Top and left [b, 1] of a random square in each image."""

    def corner(last: int) -> Tensor:
        return remaining.drawn(lambda b: torch.randint(last + 1, (b, 1), generator=rng, device=rng.device))

    _, h, w = shape
    return corner(h - side), corner(w - side)


def _signs(*shape: int, like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=rng, device=rng.device).to(like.dtype) * 2 - 1


class _Linf(_Squares):
    """Squares of one colour: in every channel x + eps or x − eps."""

    def start(self, x: Images, rng: torch.Generator) -> Images:
        """The first points, on the ball's surface but for the clipping: vertical stripes, one pixel wide."""
        b, c, _, w = x.shape
        return (x + self.eps * _signs(b, c, 1, w, like=x, rng=rng)).clamp(0, 1)

    def propose(
        self, z: Flat, x: Flat, shape: torch.Size, proposal: int, remaining: Remaining, rng: torch.Generator
    ) -> list[_Patch]:
        c, h, w = shape
        side = min(max(round((_share(self.p_init, proposal) * h * w) ** 0.5), 1), h, w)
        if side != self.side:
            self.fit(side, shape, z.device)
        top, left = _corners(remaining, side, shape, rng)
        at = top * w + left + self.offsets
        old, under = z.gather(1, at), x.gather(1, at)
        signs = remaining.drawn(lambda b: _signs(b, c, like=z, rng=rng))
        offset = (self.eps * signs).repeat_interleave(side * side, 1)
        new = (under + offset).clamp(0, 1)
        # A square that has this colour already would waste a query: it gets the opposite colour.
        idle = (new == old).all(1, keepdim=True)
        return [_Patch(at, old, torch.where(idle, (under - offset).clamp(0, 1), new))]


class _L2(_Squares):
    """Squares with a positive and a negative bump, whose norm is taken from another square (algorithm 3)."""

    tile: Float[Tensor, "2 n"]  # the bumps one above the other, and side by side

    def start(self, x: Images, rng: torch.Generator) -> Images:
        """The first points: about five by five squares, each with its own sign."""
        b, c, h, w = x.shape
        side = max(1, min(h, w) // 5)
        high, wide = h // side, w // side
        upright = torch.randint(2, (b, 1, high, 1, wide, 1), generator=rng, device=x.device) > 0
        tile = _bumps(side).to(x)
        tiles = torch.where(upright, tile[:, None], tile.T[:, None])  # [b, 1, high, side, wide, side]
        tiles = tiles * _signs(b, c, high, 1, wide, 1, like=x, rng=rng)
        offset = torch.zeros_like(x)
        top, left = (h - high * side) // 2, (w - wide * side) // 2
        offset[:, :, top : top + high * side, left : left + wide * side] = tiles.reshape(b, c, high * side, -1)
        length = offset.flatten(1).norm(dim=1)[:, None, None, None]
        return (x + offset * (self.eps / length)).clamp(0, 1)

    def propose(
        self, z: Flat, x: Flat, shape: torch.Size, proposal: int, remaining: Remaining, rng: torch.Generator
    ) -> list[_Patch]:
        (b, _), (c, h, w) = z.shape, shape
        side = max(round((_share(self.p_init, proposal) * h * w) ** 0.5), 3)
        side = min(side + 1 - side % 2, h, w)
        if side != self.side:
            self.fit(side, shape, z.device)
            self.tile = torch.stack([_bumps(side), _bumps(side).T]).flatten(1).to(z)
        (top, left), (top2, left2) = (_corners(remaining, side, shape, rng) for _ in range(2))
        at, at2 = top * w + left + self.offsets, top2 * w + left2 + self.offsets
        old, old2, under, under2 = z.gather(1, at), z.gather(1, at2), x.gather(1, at), x.gather(1, at2)
        offset, offset2 = (old - under).view(b, c, -1), (old2 - under2).view(b, c, -1)

        # The second square is cleared; the first gets the norm of both, and what clipping had left of eps.
        line = torch.arange(side, device=z.device)
        lines, columns = ((line + d >= 0) & (line + d < side) for d in (top2 - top, left2 - left))
        shared = (lines[:, :, None] & columns[:, None, :]).view(b, 1, -1)
        held = offset.square().sum(2) + offset2.square().masked_fill(shared, 0).sum(2)
        spare = (self.eps**2 - (z - x).square().sum(1, keepdim=True)).clamp_min(0)
        which = remaining.drawn(lambda b: torch.randint(2, (b,), generator=rng, device=z.device))
        bumps = self.tile[which][:, None] * remaining.drawn(lambda b: _signs(b, c, 1, like=z, rng=rng))
        paint = _unit(bumps + _unit(offset)) * (held + spare / c).sqrt()[:, :, None]
        return [_Patch(at2, old2, under2), _Patch(at, old, (under + paint.flatten(1)).clamp(0, 1))]


def _unit(offset: Float[Tensor, "b c n"]) -> Float[Tensor, "b c n"]:
    return offset / offset.norm(dim=2, keepdim=True).clamp_min(1e-12)


def _bumps(side: int) -> Float[Tensor, "side side"]:
    """A bump above its negative, of length 1: the paper's equation 2."""
    half = side // 2
    tile = torch.cat([_bump(half, side), -_bump(side - half, side)])
    return tile / tile.norm()


def _bump(high: int, wide: int) -> Float[Tensor, "high wide"]:
    """A peak in the middle: at distance r (in rows or columns, the larger) the sum of 1/k² for all k > r; length 1."""
    if not high:
        return torch.empty(0, wide)
    height = (1 / torch.arange(1.0, max(high, wide) // 2 + 2).square()).flip(0).cumsum(0).flip(0)
    line, column = ((torch.arange(n) - n // 2).abs() for n in (high, wide))
    bump = height[torch.maximum(line[:, None], column)]
    return bump / bump.norm()
