"""One loop for every recipe: attack the rows that the recipe names, average the gradient over draws, step.

RNG state is never saved: each step derives its seeds from (seed, round, step), so that a run that is killed anywhere
and resumed computes the same as an uninterrupted one.
"""

import json
import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsem._env import device_named
from gsem._fingerprint import model_fingerprint
from gsem._interrupt import Interruption, finish_step_on_interrupt
from gsem._io import BEST, LAST, append_line, part, read_checkpoint, read_metadata, save_checkpoint, write_atomically
from gsem._lock import locked
from gsem._provenance import commit, release
from gsem.data import Dataset, Split, load, mixed_order, read_extra, to_float
from gsem.nn.folded import FoldedModel, fold
from gsem.nn.load import load_model
from gsem.nn.models import create_model
from gsem.nn.predict import BATCH, correct_draws, is_stochastic
from gsem.rng import derive_seed, generator, reseed, seeded
from gsem.training.recipes import Recipe
from gsem.training.recorded import TrainingData, training_data
from gsem.training.run import (
    Progress,
    Run,
    TrainingDiverged,
    TrainingInterrupted,
    deterministic,
    model_meta,
    rank,
    read_metrics,
    recorded_precision,
)
from gsem.training.step import Average, Stepper

CHECK_EVERY = 20  # steps between looks at the guards: each look waits for the device
SAVE_SECONDS = 60.0
VALIDATION_STEPS = 10
VALIDATION_DRAWS = 5


