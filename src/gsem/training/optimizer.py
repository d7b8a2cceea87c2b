"""The optimizer of a recipe, and its state as named tensors."""

import torch
from torch import Tensor, nn

from gsem.training.recipe import Recipe

# Name of a state tensor in a checkpoint → torch's name, for SGD and AdamW.
_STATE = {"momentum": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "adam_step": "step"}


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    # On a CPU neither fused nor foreach kernels run, so that a resumed run computes the same bits.
    fused = next(model.parameters()).device.type == "cuda" or None
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    sgd = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )
    if sgd.defaults["fused"] and recipe.momentum:
        # The fused kernel allocates the momentum unset, and leaves it so where a GradScaler skips the first step.
        # From 0, the first step is the same as without a momentum.
        for p in model.parameters():
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Its tensors, as `momentum.NAME` (SGD) or `exp_avg.NAME`, `exp_avg_sq.NAME`, `adam_step.NAME` (AdamW)."""
    return {
        f"{ours}.{name}": state[theirs]
        for name, p in model.named_parameters()
        if (state := optimizer.state.get(p))
        for ours, theirs in _STATE.items()
        if state.get(theirs) is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `optimizer_state` back."""
    fused = optimizer.defaults.get("fused")
    for name, p in model.named_parameters():
        for ours, theirs in _STATE.items():
            found = tensors.get(f"{ours}.{name}")
            if found is None:
                continue
            if theirs == "step":  # a scalar, on the CPU unless a fused kernel counts it
                optimizer.state[p][theirs] = found.to(p.device if fused else "cpu", copy=True)
            else:
                optimizer.state[p][theirs] = torch.empty_like(p).copy_(found)
