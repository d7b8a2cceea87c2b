"""What the leading attack did on its way: the loss of every iterate, and the best of them."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gsem.attacks import Step
from gsem.audit.subject import Subject
from gsem.suite import Attack


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


def trace(s: Subject, attack: Attack, *names: str | int) -> Trace:
    """Run the attack, and see all of it."""
    n = len(s.x)
    best = s.x.clone()
    wrong = torch.full((n,), -1.0, device=s.x.device)
    highest = torch.full((n,), -torch.inf, device=s.x.device)
    losses: list[list[float]] = [[] for _ in range(n)]

    def see(step: Step) -> None:
        rows = step.rows
        share, loss = step.wrong.to(wrong), step.loss.detach().to(highest)
        better = (share > wrong[rows]) | ((share == wrong[rows]) & (loss > highest[rows]))
        at = rows[better]
        best[at], wrong[at], highest[at] = step.x.detach()[better], share[better], loss[better]
        for row, value in zip(rows.tolist(), loss.tolist(), strict=True):
            losses[row].append(value)

    x_adv = s.points(attack, "trace", *names, observe=see)
    table = np.full((n, max(map(len, losses), default=0)), np.nan)
    for row, values in enumerate(losses):
        table[row, : len(values)] = values
    return Trace(x_adv, best, table, wrong.cpu().numpy())
