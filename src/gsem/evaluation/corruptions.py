"""Accuracy on corrupted images, by corruption and severity."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gsem._fingerprint import data_fingerprint, model_fingerprint
from gsem._io import write_atomically
from gsem._text import columns, percent
from gsem.data import balanced, to_float
from gsem.data.corruptions import EXTRA, Corruptions
from gsem.distributed import current
from gsem.evaluation.partial import refuse_differences
from gsem.evaluation.work import shared_out
from gsem.nn.predict import BATCH, correct_draws, is_stochastic
from gsem.rng import derive_seed


class AnotherCorruptions(ValueError):
    """A file holds accuracies of another model, other images or other draws, or no accuracies."""


class Cell(NamedTuple):
    """Expected accuracy (0 to 1) under one corruption and severity, and a 95% Wilson interval over the images."""

    corruption: str
    severity: int
    accuracy: float
    low: float
    high: float
    images: int


@dataclass(frozen=True, repr=False)
class CorruptionResult:
    """The accuracy under every corruption and severity. `print(result)` shows the table."""

    cells: tuple[Cell, ...]
    metadata: dict[str, Any]
    """Fingerprints of the model and of the images, draws, seed."""

    def by_corruption(self) -> dict[str, float]:
        """For each corruption, the mean accuracy over its severities."""
        names = dict.fromkeys(cell.corruption for cell in self.cells)
        return {name: mean(c.accuracy for c in self.cells if c.corruption == name) for name in names}

    @property
    def mean(self) -> float:
        """Mean corruption accuracy: over the corruptions of the usual fifteen that are there, else over all."""
        means = self.by_corruption()
        usual = [value for name, value in means.items() if name not in EXTRA]
        return mean(usual or means.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "mean_corruption_accuracy": self.mean,
            "by_corruption": self.by_corruption(),
            "cells": [cell._asdict() for cell in self.cells],
            "metadata": self.metadata,
        }

    def __repr__(self) -> str:
        severities = sorted({cell.severity for cell in self.cells})
        found = {(cell.corruption, cell.severity): cell.accuracy for cell in self.cells}
        rows = [("corruption", *map(str, severities), "mean")]
        for name, value in self.by_corruption().items():
            rows.append((name, *(percent(found.get((name, s))) for s in severities), percent(value)))
        by_severity = [[c.accuracy for c in self.cells if c.severity == s and self._counts(c)] for s in severities]
        rows.append(
            ("mean", *(percent(mean(values) if values else None) for values in by_severity), percent(self.mean))
        )
        lines = columns(rows)
        extra = [name for name in self.by_corruption() if name in EXTRA]
        if extra and len(extra) < len(self.by_corruption()):
            lines.append(f"(the mean is over the usual corruptions, without {', '.join(extra)})")
        return "\n".join(lines)

    def _counts(self, cell: Cell) -> bool:
        return cell.corruption not in EXTRA or all(name in EXTRA for name in self.by_corruption())


def evaluate_corruptions(
    model: nn.Module,
    corruptions: Corruptions,
    *,
    images: int | None = None,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = BATCH,
    device: torch.device | str = "cpu",
    save: str | Path | None = None,
    about: dict[str, Any] | None = None,
    on_progress: Callable[[Cell], None] | None = None,
) -> CorruptionResult:
    """The expected accuracy of a model in eval mode under every corruption and severity.

    Several processes share the work: all of them call this function with the same arguments, and all return the same
    result. The first one writes it and calls `on_progress`.

    Args:
        model: a classifier of images in [0, 1], on `device`.
        corruptions: of `gsem.data.load_corruptions`; the images are read in batches.
        images: number of images for each corruption and severity, class-balanced and the same everywhere; default: all.
        draws: of a stochastic model's noise, for each image; a deterministic model takes one.
        save: a JSON file. It is written after every cell; a partial file of the same evaluation is completed.
        about: what else its metadata hold.
        on_progress: called with each new cell.

    Raises:
        AnotherCorruptions: `save` is the file of another evaluation, or of none.
        ValueError: there are no corruptions, draws or images are below 1, an image is damaged, or a logit is not
            finite.
    """
    if not corruptions or draws < 1:
        raise ValueError("there are no corruptions" if not corruptions else f"draws must be at least 1, not {draws}")
    path, processes = None if save is None else Path(save), current()
    with processes.first_warns(), processes.together():
        first = next(iter(corruptions.values()))
        probe = to_float(first.x[:BATCH]).to(device)
        model.eval()
        stochastic = is_stochastic(model, probe)
        metadata: dict[str, Any] = {
            "model": model_fingerprint(model),
            "images": {f"{name}/{s}": _sample(x.x, x.y) for (name, s), x in corruptions.items()},
            "images_per_cell": images,
            "stochastic": stochastic,
            "draws": draws if stochastic else 1,
            "seed": seed,
        }
    refuse_differences(metadata)
    cells = processes.from_first(partial(_finished, path, metadata))
    result = CorruptionResult(tuple(cells.values()), metadata | (about or {}))
    missing = [key for key in corruptions if key not in cells]
    computed = partial(_computed, model, corruptions, images, metadata["draws"], seed, batch_size, device)
    # Cells cost about the same: each process takes one, and the next ones when all have finished.
    for start in range(0, len(missing), processes.size):
        now = missing[start : start + processes.size]
        for cell in shared_out(f"the cells {now}", [partial(computed, *key) for key in now]):
            cells[cell.corruption, cell.severity] = cell
            result = CorruptionResult(tuple(cells[key] for key in corruptions if key in cells), result.metadata)
            with processes.together():
                if path is not None and processes.first:
                    write_atomically(path, json.dumps(result.to_dict(), indent=2).encode())
            if on_progress is not None and processes.first:
                on_progress(cell)
    return result


def _computed(
    model: nn.Module,
    corruptions: Corruptions,
    images: int | None,
    draws: int,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    name: str,
    severity: int,
) -> Cell:
    split = corruptions[name, severity]
    rows = torch.arange(len(split)) if images is None else balanced(split.y, images)
    right = 0.0
    for part in rows.split(batch_size):
        x, y = to_float(split.x[part]).to(device), split.y[part].to(device)
        of = derive_seed(seed, "scoring", name, severity, int(part[0]))
        right += float(correct_draws(model, x, y, draws=draws, seed=of, batch_size=batch_size).sum()) / draws
    return _cell(name, severity, right / len(rows), len(rows))


def _sample(x: Any, y: Tensor) -> str:
    """A hash of the labels and of a few images."""
    rows = torch.linspace(0, len(y) - 1, min(len(y), 4)).long()
    return "-".join(data_fingerprint((x[rows], y)).values())


def _finished(path: Path | None, metadata: dict[str, Any]) -> dict[tuple[str, int], Cell]:
    """The cells of a file of the same evaluation; none if there is no file.

    Raises:
        AnotherCorruptions: it is the file of another evaluation, or of none.
    """
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        then = {key: found["metadata"][key] for key in metadata}
        cells = [Cell(**cell) for cell in found["cells"]]
    except (ValueError, KeyError, TypeError):
        raise AnotherCorruptions(f"{path} holds no accuracies under corruptions: choose another file") from None
    if then != metadata:
        other = ", ".join(key.replace("_", " ") for key in metadata if then[key] != metadata[key])
        raise AnotherCorruptions(f"{path} holds a different evaluation (different {other}): choose another file")
    return {(cell.corruption, cell.severity): cell for cell in cells}


def _cell(name: str, severity: int, accuracy: float, n: int, z: float = 1.959964) -> Cell:
    # E. B. Wilson 1927; of accuracies that are means over draws it is wider than needed.
    centre, spread = accuracy + z * z / (2 * n), z * sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return Cell(name, severity, accuracy, max(low, 0.0), min(high, 1.0), n)
