"""FAB (Croce & Hein, ICML 2020): minimum-norm points by projections onto the linearised decision boundary."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem._env import DEVICE_FAULTS, exact_float32
from gsem.attacks._active import (
    Remaining,
    WorstSoFar,
    cascade,
    numbered,
    select,
    shifted,
)
from gsem.attacks._checks import aimed, check_result, require_finite
from gsem.attacks._confirm import Confirmer, confirm_broken, confirmation
from gsem.attacks._core import (
    Targeted,
    ascend,
    distances,
    draw_chunks,
    expected,
    expected_logits,
    forward_draws,
    outcome,
    project,
    random_start,
    strongest_wrong_classes,
)
from gsem.attacks._types import Images, ImagesLike, Labels, LabelsLike, Norm, OnStep
from gsem.losses import margin
from gsem.nn.contract import gradient
from gsem.rng import derive_seed, generator, seeded

# The paper's constants: largest weight of the image in a step, overshoot past the plane, and how much of the way
# remains once the boundary is crossed.
ALPHA_MAX = 0.1
ETA = 1.05
BETA = 0.9
# Passes of the final search, and how far beyond the boundary they aim, as a share of its distance.
FINAL, BEYOND = 3, 1e-3
# Passes of `onto_plane` on an accelerator before it looks whether they were enough. They mostly are.
PASSES = 8
# Rows up to which several gradients are taken in one vectorised backward pass: larger ones do not get faster by it.
TOGETHER = 128

Flat = Float[Tensor, "b n"]


@exact_float32()
def fab(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str | None,
    target: LabelsLike | int | None = None,
    norm: Norm = "Linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 0,
    eot: int = 1,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Images:
    """Fast adaptive boundary attack: looks for the nearest misclassified point, with no step size to tune.

    Each step linearises the classifier and moves a little past the nearest point of the boundary within [0, 1],
    with a bias towards the image.

    Args:
        model: [b, c, h, w] in [0, 1] → logits [b, k], in eval mode.
        x: images [b, c, h, w] in [0, 1]. y: their labels [b], int64.
        eps: radius of the ball, in the unit of the images: the search stops for an image once a point in the ball is
            broken (every draw misclassifies it, and a hundred more if the model is stochastic). None: no ball, and
            every path is followed to its end.
        target: classes [b], or one for all images, that a targeted attack drives the images towards; y is not used
            then, and an image is broken where it is classified as its target. Each step uses one plane, that between
            the target and the class with the highest logit: where the nearest point lies on several planes, a farther
            one is found (by up to 40% on linear classifiers).
        steps: of the iterate, per restart and target. Each costs one gradient and one pass forward.
        restarts: the first starts at the image, the others at random points in the ball (with no eps: in that of
            the nearest point so far).
        targets: 0 aims at the nearest of all wrong classes, which takes k − 1 gradients a step. More (AutoAttack: 9)
            aim at so many wrong classes with the highest clean logits, one after the other, with one gradient a step
            (FAB-T).
        eot: draws of the model's noise that logits, gradients and decisions are averaged over.
        seed: of the random starts and of the model's noise. The caller's random state is not changed.
        on_step: called with a `Step` at every iterate, whose loss is the margin; iterates may lie outside the ball.

    Returns:
        x_adv [b, c, h, w] in [0, 1]. With eps, within eps of x: a broken point of each image where one was found,
        else that with the highest margin of those seen. Without, the nearest point found whose logits, averaged over
        `eot` draws, are wrong, and x itself where none was found or x itself is wrong.

    Raises:
        ValueError: arguments out of range, a layer in train mode, NaN logits (the image is named).

    Source: "Minimally distorted adversarial examples with a fast adaptive boundary attack", algorithm 1; FAB-T from
    Croce & Hein, "Reliable evaluation of adversarial robustness …", ICML 2020. One thing differs: a point found
    within eps is pushed further along the plane's normal, so that it stays misclassified after rounding.
    """
    bound = 1.0 if eps is None else eps
    model, x, y, bound = aimed(
        model, x, y, target, eps=bound, norm=norm, targets=targets, steps=steps, restarts=restarts, eot=eot
    )
    x = x.detach()
    if not len(x):
        return x.clone()
    with seeded(derive_seed(seed, "model"), x.device):
        classes = [*strongest_wrong_classes(expected_logits(model, x, eot), y, targets)] if targets else [None]
        every = [(restart, target) for restart in range(restarts) for target in classes]
        if eps is None:
            task = _Task(model, x, y, None, norm, steps, eot, 0)
            x_adv = _nearest(task, every, seed, on_step)
        else:
            task = _Task(model, x, y, bound, norm, steps, eot, confirmation(model, x))
            runs = [partial(_in_ball, task, restart, target) for restart, target in every]
            x_adv = cascade(model, x, y, runs, eot=eot, confirm=task.confirm, seed=seed, on_step=on_step)
    return check_result(x_adv, x, eps=float("inf") if eps is None else bound, norm=norm)


@dataclass(frozen=True)
class _Task:
    """The arguments of the call, for all its images."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float | None
    norm: Norm
    steps: int
    eot: int
    confirm: int

    def length(self, x_adv: Images, x: Images) -> Float[Tensor, " b"]:
        return distances(x_adv, x)[self.norm == "L2"]


