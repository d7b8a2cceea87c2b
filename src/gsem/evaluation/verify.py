"""Check saved adversarial examples again: bounds, labels, and accuracy on fresh draws."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from gsem._env import exact_float32, require_float64
from gsem._fingerprint import model_fingerprint
from gsem._text import with_rows
from gsem.evaluation.partial import differences
from gsem.evaluation.result import AttackScores, EvaluationResult
from gsem.nn.contract import ImagesLike, LabelsLike, checked
from gsem.nn.gsem import noise
from gsem.nn.predict import BATCH, predict_draws
from gsem.rng import derive_seed

# A check that is right should fail once in a thousand attacks: the draws of two scorings differ.
CHANCE = 1e-3


@dataclass(frozen=True)
class Verified:
    """The check of one attack's adversarial examples."""

    name: str
    saved: float
    """Expected accuracy that the result holds, 0 to 1."""
    again: float
    """On fresh draws."""
    problems: list[str]
    """What does not hold, a sentence each; none if all does."""


@exact_float32()
def verify(
    result: EvaluationResult,
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    draws: int = 100,
    seed: int = 1,
) -> list[Verified]:
    """Check the adversarial examples of a result again, on draws that the evaluation has not used.

    Checked for each attack: the points lie in [0, 1] and, for bounded attacks, within eps of `x`; the distances are
    those saved; the images are those of the result (labels, and clean points equal to x); the expected accuracy on
    fresh draws differs from the saved one by no more than chance explains.

    Args:
        result: of `evaluate(..., save_adv=True)`, loaded or not.
        model, x, y: what was evaluated, tensors or numpy arrays.
        draws: fresh draws per image (one if the model was deterministic).
        seed: of these draws; they are disjoint from the evaluation's whatever its seed was.

    Raises:
        ValueError: the result keeps no images, or is of another number or shape of images, or of other weights.
    """
    given = model
    model, x, y, _ = checked(model, x, y, eps=result.metadata["eps"], norm=result.metadata["norm"])
    require_float64(x.device, "verify")
    if any(s.x_adv is None for s in result.scores):
        raise ValueError("the result holds no adversarial examples: evaluate with --save-adv (save_adv=True)")
    if tuple(result.scores[0].x_adv.shape) != tuple(x.shape):  # type: ignore[union-attr]
        raise ValueError(f"the result is of images {result.scores[0].x_adv.shape}, not {tuple(x.shape)}")  # type: ignore[union-attr]
    other = _other_model(result, given)
    found = [_judged(result, scores, model, x, y, draws, seed) for scores in result.scores]
    return [replace(v, problems=[*v.problems, *other]) if v.problems else v for v in found]


def _other_model(result: EvaluationResult, model: nn.Module) -> list[str]:
    """In what the model differs from the evaluated one although the weights are the same, as a sentence.

    Raises:
        ValueError: the weights are others.
    """
    now = model_fingerprint(model)
    then = {key: value for key, value in result.metadata.get("fingerprint", {}).items() if key in now}
    if not then or then == now:
        return []
    text = f"this is not the evaluated model. By its fingerprint, different are: {'; '.join(differences(then, now))}"
    # (How layers print may change with torch's version, so that a structure alone is no proof.)
    if then["weights"] != now["weights"]:
        raise ValueError(text)
    return [text]


def _judged(
    result: EvaluationResult, scores: AttackScores, model: nn.Module, x: Tensor, y: Tensor, draws: int, seed: int
) -> Verified:
    x_adv = torch.from_numpy(scores.x_adv).to(x.device)
    problems = _out_of_bounds(result, scores, x_adv, x)
    if not np.array_equal(result.y, y.cpu().numpy()):
        problems.append(f"{int((result.y != y.cpu().numpy()).sum())} labels differ from the saved ones")
    as_then: AbstractContextManager[None] = nullcontext()
    if len(result.metadata["noise"]) > 1:
        frozen = result.metadata["seed"] if scores.noise == "frozen" else None
        as_then = noise(model, scores.noise, seed=frozen)  # type: ignore[arg-type]
    count = draws if result.metadata["stochastic"] and scores.noise == "fresh" else 1
    with as_then:
        found = predict_draws(model, x_adv, draws=count, seed=derive_seed(seed, "verify", scores.name))
    right = (found == y).double().mean(0).cpu().numpy()
    saved = scores.correct / result.draws_of(scores)
    gap = float(right.mean() - saved.mean())
    allowed = _allowed(saved, right, result.draws_of(scores), count)
    if abs(gap) > allowed:
        problems.append(
            f"expected accuracy is {right.mean():.2%}, saved is {saved.mean():.2%}: chance explains {allowed:.2%}"
        )
    problems = [with_rows(problem, result.rows) for problem in problems]
    return Verified(scores.name, float(saved.mean()), float(right.mean()), problems)


def _out_of_bounds(result: EvaluationResult, scores: AttackScores, x_adv: Tensor, x: Tensor) -> list[str]:
    """In float64, by its own arithmetic: nothing is taken from the attacks."""
    problems = []
    if not bool(((x_adv >= 0) & (x_adv <= 1)).all()):
        outside = ~((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
        problems.append(f"image {int(outside.nonzero()[0])} leaves [0, 1]")
    linf, l2 = torch.cat([_lengths(*pair) for pair in zip(x_adv.split(BATCH), x.split(BATCH), strict=True)], 1)
    eps, norm = result.metadata["eps"], result.metadata["norm"]
    size = linf if norm == "Linf" else l2
    far = size > eps * (1 + 1e-5) + 1e-6
    if scores.bounded and bool(far.any()):
        image = int(far.nonzero()[0])
        problems.append(f"image {image} lies {float(size[image]):.6g} away ({norm}), farther than eps = {eps:.6g}")
    for name, ours, theirs in (("linf", linf, scores.linf), ("l2", l2, scores.l2)):
        wrong = np.abs(ours.cpu().numpy() - theirs) > 1e-4 * (1 + np.abs(theirs))
        if wrong.any():
            problems.append(f"the saved {name} distance of image {int(wrong.argmax())} is not that of its point")
    if scores.name.partition("@")[0] == "clean" and bool((linf > 0).any()):
        problems.append("the clean images are not those given: is --data, or --images, another?")
    return problems


def _lengths(x_adv: Tensor, x: Tensor) -> Tensor:
    """[2, b] float64: the L∞ and L2 lengths of the perturbations of a batch."""
    offset = (x_adv.double() - x.double()).flatten(1)
    return torch.stack([offset.abs().amax(1), offset.square().sum(1).sqrt()])


def _allowed(saved: np.ndarray, again: np.ndarray, draws: int, count: int) -> float:
    """The largest difference of the two means that chance leaves, but for one case in a thousand."""
    if draws == 1 and count == 1:
        # A deterministic model: rounding in another batch size may turn a point that lies on the boundary.
        return 1 / len(saved)
    from scipy import stats  # here, since it takes most of a second to import

    p = (saved * draws + again * count) / (draws + count)
    spread = np.sqrt((p * (1 - p)).sum() * (1 / draws + 1 / count)) / len(saved)
    return float(stats.norm.ppf(1 - CHANCE / 2) * spread) + 0.5 / len(saved)
