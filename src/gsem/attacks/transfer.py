"""Transfer attack: adversarial examples of other models, tried on this one."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from gsem._env import exact_float32
from gsem.attacks._active import cascade
from gsem.attacks._checks import check_result
from gsem.attacks._confirm import confirmation
from gsem.attacks._types import Images, ImagesLike, LabelsLike, Norm, OnStep
from gsem.attacks.apgd import apgd
from gsem.nn.contract import checked, plain_logits
from gsem.rng import derive_seed, seeded


@exact_float32()
def transfer(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    source_models: Sequence[nn.Module],
    eps: float | str,
    norm: Norm = "Linf",
    steps: int = 100,
    losses: Sequence[str] = ("ce", "margin"),
    eot: int = 1,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Images:
    """APGD on every source model with every loss, to the path's end; the points are judged by `model`.

    Args:
        source_models: models of the same images and classes, each of them in eval mode: another network, another
            checkpoint, this one without its noise. The attack continues after the source model is broken: a
            point that barely breaks it does not transfer.
        steps: gradients on a source model, for each loss.
        eot: draws of `model`'s noise that decisions are averaged over, and of a source model's for its gradients.

    The other arguments, what is returned and raised: as in `apgd`.
    """
    model, x, y, eps = checked(model, x, y, eps=eps, norm=norm, steps=steps, eot=eot)
    if not source_models:
        raise ValueError("transfer needs at least one source model, whose adversarial examples are tried on this one")
    source_models = [plain_logits(source, x, y) for source in source_models]

    def run(source: nn.Module, loss: str, rows: Tensor, seed: int, on_step: OnStep | None) -> Images:
        attack = partial(apgd, eps=eps, norm=norm, steps=steps, loss=loss, eot=eot, stop_broken=False)
        return attack(source, x[rows], y[rows], seed=seed, on_step=on_step)

    with seeded(derive_seed(seed, "model"), x.device):
        runs = [partial(run, source, loss) for source in source_models for loss in losses]
        confirm = confirmation(model, x)
        x_adv = cascade(model, x, y, runs, eot=eot, confirm=confirm, seed=seed, on_step=on_step)
    return check_result(x_adv, x, eps=eps, norm=norm)