@dataclass
class _Path:
    """One run's state, a row per image that is not broken yet."""

    remaining: Remaining
    x: Tensor
    y: Tensor
    target: Tensor | None
    x_adv: Tensor
    normal: Tensor  # of the linearised boundary: the gradient of the difference of logits that is zero on it
    found: Tensor  # the nearest misclassified point so far
    distance: Tensor  # its distance; infinite where there is none

    @classmethod
    def begin(cls, start: Images, x: Images, y: Labels, target: Tensor | None) -> "_Path":
        remaining = Remaining(torch.arange(len(x), device=x.device))
        far = x.new_full((len(x),), float("inf"))
        return cls(remaining, x, y, target, start, torch.zeros_like(x), x, far)


@dataclass
class _Seen:
    """The classifier at the iterates, averaged over draws."""

    margin: Tensor
    wrong: Tensor
    crossed: Tensor  # whether the averaged logits are wrong
    gap: Tensor  # the difference of logits whose gradient is the path's normal


def _in_ball(
    task: _Task, restart: int, target: Tensor | None, rows: Tensor, seed: int, on_step: OnStep | None
) -> Images:
    """One run within the ball."""
    assert task.eps is not None
    x, start = task.x[rows], task.x[rows]
    if restart:
        start = random_start(x, task.eps, task.norm, generator(seed, "start", device=x.device))
    path = _Path.begin(start, x, task.y[rows], None if target is None else target[rows])
    worst = WorstSoFar(x)
    with seeded(derive_seed(seed, "model"), x.device):
        path = _fab_loop(task, path, worst, on_step)
        if len(path.remaining):
            # Points outside the ball are judged where they are projected.
            outside = torch.where(path.distance.isfinite()[:, None, None, None], path.found, path.x_adv)
            last = project(outside, path.x, task.eps, task.norm)
            value, wrong = expected(task.model, last, path.y, margin, task.eot)
            broken = confirm_broken(task.model, last, path.y, wrong, task.confirm) & path.remaining.live
            worst.update(last, value, broken, path.remaining.rows)
    return worst.x


def _nearest(task: _Task, every: list[tuple[int, Tensor | None]], seed: int, on_step: OnStep | None) -> Images:
    """All runs one after the other, with no ball: the nearest misclassified point of each image."""
    x_adv = task.x.clone()
    value, _ = outcome(task.model, expected_logits(task.model, task.x, task.eot), task.y, margin)
    require_finite(value.isfinite())
    rows = (value <= 0).nonzero()[:, 0]
    if not len(rows):
        return x_adv
    x, y = task.x[rows], task.y[rows]
    best = _Path.begin(x, x, y, None)
    for number, (restart, target) in enumerate(every):
        start = x
        if restart:
            # Where nothing was found, from anywhere in the cube.
            cube = 1.0 if task.norm == "Linf" else x[0].numel() ** 0.5
            radius = best.distance.clamp_max(cube)[:, None, None, None]
            rng = generator(seed, "start", number, device=x.device)
            unit = 2 * random_start(torch.full_like(x, 0.5), 0.5, task.norm, rng) - 1
            start = (x + radius * unit).clamp(0, 1)
        with seeded(derive_seed(seed, "model", number), x.device), numbered(rows):
            path = _Path.begin(start, x, y, None if target is None else target[rows])
            path = _fab_loop(task, path, None, shifted(on_step, rows))
            found = _final_search(task, path, value[rows])
        _closer(best, found, torch.where(path.distance.isfinite(), task.length(found, x), float("inf")))
    x_adv[rows] = best.found
    return x_adv


