"""Run a list of attacks on a model, and score the points on draws of its noise that no attack has seen."""

import copy
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from gsem._env import exact_float32, out_of_memory_names
from gsem._fingerprint import data_fingerprint, model_fingerprint
from gsem._text import with_rows
from gsem.attacks import counting
from gsem.attacks._checks import check_result
from gsem.attacks._core import distances
from gsem.attacks._types import Norm
from gsem.attacks.own import AnyAttack, AttackLike, listed
from gsem.attacks.suite import REPAIRS, SUITES, AttackSpec, suite
from gsem.distributed import Processes, current
from gsem.evaluation.partial import FinishedBatches, computed, question, refuse_differences, saved_result
from gsem.evaluation.result import VOTERS, AttackScores, EvaluationResult, attack_name, joined, with_ending
from gsem.evaluation.work import Progress as Progress
from gsem.evaluation.work import Report, Watch, WorkItems
from gsem.nn.contract import ImagesLike, LabelsLike, check_gradient, checked, plain_logits
from gsem.nn.folded import fold
from gsem.nn.gsem import GSeM, noise
from gsem.nn.predict import BATCH, is_stochastic, predict_draws, vote_accuracy
from gsem.rng import derive_seed


@exact_float32()
def evaluate(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    attacks: AttackLike | Sequence[AttackLike] = ("clean", "pgd"),
    *,
    eps: float | str,
    norm: Norm = "Linf",
    draws: int = 100,
    seed: int = 0,
    batch_size: int = BATCH,
    source_models: Mapping[str, nn.Module] | None = None,
    frozen: bool = True,
    save_adv: bool = False,
    rows: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    save: str | Path | None = None,
    again: bool = False,
    about: Mapping[str, Any] | None = None,
    on_progress: Report | None = None,
) -> EvaluationResult:
    """Attack `model`, then score what the attacks returned on noise that they have not seen.

    The attacks search on the folded model, in float32; the score is the true model's, in float32. A stochastic model
    is recognised by two forward passes. Attacks then average over 20 draws (their `eot`), every point is judged on
    `draws` fresh ones, and the worst point of each image is chosen on `draws` others (`result["worst"]`). For a
    deterministic model one draw is used. Images as they are ("clean") are always among the attacks.

    Args:
        model: images [b, c, h, w] in [0, 1] → logits [b, k], in eval mode. Of an object or dict with `logits`, and of
            a tuple that begins with them, the logits are taken, with a warning.
        x, y: images in [0, 1], and their labels; tensors or numpy arrays.
        attacks: `AttackSpec`s, or their texts: `["clean", "pgd:steps=100:eot=20:restarts=2"]`, `"clean,pgd"`; or the
            name of a suite: quick, standard, paper, paper-code. Or functions of your own, and pairs (name, function):
            see below.
        eps: radius of the threat model, in the unit of the images; "8/255" is a number too.
        draws: selection draws, and scoring draws, for each image and attack.
        seed: of every random stream used; the caller's random state is not changed.
        batch_size: images attacked at once.
        source_models: other models, by name, for the transfer attack. Of a GSeM model, itself without noise and itself
            without the quantiser are always among them.
        frozen: whether a stochastic GSeM model is attacked and scored also with its noise frozen by a seed that the
            attacker knows, and with its noise off.
        save_adv: keep the adversarial examples in the result.
        rows: row of each image in the data set it is from, for the result and for messages; default: 0, 1, …, n − 1.
        save: where the result goes (`EvaluationResult.save`). Every finished batch is kept beside it meanwhile, and the
            same call resumes from there after an interruption, to the same result. If a result of the same model,
            images and arguments is there already, it is returned and nothing is computed; one of anything else is an
            error.
        again: compute a result that is there already anew, and replace it.
        about: what the caller wants to be kept in the result's metadata (values as JSON takes them).
        on_progress: called with a `Progress` while it runs.

    An attack function is called with a batch: `function(model, x, y, eps=…, norm=…, seed=…, eot=…)`, with those of the
    four keywords that it takes, and returns x_adv [b, c, h, w].

    - model: the folded model on which all attacks search: the logits are those of `model` but for rounding, the
      parameters require no gradient. x: [b, c, h, w], y: [b], both copies.
    - eps, norm: the threat model. A point outside it, or outside [0, 1], is an error that names the attack.
    - seed: of this batch. torch's own random stream starts from it, and is the caller's again afterwards.
    - eot: 20 for a stochastic model, else 1: the draws that the other attacks average over.

    It is named by its `__name__`, or by the pair. At `save`, it is the same attack if its name and the function's
    qualified name are the same: what changed inside the function is not seen (`again` computes it anew).

    Several processes (started by torchrun, for instance) share the work: all of them call this function with the same
    arguments, batches go to whichever process is free, and all return the same result, which is that of one process
    on the same type of device. The first process saves it and calls `on_progress`. The folder of `save` must be shared
    by all hosts.

    Raises:
        ValueError: an unknown attack or option, arguments out of range, logits that are not finite, attacks that
            follow the gradient of a model that has none; at `save`, a result of something else (`AnotherQuestion`), an
            unfinished evaluation of something else, or one in progress in another process (`Locked`).

    Warns:
        UserWarning: a model that returns probabilities, or whose gradient is zero.
    """
    processes = current()
    with processes.first_warns(), processes.together():
        if not len(x):
            raise ValueError("there are no images to evaluate on")
        # Fingerprints are of these, not of the wrappers that take the logits out of what they return.
        given, others = model, dict(source_models or {})
        numbers = _checked_rows(rows, len(x))
        named = partial(with_rows, rows=numbers)
        source_models = {}
        with _reworded(named):
            model, x, y, eps = checked(model, x, y, eps=eps, norm=norm, draws=draws, batch_size=batch_size)
            for name, source in others.items():
                with _reworded(partial("source {!r}: {}".format, name)):
                    source_models[name] = plain_logits(source, x, y)
        if norm == "Linf" and eps > 1:
            raise ValueError(f"eps = {eps:g}, but images lie in [0, 1]: it must be at most 1 (8/255, not 8)")
        chosen = _chosen(attacks, transferable=bool(source_models) or _defended(model))
        stochastic = is_stochastic(model, x[:batch_size])
        modes = ["fresh", "frozen", "off"] if stochastic and frozen and _noisy(model) else ["fresh"]
        metadata: dict[str, Any] = {
            "images": len(x),
            "fingerprint": model_fingerprint(given) | data_fingerprint((x, y)),
            "eps": eps,
            "norm": norm,
            "draws": draws if stochastic else 1,
            "stochastic": stochastic,
            "seed": seed,
            "noise": modes,
            "options": _options(chosen, eps=eps, norm=norm, stochastic=stochastic),
            "batch_size": batch_size,
            "source_models": {name: model_fingerprint(source) for name, source in others.items()},
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": str(x.device),
            "tf32": False,
        } | ({} if about is None else {"about": dict(about)})
        task = _Task(model, x, y, eps, norm, metadata["draws"], modes, seed, batch_size, save_adv)
    asked = question(metadata)
    refuse_differences(asked)
    metadata = processes.from_first(lambda: metadata)

    def scored(on_disk: FinishedBatches | None) -> EvaluationResult:
        with processes.first_warns(), processes.together(), _reworded(named), out_of_memory_names(batch_size):
            own = _own_scores(task, chosen, source_models, on_disk, on_progress)
        return EvaluationResult(_joined(processes, own, save_adv=save_adv), y.cpu().numpy(), metadata, numbers)

    if save is None:
        return scored(None)
    finished = processes.from_first(lambda: saved_result(save, asked, None if rows is None else numbers))
    if finished is None or again:
        return computed(save, asked, scored)
    return _with_examples(finished, save) if save_adv else finished


