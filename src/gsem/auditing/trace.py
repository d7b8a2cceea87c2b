"""The path of the primary attack: the loss of every iterate, and the best iterate."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gsem.attacks import Step
from gsem.attacks._types import OnStep


@dataclass(frozen=True)
class Trace:
    """Of all images, every value averaged over the attack's draws."""

    x_adv: Float[Tensor, "n c h w"]
    """What the attack returned."""
    best: Float[Tensor, "n c h w"]
    """The iterate that most draws got wrong, then that of the highest loss."""
    loss: Float[np.ndarray, "n steps"]
    """The loss of each iterate; NaN after an image was left alone."""
    broken: Float[np.ndarray, " n"]
    """The largest share of draws of the search that an iterate was wrong in."""


def trace(images: int, run: Callable[[OnStep], Tensor]) -> Trace:
    """Run an attack on so many images, and see all of it.

    Args:
        run: (observe) → x_adv [n, c, h, w].
    """
    best: dict[int, tuple[float, float, Tensor]] = {}
    losses: list[list[float]] = [[] for _ in range(images)]

    def see(step: Step) -> None:
        for at, (row, wrong, loss) in enumerate(
            zip(step.rows.tolist(), step.wrong.tolist(), step.loss.tolist(), strict=True)
        ):
            losses[row].append(loss)
            if row not in best or (wrong, loss) > best[row][:2]:
                best[row] = (wrong, loss, step.x[at].detach().clone())

    x_adv = run(see)
    table = np.full((images, max(map(len, losses), default=0)), np.nan)
    for row, values in enumerate(losses):
        table[row, : len(values)] = values
    # (An attack that is not observed, like one step of FGSM, passed no point but the one that it returned.)
    points = [best[row][2] if row in best else x_adv[row] for row in range(images)]
    return Trace(x_adv, torch.stack(points), table, np.array([best[r][0] if r in best else 0.0 for r in range(images)]))
