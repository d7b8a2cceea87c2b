"""Predictions over draws of a classifier's noise, for validation and evaluation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gsem.rng import derive_seed, seeded

# Enough images to keep a machine busy, few enough for the activations of a WideResNet in memory.
BATCH = 256


@torch.no_grad()
def is_stochastic(model: nn.Module, x: Float[Tensor, "b c h w"]) -> bool:
    """Whether two forward passes differ, on these images or on noise of their shape (some models differ on noise only).

    torch's random state is left as it was.
    """
    with seeded(0, x.device):
        return any(not torch.equal(model(probe), model(probe)) for probe in (x, torch.rand_like(x)))


@torch.no_grad()
def predict_draws(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    *,
    draws: int,
    seed: int,
    batch_size: int = BATCH,
    first: int = 0,
    offset: int = 0,
) -> Int[Tensor, "draws n"]:
    """The class that each of `draws` forward passes, each with fresh noise, gives each image.

    Args:
        first: number of the first image among all, for the message of an error.
        offset: where the images begin among those that `seed` is for: the noise is as if all were given.

    Raises:
        ValueError: a logit that is NaN or infinite; the image is named.
    """
    found = torch.zeros((draws, len(x)), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), batch_size):
        part = x[start : start + batch_size]
        bad = torch.zeros(len(part), dtype=torch.bool, device=x.device)
        with seeded(derive_seed(seed, offset + start), x.device):
            for draw in range(draws):
                logits = model(part)
                bad |= ~logits.isfinite().all(1)
                found[draw, start : start + batch_size] = logits.argmax(1)
        if bad.any():  # looked at once a batch, since a GPU waits here
            image = first + start + int(bad.nonzero()[0])
            raise ValueError(f"image {image}: the model's logits are not finite")
    return found


def correct_draws(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    draws: int,
    seed: int,
    batch_size: int = BATCH,
    offset: int = 0,
) -> Int[Tensor, " n"]:
    """In how many of `draws` forward passes, each with fresh noise, the image is classified as its label.

    `offset`: as in `predict_draws`, which also counts the images of an error's message from there.

    Raises:
        ValueError: as `predict_draws`.
    """
    found = predict_draws(model, x, draws=draws, seed=seed, batch_size=batch_size, first=offset, offset=offset)
    return (found == y).sum(0)


def vote_accuracy(found: Int[Tensor, "draws n"], y: Int[Tensor, " n"], voters: int) -> Float[Tensor, " n"]:
    """The share of votes, each among `voters` predictions of its own, in which the label alone has the most; ties lose.

    One prediction counts as the vote of a deterministic model. NaN for a stochastic one with fewer than `voters`.
    """
    if len(found) == 1:
        return (found[0] == y).to(torch.float64)
    votes = found[: len(found) // voters * voters].view(-1, voters, found.shape[1])
    if not len(votes):
        return torch.full(y.shape, torch.nan, dtype=torch.float64, device=y.device)
    mine = (votes == y).sum(1)
    # The most votes of any other class: count for each voter how many others agree with it.
    agree = (votes[:, :, None] == votes[:, None, :]).sum(2)
    other = torch.where(votes == y, 0, agree).amax(1)
    return (mine > other).to(torch.float64).mean(0)
