"""The EOT loop of every attack, and the geometry of the threat model."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem.attacks._types import Images, Labels, Norm
from gsem.losses import Loss, margin, margin_towards
from gsem.nn.contract import gradient
from gsem.nn.folded import FoldedModel
from gsem.rng import Shard

# Draws are folded into the batch up to this many pixels: 128 images of 32 × 32, 2,048 of 8 × 8. Fewer leave a processor
# with little to do; more no longer fit into its cache, and images of 32 × 32 then take a fifth longer.
FOLDED_PIXELS = 128 * 32 * 32
# A GPU has more to fill, and no such cache.
FOLDED_PIXELS_GPU = 2048 * 32 * 32
# Wrong classes that MALT looks at, those with the highest logits: the paper's number for ImageNet.
CANDIDATES = 100


class _Wrapper(nn.Module):
    """A model around another one, with the same logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # not train(): it would reach into the model

    def forward(self, x: Tensor) -> Tensor:
        return self.logits_of_draws(x, 1)

    def logits_of_draws(self, x: Tensor, count: int) -> Tensor:
        return forward_draws(self.model, x, count)


class Counting(_Wrapper):
    """A model that counts the image rows that pass through it, forward and with a gradient."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.forwards = 0
        self.gradients = 0

    def logits_of_draws(self, x: Tensor, count: int) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            self.gradients += count * len(x)
        else:
            self.forwards += count * len(x)
        return super().logits_of_draws(x, count)


def counting(model: nn.Module) -> Counting:
    """`model`, with `.forwards` (rows without a gradient) and `.gradients` (rows forward and back) counted."""
    return Counting(model)


class Targeted(_Wrapper):
    """The model of a targeted attack: y holds the classes to reach, not the labels.

    The losses of `expected` and `expected_gradient` are those of `model`, negated, so that an attack that raises
    them drives the images towards y; `wrong` is the share of draws that classify an image as y.
    """


def also_wrong_unfolded(model: nn.Module, x: Images, y: Labels, broken: Bool[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Which of the points that are broken on a deterministic model are broken on the network itself, where `model` is a
    folded one: of points that barely are, rounding may decide. Counts no pass: there is one for each point at most."""
    inner = model
    while isinstance(inner, _Wrapper):
        inner = inner.model
    if not isinstance(inner, FoldedModel):
        return broken
    at = broken.nonzero()[:, 0]
    if not len(at):
        return broken
    _, reached = outcome(model, inner.exact_logits(x[at]), y[at], margin)
    return broken.index_put((at,), reached)


