"""Losses: logits in, one value per sample out. An attack raises them; the caller averages."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "b k"]
Labels = Int[Tensor, " b"]
Values = Float[Tensor, " b"]
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Logits, y: Labels) -> Values:
    """−log softmax(logits)_y, in nats, ≥ 0."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> Values:
    """max_{k ≠ y} z_k − z_y, in logits: positive where the image is misclassified (Carlini & Wagner 2017)."""
    right = logits.gather(1, y[:, None])
    return logits.scatter(1, y[:, None], float("-inf")).amax(1) - right[:, 0]


def dlr(logits: Logits, y: Labels) -> Values:
    """The difference of logits ratio, margin / (z_(1) − z_(3)) (Croce & Hein 2020, equation 6).

    Does not change when the logits are scaled or shifted, so that large logits cannot hide its gradient.

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, not {logits.shape[1]}: use 'margin' or 'ce'")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
