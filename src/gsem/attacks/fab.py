"""FAB (Croce & Hein, ICML 2020): minimum-norm points by projections onto the linearised decision boundary."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem.attacks._active import Run, cascade, confirm_broken, confirmation, shifted
from gsem.attacks._core import (
    NOT_FINITE,
    Images,
    ImagesLike,
    Labels,
    LabelsLike,
    Norm,
    NotFinite,
    OnStep,
    Step,
    Targeted,
    WorstSoFar,
    aimed,
    ascend,
    check_result,
    distances,
    draw_chunks,
    expected,
    expected_logits,
    forward_draws,
    outcome,
    project,
    random_start,
)
from gsem.attacks._planes import gradients, onto_plane
from gsem.losses import margin
from gsem.rng import derive_seed, generator, seeded

# The paper's constants: largest weight of the image in a step, overshoot past the plane, and how much of the way
# remains once the boundary is crossed.
ALPHA_MAX = 0.1
ETA = 1.05
BETA = 0.9
# Passes of the final search, and how far beyond the boundary they aim, as a share of its distance.
FINAL, BEYOND = 3, 1e-3


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
    targets: int | None = None,
    eot: int = 1,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Images:
    """Fast adaptive boundary attack: looks for the nearest misclassified point, with no step size to tune.

    Each step takes the classifier for linear, moves to the nearest point of the boundary within [0, 1], drawn
    towards the image, and a little past it.

    Args:
        model: [b, c, h, w] in [0, 1] → logits [b, k], in eval mode.
        x: images [b, c, h, w] in [0, 1]. y: their labels [b], int64.
        eps: radius of the ball, in the unit of the images: an image is left alone once a point in the ball is
            broken (every draw misclassifies it, and a hundred more if the model is stochastic). None: no ball, and
            every path is followed to its end.
        target: classes [b], or one for all images, that a targeted attack drives the images towards; y is not used
            then, and an image is broken where it is taken for its target. Each step sees one plane, that between the
            target and the class that leads: where the nearest point lies on several planes, a farther one is found
            (by up to 40% on linear classifiers).
        steps: of the iterate, per restart and target. Each costs one gradient and one pass forward.
        restarts: the first starts at the image, the others at random points in the ball (with no eps: in that of
            the nearest point so far).
        targets: None aims at the nearest of all wrong classes, which takes k − 1 gradients a step; a number (the
            standard's 9) at each of the so many wrong classes with the highest clean logits, one after the other,
            with one gradient a step (FAB-T).
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
    within eps is pushed on along the plane's normal, where rounding cannot take it back.
    """
    counts = {"steps": steps, "restarts": restarts, "eot": eot} | ({} if targets is None else {"targets": targets})
    if target is not None and targets is not None:
        raise ValueError("give target, the classes to reach, or targets, a number of wrong classes to try; not both")
    bound = 1.0 if eps is None else eps
    model, x, y, bound = aimed(model, x, y, target, eps=bound, norm=norm, **counts)
    x = x.detach()
    if not len(x):
        return x.clone()
    with seeded(derive_seed(seed, "model"), x.device):
        classes = [None] if targets is None else _targets(model, x, y, targets, eot)
        every = [(restart, target) for restart in range(restarts) for target in classes]
        if eps is None:
            task = _Task(model, x, y, None, norm, steps, eot, 0)
            x_adv = _nearest(task, every, seed, on_step)
        else:
            task = _Task(model, x, y, bound, norm, steps, eot, confirmation(model, x))
            runs = [_run(task, *what) for what in every]
            x_adv = cascade(model, x, y, runs, eot=eot, confirm=task.confirm, seed=seed, on_step=on_step)
    return check_result(x_adv, x, eps=float("inf") if eps is None else bound, norm=norm)


@dataclass(frozen=True)
class _Task:
    """What is asked, for all images of the call."""

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
    """One run's state, a row per image: settled ones leave it."""

    place: Tensor
    """Numbers of the images within the run."""
    x: Tensor
    y: Tensor
    target: Tensor | None
    x_adv: Tensor
    normal: Tensor
    """Of the plane that stands for the boundary: gradient of the difference of logits that it is the zero set of."""
    found: Tensor
    """The nearest misclassified point so far."""
    distance: Tensor
    """Its distance; infinite where there is none."""

    @classmethod
    def begin(cls, start: Images, x: Images, y: Labels, target: Tensor | None) -> "_Path":
        place, far = torch.arange(len(x), device=x.device), x.new_full((len(x),), float("inf"))
        return cls(place, x, y, target, start, torch.zeros_like(x), x, far)

    def only(self, rows: Bool[Tensor, " b"]) -> "_Path":
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if value is not None})


