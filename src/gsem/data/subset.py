"""A fixed, class-balanced subset of the test images."""

import torch
from jaxtyping import Int
from torch import Tensor


def balanced(y: Int[Tensor, " n"], count: int) -> Int[Tensor, " count"]:
    """Indices, rising, of `count` images, as many of each class as of any other (one more or less).

    Raises:
        ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"at least 1 image must be taken, not {count}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    # The turn of an image among those of its class, in an order independent of the storage.
    turn = torch.zeros(len(y), dtype=torch.int64)
    for label in y.unique():
        mine = order[y[order] == label]
        turn[mine] = torch.arange(len(mine))
    return order[torch.argsort(turn[order], stable=True)][:count].sort().values
