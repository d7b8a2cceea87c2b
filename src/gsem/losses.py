"""Losses: logits in, one value per sample out. An attack raises them; the caller averages."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "b k"]
Labels = Int[Tensor, " b"]
Values = Float[Tensor, " b"]
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Logits, y: Labels, smoothing: float = 0.0) -> Values:
    """−log softmax(logits)_y, in nats, ≥ 0; `smoothing` spreads that share of the target over all classes."""
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)


def margin(logits: Logits, y: Labels) -> Values:
    """max_{k ≠ y} z_k − z_y, in logits: positive where the image is misclassified (Carlini & Wagner 2017)."""
    right = logits.gather(1, y[:, None])
    return logits.scatter(1, y[:, None], float("-inf")).amax(1) - right[:, 0]


def probability_margin(logits: Logits, y: Labels) -> Values:
    """1 + max_{k ≠ y} p_k − p_y, p the softmax, in [0, 2]: above 1 where misclassified (PMA, Xie et al. 2024).

    The paper's loss is max_{k ≠ y} p_k − p_y. The constant changes no gradient. Without it, the value of every image
    whose z_y is more than about 17 above the other logits would be rounded to −1 in float32. Value and gradient are
    exact but for rounding up to a difference of about 87 logits; the smaller probability is 0 beyond it (in float64,
    beyond about 700).
    """
    p = F.softmax(logits, 1)
    right = p.gather(1, y[:, None])[:, 0]
    other, at = p.scatter(1, y[:, None], -1.0).max(1)
    # 1 − p_k as the sum of the other probabilities: the difference itself would be rounded to 0.
    not_right = p.scatter(1, y[:, None], 0.0).sum(1)
    not_other = p.scatter(1, at[:, None], 0.0).sum(1)
    # Equal in value. Each has an exact gradient where its terms are small.
    return torch.where(right > other, other + not_right, 2 - (not_other + right))


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


def dlr_towards(target: Labels) -> Loss:
    """The targeted DLR loss, (z_t − z_y) / (z_(1) − (z_(3) + z_(4)) / 2) (Croce & Hein 2020, equation 7).

    Where an attack folds several draws into its batch, draw after draw, the targets are repeated alike.

    Args:
        target: [b] the class of each image that is to gain, not its label.

    Raises:
        ValueError: from the loss, where there are fewer than four classes.
    """

    def loss(logits: Logits, y: Labels) -> Values:
        if logits.shape[1] < 4:
            raise ValueError(f"the targeted DLR loss needs at least 4 classes, not {logits.shape[1]}: use 'margin'")
        top = logits.topk(4, dim=1).values
        to = target.repeat(len(logits) // len(target))
        gain = logits.gather(1, to[:, None]) - logits.gather(1, y[:, None])
        return gain[:, 0] / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

    return loss


def margin_towards(target: Labels) -> Loss:
    """z_t − z_y for a target class t of each image: the targeted loss where there are too few classes for DLR."""

    def loss(logits: Logits, y: Labels) -> Values:
        to = target.repeat(len(logits) // len(target))
        return (logits.gather(1, to[:, None]) - logits.gather(1, y[:, None]))[:, 0]

    return loss


def divergence(logits: Logits, logits_adv: Logits) -> Values:
    """KL(p ‖ p') in nats, p the softmax of `logits`, p' that of `logits_adv`."""
    log_p, log_adv = F.log_softmax(logits, 1), F.log_softmax(logits_adv, 1)
    return (log_p.exp() * (log_p - log_adv)).sum(1)


def divergence_from(logits: Logits) -> Loss:
    """A loss for an attack: KL(p ‖ p') from the fixed prediction p of `logits`; labels are not used (TRADES).

    Where the attack folds several draws into its batch, draw after draw, p is repeated alike.
    """
    fixed = logits.detach()

    def loss(logits_adv: Logits, y: Labels) -> Values:
        return divergence(fixed.repeat(len(logits_adv) // len(fixed), 1), logits_adv)

    return loss


def mart(logits_adv: Logits, logits: Logits, y: Labels, weight: float = 5.0, smoothing: float = 0.0) -> Values:
    """MART (Wang et al., ICLR 2020): boosted cross-entropy and a divergence weighted by how wrong the image is.

        −log p'_y − log(1.0001 − max_{k ≠ y} p'_k + 1e-12)
            + weight · (1.0000001 − p_y) · Σ_j p_j (log p_j − log(p'_j + 1e-12))

    with p' the softmax on the adversarial image, p that on the clean one. No branch is detached. `smoothing` enters
    the first term, −log p'_y, as in `cross_entropy`.
    """
    p_adv, p = F.softmax(logits_adv, 1), F.softmax(logits, 1)
    wrong = p_adv.scatter(1, y[:, None], -1.0).amax(1)
    boosted = cross_entropy(logits_adv, y, smoothing) - torch.log(1.0001 - wrong + 1e-12)
    kl = (p * (F.log_softmax(logits, 1) - torch.log(p_adv + 1e-12))).sum(1)
    return boosted + weight * (1.0000001 - p.gather(1, y[:, None])[:, 0]) * kl


def trades(logits_adv: Logits, logits: Logits, y: Labels, weight: float = 6.0, smoothing: float = 0.0) -> Values:
    """TRADES (Zhang et al., ICML 2019, equation 5): −log p_y + weight · KL(p ‖ p').

    `smoothing` enters the first term as in `cross_entropy`; the divergence is as it is.
    """
    return cross_entropy(logits, y, smoothing) + weight * divergence(logits, logits_adv)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr, "pm": probability_margin}