@dataclass
class _Seen:
    """The classifier at the iterates, averaged over draws."""

    margin: Tensor
    wrong: Tensor
    crossed: Tensor
    """Whether the averaged logits are wrong."""
    gap: Tensor
    """The difference of logits whose gradient is the path's normal."""


def _targets(model: nn.Module, x: Images, y: Labels, targets: int, eot: int) -> list[Tensor | None]:
    """For the 1st, 2nd, … target: [b] the wrong class whose mean logit on the clean image comes 1st, 2nd, …"""
    logits = expected_logits(model, x, eot).scatter(1, y[:, None], float("-inf"))
    return list(logits.topk(min(targets, logits.shape[1] - 1), dim=1).indices.T)


def _run(task: _Task, restart: int, target: Tensor | None) -> Run:
    """One run within the ball, for `cascade`."""

    def attack(rows: Tensor, seed: int, on_step: OnStep | None) -> Images:
        assert task.eps is not None
        x, start = task.x[rows], task.x[rows]
        if restart:
            start = random_start(x, task.eps, task.norm, generator(seed, "start", device=x.device))
        path = _Path.begin(start, x, task.y[rows], None if target is None else target[rows])
        worst = WorstSoFar(x)
        with seeded(derive_seed(seed, "model"), x.device):
            path = _walk(task, path, rows, worst, on_step)
            if len(path.place):
                # What lies outside is worth its projection.
                outside = torch.where(path.distance.isfinite()[:, None, None, None], path.found, path.x_adv)
                last = project(outside, path.x, task.eps, task.norm)
                value, wrong = expected(task.model, last, path.y, margin, task.eot)
                worst.update(last, value, confirm_broken(task.model, last, path.y, wrong, task.confirm), path.place)
        return worst.x

    return attack


def _nearest(task: _Task, every: list[tuple[int, Tensor | None]], seed: int, on_step: OnStep | None) -> Images:
    """All runs one after the other, with no ball: the nearest misclassified point of each image."""
    x_adv = task.x.clone()
    value, _ = outcome(task.model, expected_logits(task.model, task.x, task.eot), task.y, margin)
    _check_finite(value, torch.arange(len(value), device=value.device))
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
        with seeded(derive_seed(seed, "model", number), x.device):
            path = _Path.begin(start, x, y, None if target is None else target[rows])
            path = _walk(task, path, rows, None, shifted(on_step, rows))
            found = _final_search(task, path, value[rows])
        _closer(best, found, torch.where(path.distance.isfinite(), task.length(found, x), float("inf")))
    x_adv[rows] = best.found
    return x_adv


