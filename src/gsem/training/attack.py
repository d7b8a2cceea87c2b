"""The adversarial examples of a training step and of its validation: PGD or N-FGSM on the folded model."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gsem.attacks._core import project, random_start
from gsem.attacks.pgd import pgd_loop
from gsem.losses import Loss, cross_entropy, divergence_from
from gsem.nn.folded import FoldedModel
from gsem.rng import Shard, derive_seed, generator, seeded
from gsem.training.recipe import Recipe


def attack_from(
    recipe: Recipe, folded: FoldedModel, x: Tensor, y: Tensor, start: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """The steps of `adversarial_examples` from `start`, on the folded model, which is refreshed first.

    A CUDA graph replays this function (see `cuda_graph.py`). All that differs from batch to batch must therefore be in
    a tensor: x, y, start, the weights or the noise.
    """
    r = recipe
    folded.refresh()
    objective: Loss = cross_entropy
    if r.objective == "trades":
        with torch.no_grad():
            objective = divergence_from(folded(x))
    return pgd_loop(
        folded,
        x,
        y,
        start,
        eps=math.inf if r.attack_init == "noise" else eps,
        step=r.attack_step(eps),
        steps=r.steps,
        eot=r.eot,
        objective=objective,
        norm=r.norm,
    )


def adversarial_examples(
    recipe: Recipe,
    folded: FoldedModel,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    number: int,
    steps_from: Callable[..., tuple[Tensor, Tensor]] = attack_from,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """The recipe's attack on the folded model, which is refreshed first. Nothing here waits for the device.

    With attack_init "noise" it is N-FGSM (de Jorge et al., NeurIPS 2022): x + η + step · sign(gradient at x + η) with
    η uniform in ±noise_radius · eps. The perturbation is not projected into the ball of eps; the start and the end
    are clipped to [0, 1], as in the authors' code.

    Args:
        x: images [b, c, h, w] in [0, 1]. y: labels [b].
        eps: radius, in pixels of [0, 1].
        number: of this attack in the run, from which its random numbers follow.
        steps_from: what makes the steps: `attack_from`, or its replay as a CUDA graph.
        shard: which rows of the attacked batch x is, where other processes attack the rest. An image's start does not
            depend on it; the model's noise does. Default: all of it.

    Returns:
        x_adv [b, c, h, w], and whether each image's losses were finite.
    """
    r = recipe
    shard = shard or Shard(0, len(x), len(x))
    seed = derive_seed(r.seed, "attack", number)
    with seeded(derive_seed(seed, "model", *shard.stream), x.device):
        rng = generator(seed, "start", 0, device=x.device)
        if r.attack_init == "gaussian":
            rng = generator(r.seed, "start", number, device=x.device)
            drawn = torch.randn((shard.batch, *x.shape[1:]), generator=rng, device=x.device)[shard.rows]
            start = project(x + 0.001 * drawn, x, eps, r.norm)
        else:
            start = random_start(x, eps * (r.noise_radius if r.attack_init == "noise" else 1), r.norm, rng, shard)
        return steps_from(recipe, folded, x, y, start, eps=eps)
