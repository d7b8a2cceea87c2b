"""What every attack shares: the one EOT loop, the threat model's geometry, and the checks at both ends."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem.losses import LOSSES, Loss
from gsem.nn.contract import ImagesLike, LabelsLike, NotFinite, checked, gradient

Images = Float[Tensor, "b c h w"]  # in [0, 1]; eps in the same unit
Labels = Int[Tensor, " b"]
Norm = Literal["Linf", "L2"]

# Draws are folded into the batch up to this many pixels: 128 images of 32 × 32, 2,048 of 8 × 8. Fewer leave a processor
# with little to do; more no longer fit into its cache, and images of 32 × 32 then take a fifth longer.
FOLDED_PIXELS = 128 * 32 * 32
# A GPU has more to fill, and no such cache.
FOLDED_PIXELS_GPU = 2048 * 32 * 32


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


State = TypeVar("State", bound=_Dataclass)


def select(state: State, rows: Bool[Tensor, " b"]) -> State:
    """An attack's state, a dataclass whose tensors have one row per image, for these images only."""
    return replace(state, **{name: value[rows] for name, value in vars(state).items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class Step:
    """One iterate of an attack, as its observer sees it: all averaged over the draws of the search.

    rows: [b] numbers of the images; x: [b, c, h, w] the iterate; loss: [b]; wrong: [b], the share of draws that
    misclassify it (of a targeted attack: that take it for its target), in [0, 1].
    """

    rows: Tensor
    step: int
    x: Tensor
    loss: Tensor
    wrong: Tensor


OnStep = Callable[[Step], None]


class WorstSoFar:
    """The worst point of each image among those seen: one that is broken for good, then the highest loss.

    Broken (every draw misclassifies it) comes first because such a point may have the lower loss; among the others
    the mean loss decides, not the share of wrong draws, whose maximum over a path would mostly pick luck.
    """

    def __init__(self, x: Images):
        self.x = x.detach().clone()
        self.value = x.new_full((len(x),), float("-inf"))
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def update(
        self, x: Images, value: Float[Tensor, " r"], broken: Bool[Tensor, " r"], rows: Int[Tensor, " r"] | None = None
    ) -> None:
        """Compare points of the images numbered `rows` (default: all) with the worst so far."""
        at = slice(None) if rows is None else rows
        better = torch.where(broken == self.broken[at], value > self.value[at], broken)
        self.x[at] = torch.where(better[:, None, None, None], x, self.x[at])
        self.value[at] = torch.where(better, value, self.value[at])
        self.broken[at] |= broken


class _Wrapper(nn.Module):
    """A model around another, which it asks for the logits of one draw or of several."""

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
    """A model as a targeted attack sees it: y holds the classes to reach, not those to leave.

    The losses of `expected` and `expected_gradient` are those of `model`, negated, so that an attack that raises
    them drives the images towards y; `wrong` is the share of draws that classify an image as y.
    """


def aimed(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    target: LabelsLike | int | None,
    *,
    eps: float | str,
    norm: str,
    targets: int = 0,
    **counts: int,
) -> tuple[nn.Module, Tensor, Tensor, float]:
    """`checked` arguments of an attack. With a target: a `Targeted` model, and the targets in the place of y."""
    if targets:
        counts["targets"] = targets
        if target is not None:
            raise ValueError("give target, the classes to reach, or targets, a number of wrong classes; not both")
    if target is None:
        return checked(model, x, y, eps=eps, norm=norm, **counts)
    if isinstance(target, int):
        target = torch.full((len(x),), target)
    model, x, y, radius = checked(model, x, target, "target", eps=eps, norm=norm, **counts)
    return Targeted(model), x, y.to(x.device), radius


def checked_init(init: ImagesLike | None, x: Images, restarts: int) -> Images | None:
    """Starting points that the caller gives, in the form of x."""
    if init is None:
        return None
    init = torch.as_tensor(init).to(x)
    if init.shape != x.shape or restarts != 1:
        raise ValueError(f"init must have x's shape {tuple(x.shape)}, and restarts must be 1")
    return init


def resolve_loss(loss: str | Loss) -> Loss:
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is unknown: it is one of {', '.join(LOSSES)}, or a function")
    return LOSSES[loss]


def draw_chunks(draws: int, x: Images) -> list[int]:
    """How many draws go into each pass over this batch."""
    pixels = FOLDED_PIXELS if x.device.type == "cpu" else FOLDED_PIXELS_GPU
    per_pass = max(1, min(draws, pixels // max(1, x[:, :1].numel())))
    full, rest = divmod(draws, per_pass)
    return [per_pass] * full + ([rest] if rest else [])


def forward_draws(model: nn.Module, x: Images, draws: int) -> Float[Tensor, "n k"]:
    """Logits [draws · b, k]: all of the first draw, then all of the second, … A folded model shares their beginning."""
    if draws == 1:
        return model(x)
    several = getattr(model, "logits_of_draws", None)
    return several(x, draws) if several is not None else model(x.repeat(draws, 1, 1, 1))


def outcome(
    model: nn.Module, logits: Float[Tensor, "n k"], y: Int[Tensor, " n"], loss: Loss
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """What an attack raises, and whether it has reached its goal: for each row, of one draw."""
    values, answers = loss(logits, y), logits.detach().argmax(1)
    return (-values, answers == y) if isinstance(model, Targeted) else (values, answers != y)


def _averaged(
    model: nn.Module, x: Images, y: Labels, loss: Loss, eot: int, *, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
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
    # One draw is left as it is: a division would cost a pass, and the bits stay those of the textbook.
    return values / eot, wrong / eot, grad if grad is None or eot == 1 else grad / eot


def expected(
    model: nn.Module, x: Images, y: Labels, loss: Loss, eot: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Loss and share of wrong draws of each image, averaged over `eot` forward passes."""
    values, wrong, _ = _averaged(model, x, y, loss, eot, differentiate=False)
    return values, wrong


def expected_gradient(
    model: nn.Module, x: Images, y: Labels, loss: Loss, eot: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Images]:
    """As `expected`, and the gradient of the averaged loss (EOT, Athalye et al. 2018)."""
    values, wrong, grad = _averaged(model, x, y, loss, eot, differentiate=True)
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


def _length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def random_start(x: Images, eps: float, norm: Norm, generator: torch.Generator) -> Images:
    """A point drawn uniformly from the ball of radius eps around each image, clipped to [0, 1]."""
    if norm == "Linf":
        offset = (torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) * 2 - 1) * eps
    else:
        offset = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        size = x[0].numel()
        share = torch.rand((len(x), 1, 1, 1), generator=generator, device=x.device, dtype=x.dtype)
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


def _refuse(
    bad: Bool[Tensor, " r"], what: str, rows: Int[Tensor, " r"] | None = None, error: type[ValueError] = ValueError
) -> None:
    if bool(bad.any()):
        image = int(bad.nonzero()[0, 0]) if rows is None else int(rows[bad][0])
        raise error(f"image {image} of the attacked batch: {what}")


def require_finite(finite: Bool[Tensor, " r"], rows: Int[Tensor, " r"] | None = None) -> None:
    """Refuse losses that are not finite.

    Args:
        finite: whether the loss of each image is.
        rows: numbers of the images; default: 0, 1, …

    Raises:
        NotFinite: naming the first image whose loss is NaN or infinite.
    """
    _refuse(~finite, "the model's loss is NaN or infinite there", rows, NotFinite)


def check_result(x_adv: Images, x: Images, *, eps: float, norm: Norm) -> Images:
    """`x_adv`, if it keeps to the threat model.

    Raises:
        NotFinite: naming the first image with pixels that are NaN or infinite.
        ValueError: naming the first that leaves [0, 1], or lies farther than eps from its original (by more than
            rounding: 1e-6 for L∞, 1e-5 relative for L2).
    """
    flat = x_adv.flatten(1)
    _refuse(~flat.isfinite().all(1), "the attack returned NaN or infinite pixels", error=NotFinite)
    _refuse(((flat < 0) | (flat > 1)).any(1), "the attack left [0, 1]")
    linf, l2 = distances(x_adv, x)
    far = linf > eps + 1e-6 if norm == "Linf" else l2 > eps * (1 + 1e-5) + 1e-6
    _refuse(far, f"the attack returned a point farther than eps = {eps:g} ({norm}) from the image")
    return x_adv