def _with_examples(finished: EvaluationResult, save: str | Path) -> EvaluationResult:
    if any(s.x_adv is None for s in finished.scores):
        raise ValueError(
            f"{with_ending(save, '.npz')} is this evaluation, finished without its adversarial examples. --again "
            "(again=True) computes it anew and keeps them"
        )
    return finished


def _options(attacks: Sequence[AnyAttack], *, eps: float, norm: Norm, stochastic: bool) -> dict[str, dict[str, Any]]:
    """The options that each attack runs with, by its label.

    Raises:
        ValueError: the same attack twice, or a step longer than the images' range.
    """
    labels = [a.label(eps=eps, stochastic=stochastic) for a in attacks]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the same attack twice: {', '.join(labels)}")
    options = {lb: a.resolved(eps=eps, stochastic=stochastic) for lb, a in zip(labels, attacks, strict=True)}
    for label, own in options.items():
        if norm == "Linf" and (step := own.get("step", 0)) > 1:
            raise ValueError(f"attack {label!r}: step = {step:g}, but images lie in [0, 1]: at most 1 (2/255, not 2)")
    return options


def _checked_rows(rows: Sequence[int] | Int[np.ndarray, " n"] | None, images: int) -> Int[np.ndarray, " n"]:
    if rows is None:
        return np.arange(images)
    found = np.asarray(rows)
    if found.shape != (images,) or not np.issubdtype(found.dtype, np.integer) or (found < 0).any():
        raise ValueError(f"rows must be the rows of the {images} images in their data set, integers of at least 0")
    return found.astype(np.int64)


