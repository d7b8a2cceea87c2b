"""One loop for every recipe: attack the rows that the recipe names, average the gradient over draws, step.

Chance is counted, not carried: every step reseeds its streams from (seed, round, step), so that a run killed
anywhere and resumed computes what the uninterrupted one does.
"""

import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsem.attacks import NotFinite, pgd
from gsem.checkpoint import load_model, model_meta, part, read_checkpoint, save_checkpoint, write_atomically
from gsem.data import Source, Split, crop_flip, load, to_float
from gsem.device import device_named
from gsem.losses import cross_entropy
from gsem.models import create_model
from gsem.predict import BATCH, correct_draws, is_stochastic
from gsem.recipes import Recipe
from gsem.streams import generator, reseed, split, stream
from gsem.twin import SearchTwin, search_twin

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECK_EVERY = 20  # steps between looks at the guards: each look waits for the device
SAVE_SECONDS = 60.0
VALIDATION_IMAGES = 1000
VALIDATION_STEPS = 10
VALIDATION_DRAWS = 5


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer finite, or exploded; the last good checkpoint is kept."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: the step was finished and saved; `gsem.train(recipe, resume=True)` goes on from there."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever shows it."""

    epoch: int
    epochs: int
    step: int
    steps: int
    """Done and to do, over all rounds."""
    loss: float
    images_per_second: float
    seconds_left: float
    clean: float | None
    robust: float | None
    """Of the last validation, 0 to 1."""
    epoch_ended: bool


@dataclass(frozen=True)
class Run:
    """A run directory: `recipe.json`, `metrics.jsonl`, `checkpoints/{last,best}.safetensors`."""

    path: Path
    recipe: Recipe
    metrics: list[dict[str, Any]] = field(repr=False)
    """One per epoch: epoch (from 1, over all rounds), loss, clean and robust validation accuracy (0 to 1), …"""

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of the epoch whose weights are the run's model."""
        return max((m for m in self.metrics if "robust" in m), key=lambda m: m["robust"])

    def model(self) -> nn.Module:
        """The model of the best epoch, in eval mode."""
        return load_model(self.path)[0]


def attacked_rows(batch: int, share: float) -> slice | Tensor:
    """Which rows of a batch are attacked: evenly spread, every second one for one half (as published)."""
    if share == 1:
        return slice(None)
    row = torch.arange(batch, dtype=torch.float64)
    return (torch.floor((row + 1) * share + 1e-9) > torch.floor(row * share + 1e-9)).nonzero()[:, 0]


def train(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    data: Source | None = None,
    device: str | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> Run:
    """Train as `recipe` says and keep the result in a run directory.

    Args:
        out: the run directory; `runs/RECIPE-DATA-MODEL-seedN` unless told.
        data: where the images come from; `recipe.data` unless given. Its test split is never opened.
        device: "cpu", "cuda", "cuda:N"; the GPU where there is one unless told.
        resume: go on where `out` stopped. On a CPU, the end is the same, bit for bit, as without the stop.
        report: called with a `Progress` every few steps and after each epoch.

    Raises:
        ValueError: a run is already there (and `resume` was not asked for), or it follows another recipe.
        TrainingDiverged: the loss or gradient is not finite, or exploded.
        TrainingInterrupted: Ctrl-C, after the running step was saved.
    """
    source = data or load(recipe.data)
    default = f"{recipe.name}-{Path(source.name).stem}-{recipe.model}-seed{recipe.seed}"
    path = Path(out) if out is not None else Path("runs") / default
    where = device_named(device)
    with stream(split(recipe.seed, "run"), where):
        loop = _Loop(recipe, source, path, where)
        if loop.last.exists() and not resume:
            raise ValueError(f"{path} already holds a run: resume it (--resume {path}) or choose another --out")
        if loop.last.exists():
            loop.restore()
        else:
            loop.begin()
        with _finish_step_on_interrupt() as interrupted:
            loop.run(interrupted, report)
    return Run(path, recipe, _read_metrics(path))


def resume_recipe(path: Path) -> Recipe:
    """The recipe of an existing run directory.

    Raises:
        FileNotFoundError: no run there.
    """
    file = path / "recipe.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no recipe.json: it is no run of gsem train")
    try:
        return Recipe.from_dict(json.loads(file.read_text())["recipe"])
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None