def draw_chunks(draws: int, x: Images) -> list[int]:
    """How many draws go into each pass over this batch. On an accelerator their numbers differ by one at most, so that
    no pass is nearly empty and few shapes are planned or compiled."""
    on_cpu = x.device.type == "cpu"
    pixels = FOLDED_PIXELS if on_cpu else FOLDED_PIXELS_GPU
    per_pass = max(1, min(draws, pixels // max(1, x[:, :1].numel())))
    full, rest = divmod(draws, per_pass)
    if on_cpu:  # (Equal sizes would be other draws of seeded noise, and of what a model draws by randn.)
        return [per_pass] * full + ([rest] if rest else [])
    passes = full + (rest > 0)
    least, larger = divmod(draws, passes)
    return [least + 1] * larger + [least] * (passes - larger)


def forward_draws(model: nn.Module, x: Images, draws: int) -> Float[Tensor, "n k"]:
    """Logits [draws · b, k]: all of the first draw, then all of the second, … A folded model shares their beginning."""
    if draws == 1:
        return model(x)
    several = getattr(model, "logits_of_draws", None)
    return several(x, draws) if several is not None else model(x.repeat(draws, 1, 1, 1))


def outcome(
    model: nn.Module, logits: Float[Tensor, "n k"], y: Int[Tensor, " n"], loss: Loss
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """For each row, of one draw: the loss that the attack raises, and whether its goal is reached (see `Targeted`)."""
    values, answers = loss(logits, y), logits.detach().argmax(1)
    return (-values, answers == y) if isinstance(model, Targeted) else (values, answers != y)


def averaged(
    model: nn.Module, x: Images, y: Labels, loss: Loss, eot: int, *, differentiate: bool
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Images | None]:
    """Loss and share of wrong draws of each image, averaged over `eot` forward passes; if `differentiate`, also the
    gradient of the averaged loss (EOT, Athalye et al. 2018)."""
    values, wrong = x.new_zeros(len(x)), x.new_zeros(len(x))
    grad: Tensor | None = None
    x = x.detach().requires_grad_(differentiate)
    for fold in draw_chunks(eot, x):
        with torch.set_grad_enabled(differentiate):
            logits = forward_draws(model, x, fold)
            labels = y.repeat(fold)
            each, reached = outcome(model, logits, labels, loss)
            if differentiate:
                part = gradient(each.sum(), x)
                grad = part if grad is None else grad + part
        values = values + each.detach().view(fold, -1).sum(0)
        wrong = wrong + reached.view(fold, -1).sum(0)
    # The gradient of one draw is not divided: that would cost time.
    return values / eot, wrong / eot, grad if grad is None or eot == 1 else grad / eot


def expected(
    model: nn.Module, x: Images, y: Labels, loss: Loss, eot: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """`averaged` without the gradient."""
    values, wrong, _ = averaged(model, x, y, loss, eot, differentiate=False)
    return values, wrong


def expected_gradient(
    model: nn.Module, x: Images, y: Labels, loss: Loss, eot: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Images]:
    """`averaged` with the gradient."""
    values, wrong, grad = averaged(model, x, y, loss, eot, differentiate=True)
    assert grad is not None
    return values, wrong, grad


@torch.no_grad()
def expected_logits(model: nn.Module, x: Images, eot: int) -> Float[Tensor, "b k"]:
    """Logits averaged over `eot` forward passes."""
    total: Tensor | float = 0.0
    for fold in draw_chunks(eot, x):
        logits = forward_draws(model, x, fold)
        total = total + logits.view(fold, len(x), -1).sum(0)
    assert isinstance(total, Tensor)
    return total / eot


def strongest_wrong_classes(logits: Float[Tensor, "b k"], y: Labels, count: int) -> list[Int[Tensor, " b"]]:
    """For each image the wrong class with the highest logit, then that with the second highest, …: `count` of them."""
    wrong = logits.scatter(1, y[:, None], float("-inf"))
    return list(wrong.topk(min(count, logits.shape[1] - 1), dim=1).indices.T)


def nearest_wrong_classes(
    model: nn.Module, x: Images, y: Labels, count: int, *, norm: Norm, eot: int
) -> list[Int[Tensor, " b"]]:
    """For each image the wrong class whose linearised boundary is nearest, then the second nearest, …: `count` of them
    (MALT, Melamed et al. 2024).

    The boundary with class t lies at (z_y − z_t) / ‖∇(z_t − z_y)‖, with logits and gradients at the image itself,
    averaged over `eot` draws. The norm is the dual one of the threat model: L1 for L∞, L2 for L2. For a linear
    classifier these are the distances to the hyperplanes. Both the norm and the choice of classes (the 100 wrong ones
    with the highest logits) are those of the authors' code. There, a class whose gradient is zero comes first; here,
    last.

    Each class costs a gradient pass for each draw.
    """
    classes = strongest_wrong_classes(expected_logits(model, x, eot), y, CANDIDATES)
    distances = []
    for target in classes:
        gain, _, grad = expected_gradient(model, x, y, margin_towards(target), eot)
        steepness = dual_length(grad, norm)
        distances.append(torch.where(steepness > 0, -gain / steepness, float("inf")))
    order = torch.stack(distances).argsort(dim=0, stable=True)[:count]
    return list(torch.stack(classes).gather(0, order))


def dual_length(grad: Images, norm: Norm) -> Float[Tensor, " b"]:
    """The dual norm of each gradient: by how much a linear function rises, at most, in the unit ball of `norm`."""
    return grad.flatten(1).norm(p=1 if norm == "Linf" else 2, dim=1)


def _length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def random_start(x: Images, eps: float, norm: Norm, generator: torch.Generator, shard: Shard | None = None) -> Images:
    """A point drawn uniformly from the ball of radius eps around each image, clipped to [0, 1].

    `shard`: which rows of a batch x is; the random numbers are drawn for the whole batch. Default: all of it.
    """
    shard = shard or Shard(0, len(x), len(x))
    shape = (shard.batch, *x.shape[1:])
    if norm == "Linf":
        drawn = torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)[shard.rows]
        offset = (drawn * 2 - 1) * eps
    else:
        offset = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)[shard.rows]
        size = x[0].numel()
        share = torch.rand((shard.batch, 1, 1, 1), generator=generator, device=x.device, dtype=x.dtype)[shard.rows]
        offset = offset / _length(offset).clamp_min(1e-12) * eps * share ** (1 / size)
    return (x + offset).clamp(0, 1)


def starting_points(x: Images, init: Images | None, eps: float, norm: Norm, rng: torch.Generator) -> Images:
    """`init`, projected into the ball; without it, random points of the ball."""
    return random_start(x, eps, norm, rng) if init is None else project(init, x, eps, norm)


def ascend(
    x_adv: Images, x: Images, grad: Images, step: float | Float[Tensor, "b 1 1 1"], eps: float, norm: Norm
) -> Images:
    """One step of length `step` (one, or each image's own) along the steepest ascent, then into the ball and [0, 1]."""
    if norm == "Linf":
        return project(x_adv + step * grad.sign(), x, eps, norm)
    return project(x_adv + step * grad / _length(grad).clamp_min(1e-12), x, eps, norm)


def project(x_adv: Images, x: Images, eps: float, norm: Norm) -> Images:
    """The nearest point of the ball of radius eps around x, then clipped to [0, 1]."""
    offset = x_adv - x
    if norm == "Linf":
        offset = offset.clamp(-eps, eps)
    else:
        offset = offset * (eps / _length(offset).clamp_min(eps))
    return (x + offset).clamp(0, 1)


def distances(x_adv: Images, x: Images) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """L∞ and L2 length of each perturbation, in the unit of the images."""
    offset = (x_adv - x).flatten(1)
    return offset.abs().amax(1), offset.norm(dim=1)
