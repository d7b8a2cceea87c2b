"""The training loop of every recipe: attack a batch, average the gradient over draws, step; and resuming.

RNG state is never saved: each step derives its seeds from (seed, round, step), so that a run that is killed anywhere
and resumed computes the same as an uninterrupted one.
"""

import copy
import json
import platform
import re
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gsem._env import commit, out_of_memory_names, release
from gsem._fingerprint import model_fingerprint
from gsem._interrupt import Interruption, Terminated, finish_step_on_interrupt
from gsem._io import BEST, LAST, append_line, part, read_checkpoint, read_metadata, save_checkpoint, write_atomically
from gsem._lock import locked
from gsem.data import Dataset, as_dataset, load, read_extra
from gsem.data.batches import Batch, Held, batches_of
from gsem.data.images import DamagedImage
from gsem.distributed import Processes, current, share_statistics
from gsem.nn.build import Network, build_network, check_named, check_same_network, named
from gsem.nn.load import weights_in
from gsem.nn.models import check_weights
from gsem.rng import derive_seed, reseed, seeded
from gsem.training.model_selection import Counters
from gsem.training.progress import Progress, Schedule, batch_rows, epoch_order
from gsem.training.recipe import Compile, Recipe
from gsem.training.recorded import TrainingData, training_data
from gsem.training.run import (
    Run,
    TrainingDiverged,
    TrainingInterrupted,
    deterministic,
    model_meta,
    read_metrics,
    recorded_precision,
    wanted_network,
)
from gsem.training.step import Average, Stepper
from gsem.training.validation import Validator

CHECK_EVERY = 20  # steps between looks at the guards: each look waits for the device
SAVE_SECONDS = 60.0
TWICE_SECONDS = 10.0  # within which a signal that a launcher passes on comes for the second time


