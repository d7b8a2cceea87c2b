"""Adversarial weight perturbation (Wu et al., NeurIPS 2020), without a proxy copy of the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gsem.distributed import Processes


def perturbed_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters that AWP moves: "weight" in their name, and more than one dimension."""
    return [p for name, p in model.named_parameters() if "weight" in name and p.ndim > 1 and p.requires_grad]


@contextmanager
def awp(
    model: nn.Module,
    x_adv: Float[Tensor, "b c h w"],
    y: Int[Tensor, " b"],
    *,
    gamma: float,
    draws: int = 1,
    processes: Processes | None = None,
) -> Iterator[None]:
    """Inside the block, the weights are moved to where the cross-entropy of (x_adv, y) is higher.

        w ← w + γ · ‖w‖ · g / (‖g‖ + 1e-20)      for every weight tensor, g the ascent gradient

    The ascent gradient is that of the model in train mode, averaged over `draws` of its noise; BatchNorm's
    statistics and the parameters' `.grad` are as before it. Loss, backward and optimizer step belong inside the
    block: at its end the *same* perturbation is subtracted, so that the step stays (restoring the saved weights
    would erase it). Where no step was made, an exception included, the weights return bit for bit.

    Args:
        gamma: length of the perturbation of each tensor, relative to its norm; at least 0.
        processes: those that the batch is shared out among. The ascent gradient is that of the whole batch.

    Raises:
        ValueError: a negative gamma, or no draws.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, not {gamma}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    weights = perturbed_parameters(model)
    several = processes is not None and processes.several
    ascent = _ascent_gradient(model, weights, x_adv, y, draws, total=several)
    if processes is not None:
        processes.sum_(*ascent)
    with torch.no_grad():
        saved = [w.clone() for w in weights]
        lengths = torch._foreach_norm(weights)
        steepness = torch._foreach_norm(ascent)
        deltas = [
            g * (gamma * length / (steep + 1e-20)) for g, length, steep in zip(ascent, lengths, steepness, strict=True)
        ]
        torch._foreach_add_(weights, deltas)
    # torch counts the writes to each tensor, which shows whether a step was made.
    versions = [w._version for w in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            if versions == [w._version for w in weights]:
                torch._foreach_copy_(weights, saved)
            else:
                torch._foreach_sub_(weights, deltas)


def _ascent_gradient(
    model: nn.Module, weights: list[Tensor], x_adv: Tensor, y: Tensor, draws: int, *, total: bool
) -> list[Tensor]:
    """The gradient of the mean over the images, or (`total`) of the sum, which is added to those of other processes."""
    # In train mode BatchNorm writes its statistics: here, to copies of them.
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    copies = {f"{name}.{key}".lstrip("."): b.clone() for name, m in layers for key, b in m.named_buffers()}
    ascent = [torch.zeros_like(w) for w in weights]
    for _ in range(draws):
        logits = torch.func.functional_call(model, copies, (x_adv,))
        low = logits.dtype in (torch.bfloat16, torch.float16)
        # Only the direction counts. In fp16 the gradient of a mean over many images would vanish.
        share = "sum" if total or logits.dtype == torch.float16 else "mean"
        loss = F.cross_entropy(logits.float() if low else logits, y, reduction=share) / draws
        grads = torch.autograd.grad(loss, weights, allow_unused=True)  # (a network may have weights for other uses)
        used = [(sum_, g) for sum_, g in zip(ascent, grads, strict=True) if g is not None]
        torch._foreach_add_([sum_ for sum_, _ in used], [g for _, g in used])
    return ascent