@contextmanager
def _reworded(change: Callable[[str], str]) -> Iterator[None]:
    """Within the block, the text of a ValueError is changed, so that it names what the caller knows."""
    try:
        yield
    except ValueError as error:
        error.args = (change(str(error)), *error.args[1:])
        raise


def _numbered_among_all(text: str, name: str, first: int) -> str:
    """Of an error about an image of a batch: with the attack's name, and the image's number among all."""
    changed = re.sub(r"image (\d+) of the attacked batch", lambda m: f"image {first + int(m[1])}", text)
    return text if changed == text else f"attack {name!r}: {changed}"


def _chosen(attacks: AttackLike | Sequence[AttackLike], *, transferable: bool) -> list[AnyAttack]:
    if isinstance(attacks, str) and attacks in SUITES:
        chosen: list[AnyAttack] = [*suite(attacks)]
        if attacks in ("standard", "paper") and transferable:
            chosen.append(AttackSpec("transfer"))
        return chosen
    chosen = listed(attacks)
    if any(a.name == "transfer" for a in chosen) and not transferable:
        raise ValueError(
            "transfer needs at least one source (--source, source_models=): a model whose points are tried here"
        )
    return chosen if any(a.name == "clean" for a in chosen) else [AttackSpec("clean"), *chosen]


def _defended(model: nn.Module) -> bool:
    return any(isinstance(m, GSeM) for m in model.modules())


def _noisy(model: nn.Module) -> bool:
    return any(isinstance(m, GSeM) and m.noise > 0 for m in model.modules())


