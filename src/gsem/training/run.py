"""A run directory and its metrics, and the exceptions that end a training early."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gsem._fingerprint import model_fingerprint
from gsem._io import BEST, LAST, read_checkpoint_metadata, read_metadata
from gsem._text import percent
from gsem.data import Dataset
from gsem.nn.build import Network, Wanted
from gsem.nn.load import load_model
from gsem.training.model_selection import Counters, rank
from gsem.training.recipe import Recipe


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer finite, or exploded; the last good checkpoint is kept."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and saved; `gsem.train(recipe, resume=True)` resumes there."""

    kind: type[KeyboardInterrupt] = KeyboardInterrupt
    """`gsem._interrupt.Terminated` for SIGTERM."""


@dataclass(frozen=True, repr=False)
class Run:
    """A run directory: `recipe.json`, `metrics.jsonl`, `checkpoints/{last,best}.safetensors`.

    `print(run)` shows the recipe, the model, the data, and the accuracies of the best epoch.
    """

    path: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    """One per epoch: epoch (from 1, over all rounds), loss, clean and robust validation accuracy (0 to 1), …"""
    network: Network | None = field(default=None, compare=False)
    """The network or its factory, where it was passed in Python."""

    def __repr__(self) -> str:
        """The path, the recipe, and the validation accuracies of the best epoch."""
        recipe, epochs = self.recipe, self.recipe.epochs * self.recipe.rounds
        done = self.metrics[-1]["epoch"] if self.metrics else 0
        lines = [f"run {self.path}: {recipe.name}, {recipe.model} on {recipe.data}, seed {recipe.seed}"]
        if any("robust" in m for m in self.metrics):
            best = self.best
            accuracies = f"clean {percent(best['clean']).strip()}, robust {percent(best['robust']).strip()}"
            lines.append(f"{done} of {epochs} epochs; best: epoch {best['epoch']}, validation {accuracies}")
            if self.collapsed:
                lines.append(f"stopped after epoch {done} at catastrophic overfitting; epoch {best['epoch']} is kept")
        else:
            lines.append(f"{done} of {epochs} epochs; no epoch is validated yet")
        return "\n".join(lines)

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of the epoch whose weights are the run's model (see `rank`)."""
        return max((m for m in self.metrics if "robust" in m), key=lambda m: rank(self.recipe, m))

    @property
    def collapsed(self) -> bool:
        """Whether the training stopped at catastrophic overfitting (see `Recipe.collapse`)."""
        counters = Counters()
        for metrics in self.metrics:
            if "robust" in metrics:
                counters.count_validation(self.recipe, metrics)
        return counters.collapsed

    def model(self) -> nn.Module:
        """The model of the best epoch, in eval mode."""
        return load_model(self.path, model=self.network)[0]


def model_meta(recipe: Recipe, *, classes: tuple[str, ...], shape: tuple[int, int, int], eps: float) -> dict:
    """What a checkpoint records of its recipe, model and data."""
    return {
        "recipe": recipe.to_dict(),
        "model": {
            "name": recipe.model,
            "num_classes": len(classes),
            "in_channels": shape[0],
            "levels": recipe.levels,
            "noise": recipe.noise,
            "gradient": recipe.gradient,
            "quantiser": recipe.quantiser,
        },
        "data": {"classes": list(classes), "shape": list(shape), "eps": eps},
    }


def wanted_network(recipe: Recipe, data: Dataset, given: Network | None) -> Wanted:
    """The network that the recipe and the data need."""
    return Wanted(
        name=recipe.model,
        given=given,
        shape=data.shape,
        num_classes=len(data.classes),
        levels=recipe.levels,
        noise=recipe.noise,
        gradient=recipe.gradient,
        quantiser=recipe.quantiser,
        insert_after=recipe.insert_after,
        normalize=recipe.normalize,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    file = path / "metrics.jsonl"
    # A run killed while it wrote leaves half a line at the end, which counts as not written.
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def run_fingerprint(path: Path) -> dict[str, str] | None:
    """The fingerprint of the run's model (see `gsem._fingerprint`); None without a checkpoint.

    Raises:
        ValueError, RuntimeError: the checkpoint is damaged.
    """
    file = next((path / name for name in (BEST, LAST) if (path / name).is_file()), None)
    if file is None:
        return None
    known: dict[str, str] | None = read_checkpoint_metadata(file).get("fingerprint")
    return known or model_fingerprint(load_model(file)[0])


def resume_recipe(path: Path) -> Recipe:
    """The recipe of an existing run directory.

    Raises:
        FileNotFoundError, ValueError: there is no run, or its recipe has fields that this version does not know.
    """
    return Recipe.from_dict(read_metadata(path)["recipe"])


def recorded_precision(path: Path, device: torch.device) -> dict[str, str]:
    """The precision that the run in `path` was started in, by recipe field; empty where there is none recorded.

    Raises:
        ValueError: fp16 on a device that is not a GPU.
    """
    file = path / "recipe.json"
    recorded = json.loads(file.read_text()).get("precision", {}) if file.is_file() else {}
    used = {field: choice["used"] for field, choice in recorded.items()}
    if "fp16" in used.values() and device.type != "cuda":
        raise ValueError(
            f"{path} was started in fp16, which only GPUs are fast in: resume it on a GPU, not on {device}"
        )
    return used


_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """torch's deterministic algorithms inside this block, if `wanted`; the caller's settings are put back."""
    if not wanted:  # torch's switch imports its compiler, which takes a second
        yield
        return
    former = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    given = os.environ.get(_CUBLAS)
    try:
        if device.type == "cuda" and given is None:
            # Before torch 2.10 a product on a GPU is an error in this mode unless this was set before the first one.
            os.environ[_CUBLAS] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=former[1])
        yield
    finally:
        torch.use_deterministic_algorithms(former[0], warn_only=former[1])
        if given is None:
            os.environ.pop(_CUBLAS, None)