def _fab_loop(task: _Task, path: _Path, worst: WorstSoFar | None, on_step: OnStep | None) -> _Path:
    """One run. With `worst`, points in the ball are compared with it, and broken images leave the path.

    Returns:
        the path of the images that are not broken.
    """
    remaining = path.remaining
    confirmer = Confirmer(task.model, path.x, path.y, task.confirm, spaced=False)
    for number in range(task.steps + 1):
        ends = number == task.steps
        # One forward pass decides whether the iterate has crossed; the gradient is taken where the next step begins.
        seen = _look(task, path, differentiate=number == 0 and not ends)
        remaining.require_finite(seen.margin.isfinite())
        if on_step is not None:
            on_step(remaining.step(number, path.x_adv, seen.margin, seen.wrong))
        length = task.length(path.x_adv, path.x)
        nearer = _closer(path, path.x_adv, torch.where(seen.crossed, length, float("inf")))
        broken = None
        if worst is not None:
            # The start is pushed, too: then one gradient alone gives at least a step of length eps.
            chosen = nearer if number else torch.ones_like(nearer)
            broken = _judge(task, path, seen, length, chosen, worst, confirmer, last=ends)
        kept = remaining.drop(broken)
        if kept is not None:
            path, seen = select(path, kept), select(seen, kept)
        if ends or not len(remaining):
            break
        if number or bool(seen.crossed.any()):
            # From across the boundary the iterate first moves back towards the image. (The plane at the crossing itself
            # misses boundaries of a rugged classifier: on one, 5 of the 73 images that the reference breaks.)
            back = path.x + BETA * (path.x_adv - path.x)
            path.x_adv = torch.where(seen.crossed[:, None, None, None], back, path.x_adv)
            seen = _look(task, path, differentiate=True)
            remaining.require_finite(seen.margin.isfinite())
        path.x_adv = _step(path, seen, task.norm)
    remaining.finish()
    return path