def _walk(task: _Task, path: _Path, rows: Int[Tensor, " r"], worst: WorstSoFar | None, on_step: OnStep | None) -> _Path:
    """One run; `rows` are the images' numbers in the call. With `worst`, points in the ball are judged and what is
    broken leaves. Returns what stays."""
    for number in range(task.steps + 1):
        ends = number == task.steps
        # One pass forward tells where the iterate lies; the gradient is taken where the next step begins.
        seen = _look(task, path, differentiate=number == 0 and not ends)
        _check_finite(seen.margin, rows[path.place])
        if on_step is not None:
            on_step(Step(path.place, number, path.x_adv, seen.margin, seen.wrong))
        length = task.length(path.x_adv, path.x)
        nearer = _closer(path, path.x_adv, torch.where(seen.crossed, length, float("inf")))
        if worst is not None:
            # The start is pushed, too: the least that one gradient can do.
            broken = _judge(task, path, seen, length, nearer if number else torch.ones_like(nearer), worst)
            if bool(broken.any()):
                path = path.only(~broken)
                seen = _Seen(*(value[~broken] for value in vars(seen).values()))
        if ends or not len(path.place):
            break
        if number or bool(seen.crossed.any()):
            # Across the boundary it goes back towards the image first. (The plane at the crossing itself misses
            # boundaries of a rugged classifier: 5 of 73 images that the reference breaks, on such a one.)
            back = path.x + BETA * (path.x_adv - path.x)
            path.x_adv = torch.where(seen.crossed[:, None, None, None], back, path.x_adv)
            seen = _look(task, path, differentiate=True)
            _check_finite(seen.margin, rows[path.place])
        path.x_adv = _step(path, seen, task.norm)
    return path


def _check_finite(value: Float[Tensor, " b"], rows: Int[Tensor, " b"]) -> None:
    bad = ~value.isfinite()
    if bool(bad.any()):
        raise NotFinite(f"image {int(rows[bad][0])} of the attacked batch: {NOT_FINITE}")


def _closer(path: _Path, x_adv: Images, distance: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
    nearer = distance < path.distance
    path.found = torch.where(nearer[:, None, None, None], x_adv, path.found)
    path.distance = torch.where(nearer, distance, path.distance)
    return nearer


def _judge(
    task: _Task, path: _Path, seen: _Seen, length: Tensor, chosen: Tensor, worst: WorstSoFar
) -> Bool[Tensor, " b"]:
    """Take iterates in the ball into `worst`; the chosen are first pushed along the normal, past the boundary, with
    what is left of eps. Returns which are broken."""
    assert task.eps is not None
    inside = length <= task.eps
    point, value, wrong = path.x_adv, seen.margin, seen.wrong
    push = (inside & chosen).nonzero()[:, 0]
    if len(push):
        room = (task.eps - length[push])[:, None, None, None]
        pushed = ascend(point[push], path.x[push], path.normal[push], room, task.eps, task.norm)
        higher, share = expected(task.model, pushed, path.y[push], margin, task.eot)
        better = higher > value[push]
        pushed, push = pushed[better], push[better]
        point, value, wrong = point.clone(), value.clone(), wrong.clone()
        point[push], value[push], wrong[push] = pushed, higher[better], share[better]
    broken = confirm_broken(task.model, point, path.y, torch.where(inside, wrong, 0.0), task.confirm)
    worst.update(point, torch.where(inside, value, float("-inf")), broken, path.place)
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

    def worth(point: Images) -> Float[Tensor, " b"]:
        return outcome(task.model, expected_logits(task.model, point, task.eot), y, margin)[0]

    low, high = torch.zeros_like(clean[rows]), torch.ones_like(clean[rows])
    right, wrong = clean[rows], worth(far)
    for _ in range(FINAL):
        share = (right / (right - wrong).clamp_max(-torch.finfo(x.dtype).tiny)).clamp(0, 1)
        between = torch.minimum((low + (high - low) * share) * (1 + BEYOND), high)
        point = (x + between[:, None, None, None] * (far - x)).clamp(0, 1)
        value = worth(point)
        crossed = value > 0
        x_adv[rows] = torch.where(crossed[:, None, None, None], point, x_adv[rows])
        low, right = torch.where(crossed, low, between), torch.where(crossed, right, value)
        high, wrong = torch.where(crossed, between, high), torch.where(crossed, value, wrong)
    return x_adv
