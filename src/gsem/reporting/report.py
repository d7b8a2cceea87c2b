"""A report from run directories: read, with pictures where the model can be loaded, written by the file's ending."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gsem._env import device_named, release
from gsem._fingerprint import model_fingerprint
from gsem._io import write_atomically
from gsem.data import Dataset, balanced, load, to_float
from gsem.evaluation.result import AttackScores, EvaluationResult
from gsem.nn.contract import plain_logits
from gsem.nn.load import load_model
from gsem.reporting import RunReport, cards, html, markdown, read_runs
from gsem.reporting.match import other_network
from gsem.reporting.tables import bare
from gsem.reporting.visuals import pictures, saved_pictures
from gsem.training.recorded import find, find_named

WRITERS: dict[str, Callable[[Sequence[RunReport], str], str]] = {
    ".html": lambda entries, told: html(entries, version=told),
    ".md": lambda entries, told: markdown(entries, version=told),
    ".json": lambda entries, told: cards(entries),
}
IMAGES = 100


def report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | Sequence[str | Path],
    *,
    model: nn.Module | None = None,
    data: str | Dataset | None = None,
    data_path: str | None = None,
    images: int = IMAGES,
    device: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """What was trained, what was measured, and whether to believe it, as a page that people read.

    Args:
        runs: run directories, or files of single evaluations; of a directory, the latest evaluation and the latest
            whole audit are shown.
        out: where to write. `.html`: one page that loads nothing; `.md`: Markdown; `.json`: a card with the field
            names of RobustBench.
        model: a network of your own whose evaluation (an `.npz`) is among `runs`, for its pictures: images in [0, 1] →
            logits, in eval mode. Without it, the gallery shows the adversarial examples that the evaluation kept.
        data: whose test images the pictures are made of, where the evaluation kept none: a data set's name, an image
            folder, an `.npz` file, or a `gsem.data.Dataset`. Default: what the evaluation or the run names.
        data_path: directory of the data sets that have names.
        images: test images that pictures (confusion, gallery, loss surface) are computed of, where the evaluation
            kept no adversarial examples; 0 for no pictures.
        device: "cpu", "cuda", "cuda:N"; default: the GPU where there is one.
        on_progress: called with a line before each step that takes time.

    Returns:
        The files written.

    Raises:
        FileNotFoundError, ValueError: no run, a damaged file, an ending that is none of the three, or a `model` that is
            not the evaluated one.
    """
    paths = [Path(p) for p in ([out] if isinstance(out, (str, Path)) else out)]
    for path in paths:
        if path.suffix not in WRITERS:
            raise ValueError(f"{path}: a report is written as {', '.join(WRITERS)}; its name must end so")
        if path.is_dir():
            raise ValueError(f"{path} is a directory: name a file in it, like {path / 'report.html'}")
    if images < 0:
        raise ValueError(f"images must be at least 0, not {images}")
    entries = read_runs([runs] if isinstance(runs, (str, Path)) else list(runs))
    strangers = [entry for entry in entries if not entry.metadata]
    if model is not None and len(strangers) != 1:
        raise ValueError(
            f"a model is given for the evaluation of a network that gsem did not train, and of the {len(entries)} runs "
            f"{len(strangers)} are such evaluations, not one: run directories hold their own model"
        )
    if any(path.suffix == ".html" for path in paths):
        where, on_progress = device_named(device), on_progress or (lambda line: None)
        source = load(data, data_path) if isinstance(data, str) else data
        entries = [_pictured(e, None if e.metadata else model, source, images, where, on_progress) for e in entries]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, WRITERS[path.suffix](entries, release()).encode())
    return paths


def _pictured(
    entry: RunReport,
    own: nn.Module | None,
    data: Dataset | None,
    images: int,
    device: torch.device,
    on_progress: Callable[[str], None],
) -> RunReport:
    """With its pictures; or with a sentence that says which are missing, why, and how to get them.

    Args:
        own: the network that the evaluation is of, if the caller gave it; of a run, None.
        data: whose test images, if the caller gave them.
    """
    if images == 0:
        return replace(entry, missing="No pictures were asked for: they come with --images above 0.")
    kept = _kept(entry)
    if own is None and not entry.metadata:
        return _without_network(entry, kept, data)
    try:
        model = own if own is not None else load_model(entry.path)[0]
    except (ValueError, OSError, RuntimeError) as error:
        again = f"With them there, {shlex.join(['gsem', 'report', entry.spec])} shows the pictures."
        return replace(entry, missing=f"The run's model could not be loaded ({_line(error)}). {again}")
    on_progress(f"{entry.name}: pictures")
    try:
        shown = kept if kept is not None else _fresh(entry, data, images)
    except (ValueError, OSError) as error:
        return replace(
            entry,
            missing=f"The test images are not there ({_line(error)}), and the evaluation did not keep its own. "
            f"{shlex.join(['gsem', 'evaluate', entry.spec, '--save-adv'])} keeps them.",
        )
    model, x, y = model.to(device), shown.x.to(device), shown.y.to(device)
    if own is not None:
        _check_same(entry, plain_logits(model, x, y))
    eps = entry.eps
    assert eps is not None
    norm: Any = "Linf" if entry.result is None else entry.result.metadata.get("norm", "Linf")
    points = None if shown.points is None else shown.points.to(device)
    found = pictures(model, x, y, eps=eps, norm=norm, points=points, how=shown.how, rows=shown.rows)
    return replace(entry, pictures=found, named=shown.classes if data is None else data.classes)


def _check_same(entry: RunReport, model: nn.Module) -> None:
    """Raise a ValueError if the evaluation says that it is of another network."""
    assert entry.result is not None
    metadata = entry.result.metadata
    if metadata.get("fingerprint") and (other := other_network(metadata, model_fingerprint(model))):
        raise ValueError(
            f"{entry.file} is not an evaluation of the network that is given: {other}. A network that was evaluated "
            "with --normalize needs it here too"
        )


def _without_network(entry: RunReport, kept: "_Images | None", data: Dataset | None) -> RunReport:
    """What the evaluation kept: images and how often they were right, but not what they were taken for."""
    named = None if entry.result is None else entry.result.metadata.get("about", {}).get("model")
    words = ["gsem", "report", entry.file, "--model", bare(named) if named else "package.module:function"]
    missing = f"The network is needed for it: {shlex.join(words)} shows it."
    if kept is None or kept.points is None:
        more = "An evaluation with --save-adv keeps what the gallery shows."
        return replace(entry, missing=f"{missing} {more}")
    assert entry.result is not None and entry.eps is not None
    clean, attacked = entry.result["clean"], _worst_of_each(entry.result)[0]
    draws = entry.result.draws_of(clean)
    right = [torch.from_numpy(correct / draws) for correct in (clean.correct, attacked)]
    found = saved_pictures(
        kept.x, kept.y, kept.points, *right, draws=draws, eps=entry.eps, how=kept.how, rows=kept.rows
    )
    return replace(entry, pictures=found, missing=missing, named=() if data is None else data.classes)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class _Images:
    """What pictures are made of."""

    x: torch.Tensor
    y: torch.Tensor
    points: torch.Tensor | None
    """Adversarial points, if they are known."""
    how: str
    """Where they come from, in words."""
    rows: np.ndarray | None
    """In the data set."""
    classes: tuple[str, ...] = ()
    """Their names, if they are known."""


def _kept(entry: RunReport) -> _Images | None:
    """Images, labels and points of the evaluation, the worst of its attacks, if it kept them."""
    result = entry.result
    if result is None or not any(s.name == "clean" for s in result.scores):
        return None
    attacks = _attacks(result)
    x, kept = result["clean"].x_adv, [s.x_adv for s in attacks if s.x_adv is not None]
    if x is None or not kept or len(kept) < len(attacks):
        return None
    _, chosen = _worst_of_each(result)
    points = np.stack(kept)[chosen, np.arange(len(chosen))]
    how = f"the points of the evaluation's attacks ({', '.join(s.name for s in attacks)}), of each image the worst"
    return _Images(torch.from_numpy(x), torch.from_numpy(result.y), torch.from_numpy(points), how, result.rows)


def _attacks(result: EvaluationResult) -> list[AttackScores]:
    # Not `worst`, which has the image as it is wherever no attack is worse: here the attacks are to be seen.
    return [s for s in result.scores if s.noise == "fresh" and s.bounded and s.name != "clean"]


def _worst_of_each(result: EvaluationResult) -> tuple[np.ndarray, np.ndarray]:
    """Per image the right draws under the worst attack, and its number."""
    attacks = _attacks(result)
    chosen = np.stack([s.selection for s in attacks]).argmin(0)
    return np.stack([s.correct for s in attacks])[chosen, np.arange(len(chosen))], chosen


def _fresh(entry: RunReport, data: Dataset | None, images: int) -> _Images:
    """Some test images: of those that were evaluated if they are known, else of the data.

    Raises:
        ValueError, OSError: they cannot be had.
    """
    result = entry.result
    about = {} if result is None else result.metadata.get("about", {})
    if data is not None:
        source = data
    elif about.get("data"):
        source = find_named(about["data"], about.get("data_path"), about.get("places", {}), entry.path)
    elif entry.metadata:
        source = find(entry.metadata, entry.path)
    else:
        raise ValueError(f"{entry.file} does not say which data it is of: give --data")
    test = source.test()
    shape = entry.metadata["data"]["shape"] if entry.metadata else list(test.x.shape[1:])
    if list(test.x.shape[1:]) != shape:
        raise ValueError(f"{source.name} has images {list(test.x.shape[1:])}, the run's were {shape}")
    rows = balanced(test.y, min(images, len(test)))
    if not entry.metadata and result is not None and result.rows is not None and result.rows.max() < len(test):
        known, y = torch.from_numpy(result.rows), torch.from_numpy(result.y)
        if torch.equal(test.y[known], y):
            rows = known[balanced(y, min(images, len(y)))]
    return _Images(to_float(test.x[rows]), test.y[rows], None, "", rows.numpy(), source.classes)
