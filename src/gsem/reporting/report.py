"""`report`: reads runs, adds pictures where the model can be loaded, writes HTML, Markdown or a JSON card."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import nn

from gsem._env import device_named, release
from gsem._fingerprint import model_fingerprint
from gsem._io import write_atomically
from gsem.data import Dataset, balanced, load, to_float
from gsem.distributed import current
from gsem.evaluation.result import AttackScores, EvaluationResult
from gsem.nn.contract import plain_logits
from gsem.nn.load import load_model
from gsem.reporting import charts, views
from gsem.reporting.card import card
from gsem.reporting.read import RunReport, bare, other_network, read_runs
from gsem.reporting.svg import run_key
from gsem.reporting.visuals import SHOWN, Pictures, first_of_each, gallery, gallery_choice, pictures, shown_images
from gsem.training.recorded import find, find_named

ENDINGS = (".html", ".md", ".json")
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
    """Write a report of runs: training, accuracies, the audit's verdict, pictures and cost.

    Args:
        runs: run directories, or files of single evaluations. A directory is reported with its latest evaluation and
            the latest audit that made all checks.
        out: the files to write. `.html`: one self-contained page; `.md`: Markdown; `.json`: a card with the field
            names of RobustBench.
        model: a network that gsem did not train, whose evaluation (an `.npz`) is among `runs`: images in [0, 1] →
            logits, in eval mode. Without it, the gallery shows the adversarial examples that the evaluation saved.
        data: the data set whose test images are shown where the evaluation saved none: a name, an image folder, an
            `.npz` file, or a `gsem.data.Dataset`. Default: the data set of the evaluation or the run.
        data_path: directory of the named data sets.
        images: number of test images for the pictures (confusion, gallery, loss surface) where the evaluation saved
            no adversarial examples; 0 for no pictures.
        device: "cpu", "cuda", "cuda:N". Default: the GPU where there is one.
        on_progress: called with a line of text before each step that takes time.

    Returns:
        The files written. Of several processes, the first one writes them, while the others wait.

    Raises:
        FileNotFoundError, ValueError: no run, a damaged file, an unknown ending, or a `model` that is not the
            evaluated one.
    """
    written = partial(_written, runs, out, model, data, data_path, images, device, on_progress)
    return current().from_first(written)


def _written(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | Sequence[str | Path],
    model: nn.Module | None,
    data: str | Dataset | None,
    data_path: str | None,
    images: int,
    device: str | None,
    on_progress: Callable[[str], None] | None,
) -> list[Path]:
    paths = [Path(p) for p in ([out] if isinstance(out, (str, Path)) else out)]
    for path in paths:
        if path.suffix not in ENDINGS:
            raise ValueError(f"{path}: the name of a report must end in one of {', '.join(ENDINGS)}")
        if path.is_dir():
            raise ValueError(f"{path} is a directory: name a file in it, like {path / 'report.html'}")
    if images < 0:
        raise ValueError(f"images must be at least 0, not {images}")
    entries = read_runs([runs] if isinstance(runs, (str, Path)) else list(runs))
    foreign = sum(not entry.metadata for entry in entries)
    if model is not None and foreign != 1:
        raise ValueError(
            f"model is for one evaluation of a network that gsem did not train, but {foreign} of the {len(entries)} "
            "runs are such evaluations; run directories hold their own model"
        )
    if any(path.suffix == ".html" for path in paths):
        where, on_progress = device_named(device), on_progress or (lambda line: None)
        source = load(data, data_path) if isinstance(data, str) else data
        entries = [
            _with_pictures(e, None if e.metadata else model, source, images, where, on_progress) for e in entries
        ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write = {".html": html, ".md": markdown, ".json": cards}[path.suffix]
        write_atomically(path, write(entries).encode())
    return paths


# --- the three forms -----------------------------------------------------------------------------------------------


def html(entries: Sequence[RunReport]) -> str:
    """The page. It loads nothing, and everything that comes from files is escaped."""
    environment = _environment(autoescape=True)
    style, script = (Markup(environment.loader.get_source(environment, name)[0]) for name in ("page.css", "page.js"))  # type: ignore[union-attr]
    return environment.get_template("page.html.j2").render(_context(entries) | {"style": style, "script": script})


def markdown(entries: Sequence[RunReport]) -> str:
    """The verdict, the tables, the checks and the cost; the sweeps and training curves as tables."""
    environment = _environment(autoescape=False)
    environment.filters |= {"plain": plain, "code": code, "check_row": _check_row}
    return environment.get_template("page.md.j2").render(_context(entries))


def cards(entries: Sequence[RunReport]) -> str:
    """One card, or a list of them for several runs, as JSON."""
    found = [card(entry) for entry in entries]
    return json.dumps(found[0] if len(found) == 1 else found, indent=2) + "\n"


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("gsem.reporting"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quoted"] = shlex.quote
    return environment


def plain(value: object) -> str:
    """Text without any meaning in Markdown or HTML, since names may hold anything. Code stays code."""
    if isinstance(value, Markup):
        return str(value).replace("|", "\\|")
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_|[]":
        text = text.replace(sign, "\\" + sign)
    return text


def code(text: str) -> Markup:
    """A command as Markdown code."""
    return Markup("`" + text.replace("`", "'") + "`")


def _check_row(view: views.CheckView) -> tuple[str, ...]:
    check = view.check
    return (
        check.name,
        view.figure,
        check.threshold,
        check.outcome_in_words,
        view.reason,
        check.advice,
        code(view.command),
    )


def _context(entries: Sequence[RunReport]) -> dict[str, Any]:
    """What the templates show."""
    return {
        "signs": views.SIGNS,
        "title": "Report: " + ", ".join(e.name for e in entries),
        "version": release(),
        "runs": [_run_context(entry, number) for number, entry in enumerate(entries)],
        "accuracy": charts.accuracy_figure(entries),
        "certified": charts.certified_figure(entries),
        "outcomes": views.outcomes(entries),
        "training": charts.training(entries),
        "sweeps": charts.sweeps(entries),
        "trained": views.trained(entries),
        "other_fields": views.other_fields(entries),
        "costs": views.costs(entries),
    }


def _run_context(entry: RunReport, number: int) -> dict[str, Any]:
    figures = [charts.class_figure(entry, number), charts.confusion_figure(entry, number)]
    p = entry.pictures
    return {
        "key": run_key(entry.name, number),
        "entry": entry,
        "verdict": views.verdict(entry),
        "accuracies": views.accuracies(entry),
        "as_published": views.as_published(entry),
        "certified": views.certified(entry),
        "certification": views.certification(entry),
        "unbounded": views.unbounded(entry),
        "evaluated": views.evaluated(entry),
        "classes": [figure for figure in figures if figure is not None],
        "gallery": [] if p is None else gallery(p, entry.class_name),
        "choice": "" if p is None else gallery_choice(p),
        "surfaces": charts.surface_figures(entry, number),
    }


# --- pictures ------------------------------------------------------------------------------------------------------


def _with_pictures(
    entry: RunReport,
    own: nn.Module | None,
    data: Dataset | None,
    images: int,
    device: torch.device,
    on_progress: Callable[[str], None],
) -> RunReport:
    """With its pictures, or with a sentence on which are missing, why, and how to get them.

    Args:
        own: the evaluated network, if the caller passed it; None for a run.
        data: the data set, if the caller passed one.
    """
    if images == 0:
        return replace(entry, missing="Pictures were switched off by --images 0.")
    saved = _saved(entry)
    if own is None and not entry.metadata:
        return _without_network(entry, saved, data)
    try:
        model = own if own is not None else load_model(entry.path)[0]
    except (ValueError, OSError, RuntimeError) as error:
        again = f"Where it can be loaded, {shlex.join(['gsem', 'report', entry.spec])} shows the pictures."
        return replace(entry, missing=f"The run's model could not be loaded ({_line(error)}). {again}")
    on_progress(f"{entry.name}: pictures")
    try:
        shown = saved if saved is not None else _fresh(entry, data, images)
    except (ValueError, OSError) as error:
        return replace(
            entry,
            missing=f"The test images were not found ({_line(error)}), and the evaluation did not save its own. "
            f"{shlex.join(['gsem', 'evaluate', entry.spec, '--save-adv'])} saves them.",
        )
    model, x, y = model.to(device), shown.x.to(device), shown.y.to(device)
    evaluated = None if entry.result is None else entry.result.metadata
    if own is not None and evaluated is not None and evaluated.get("fingerprint"):
        other = other_network(evaluated, model_fingerprint(plain_logits(model, x, y)))
        if other is not None:
            raise ValueError(
                f"{entry.file} is not an evaluation of the given network: {other}. A network that was evaluated with "
                "--normalize needs it here too"
            )
    eps = entry.eps
    assert eps is not None
    norm: Any = (evaluated or {}).get("norm", "Linf")
    points = None if shown.points is None else shown.points.to(device)
    found = pictures(model, x, y, eps=eps, norm=norm, points=points, origin=shown.origin, rows=shown.rows)
    return replace(entry, pictures=found, named=shown.classes if data is None else data.classes)


def _without_network(entry: RunReport, saved: "_Images | None", data: Dataset | None) -> RunReport:
    """With the saved images and how often they were right; their predictions are not known."""
    named = entry.evaluated.get("model")
    words = ["gsem", "report", entry.file, "--model", bare(named) if named else "package.module:function"]
    missing = f"This needs the network: {shlex.join(words)} shows it."
    if saved is None or saved.points is None:
        more = "An evaluation with --save-adv saves the images of the gallery."
        return replace(entry, missing=f"{missing} {more}")
    assert entry.result is not None and entry.eps is not None
    clean, attacked = entry.result["clean"], _worst_of_each(entry.result)[0]
    draws = entry.result.draws_of(clean)
    right = [torch.from_numpy(correct / draws) for correct in (clean.correct, attacked)]
    chosen = first_of_each(saved.y, SHOWN, right=right[0] > 0.5)
    shown = shown_images(saved.x, saved.points, saved.y, chosen, saved.rows, right, None)
    found = Pictures(saved.origin, len(saved.x), draws, entry.eps, shown)
    return replace(entry, pictures=found, missing=missing, named=() if data is None else data.classes)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class _Images:
    """The images from which pictures are made."""

    x: torch.Tensor
    y: torch.Tensor
    points: torch.Tensor | None
    """Adversarial points, where they are known."""
    origin: str
    """Where the points come from, in words."""
    rows: np.ndarray | None
    """Rows in the data set."""
    classes: tuple[str, ...] = ()
    """Names of the classes, where they are known."""


def _saved(entry: RunReport) -> _Images | None:
    """Images, labels and worst points of the evaluation; None where it did not save them."""
    result = entry.result
    if result is None or not any(s.name == "clean" for s in result.scores):
        return None
    attacks = _attacks(result)
    x, saved = result["clean"].x_adv, [s.x_adv for s in attacks if s.x_adv is not None]
    if x is None or not saved or len(saved) < len(attacks):
        return None
    _, chosen = _worst_of_each(result)
    points = np.stack(saved)[chosen, np.arange(len(chosen))]
    origin = f"each image's worst point of the evaluation's attacks ({', '.join(s.name for s in attacks)})"
    return _Images(torch.from_numpy(x), torch.from_numpy(result.y), torch.from_numpy(points), origin, result.rows)


def _attacks(result: EvaluationResult) -> list[AttackScores]:
    # (`result["worst"]` holds the clean image where no attack is worse.)
    return [s for s in result.scores if s.noise == "fresh" and s.bounded and s.name != "clean"]


def _worst_of_each(result: EvaluationResult) -> tuple[np.ndarray, np.ndarray]:
    """Per image: the number of right draws under the worst attack, and the number of that attack."""
    attacks = _attacks(result)
    chosen = np.stack([s.selection for s in attacks]).argmin(0)
    return np.stack([s.correct for s in attacks])[chosen, np.arange(len(chosen))], chosen


def _fresh(entry: RunReport, data: Dataset | None, images: int) -> _Images:
    """Some test images: evaluated ones where they are known, else any of the data set.

    Raises:
        ValueError, OSError: the data set is not known or cannot be read.
    """
    result, about = entry.result, entry.evaluated
    if data is not None:
        source = data
    elif about.get("data"):
        source = find_named(about["data"], about.get("data_path"), about.get("places", {}), entry.path)
    elif entry.metadata:
        source = find(entry.metadata, entry.path)
    else:
        raise ValueError(f"{entry.file} does not record its data: give --data")
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