@contextmanager
def _finish_step_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that a step is never torn; the second stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    former = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, former)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    file = path / "metrics.jsonl"
    # A run killed while it wrote leaves half a line at the end, which counts as not written.
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


class Average:
    """The exponential average of a model's weights and statistics, with a warm-up of the decay."""

    def __init__(self, model: nn.Module, decay: float, twin_of: nn.Module):
        self.decay = decay
        self.model = twin_of
        self.pairs = [
            (mine, theirs)
            for mine, theirs in zip(
                [*self.model.parameters(), *self.model.buffers()],
                [*model.parameters(), *model.buffers()],
                strict=True,
            )
            if mine.is_floating_point()
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([m for m, _ in self.pairs], [t for _, t in self.pairs], 1 - decay)


class _Loop:
    """A training run in memory: the weights, the optimizer, and the place in the schedule."""

    def __init__(self, recipe: Recipe, source: Source, path: Path, device: torch.device):
        self.recipe, self.source, self.path, self.device = recipe, source, path, device
        self.eps = recipe.eps or source.eps
        self.meta = model_meta(recipe, classes=source.classes, shape=source.shape, eps=self.eps)
        training, validation = source.training(recipe.seed)
        self.training = training.to(device)
        self.validation = Split(validation.x[:VALIDATION_IMAGES], validation.y[:VALIDATION_IMAGES]).to(device)
        self.batch = min(recipe.batch, len(training))
        self.steps_per_epoch = len(training) // self.batch
        self.total_steps = self.steps_per_epoch * recipe.epochs * recipe.rounds
        self.last = path / "checkpoints" / "last.safetensors"
        self.best = path / "checkpoints" / "best.safetensors"
        reseed(split(recipe.seed, "weights"), device)
        self.model = self._new_model()
        self.average = Average(self.model, recipe.ema, self._new_model()) if recipe.ema else None
        self.twin = search_twin(self.model, DTYPES[recipe.search])
        self.validation_twin: SearchTwin | None = None
        self.step = 0  # done, over all rounds
        self.best_robust = -1.0
        self.latest: dict[str, float] = {}
        self.round = 0
        self.seconds = 0.0
        self._new_optimizer()
        self._clear_sums()

    @property
    def chosen(self) -> nn.Module:
        return self.average.model if self.average else self.model

    def _new_model(self) -> nn.Module:
        # (torch's stubs do not know memory_format for modules.)
        model = create_model(**self.meta["model"])
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _new_optimizer(self) -> None:
        r = self.recipe
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=r.lr,
            momentum=r.momentum,
            nesterov=r.nesterov,
            weight_decay=r.weight_decay,
            fused=self.device.type == "cuda" or None,
        )
        # fp16's narrow range needs scaled gradients. CPUs have bf16 in hardware, fp16 rarely: bf16 runs there.
        fp16 = r.precision == "fp16" and self.device.type == "cuda"
        self.autocast = torch.float16 if fp16 else DTYPES["bf16" if r.precision == "fp16" else r.precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

    def _clear_sums(self) -> None:
        self.sums = torch.zeros(2, device=self.device)  # loss, steps
        self.longest = torch.zeros((), device=self.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    # --- the run -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        if self.average:
            self.average.model.load_state_dict(self.model.state_dict())
        facts = self.meta | {"gsem_torch": torch.__version__, "machine": platform.machine()}
        facts |= {"device": str(self.device), "training_images": len(self.training)}
        write_atomically(self.path / "recipe.json", json.dumps(facts, indent=2).encode())
        write_atomically(self.path / "metrics.jsonl", b"")
        self.save()

    def run(self, interrupted: threading.Event, report: Callable[[Progress], None] | None) -> None:
        per_round = self.steps_per_epoch * self.recipe.epochs
        order: Tensor | None = None
        first, started = self.step, time.monotonic()
        lap = saved = started
        while self.step < self.total_steps:
            round_, in_round = divmod(self.step, per_round)
            epoch, index = divmod(in_round, self.steps_per_epoch)
            if round_ > self.round:
                self._begin_round(round_)
            if index == 0 or order is None:
                order = self._order(round_, epoch)
            self._training_step(order[index * self.batch : (index + 1) * self.batch], in_round)
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
            if report is not None and (due or self.step % CHECK_EVERY == 0 or self.step == first + 1):
                report(self._progress((now - started) / (self.step - first), ended))
            if interrupted.is_set() and self.step < self.total_steps:
                raise TrainingInterrupted(self.path)

    def _order(self, round_: int, epoch: int) -> Tensor:
        chance = generator(self.recipe.seed, "order", round_, epoch)
        return torch.randperm(len(self.training), generator=chance).to(self.device)

    def _begin_round(self, round_: int) -> None:
        """The schedule again from the best weights, with a new optimizer (method: 5 rounds as published)."""
        tensors, _ = read_checkpoint(self.best)
        self.model.load_state_dict(part(tensors, "model"))
        if self.average:
            self.average.model.load_state_dict(part(tensors, "model"))
        self._new_optimizer()
        self.round = round_
        # At once: a resumed run must not start this round from a better checkpoint that the round itself made.
        self.save()

    def _training_step(self, picked: Tensor, in_round: int) -> None:
        r = self.recipe
        reseed(split(r.seed, "step", self.step), self.device)
        chance = generator(r.seed, "augment", self.step, device=self.device)
        y = self.training.y[picked]
        flip = self.source.flip if r.flip is None else r.flip
        x = to_float(
            crop_flip(
                self.training.x[picked],
                padding=self.source.padding,
                flip=flip,
                fill=self.source.fill,
                generator=chance,
            )
        )
        x = x.contiguous(memory_format=torch.channels_last)
        if r.attacked > 0:
            rows = attacked_rows(len(x), r.attacked)
            x[rows] = self._attack(self.twin, x[rows], y[rows], r.steps, r.eot, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = r.learning_rate(in_round / self.steps_per_epoch)
        self.model.train()
        loss = torch.zeros((), device=self.device)
        for _ in range(r.draws):
            with self._autocast():
                logits = self.model(x)
            draw = cross_entropy(logits.float(), y).mean() / r.draws
            self.scaler.scale(draw).backward()
            loss += draw.detach()
        self._update(loss)

    def _autocast(self):
        if self.autocast == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def _attack(self, twin: SearchTwin, x: Tensor, y: Tensor, steps: int, eot: int, number: int) -> Tensor:
        length = self.recipe.step or self.eps / 4
        twin.refresh()
        seed = split(self.recipe.seed, "attack", number)
        try:
            return pgd(twin, x, y, eps=self.eps, step=length, steps=steps, eot=eot, seed=seed)
        except NotFinite:
            self._check()  # the loss may have told already
            raise self._diverged("the network's outputs became NaN or infinite") from None

    def _update(self, loss: Tensor) -> None:
        self.scaler.unscale_(self.optimizer)
        length = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.step)
        self.sums += torch.stack([loss, torch.ones_like(loss)])
        self.finite &= loss.isfinite()
        # Under fp16 an infinite gradient is no accident: the scaler skips that step and scales less.
        self.longest = torch.maximum(
            self.longest, length.nan_to_num(0.0, 0.0) if self.scaler.is_enabled() else length
        )

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} at or shortly before step {self.step} of {self.total_steps}; the last good checkpoint is "
            f"{self.last}. A lower --lr or --clip 1 usually helps"
        )

    def _check(self) -> None:
        if not bool(self.finite):
            raise self._diverged("the loss became NaN or infinite")
        longest = float(self.longest)
        if not longest <= self.recipe.explosion:
            raise self._diverged(f"the gradient exploded to a norm of {longest:.3g}")

    # --- validation and files -------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        epoch = self.step // self.steps_per_epoch
        total, count = self.sums.tolist()
        self.latest["loss"] = total / count
        line = {
            "epoch": epoch,
            "step": self.step,
            "loss": self.latest["loss"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "longest_gradient": float(self.longest),
            "seconds": round(self.seconds, 3),
        }
        if epoch % self.recipe.validate_every == 0 or self.step == self.total_steps:
            line |= self._validate()
        self._clear_sums()
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if line.get("robust", -1.0) > self.best_robust:
            self.best_robust = line["robust"]
            tensors = {f"model.{name}": t for name, t in self.chosen.state_dict().items()}
            save_checkpoint(self.best, tensors, self.meta | {"metrics": line})

    def _validate(self) -> dict[str, float]:
        """Clean and PGD-10 accuracy on held-out training images, expected over the noise."""
        model = self.chosen.eval()
        if self.validation_twin is None:
            self.validation_twin = search_twin(model, DTYPES[self.recipe.search])
        x, y = to_float(self.validation.x), self.validation.y
        seed = split(self.recipe.seed, "validation")
        draws = VALIDATION_DRAWS if is_stochastic(model, x[:1]) else 1
        x_adv = torch.cat(
            [
                self._attack(self.validation_twin, xs, ys, VALIDATION_STEPS, 1, -1)
                for xs, ys in zip(x.split(BATCH), y.split(BATCH), strict=True)
            ]
        )
        accuracies = {
            name: correct_draws(model, images, y, draws=draws, seed=seed).sum().item() / (draws * len(y))
            for name, images in (("clean", x), ("robust", x_adv))
        }
        self.latest |= accuracies
        return accuracies

    def _progress(self, seconds_per_step: float, epoch_ended: bool) -> Progress:
        total, count = self.sums.tolist()  # zeros right after an epoch's end
        return Progress(
            epoch=min(
                self.step // self.steps_per_epoch + (not epoch_ended), self.recipe.epochs * self.recipe.rounds
            ),
            epochs=self.recipe.epochs * self.recipe.rounds,
            step=self.step,
            steps=self.total_steps,
            loss=total / count if count else self.latest["loss"],
            images_per_second=self.batch / seconds_per_step,
            seconds_left=(self.total_steps - self.step) * seconds_per_step,
            clean=self.latest.get("clean"),
            robust=self.latest.get("robust"),
            epoch_ended=epoch_ended,
        )

    def save(self) -> None:
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        if self.average:
            tensors |= {f"ema.{name}": t for name, t in self.average.model.state_dict().items()}
        for (name, _), p in zip(self.model.named_parameters(), self.model.parameters(), strict=True):
            if (buffer := self.optimizer.state.get(p, {}).get("momentum_buffer")) is not None:
                tensors[f"momentum.{name}"] = buffer
        tensors |= {"loop.sums": self.sums, "loop.longest": self.longest}
        state = {
            "step": self.step,
            "round": self.round,
            "best_robust": self.best_robust,
            "latest": self.latest,
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict(),
        }
        save_checkpoint(self.last, tensors, self.meta | {"state": state})

    def restore(self) -> None:
        tensors, meta = read_checkpoint(self.last)
        former = Recipe.from_dict(meta["recipe"])
        if former != self.recipe:
            changed = [k for k, v in self.recipe.to_dict().items() if former.to_dict()[k] != v]
            raise ValueError(
                f"{self.path} follows another recipe (other {', '.join(changed)}): choose another --out"
            )
        self.model.load_state_dict(part(tensors, "model"))
        if self.average:
            self.average.model.load_state_dict(part(tensors, "ema"))
        momentum = part(tensors, "momentum")
        for name, p in self.model.named_parameters():
            if name in momentum:
                buffer = torch.empty_like(p).copy_(momentum[name])
                self.optimizer.state[p]["momentum_buffer"] = buffer
        loop = part(tensors, "loop")
        self.sums, self.longest = loop["sums"].to(self.device), loop["longest"].to(self.device)
        state = meta["state"]
        self.step, self.round, self.seconds = state["step"], state["round"], state["seconds"]
        self.best_robust, self.latest = state["best_robust"], state["latest"]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        # Lines that a killed run wrote after this checkpoint will be written again.
        kept = [line for line in _read_metrics(self.path) if line["step"] <= self.step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.path / "metrics.jsonl", text.encode())
