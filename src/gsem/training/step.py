"""One optimizer step of a recipe: augment, attack, perturb the weights, average the gradient over draws, update."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from gsem._env import DTYPES, choose_precision, require_float64, warn_if_emulated
from gsem._io import part
from gsem.data import Dataset, auto_augment, crop_flip, cutout, resized_crop, to_float
from gsem.distributed import current
from gsem.losses import cross_entropy, mart, trades
from gsem.nn.folded import FoldedModel, fold
from gsem.rng import Shard, derive_seed, generator, reseed
from gsem.training.attack import adversarial_examples, attack_from
from gsem.training.awp import awp
from gsem.training.cuda_graph import compiler_works, graphed_attack
from gsem.training.optimizer import make_optimizer, optimizer_state, restore_optimizer
from gsem.training.passes import TrainingPasses
from gsem.training.recipe import Compile, Recipe


@cache
def attacked_rows(batch: int, share: float, device: torch.device | str = "cpu") -> slice | Tensor:
    """Which rows of a batch are attacked: evenly spread, every second one for one half (as published)."""
    if share == 1:
        return slice(None)
    row = torch.arange(batch, dtype=torch.float64)
    return (torch.floor((row + 1) * share + 1e-9) > torch.floor(row * share + 1e-9)).nonzero()[:, 0].to(device)


@cache
def attacked_shard(shard: Shard, share: float, device: torch.device | str = "cpu") -> tuple[slice | Tensor, Shard]:
    """Which rows of a shard are attacked, and which of all attacked rows of the batch they are."""
    rows = attacked_rows(shard.batch, share, device)
    if isinstance(rows, slice):
        return rows, shard
    start, stop = (int((rows < place).sum()) for place in (shard.start, shard.stop))
    return rows[start:stop] - shard.start, Shard(start, stop, len(rows))


class Average:
    """A model whose weights and statistics are an average of another's over its steps.

    Exponential with a warm-up of the decay (EMA), or, from an epoch on, with equal weights (SWA, Izmailov et al.
    2018; the statistics are averaged like the weights, not estimated anew).
    """

    # torch's AveragedModel differs: its first update copies the weights and its decay has no warm-up.

    def __init__(self, model: nn.Module, averaged: nn.Module, decay: float, equal: bool):
        self.model, self.decay, self.equal = averaged, decay, equal
        mine = [*averaged.parameters(), *averaged.buffers()]
        theirs = [*model.parameters(), *model.buffers()]
        pairs = [(m, t) for m, t in zip(mine, theirs, strict=True) if m.is_floating_point()]
        self.mine, self.theirs = [m for m, _ in pairs], [t for _, t in pairs]

    @torch.no_grad()
    def update(self, count: int) -> None:
        """`count`: averaged steps before this one."""
        share = 1 / (count + 1) if self.equal else 1 - min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(self.mine, self.theirs, share)


class Stepper:
    """Model, averaged model, optimizer, and the folded model that attacks search on; trains on one batch per call.

    `compile`: with "auto", a CUDA graph replays the attacks where that pays (see `cuda_graph.py`); with "on",
    torch.compile runs the training passes and the folded model; with "off", neither. `used` is the precision that the
    training passes and the search run in: what the recipe's `auto` means on the model's device.

    Raises:
        ValueError: a precision or an augmentation that the device cannot do.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Dataset,
        eps: float,
        model: nn.Module,
        average: Average | None,
        *,
        compile: Compile = "auto",
    ):
        self.recipe, self.source, self.eps = recipe, source, eps
        self.model, self.average = model, average
        self.device = next(model.parameters()).device
        if recipe.augment == "autoaugment":
            require_float64(self.device, "augment autoaugment")
        self.used = {
            field: choose_precision(getattr(recipe, field), self.device) for field in ("precision", "attack_precision")
        }
        warn_if_emulated(self.used.values(), self.device)
        self.dtype, self.search_dtype = DTYPES[self.used["precision"]], DTYPES[self.used["attack_precision"]]
        self.folded = fold(model, self.search_dtype)
        self.processes = current()
        self.graphed = graphed_attack(self.device) if compile == "auto" else None
        self.compiled = compile == "on" and compiler_works(self.device)
        self.training_pass: Callable[[Tensor], Tensor] = torch.compile(model) if self.compiled else model
        self.passes = TrainingPasses(model, self.training_pass)
        if self.compiled:
            self.folded.compile_graph()
        self.new_optimizer()
        self.clear_sums()

    @property
    def compile_used(self) -> str:
        """How the passes have run so far: "torch.compile", "CUDA graph" (the attacks) or "off"."""
        if self.compiled:
            return "torch.compile"
        return "CUDA graph" if self.graphed is not None and self.graphed.used else "off"

    def new_optimizer(self) -> None:
        self.optimizer = make_optimizer(self.recipe, self.model)
        # fp16's narrow range needs scaled gradients.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def clear_sums(self) -> None:
        self.sums = torch.zeros(2, device=self.device)  # loss, steps
        self.hits = torch.zeros(2, device=self.device)  # adversarial examples classified correctly, and all
        self.longest = torch.zeros((), device=self.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    def __call__(
        self,
        pixels: UInt8[Tensor, "b c h w"],
        y: Int64[Tensor, " b"],
        *,
        step: int,
        epoch: float,
        averaged: int | None,
        batch: int | None = None,
    ) -> None:
        """Train on a batch, or, with other processes, on this one's rows of it.

        Args:
            step: its number in the whole run, from which all random numbers of the step follow.
            epoch: of the round, fractional, for the schedule.
            averaged: steps averaged before this one; None while the average has not begun.
            batch: images of all processes together. Default: those that are given.
        """
        r = self.recipe
        batch = batch or len(y)
        mine = self.processes.rows(batch)
        shard = Shard(mine.start, mine.stop, batch)
        reseed(derive_seed(r.seed, "step", step, *shard.stream), self.device)
        x = self._augmented(pixels, step, shard)
        x_adv = x
        rows, attacked = attacked_shard(shard, r.adversarial_fraction, self.device)
        if len(attacked):
            x_adv = x if r.objective == "ce" else x.clone()  # the others need the clean images too
            x_adv[rows] = self.attack(r, self.folded, x[rows], y[rows], number=step, shard=attacked)
        for group in self.optimizer.param_groups:
            group["lr"] = r.learning_rate(epoch)
        self.model.train()
        self.passes.join(x_adv)
        with ExitStack() as stack:
            if r.awp > 0 and epoch >= r.awp_warmup:
                with self._autocast():
                    stack.enter_context(awp(self.model, x_adv, y, gamma=r.awp, draws=r.draws, processes=self.processes))
            loss = torch.zeros((), device=self.device)
            hits = torch.zeros_like(self.hits)
            for left in reversed(range(r.draws)):
                with self.passes.of_draw(left):
                    logits = self._logits(x, x_adv)
                    draw = self.passes.mean(self._losses(logits, y), batch) / r.draws
                    self.scaler.scale(draw).backward()
                loss += draw.detach()
                if r.collapse > 0:
                    right = (logits[0].detach()[rows].argmax(1) == y[rows]).float()
                    hits += torch.stack([right.sum(), torch.ones_like(right).sum()])
            self._update()
            self.finite &= loss.isfinite()
            self.passes.agree(loss, hits, self.finite, len(y) / batch)
            self.sums += torch.stack([loss, torch.ones_like(loss)])
            self.hits += hits
        if self.average and averaged is not None:
            self.average.update(averaged)

    def _augmented(self, pixels: Tensor, step: int, shard: Shard | None = None) -> Tensor:
        rng = generator(self.recipe.seed, "augment", step, device=self.device)
        flip = self.source.flip if self.recipe.flip is None else self.recipe.flip
        padding, fill = self.source.padding, self.source.fill
        if self.recipe.augment == "resized-crop":
            pixels = resized_crop(pixels, flip=flip, generator=rng, shard=shard)
        elif self.recipe.augment != "none":
            pixels = crop_flip(pixels, padding=padding, fill=fill, flip=flip, generator=rng, shard=shard)
        if self.recipe.augment == "autoaugment":
            if pixels.shape[1] == 3:
                # The policy's choices are made on the CPU: rows are grouped by operation, and a GPU would wait.
                choices = generator(self.recipe.seed, "policy", step)
                pixels = auto_augment(pixels, fill=fill, generator=choices, shard=shard)
            pixels = cutout(pixels, size=pixels.shape[2] // 2, generator=rng, shard=shard)
        return to_float(pixels).contiguous(memory_format=torch.channels_last)

    def attack(
        self, recipe: Recipe, folded: FoldedModel, x: Tensor, y: Tensor, *, number: int, shard: Shard | None = None
    ) -> Tensor:
        """See `adversarial_examples`. An infinite loss shows in `finite`, which is looked at now and then."""
        steps_from = self.graphed or attack_from
        x_adv, finite = adversarial_examples(
            recipe, folded, x, y, eps=self.eps, number=number, steps_from=steps_from, shard=shard
        )
        self.finite &= finite.all()
        return x_adv

    def _logits(self, x: Tensor, x_adv: Tensor) -> list[Tensor]:
        """On the adversarial images, then, with MART and TRADES, on the clean ones."""
        with self._autocast():
            return self.passes(x_adv) if self.recipe.objective == "ce" else self.passes(x_adv, x)

    def _losses(self, logits: list[Tensor], y: Tensor) -> Tensor:
        """Of each image."""
        r = self.recipe
        if r.objective == "ce":
            return cross_entropy(logits[0], y, r.label_smoothing)
        objective = mart if r.objective == "mart" else trades
        return objective(logits[0], logits[1], y, r.kl_weight, r.label_smoothing)

    def _autocast(self) -> AbstractContextManager:
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if low else nullcontext()

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        length = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # Under fp16 an infinite gradient is no accident: the scaler skips that step and scales less.
        length = length.nan_to_num(0.0, 0.0) if self.scaler.is_enabled() else length
        self.longest = torch.maximum(self.longest, length)

    def mean_loss(self) -> float:
        """Over the steps since the sums were cleared; there is at least one."""
        total, count = self.sums.tolist()
        return total / count

    def training_robust(self) -> float:
        """The share of the adversarial examples of these steps that was classified correctly, where it is watched."""
        hits, count = self.hits.tolist()
        return hits / count

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Into the model and its average."""
        self.model.load_state_dict(weights)
        if self.average:
            self.average.model.load_state_dict(weights)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able metadata that `restore` takes."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        if self.average:
            tensors |= {f"ema.{name}": t for name, t in self.average.model.state_dict().items()}
        tensors |= optimizer_state(self.optimizer, self.model)
        tensors |= {"loop.sums": self.sums, "loop.longest": self.longest}
        if self.recipe.collapse > 0:
            tensors["loop.hits"] = self.hits
        return tensors, self.scaler.state_dict()

    def restore(self, tensors: dict[str, Tensor], scaler: dict[str, Any]) -> None:
        """Put a `state` back."""
        self.model.load_state_dict(part(tensors, "model"))
        if self.average:
            self.average.model.load_state_dict(part(tensors, "ema"))
        restore_optimizer(self.optimizer, self.model, tensors)
        self.sums, self.longest = (tensors[f"loop.{name}"].to(self.device) for name in ("sums", "longest"))
        if "loop.hits" in tensors:
            self.hits = tensors["loop.hits"].to(self.device)
        if scaler:
            self.scaler.load_state_dict(scaler)
