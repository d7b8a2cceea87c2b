"""The linearised classifier: gradients of logit differences, and the projection onto the plane that they define."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gsem.attacks._core import Images, Labels, Norm
from gsem.nn.contract import gradient

# Rows up to which several gradients are taken in one vectorised backward pass: larger ones do not get faster by it.
TOGETHER = 128

Flat = Float[Tensor, "b n"]


def gradients(
    logits: Float[Tensor, "b k"], x: Images, classes: Int[Tensor, "m b"], y: Labels, rows: int
) -> Float[Tensor, "m b c h w"]:
    """Gradients of the differences between the logits of `classes` and that of y."""
    k = logits.shape[1]
    towards = (F.one_hot(classes, k) - F.one_hot(y, k)).to(logits.dtype)
    together = min(len(classes), TOGETHER // rows)
    if together > 1:
        try:
            return torch.cat(
                [
                    torch.autograd.grad(logits, x, part, retain_graph=True, is_grads_batched=True)[0]
                    for part in towards.split(together)
                ]
            )
        except RuntimeError:
            pass  # The model has a step whose backward pass cannot be vectorised.
    return torch.stack([gradient(logits, x, part, retain_graph=True) for part in towards])


def onto_plane(points: Flat, normal: Flat, gap: Float[Tensor, " b"], norm: Norm) -> Flat:
    """The shortest offset d with ⟨normal, d⟩ = gap and points + d in [0, 1].

    Where the cube ends before the plane, the offset that comes nearest to it; where `normal` is zero, zero.

    Every pixel moves at its own speed (1 for L∞, |normal| for L2) until it meets the side of the cube. What is
    gained is a concave, piecewise linear function of time, on which Newton's method from 0 meets the goal exactly,
    each time with more pixels stuck: a handful of passes instead of a sort.
    """
    # Scaled, so that no square of a small gradient underflows.
    scale = normal.abs().amax(1).clamp_min(torch.finfo(normal.dtype).tiny)
    sign = normal.sign() * gap.sign()[:, None]
    size, goal = normal.abs() / scale[:, None], gap.abs() / scale
    speed = torch.ones_like(size) if norm == "Linf" else size
    room = torch.where(sign > 0, 1 - points, points)
    stuck = torch.zeros_like(size, dtype=torch.bool)
    never = torch.finfo(size.dtype).max
    while True:
        rate = torch.where(stuck, 0.0, size * speed).sum(1)
        time = (goal - torch.where(stuck, size * room, 0.0).sum(1)) / rate
        travelled = torch.where(rate > 0, time.clamp(0, never), never)[:, None] * speed
        more = (travelled >= room) & ~stuck
        if not bool(more.any()):
            return sign * torch.where(stuck, room, travelled)
        stuck |= more
