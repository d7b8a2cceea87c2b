"""What a classifier answers, over draws of its noise. Used by training's validation and by the evaluation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gsem.streams import split, stream

# Enough images to keep a machine busy, few enough for the activations of a WideResNet in memory.
BATCH = 256


@torch.no_grad()
def is_stochastic(model: nn.Module, x: Float[Tensor, "b c h w"]) -> bool:
    """Whether two forward passes differ, on these images or on noise of their shape (some models only then do).

    torch's random state is left as it was.
    """
    with stream(0, x.device):
        return any(not torch.equal(model(probe), model(probe)) for probe in (x, torch.rand_like(x)))


@torch.no_grad()
def correct_draws(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    draws: int,
    seed: int,
    batch: int = BATCH,
) -> Int[Tensor, " n"]:
    """In how many of `draws` forward passes, each with fresh noise, the image is classified as its label.

    Raises:
        ValueError: a logit that is NaN or infinite; the image is named.
    """
    counts = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for first in range(0, len(x), batch):
        part, labels = x[first : first + batch], y[first : first + batch]
        with stream(split(seed, first), x.device):
            for _ in range(draws):
                logits = model(part)
                bad = ~logits.isfinite().all(1)
                if bad.any():
                    raise ValueError(f"image {first + int(bad.nonzero()[0])}: the model's logits are not finite")
                counts[first : first + batch] += logits.argmax(1) == labels
    return counts