def train(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    data: Any = None,
    hold: bool | None = None,
    model: Network | str | None = None,
    device: str | None = None,
    resume: bool = False,
    compile: Compile = "auto",
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train by `recipe` and keep the result in a run directory.

    Args:
        out: the run directory; default: `runs/RECIPE-DATA-MODEL-seedN`.
        data: where the images come from; `recipe.data` unless given: a `gsem.data.Dataset`, or what
            `gsem.data.as_dataset` makes one of (a map-style torch dataset, a pair of arrays, a Hugging Face dataset).
            Its test split is never opened. The run records the name, shape, classes and a hash of what was used; to
            resume it, pass the same again.
        hold: whether the training images are held on the device, or read by worker processes batch by batch; default:
            held up to 4 GiB (see `gsem.data.Dataset`). It changes no result.
        model: the network to train, or a function without arguments that returns it; `recipe.model` unless given. It
            maps images to logits, or to an object or dict with `logits`. A network is copied and starts from the
            weights that it has; to resume its run or load its model, pass it again. A function that can be imported is
            recorded by its name.
        device: "cpu", "cuda", "cuda:N"; default: the GPU where there is one.
        resume: resume the run in `out` where it stopped. On a CPU, it ends with the same bits as without the stop.
        compile: "auto": on CUDA, a CUDA graph replays the attacks where launching their kernels would take longer than
            running them; elsewhere passes run plainly. "on": torch.compile runs the passes. Its first steps take
            minutes; on a CPU it gains nothing. "off": all passes run plainly. Where the device cannot do it, passes run
            plainly, with a warning.
        on_progress: called with a `Progress` every few steps and after each epoch; of several processes, in the first.

    Under torchrun or SLURM, the processes share out each batch (see the README of this folder). All call `train` with
    the same arguments and get the same run; the first writes it.

    Raises:
        ValueError: a run is already there (and `resume` is False), it has another recipe, was trained
            on other data, or is in progress in another process (`Locked`); a network that cannot be built, or does not
            fit the data; an unknown `compile`.
        gsem.data.DamagedImage: a streamed image cannot be read, after the training was saved; it can be resumed.
        TrainingDiverged: the loss or gradient is not finite, or exploded.
        TrainingInterrupted: Ctrl-C or SIGTERM, after the running step was saved.
        gsem.distributed.ProcessLost: another process ended. OtherProcessFailed: it raised one of these errors.
    """
    if compile not in get_args(Compile):
        raise ValueError(f"compile {compile!r} is unknown: it is auto, on or off")
    processes = current()
    network = None if isinstance(model, str) else model
    with processes.together():
        if data is not None:
            data = as_dataset(data)
        if model is not None:
            recipe = replace(recipe, model=named(model))
        path = Path(out or _usual_place(recipe, data))
    former = processes.from_first(lambda: read_metadata(path) if resume and (path / LAST).exists() else None)
    with processes.together():
        found = training_data(recipe, data, former, path)
        if hold is not None:
            found = replace(found, source=replace(found.source, hold=hold))
        recipe = found.recipe
        if former is not None and network is None:
            check_named(former["model"], path)
        where = processes.device(device)
    with (
        seeded(derive_seed(recipe.seed, "run"), where),
        deterministic(recipe.deterministic, where),
        ExitStack() as stack,
    ):
        # A resumed run keeps its precision, also on a machine where `auto` would now choose another.
        used = processes.from_first(lambda: recorded_precision(path, where) if resume else {})
        with processes.together():
            loop = Trainer(recipe, found, network, path, where, compile, used)
            if processes.first:
                path.mkdir(parents=True, exist_ok=True)
                instead = "wait for its end, or stop it" if resume else "wait for its end, or choose another --out"
                stack.enter_context(locked(path / ".lock", f"training in {path}", instead))
        loop.begin_or_restore(resume)
        former_hint = processes.hint  # (that of a study, which resumes its trainings itself)
        again = f"gsem train --resume {shlex.quote(str(path))}"
        processes.hint = former_hint or f"Resume, on any number of processes, with: {again}"
        interrupted = stack.enter_context(finish_step_on_interrupt(TWICE_SECONDS if processes.several else 0.0))
        with out_of_memory_names(recipe.batch_size):
            loop.run(interrupted, on_progress)
        metrics = processes.from_first(lambda: read_metrics(path))
        processes.hint = former_hint
    return Run(path, recipe, metrics, network)


def _usual_place(recipe: Recipe, data: Dataset | None) -> Path:
    name = (data or load(recipe.data, recipe.data_path, resize=recipe.resize)).name
    of_model = re.sub(r"[^\w.]+", "-", recipe.model)
    return Path("runs") / f"{recipe.name}-{Path(name).stem}-{of_model}-seed{recipe.seed}"


_COLLAPSED = (
    "catastrophic overfitting: by epoch {}, the robust validation accuracy has fallen from {:.1f}% while that on the "
    "training batches has not. The training stops; the weights of the best epoch are the run's model"
)


class Trainer:
    """A training run in memory: images, weights, optimizer and counters."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        network: Network | None,
        path: Path,
        device: torch.device,
        compile: Compile,
        used: dict[str, Any],
    ):
        self.recipe, self.path, self.device = recipe, path, device
        self.processes = current()
        source = data.source
        eps = recipe.radius(source.eps)
        linf = eps if recipe.norm == "Linf" else source.eps  # the radius of an evaluation that gives none
        self.meta = model_meta(recipe, classes=source.classes, shape=source.shape, eps=linf)
        training, validation, metadata = data.read(recipe.seed)
        self.meta |= {"data": metadata | {"eps": linf}, "places": data.places}
        self.real = len(training)
        extra = [] if data.extra is None else [read_extra(data.extra, source.shape, source.classes, hold=source.hold)]
        self.training = batches_of([training, *extra], device)
        self.batch = min(recipe.batch_size, self.real)
        if self.batch < self.processes.size:
            raise ValueError(
                f"a batch of {self.batch} images cannot be shared out among {self.processes.size} processes: "
                f"start {self.batch} at most, or make the batch larger (--batch-size)"
            )
        self.schedule = Schedule(recipe, len(self._order(0, 0)))
        self.last, self.best = path / LAST, path / BEST
        reseed(derive_seed(recipe.seed, "weights"), device)
        model, self.meta["model"] = build_network(wanted_network(recipe, source, network), device)
        if self.processes.several and device.type == "cuda":
            share_statistics(model)
        equal = recipe.swa_from is not None
        average = Average(model, copy.deepcopy(model), recipe.ema, equal) if recipe.ema or equal else None
        self.stepper = Stepper(replace(recipe, **used), source, eps, model, average, compile=compile)
        chosen = self.stepper.used
        self.meta["precision"] = {f: {"asked": getattr(recipe, f), "used": chosen[f]} for f in chosen}
        self.meta["processes"] = self.processes.size
        self.meta["compile"] = {"asked": compile, "used": self.stepper.compile_used}
        self.validate = Validator(self.stepper, validation.to(device))
        self.counters = Counters()

    def begin_or_restore(self, resume: bool) -> None:
        """Begin the run, or resume it where it stopped.

        Raises:
            ValueError: a run is there, and it is not to be resumed; or it cannot be.
        """
        last, best = self.processes.from_first(lambda: (self.last.exists(), self.best.exists()))
        if last and resume:
            self.restore()
        else:
            _check_free(self.path, last, best)
            self.begin()

    def begin(self) -> None:
        # (The weights of a network that was passed in Python may differ between the processes.)
        self.stepper.load_weights(self.processes.from_first(lambda: _first_weights(self.recipe, self.stepper.model)))
        metadata = self.meta | {"gsem_torch": torch.__version__, "machine": platform.machine()}
        metadata |= {"device": str(self.device), "training_images": self.real, "gsem": release(), "commit": commit()}
        with self.processes.first_writes() as writes:
            if writes:
                (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
                write_atomically(self.path / "recipe.json", json.dumps(metadata, indent=2).encode())
                write_atomically(self.path / "metrics.jsonl", b"")
        self.save()

    def save(self) -> None:
        with self.processes.first_writes() as writes:
            if writes:
                tensors, scaler = self.stepper.state()
                save_checkpoint(self.last, tensors, self.meta | {"state": self.counters.to_dict() | {"scaler": scaler}})

    def restore(self) -> None:
        tensors, meta = self.processes.from_first(lambda: read_checkpoint(self.last))
        with self.processes.first_writes() as writes:
            self._restore(tensors, meta)
            if writes:
                self._record("data", "places", "compile", "processes")
                _forget(self.path, self.counters.step)

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        _check_recipe(Recipe.from_dict(meta["recipe"]), self.recipe, self.path)
        self.meta["model"] = check_same_network(meta["model"], self.meta["model"], self.path)
        self.stepper.restore(tensors, meta["state"].pop("scaler"))
        self.counters = Counters.from_dict(meta["state"])

    def _record(self, *keys: str) -> None:
        """Write what has changed of these into recipe.json."""
        metadata = read_metadata(self.path)
        changed = {key: self.meta[key] for key in keys if metadata.get(key) != self.meta[key]}
        if changed:
            write_atomically(self.path / "recipe.json", json.dumps(metadata | changed, indent=2).encode())

    @property
    def ended(self) -> bool:
        return self.counters.step >= self.schedule.steps or self.counters.stops_early(self.recipe)

    def run(self, interrupted: Interruption, on_progress: Callable[[Progress], None] | None) -> None:
        rows = batch_rows(self.schedule, self._order, self.counters.step)
        rows = (picked[self.processes.rows(len(picked))] for picked in rows)
        with closing(self.training.batches(rows)) as batches:  # what reads in advance ends with the loop
            self._run(batches, interrupted, on_progress)

    def _run(
        self, batches: Iterator[Batch], interrupted: Interruption, on_progress: Callable[[Progress], None] | None
    ) -> None:
        counters = self.counters
        first, started = counters.step, time.monotonic()
        lap = saved = started
        while not self.ended:
            round_, _, index = self.schedule.place(counters.step)
            if round_ > counters.round:
                self._begin_round(round_)
            self._train_on(*self._next(batches))
            epoch_ended = index + 1 == self.schedule.steps_per_epoch
            stop, late = _decided(self.processes, interrupted, time.monotonic() - saved > SAVE_SECONDS)
            due = epoch_ended or stop or late
            if due or counters.step % CHECK_EVERY == 0:
                _check(self.stepper, self.counters.step, self.schedule.steps, self.last)
            if epoch_ended:
                self._end_epoch()
            now = time.monotonic()
            counters.seconds, lap = counters.seconds + now - lap, now
            if due:
                self.save()
                saved = now
            shown = self.processes.first and (due or counters.step % CHECK_EVERY == 0 or counters.step == first + 1)
            if on_progress is not None and shown:
                on_progress(_progress(self, (now - started) / (counters.step - first), epoch_ended))
            if stop and not self.ended:
                stopped = TrainingInterrupted(self.path)
                stopped.kind = interrupted.kind
                raise stopped

    def _order(self, round_: int, epoch: int) -> Tensor:
        return epoch_order(self.recipe, self.real, len(self.training) - self.real, self.batch, round_, epoch)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        if isinstance(self.training, Held):
            return next(batches)
        problem: str | None = None
        try:
            batch = next(batches)
        except DamagedImage as error:
            problem = str(error)
        if not self.processes.any(problem is not None):
            return batch
        problem = next(filter(None, self.processes.gathered(problem)))
        _check(self.stepper, self.counters.step, self.schedule.steps, self.last)
        self.save()
        again = f"replace it and resume: --resume {shlex.quote(str(self.path))}"
        raise DamagedImage(f"{problem}. Saved at step {self.counters.step} of {self.schedule.steps}: {again}")

    def _train_on(self, x: Tensor, y: Tensor) -> None:
        step, schedule = self.counters.step, self.schedule
        epoch, averaged = schedule.epoch(step), schedule.averaged(step)
        with self.processes.explained():
            self.stepper(x, y, step=step, epoch=epoch, averaged=averaged, batch=self.batch)
        self.counters.step += 1

    def _begin_round(self, round_: int) -> None:
        """Start the schedule again from the best weights, with a new optimizer (the paper has 5 rounds)."""
        tensors, _ = self.processes.from_first(lambda: read_checkpoint(self.best))
        self.stepper.load_weights(part(tensors, "model"))
        self.stepper.new_optimizer()
        self.counters.round = round_
        # Saved at once: a resumed run must not start this round from a better checkpoint that the round itself made.
        self.save()

    def _end_epoch(self) -> None:
        counters, stepper = self.counters, self.stepper
        epoch = counters.step // self.schedule.steps_per_epoch
        counters.latest["loss"] = stepper.mean_loss()
        metrics = {
            "epoch": epoch,
            "step": counters.step,
            "loss": counters.latest["loss"],
            "lr": stepper.optimizer.param_groups[0]["lr"],
            "longest_gradient": float(stepper.longest),
            "seconds": round(counters.seconds, 3),
        }
        # The average is validated and kept once it has begun.
        began = self.schedule.averaged(counters.step - 1) is not None
        chosen = stepper.average.model if stepper.average and began else stepper.model
        validated = epoch % self.recipe.validate_every == 0 or counters.step == self.schedule.steps
        if self.recipe.collapse > 0:
            metrics["training_robust"] = stepper.training_robust()
        if validated:
            counters.latest |= (found := self.validate(chosen))
            metrics |= found
        stepper.clear_sums()
        better = validated and counters.count_validation(self.recipe, metrics)
        compile_decided = self.meta["compile"]["used"] != stepper.compile_used  # (the first attacks decide it)
        self.meta["compile"]["used"] = stepper.compile_used
        with self.processes.first_writes() as writes:
            if writes:
                append_line(self.path / "metrics.jsonl", json.dumps(metrics))
            if writes and compile_decided:
                self._record("compile")
            if writes and better:
                tensors = {f"model.{name}": t for name, t in chosen.state_dict().items()}
                metadata = {"metrics": metrics, "fingerprint": model_fingerprint(chosen)}
                save_checkpoint(self.best, tensors, self.meta | metadata)
        if counters.collapsed and self.processes.first:
            warnings.warn(_COLLAPSED.format(epoch, 100 * counters.watched[0]), stacklevel=2)


def _first_weights(recipe: Recipe, model: nn.Module) -> dict[str, Tensor]:
    """The weights that the training starts from: the model's own, or those of `init_from`; for others, on the CPU."""
    ours = model.state_dict()
    if recipe.init_from is None:
        return {name: t.cpu() for name, t in ours.items()} if current().several else ours
    weights = weights_in(recipe.init_from)
    check_weights(weights, ours, f"init_from {recipe.init_from} does not fit {recipe.model}")
    return weights


def _check_free(path: Path, last: bool, best: bool) -> None:
    if last:
        again = f"resume it (--resume {shlex.quote(str(path))})"
        raise ValueError(f"{path} already holds a run: {again} or choose another --out")
    if best:
        raise ValueError(f"{path} holds {BEST}, but no {LAST} to resume from: choose another --out")


def _check_recipe(former: Recipe, recipe: Recipe, path: Path) -> None:
    if former != recipe:
        changed = [k for k, v in recipe.to_dict().items() if former.to_dict()[k] != v]
        raise ValueError(f"{path} has another recipe (different {', '.join(changed)}): choose another --out")


def _forget(path: Path, step: int) -> None:
    """Remove the lines that a killed run wrote after `step`, where its checkpoint is: they will be written again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())


def _progress(loop: Trainer, seconds_per_step: float, epoch_ended: bool) -> Progress:
    counters, schedule = loop.counters, loop.schedule
    return Progress(
        epoch=min(counters.step // schedule.steps_per_epoch + (not epoch_ended), schedule.epochs),
        epochs=schedule.epochs,
        step=counters.step,
        steps=schedule.steps,
        loss=counters.latest["loss"] if epoch_ended else loop.stepper.mean_loss(),
        images_per_second=loop.batch / seconds_per_step,
        seconds_left=(schedule.steps - counters.step) * seconds_per_step,
        clean=counters.latest.get("clean"),
        robust=counters.latest.get("robust"),
        best_robust=counters.best_robust if counters.best_robust >= 0 else None,
        epoch_ended=epoch_ended,
        device=str(loop.device),
        precision=dict(loop.stepper.used),
    )


def _decided(processes: Processes, interrupted: Interruption, late: bool) -> tuple[bool, bool]:
    """(whether to stop, whether to save) after this step: what any of the processes is asked to do, all do."""
    stop = interrupted.is_set()
    if not processes.several:
        return stop, late
    asked = torch.tensor([stop, stop and issubclass(interrupted.kind, Terminated), late], dtype=torch.int32)
    processes.max_(asked)
    stop, terminated, late = (bool(flag) for flag in asked.tolist())
    interrupted.kind = Terminated if terminated else KeyboardInterrupt
    return stop, late


def _check(stepper: Stepper, step: int, steps: int, last: Path) -> None:
    """Raise TrainingDiverged where the steps so far do not allow to continue."""
    longest = float(stepper.longest)
    if not bool(stepper.finite):
        what = "a loss became NaN or infinite"
    elif not longest <= stepper.recipe.abort_grad_norm:
        what = f"the gradient exploded to a norm of {longest:.3g}"
    else:
        return
    raise TrainingDiverged(
        f"{what} at or shortly before step {step} of {steps}; the last good checkpoint is {last}. A lower --lr or "
        "--clip 1 usually helps"
    )