def _closer(path: _Path, x_adv: Images, distance: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
    nearer = distance < path.distance
    path.found = torch.where(nearer[:, None, None, None], x_adv, path.found)
    path.distance = torch.where(nearer, distance, path.distance)
    return nearer


def _judge(
    task: _Task,
    path: _Path,
    seen: _Seen,
    length: Tensor,
    chosen: Tensor,
    worst: WorstSoFar,
    confirmer: Confirmer,
    *,
    last: bool,
) -> Bool[Tensor, " b"]:
    """Compare the iterates in the ball with `worst`; the chosen are first pushed along the normal, past the boundary,
    by what remains of eps. Returns which are broken."""
    assert task.eps is not None
    inside = length <= task.eps
    point, value, wrong = path.x_adv, seen.margin, seen.wrong
    push = path.remaining.only(inside & chosen)
    if len(push):
        room = (task.eps - length[push])[:, None, None, None]
        pushed = ascend(point[push], path.x[push], path.normal[push], room, task.eps, task.norm)
        higher, share = expected(task.model, pushed, path.y[push], margin, task.eot)
        better = (higher > value[push]) & (inside & chosen)[push]
        point, value, wrong = point.clone(), value.clone(), wrong.clone()
        point[push] = torch.where(better[:, None, None, None], pushed, point[push])
        value[push] = torch.where(better, higher, value[push])
        wrong[push] = torch.where(better, share, wrong[push])

    value, wrong = torch.where(inside, value, float("-inf")), torch.where(inside, wrong, 0.0)
    broken, point, value = path.remaining.broken(point, value, wrong, confirmer, last=last)
    worst.update(point, value, broken, path.remaining.rows)
    return broken


def _look(task: _Task, path: _Path, *, differentiate: bool) -> _Seen:
    """One pass per draw: the classifier at the iterates and, if differentiated, the nearest plane there."""
    b, y = len(path.x_adv), path.y
    x = path.x_adv.detach().requires_grad_(differentiate)
    value, wrong = x.new_zeros(b), x.new_zeros(b)
    total: Tensor | float = 0.0
    grads: Tensor | float = 0.0
    sides: tuple[Tensor, Tensor] | None = None
    for fold in draw_chunks(task.eot, x):
        with torch.set_grad_enabled(differentiate):
            each = forward_draws(task.model, x, fold)
            logits = each.view(fold, b, -1).sum(0)
        sides = sides or _sides(task, path, logits.detach())
        if differentiate:
            grads = grads + gradients(logits, x, *sides, fold * b)
        total = total + logits.detach()
        values, reached = outcome(task.model, each.detach(), y.repeat(fold), margin)
        value = value + values.view(fold, b).sum(0)
        wrong = wrong + reached.view(fold, b).sum(0)
    assert isinstance(total, Tensor) and sides is not None
    logits = total / task.eot
    gaps = logits.gather(1, sides[0].T).T - logits.gather(1, sides[1][:, None]).T
    if isinstance(grads, Tensor):
        grads = grads / task.eot
        steepness = grads.flatten(2).norm(p=1 if task.norm == "Linf" else 2, dim=2)
        nearest = (gaps.abs() / steepness.clamp_min(torch.finfo(x.dtype).tiny)).argmin(0)
        at = torch.arange(b, device=x.device)
        gaps, path.normal = gaps[nearest, at][None], grads[nearest, at]
    return _Seen(value / task.eot, wrong / task.eot, outcome(task.model, logits, y, margin)[0] > 0, gaps[0])


def _sides(task: _Task, path: _Path, logits: Float[Tensor, "b k"]) -> tuple[Int[Tensor, "m b"], Int[Tensor, " b"]]:
    """The planes that may be crossed: the classes that gain, and the class that loses."""
    y = path.y
    if path.target is not None:
        return path.target[None], y
    if isinstance(task.model, Targeted):
        return y[None], logits.scatter(1, y[:, None], float("-inf")).argmax(1)
    wrong = torch.arange(logits.shape[1] - 1, device=y.device)[:, None]
    return wrong + (wrong >= y), y


def _step(path: _Path, seen: _Seen, norm: Norm) -> Images:
    """The paper's step (equations 8 to 10): iterate and image both go onto the plane and ETA past it, and are mixed,
    with the more weight for the image the nearer its plane."""
    points = torch.cat([path.x_adv, path.x]).flatten(1)
    normal = path.normal.flatten(1).repeat(2, 1)
    gap = -seen.gap.repeat(2) - (normal * (points - path.x_adv.flatten(1).repeat(2, 1))).sum(1)
    offset = onto_plane(points, normal, gap, norm)
    length = (offset.abs().amax(1) if norm == "Linf" else offset.norm(dim=1)).clamp_min(1e-8)
    ours, theirs = length.chunk(2)
    share = (ours / (ours + theirs)).clamp_max(ALPHA_MAX)[:, None]
    moved, image = (points + ETA * offset).chunk(2)
    return ((1 - share) * moved + share * image).clamp(0, 1).view_as(path.x)


def _final_search(task: _Task, path: _Path, clean: Float[Tensor, " b"]) -> Images:
    """Closer to the image on the line from what was found: thrice to where the margin, if linear, changes sign.

    `clean` is the margin of the images, not positive.
    """
    x_adv, rows = path.found.clone(), path.distance.isfinite().nonzero()[:, 0]
    if not len(rows):
        return x_adv
    x, y, far = path.x[rows], path.y[rows], path.found[rows]

    def margins(point: Images) -> Float[Tensor, " b"]:
        return outcome(task.model, expected_logits(task.model, point, task.eot), y, margin)[0]

    low, high = torch.zeros_like(clean[rows]), torch.ones_like(clean[rows])
    right, wrong = clean[rows], margins(far)
    for _ in range(FINAL):
        share = (right / (right - wrong).clamp_max(-torch.finfo(x.dtype).tiny)).clamp(0, 1)
        between = torch.minimum((low + (high - low) * share) * (1 + BEYOND), high)
        point = (x + between[:, None, None, None] * (far - x)).clamp(0, 1)
        value = margins(point)
        crossed = value > 0
        x_adv[rows] = torch.where(crossed[:, None, None, None], point, x_adv[rows])
        low, right = torch.where(crossed, low, between), torch.where(crossed, right, value)
        high, wrong = torch.where(crossed, between, high), torch.where(crossed, value, wrong)
    return x_adv


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
        except DEVICE_FAULTS:
            raise
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
    # On an accelerator the CPU waits for the answer whether a pass changed anything, and one that did not costs little.
    passes = 1 if points.device.type == "cpu" else PASSES
    number = 0
    while True:
        number += 1
        rate = torch.where(stuck, 0.0, size * speed).sum(1)
        time = (goal - torch.where(stuck, size * room, 0.0).sum(1)) / rate
        travelled = torch.where(rate > 0, time.clamp(0, never), never)[:, None] * speed
        more = (travelled >= room) & ~stuck
        if number % passes == 0 and not bool(more.any()):
            return sign * torch.where(stuck, room, travelled)
        stuck |= more