@dataclass(frozen=True)
class _Task:
    """What is evaluated, and how."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    norm: Norm
    draws: int
    modes: Sequence[str]
    seed: int
    batch_size: int
    save_adv: bool

    def draws_in(self, mode: str) -> int:
        """Selection draws, and scoring draws: one where the noise is frozen or off."""
        return self.draws if mode == "fresh" else 1

    def name(self, mode: str, attack: AnyAttack) -> str:
        return attack_name(attack.label(eps=self.eps, stochastic=self.draws_in(mode) > 1), mode)


def _own_scores(
    task: _Task,
    attacks: Sequence[AnyAttack],
    source_models: Mapping[str, nn.Module],
    on_disk: FinishedBatches | None,
    on_progress: Report | None,
) -> dict[str, dict[int, AttackScores]]:
    """Every attack in every mode of the noise: by its name, and by their first image, the batches of this process."""
    processes = current()
    # Transferred and unbounded points are questions about the model as it is used: with fresh noise.
    asked = {m: [a for a in attacks if m == "fresh" or (a.bounded and a.name != "transfer")] for m in task.modes}
    work, watches = WorkItems(processes), {}
    for mode in task.modes:
        for name in map(partial(task.name, mode), asked[mode]):
            watches[name] = Watch(on_progress, name, len(task.x), task.draws_in(mode), work)
    parts: dict[str, dict[int, AttackScores]] = {name: {} for name in watches}
    with work:
        for mode in task.modes:
            with _noise(task, mode):
                evaluation = _Evaluation(task, mode, asked[mode], source_models, on_disk)
                items = _items(task, mode, asked[mode], costly_first=processes.several)
                for number in work.own(len(items)):
                    attack, name, first = items[number]
                    part = evaluation.part(attack, name, first, watches[name])
                    # (The points of all attacks at once take more memory than those of one batch.)
                    parts[name][first] = part if task.save_adv else replace(part, x_adv=None)
                    _refresh(watches)
        work.wait(partial(_refresh, watches))
    return parts


def _joined(processes: Processes, own: dict[str, dict[int, AttackScores]], *, save_adv: bool) -> list[AttackScores]:
    """The scores of each attack, from the batches of all processes. `own` is emptied, to hold no image twice."""
    scores = []
    for name in list(own):
        found = {first: part for parts in processes.gathered(own.pop(name)) for first, part in parts.items()}
        scores.append(joined([found[first] for first in sorted(found)], save_adv=save_adv))
    return scores


def _refresh(watches: Mapping[str, Watch]) -> None:
    for watch in watches.values():
        watch.refresh()


def _items(
    task: _Task, mode: str, attacks: Sequence[AnyAttack], *, costly_first: bool
) -> list[tuple[AnyAttack, str, int]]:
    """The batches of a mode of the noise: attack, its name in the result, and number of the first image.

    Where the costly ones come first, the processes that share them end at about the same time.
    """
    if costly_first:
        stochastic = task.draws_in(mode) > 1
        attacks = sorted(attacks, key=lambda a: -a.passes(eps=task.eps, stochastic=stochastic))
    return [(a, task.name(mode, a), first) for a in attacks for first in range(0, len(task.x), task.batch_size)]


@contextmanager
def _noise(task: _Task, mode: str) -> Iterator[None]:
    as_set: Any = nullcontext()  # one mode only: the model stays as the caller set it
    if len(task.modes) > 1:
        as_set = noise(task.model, mode, seed=task.seed if mode == "frozen" else None)  # type: ignore[arg-type]
    with as_set:
        yield


def _check_gradients(model: nn.Module, attacks: Sequence[AnyAttack], x: Tensor) -> None:
    """Check, before any attack runs, that those which follow a gradient have one (`check_gradient`)."""
    following = [a for a in attacks if isinstance(a, AttackSpec) and a.follows_gradient]
    networks = {tuple(a.options.get(option) for option in REPAIRS): a for a in following}
    for attack in networks.values():
        check_gradient(attack.network(model), x)


class _Evaluation:
    """The attacks on one model in one mode of its noise, which is set already, batch by batch.

    Raises:
        NoGradient: attacks follow the gradient of a model that has none.
    """

    def __init__(
        self,
        task: _Task,
        mode: str,
        attacks: Sequence[AnyAttack],
        source_models: Mapping[str, nn.Module],
        on_disk: FinishedBatches | None,
    ):
        self.task, self.mode, self.on_disk, self.draws = task, mode, on_disk, task.draws_in(mode)
        transferred = any(a.name == "transfer" for a in attacks)
        sources = undefended(task.model) | dict(source_models) if transferred else {}
        self.folded = fold(task.model)
        self.source_models: dict[str, nn.Module] = {name: fold(source) for name, source in sources.items()}
        if mode == "fresh":
            _check_gradients(self.folded, attacks, task.x)

    def part(self, attack: AnyAttack, name: str, first: int, watch: Watch) -> AttackScores:
        """The batch from image `first`, read if it was finished before an interruption."""
        watch.begin(min(self.task.batch_size, len(self.task.x) - first))
        part = self.on_disk.read(name, first) if self.on_disk is not None else None
        if part is None:
            part = self._batch(attack, name, first, watch)
            if self.on_disk is not None:
                self.on_disk.write(name, first, part)
        watch.finished(part)
        return part

    def _batch(self, attack: AnyAttack, name: str, first: int, watch: Watch) -> AttackScores:
        task = self.task
        x, y = (values[first : first + task.batch_size] for values in (task.x, task.y))
        started = time.monotonic()
        watch.model = counted = counting(attack.network(self.folded))
        with _reworded(partial(_numbered_among_all, name=name, first=first)):
            x_adv = attack.run(
                counted,
                x,
                y,
                eps=task.eps,
                norm=task.norm,
                stochastic=self.draws > 1,
                # The names keep the streams apart: no draw of the search is a draw of the selection or of the score.
                seed=derive_seed(task.seed, "search", name, first),
                source_models=self.source_models,
                on_step=watch.on_step if watch.used else None,
            )
            if attack.bounded:
                check_result(x_adv, x, eps=task.eps, norm=task.norm)
        seconds = time.monotonic() - started
        selection, scoring = (
            predict_draws(
                task.model, x_adv, draws=self.draws, seed=derive_seed(task.seed, stream, name, first), first=first
            )
            for stream in ("selection", "scoring")
        )
        linf, l2 = distances(x_adv, x)
        right = scoring == y
        arrays = {
            "correct": right.sum(0),
            "votes": vote_accuracy(scoring.cpu(), y.cpu(), VOTERS),  # in float64, which not every device has
            "selection": (selection == y).sum(0),
            "single": torch.stack([selection[0] == y, right[0]], dim=1),
            "linf": linf,
            "l2": l2,
            "x_adv": x_adv,
        }
        return AttackScores(
            name=name,
            **{key: value.cpu().numpy() for key, value in arrays.items()},
            forwards=counted.forwards,
            gradients=counted.gradients,
            seconds=seconds,
            noise=self.mode,
            bounded=attack.bounded,
        )


def undefended(model: nn.Module) -> dict[str, nn.Module]:
    """Of a GSeM model, itself without its noise, and itself without its quantiser too: what an attacker would try."""
    if not _defended(model):
        return {}
    copies = {"noise off": copy.deepcopy(model), "quantiser off": copy.deepcopy(model)}
    for name, other in copies.items():
        for module in other.modules():
            if isinstance(module, GSeM):
                module.offsets.mode = "off"
                module.quantiser = module.quantiser and name == "noise off"
    return copies