def train(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    data: Dataset | None = None,
    device: str | None = None,
    resume: bool = False,
    compiled: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train as `recipe` says and keep the result in a run directory.

    Args:
        out: the run directory; default: `runs/RECIPE-DATA-MODEL-seedN`.
        data: where the images come from; `recipe.data` unless given. Its test split is never opened. The run records
            the name, shape, classes and a hash of what was used; to resume it, pass the same again.
        device: "cpu", "cuda", "cuda:N"; default: the GPU where there is one.
        resume: go on where `out` stopped. On a CPU, the end is the same, bit for bit, as without the stop.
        compiled: run the passes by torch.compile. Its first steps take minutes; on a CPU it gains nothing.
        on_progress: called with a `Progress` every few steps and after each epoch.

    Raises:
        ValueError: a run is already there (and `resume` was not asked for), it follows another recipe, was trained
            on other data, or is in progress in another process (`Locked`).
        TrainingDiverged: the loss or gradient is not finite, or exploded.
        TrainingInterrupted: Ctrl-C or SIGTERM, after the running step was saved.
    """
    if out is None:
        name = (data or load(recipe.data, recipe.data_path)).name
        out = Path("runs") / f"{recipe.name}-{Path(name).stem}-{recipe.model}-seed{recipe.seed}"
    path = Path(out)
    former = read_metadata(path) if resume and (path / LAST).exists() else None
    found = training_data(recipe, data, former, path)
    recipe = found.recipe
    where = device_named(device)
    with seeded(derive_seed(recipe.seed, "run"), where), deterministic(recipe.deterministic):
        # A resumed run keeps its precision, also on a machine where `auto` would now choose another.
        used = recorded_precision(path, where) if resume else {}
        loop = Trainer(recipe, found, path, where, compiled, used)
        path.mkdir(parents=True, exist_ok=True)
        instead = "wait for its end, or stop it" if resume else "wait for its end, or choose another --out"
        with locked(path / ".lock", f"training in {path}", instead):
            loop.begin_or_restore(resume)
            with finish_step_on_interrupt() as interrupted:
                loop.run(interrupted, on_progress)
    return Run(path, recipe, read_metrics(path))


class Trainer:
    """A training run in memory: the weights, the optimizer, and the place in the schedule."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        path: Path,
        device: torch.device,
        compiled: bool,
        used: dict[str, Any],
    ):
        self.recipe, self.path, self.device = recipe, path, device
        self.source = source = data.source
        self.eps = recipe.eps or source.eps
        self.meta = model_meta(recipe, classes=source.classes, shape=source.shape, eps=self.eps)
        training, validation, metadata = data.read(recipe.seed)
        self.meta |= {"data": metadata | {"eps": self.eps}, "places": data.places}
        self.real = len(training)
        if data.extra is not None:
            extra = read_extra(data.extra, source.shape, source.classes)
            training = Split(torch.cat([training.x, extra.x]), torch.cat([training.y, extra.y]))
        self.training = training.to(device)
        self.validation = validation.to(device)
        self.batch = min(recipe.batch_size, self.real)
        self.steps_per_epoch = len(self._order(0, 0))
        self.total_steps = self.steps_per_epoch * recipe.epochs * recipe.rounds
        self.last, self.best = path / LAST, path / BEST
        reseed(derive_seed(recipe.seed, "weights"), device)
        model = self._new_model()
        average = None
        if recipe.ema or recipe.swa_from is not None:
            average = Average(model, self._new_model(), decay=recipe.ema, equal=recipe.swa_from is not None)
        self.stepper = Stepper(replace(recipe, **used), source, self.eps, model, average, compiled=compiled)
        chosen = self.stepper.used.items()
        self.meta["precision"] = {field: {"asked": getattr(recipe, field), "used": value} for field, value in chosen}
        self.folded_for_validation: FoldedModel | None = None
        self.step = 0  # done, over all rounds
        self.best_robust = -1.0
        self.best_rank = (-1.0, -1.0)
        self.latest: dict[str, float] = {}
        self.round = 0
        self.seconds = 0.0
        self.stale = 0  # validations since the best

    def _new_model(self) -> nn.Module:
        # (torch's stubs do not know memory_format for modules.)
        model = create_model(**self.meta["model"])
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    # --- the run -------------------------------------------------------------------------------------------

    def begin_or_restore(self, resume: bool) -> None:
        """Begin the run, or go on where it stopped.

        Raises:
            ValueError: a run is there, and it is not to be resumed; or it cannot be.
        """
        if self.last.exists() and resume:
            self.restore()
        elif self.last.exists():
            path = shlex.quote(str(self.path))
            raise ValueError(f"{self.path} already holds a run: resume it (--resume {path}) or choose another --out")
        elif self.best.exists():
            raise ValueError(f"{self.path} holds {BEST}, but no {LAST} to go on from: choose another --out")
        else:
            self.begin()

    def begin(self) -> None:
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        weights = self.stepper.model.state_dict()
        if self.recipe.init_from is not None:
            weights = self._starting_weights(self.recipe.init_from)
        self._start_from(weights)
        metadata = self.meta | {"gsem_torch": torch.__version__, "machine": platform.machine()}
        metadata |= {"device": str(self.device), "training_images": self.real, "gsem": release(), "commit": commit()}
        write_atomically(self.path / "recipe.json", json.dumps(metadata, indent=2).encode())
        write_atomically(self.path / "metrics.jsonl", b"")
        self.save()

    def _starting_weights(self, spec: str) -> dict[str, Tensor]:
        told = {key: self.meta["model"][key] for key in ("name", "num_classes", "levels", "noise")}
        weights, ours = load_model(spec, **told)[0].state_dict(), self.stepper.model.state_dict()
        for name in [*ours, *weights]:
            here, there = (tuple(w[name].shape) if name in w else None for w in (ours, weights))
            if here != there:
                raise ValueError(f"start_from {spec}: {name!r} is {there} there, {here} in {self.recipe.model}")
        return weights

    def _start_from(self, weights: dict[str, Tensor]) -> None:
        self.stepper.model.load_state_dict(weights)
        if self.stepper.average:
            self.stepper.average.model.load_state_dict(weights)

    def run(self, interrupted: Interruption, on_progress: Callable[[Progress], None] | None) -> None:
        per_round = self.steps_per_epoch * self.recipe.epochs
        order: Tensor | None = None
        first, started = self.step, time.monotonic()
        lap = saved = started
        while self.step < self.total_steps and not self._stops_early:
            round_, in_round = divmod(self.step, per_round)
            epoch, index = divmod(in_round, self.steps_per_epoch)
            if round_ > self.round:
                self._begin_round(round_)
            if index == 0 or order is None:
                order = self._order(round_, epoch)
            self._train_on(order[index], in_round)
            self.step += 1
            ended = index + 1 == self.steps_per_epoch
            due = ended or interrupted.is_set() or time.monotonic() - saved > SAVE_SECONDS
            if due or self.step % CHECK_EVERY == 0:
                self._check()
            if ended:
                self._end_epoch()
            now = time.monotonic()
            self.seconds, lap = self.seconds + now - lap, now
            if due:
                self.save()
                saved = now
            if on_progress is not None and (due or self.step % CHECK_EVERY == 0 or self.step == first + 1):
                on_progress(self._progress((now - started) / (self.step - first), ended))
            if interrupted.is_set() and self.step < self.total_steps and not self._stops_early:
                stopped = TrainingInterrupted(self.path)
                stopped.kind = interrupted.kind
                raise stopped

    @property
    def _stops_early(self) -> bool:
        return 0 < self.recipe.patience <= self.stale

    def _order(self, round_: int, epoch: int) -> Tensor:
        rng = generator(self.recipe.seed, "order", round_, epoch)
        extra = len(self.training) - self.real
        return mixed_order(self.real, extra, self.batch, self.recipe.extra_share, rng).to(self.device)

    def _train_on(self, picked: Tensor, in_round: int) -> None:
        first = (self.recipe.swa_from or 0) * self.steps_per_epoch
        averaged = in_round - first if in_round >= first else None
        x, y = self.training.x[picked], self.training.y[picked]
        self.stepper(x, y, step=self.step, epoch=in_round / self.steps_per_epoch, averaged=averaged)

    @property
    def _chosen(self) -> nn.Module:
        """The model that is validated and kept: the average, once it has begun."""
        s = self.stepper
        if s.average is None:
            return s.model
        done = self.step - self.round * self.steps_per_epoch * self.recipe.epochs
        return s.average.model if done > (self.recipe.swa_from or 0) * self.steps_per_epoch else s.model

    def _begin_round(self, round_: int) -> None:
        """The schedule again from the best weights, with a new optimizer (method: 5 rounds as published)."""
        tensors, _ = read_checkpoint(self.best)
        self._start_from(part(tensors, "model"))
        self.stepper.new_optimizer()
        self.round = round_
        # At once: a resumed run must not start this round from a better checkpoint that the round itself made.
        self.save()

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} at or shortly before step {self.step} of {self.total_steps}; the last good checkpoint is "
            f"{self.last}. A lower --lr or --clip 1 usually helps"
        )

    def _check(self) -> None:
        if not bool(self.stepper.finite):
            raise self._diverged("a loss became NaN or infinite")
        longest = float(self.stepper.longest)
        if not longest <= self.recipe.abort_grad_norm:
            raise self._diverged(f"the gradient exploded to a norm of {longest:.3g}")

    # --- validation and files -------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        epoch = self.step // self.steps_per_epoch
        total, count = self.stepper.sums.tolist()
        self.latest["loss"] = total / count
        line = {
            "epoch": epoch,
            "step": self.step,
            "loss": self.latest["loss"],
            "lr": self.stepper.optimizer.param_groups[0]["lr"],
            "longest_gradient": float(self.stepper.longest),
            "seconds": round(self.seconds, 3),
        }
        if epoch % self.recipe.validate_every == 0 or self.step == self.total_steps:
            line |= self._validate()
        self.stepper.clear_sums()
        append_line(self.path / "metrics.jsonl", json.dumps(line))
        if "robust" not in line:
            return
        self.stale = 0 if line["robust"] > self.best_robust else self.stale + 1
        self.best_robust = max(self.best_robust, line["robust"])
        if rank(self.recipe, line) > self.best_rank:
            self.best_rank = rank(self.recipe, line)
            tensors = {f"model.{name}": t for name, t in self._chosen.state_dict().items()}
            metadata = {"metrics": line, "fingerprint": model_fingerprint(self._chosen)}
            save_checkpoint(self.best, tensors, self.meta | metadata)

    def _validate(self) -> dict[str, float]:
        """Clean and PGD-10 accuracy on held-out training images, expected over the noise."""
        found = self._accuracies(self._chosen)
        if self._chosen is not self.stepper.model:
            found |= {f"raw_{name}": value for name, value in self._accuracies(self.stepper.model).items()}
        self.latest |= found
        return found

    def _accuracies(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        if model is self.stepper.model:
            folded = self.stepper.folded
        else:
            self.folded_for_validation = folded = self.folded_for_validation or fold(model, self.stepper.search_dtype)
        x, y = to_float(self.validation.x), self.validation.y
        seed = derive_seed(self.recipe.seed, "validation")
        draws = VALIDATION_DRAWS if is_stochastic(model, x[:1]) else 1
        parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
        attack = self.stepper.attack
        x_adv = torch.cat(
            [
                attack(folded, *xy, steps=VALIDATION_STEPS, eot=1, number=-1 - i, plain=True)
                for i, xy in enumerate(parts)
            ]
        )
        return {
            name: correct_draws(model, images, y, draws=draws, seed=seed).sum().item() / (draws * len(y))
            for name, images in (("clean", x), ("robust", x_adv))
        }

    def _progress(self, seconds_per_step: float, epoch_ended: bool) -> Progress:
        total, count = self.stepper.sums.tolist()  # zeros right after an epoch's end
        return Progress(
            epoch=min(self.step // self.steps_per_epoch + (not epoch_ended), self.recipe.epochs * self.recipe.rounds),
            epochs=self.recipe.epochs * self.recipe.rounds,
            step=self.step,
            steps=self.total_steps,
            loss=total / count if count else self.latest["loss"],
            images_per_second=self.batch / seconds_per_step,
            seconds_left=(self.total_steps - self.step) * seconds_per_step,
            clean=self.latest.get("clean"),
            robust=self.latest.get("robust"),
            best_robust=self.best_robust if self.best_robust >= 0 else None,
            epoch_ended=epoch_ended,
            device=str(self.device),
            precision=dict(self.stepper.used),
        )

    def save(self) -> None:
        tensors, scaler = self.stepper.state()
        state = {
            "step": self.step,
            "round": self.round,
            "best_robust": self.best_robust,
            "best_rank": self.best_rank,
            "stale": self.stale,
            "latest": self.latest,
            "seconds": self.seconds,
            "scaler": scaler,
        }
        save_checkpoint(self.last, tensors, self.meta | {"state": state})

    def restore(self) -> None:
        tensors, meta = read_checkpoint(self.last)
        former = Recipe.from_dict(meta["recipe"])
        if former != self.recipe:
            changed = [k for k, v in self.recipe.to_dict().items() if former.to_dict()[k] != v]
            raise ValueError(f"{self.path} follows another recipe (other {', '.join(changed)}): choose another --out")
        state = meta["state"]
        self.stepper.restore(tensors, state["scaler"])
        self.step, self.round, self.seconds = state["step"], state["round"], state["seconds"]
        self.best_robust, self.best_rank = state["best_robust"], tuple(state["best_rank"])
        self.stale, self.latest = state["stale"], state["latest"]
        metadata = read_metadata(self.path)
        moved = {key: self.meta[key] for key in ("data", "places") if metadata.get(key) != self.meta[key]}
        if moved:
            write_atomically(self.path / "recipe.json", json.dumps(metadata | moved, indent=2).encode())
        # Lines that a killed run wrote after this checkpoint will be written again.
        kept = [line for line in read_metrics(self.path) if line["step"] <= self.step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.path / "metrics.jsonl", text.encode())
