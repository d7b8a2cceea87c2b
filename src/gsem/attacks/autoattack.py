"""AutoAttack (Croce & Hein, ICML 2020): four attacks without tuning, each on the images that remain."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gsem._env import exact_float32
from gsem.attacks._active import cascade, draw_schedule
from gsem.attacks._checks import check_result
from gsem.attacks._confirm import confirmation
from gsem.attacks._types import Images, ImagesLike, LabelsLike, Norm, OnStep
from gsem.attacks.apgd import apgd
from gsem.attacks.fab import fab
from gsem.attacks.square import square
from gsem.nn.contract import checked
from gsem.rng import derive_seed, seeded

Version = Literal["standard", "plus", "rand"]
Part = tuple[str, Callable[..., Images]]


def parts(version: Version, classes: int, steps: int = 100, queries: int = 5000) -> list[Part]:
    """The attacks of a version, in their order, with the reference's budgets.

    standard: APGD-CE, APGD-T and FAB-T towards 9 classes, Square. plus: APGD-CE and APGD-DLR of 5 restarts, FAB of 5,
    Square, APGD-T, FAB-T. rand: APGD-CE and APGD-DLR. With too few classes the margin replaces
    the untargeted DLR loss (which needs 3), and there are fewer targets.
    """
    dlr = "dlr" if classes > 2 else "margin"
    targets = min(9, classes - 1)
    restarts = 5 if version == "plus" else 1
    ce: Part = (f"apgd-ce{steps}", partial(apgd, steps=steps, restarts=restarts))
    untargeted: Part = (f"apgd-{dlr}{steps}", partial(apgd, steps=steps, restarts=restarts, loss=dlr))
    apgd_t: Part = (f"apgd-t{steps}", partial(apgd, steps=steps, targets=targets))
    fab_t: Part = (f"fab-t{steps}", partial(fab, steps=steps, targets=targets))
    box: Part = (f"square{queries}", partial(square, queries=queries))
    if version == "standard":
        return [ce, apgd_t, fab_t, box]
    if version == "rand":
        return [ce, untargeted]
    return [ce, untargeted, (f"fab{steps}", partial(fab, steps=steps, restarts=5)), box, apgd_t, fab_t]


@exact_float32()
def autoattack(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    eps: float | str,
    norm: Norm = "Linf",
    version: Version = "standard",
    steps: int = 100,
    queries: int = 5000,
    eot: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    on_step: OnStep | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> Images:
    """The standard ensemble of parameter-free attacks, also for stochastic models.

    Each attack works on the images that are not broken yet. With more than five draws the whole ensemble runs with
    five first, and again with more on the images that remain then.

    Args:
        model: [b, c, h, w] in [0, 1] → logits [b, k], in eval mode.
        x: images [b, c, h, w] in [0, 1]. y: their labels [b], int64.
        eps: radius of the ball, in the unit of the images.
        version: "standard" (APGD-CE, APGD-T, FAB-T, Square), "plus" (more attacks and restarts), or "rand"
            (APGD-CE and APGD-DLR: the reference's for stochastic models, where it sets eot=20).
        steps: of APGD and FAB, per target and restart: 100 is the standard. queries: of Square: 5000 is.
        eot: draws of the model's noise that every gradient, loss and decision is averaged over.
        seed: of the random starts, of the squares and of the model's noise. The caller's random state is not changed.
        batch_size: images attacked at once, regrouped from those that remain; default: all.
        on_step: called with a `Step` at every iterate.
        on_progress: called with each attack's name when it ends, and how many images remain.

    Returns:
        x_adv [b, c, h, w], within eps of x and within [0, 1]; an image that the model misclassifies already is
        returned as it is.

    Raises:
        ValueError: arguments out of range, a layer in train mode, NaN logits.
    """
    counts = {"steps": steps, "queries": queries, "eot": eot, "batch_size": 1 if batch_size is None else batch_size}
    model, x, y, eps = checked(model, x, y, eps=eps, norm=norm, **counts)
    if version not in ("standard", "plus", "rand"):
        raise ValueError(f"version {version!r} is unknown: it is 'standard', 'plus' or 'rand'")
    if not len(x):
        return x.clone()

    def run(attack: Callable[..., Images], draws: int, rows: Tensor, seed: int, on_step: OnStep | None) -> Images:
        return attack(model, x[rows], y[rows], eps=eps, norm=norm, eot=draws, seed=seed, on_step=on_step)

    with seeded(derive_seed(seed, "model"), x.device):
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        schedule = [
            (name, attack, draws)
            for draws in draw_schedule(eot)
            for name, attack in parts(version, classes, steps, queries)
        ]
        x_adv = cascade(
            model,
            x,
            y,
            [partial(run, attack, draws) for _, attack, draws in schedule],
            eot=eot,
            confirm=confirmation(model, x),
            seed=seed,
            batch_size=batch_size,
            on_step=on_step,
            on_progress=None if on_progress is None else lambda number, left: on_progress(schedule[number][0], left),
        )
    return check_result(x_adv, x, eps=eps, norm=norm)
