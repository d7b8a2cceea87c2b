"""The published GCAT step as a textbook writes it, for `training_step.py` and for a test of the fast one.

Source: method as released (X. Liu et al., Pattern Recognition 172 (2026) 112433): every second image is replaced by
its PGD example, searched in eval mode with each gradient averaged over draws of the noise; the gradient of the
weights is averaged over draws, too. Eager, one draw after the other, in whatever dtype and layout the model has.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cast = Callable[[], AbstractContextManager]


def attack_gradient(model: nn.Module, x: Tensor, y: Tensor, cast: Cast = nullcontext) -> Tensor:
    """One attack pass: the gradient of the cross-entropy with respect to the images."""
    x = x.detach().requires_grad_()
    with cast():
        loss = F.cross_entropy(model(x).float() if x.dtype != torch.float64 else model(x), y, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    return grad


def attack(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, eps: float, steps: int, eot: int, cast: Cast = nullcontext
) -> Tensor:
    """PGD in eval mode from `start`, with steps of eps / 4."""
    model.eval()
    x_adv = start
    for _ in range(steps):
        grad = sum(attack_gradient(model, x_adv, y, cast) for _ in range(eot))
        x_adv = x_adv + eps / 4 * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


def training_pass(model: nn.Module, x: Tensor, y: Tensor, share: float, cast: Cast = nullcontext) -> Tensor:
    """Adds `share` of the mean cross-entropy's gradient to the weights' gradients. Returns the mean."""
    model.train()
    with cast():
        logits = model(x)
        loss = F.cross_entropy(logits.float() if x.dtype != torch.float64 else logits, y)
    (loss * share).backward()
    return loss.detach()


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    *,
    eps: float,
    steps: int,
    eot: int,
    draws: int,
    cast: Cast = nullcontext,
) -> float:
    """One optimizer step on images x [b, c, h, w]; the attacks on rows 1, 3, … begin at `start` [b // 2, c, h, w].

    Returns:
        the loss, averaged over images and draws.
    """
    x = x.clone()
    x[1::2] = attack(model, x[1::2], y[1::2], start, eps=eps, steps=steps, eot=eot, cast=cast)
    optimizer.zero_grad()
    losses = [training_pass(model, x, y, 1 / draws, cast) for _ in range(draws)]
    optimizer.step()
    return float(sum(losses) / draws)
