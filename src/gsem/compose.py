"""A report from run directories: read, with pictures where the model can be loaded, written by the file's ending."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsem.checkpoint import load_model, write_atomically
from gsem.data import balanced, to_float
from gsem.device import device_named
from gsem.gallery import pictures
from gsem.provenance import release
from gsem.recorded import find, find_named
from gsem.report import Entry, cards, html, markdown, read_runs

WRITERS: dict[str, Callable[[Sequence[Entry], str], str]] = {
    ".html": lambda entries, told: html(entries, version=told),
    ".md": lambda entries, told: markdown(entries, version=told),
    ".json": lambda entries, told: cards(entries),
}
IMAGES = 100


def report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | Sequence[str | Path],
    *,
    images: int = IMAGES,
    device: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Path]:
    """What was trained, what was measured, and whether to believe it, as a page that people read.

    Args:
        runs: run directories, or files of single evaluations; of a directory, the latest evaluation and the latest
            whole audit are shown.
        out: where to write. `.html`: one page that loads nothing; `.md`: Markdown; `.json`: a card with the field
            names of RobustBench.
        images: test images that pictures (confusion, gallery, loss surface) are computed of, where the evaluation
            kept no adversarial examples; 0 for no pictures.
        device: "cpu", "cuda", "cuda:N"; the GPU where there is one unless told.
        tell: called with a line before each step that takes time.

    Returns:
        The files written.

    Raises:
        FileNotFoundError, ValueError: no run, a damaged file, or an ending that is none of the three.
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
    if any(path.suffix == ".html" for path in paths):
        where = device_named(device)
        entries = [_pictured(entry, images, where, tell or (lambda line: None)) for entry in entries]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, WRITERS[path.suffix](entries, release()).encode())
    return paths


def _pictured(entry: Entry, images: int, device: torch.device, tell: Callable[[str], None]) -> Entry:
    """With its pictures; or with a sentence that says why there are none, and how to get them."""
    if images == 0:
        return replace(entry, missing="No pictures were asked for: they come with --images above 0.")
    if not entry.facts:
        return replace(entry, missing="Pictures need the model: they are made of run directories of gsem train.")
    again = f"With them there, {shlex.join(['gsem', 'report', entry.spec])} shows the pictures."
    try:
        model, _ = load_model(entry.path)
    except (ValueError, OSError, RuntimeError) as error:
        return replace(entry, missing=f"The run's model could not be loaded ({_line(error)}). {again}")
    tell(f"{entry.name}: pictures")
    kept = _kept(entry)
    try:
        x, y, points, how, rows = kept if kept is not None else _fresh(entry, images)
    except (ValueError, OSError) as error:
        return replace(
            entry,
            missing=f"The test images are not there ({_line(error)}), and the evaluation did not keep its own. "
            f"{shlex.join(['gsem', 'evaluate', entry.spec, '--keep-images'])} keeps them.",
        )
    eps = entry.eps
    assert eps is not None
    norm: Any = "Linf" if entry.result is None else entry.result.facts.get("norm", "Linf")
    found = pictures(
        model.to(device),
        x.to(device),
        y.to(device),
        eps=eps,
        norm=norm,
        points=None if points is None else points.to(device),
        how=how,
        rows=rows,
    )
    return replace(entry, pictures=found)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


# Images, labels, points, where the points come from in words, rows in the data set.
Images = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str, np.ndarray | None]


def _kept(entry: Entry) -> Images | None:
    """Images, labels and points of the evaluation, the worst of its attacks, if it kept them."""
    result = entry.result
    if result is None or not any(s.name == "clean" for s in result.scores):
        return None
    # Not `worst`, which has the image as it is wherever no attack is worse: here the attacks are to be seen.
    attacks = [s for s in result.scores if s.noise == "fresh" and s.bounded and s.name != "clean"]
    x, kept = result["clean"].x_adv, [s.x_adv for s in attacks if s.x_adv is not None]
    if x is None or not kept or len(kept) < len(attacks):
        return None
    chosen = np.stack([s.selection for s in attacks]).argmin(0)
    points = np.stack(kept)[chosen, np.arange(len(chosen))]
    how = f"the points of the evaluation's attacks ({', '.join(s.name for s in attacks)}), of each image the worst"
    return torch.from_numpy(x), torch.from_numpy(result.y), torch.from_numpy(points), how, result.rows


def _fresh(entry: Entry, images: int) -> Images:
    """Some test images of the run's data.

    Raises:
        ValueError, OSError: they cannot be had.
    """
    about = {} if entry.result is None else entry.result.facts.get("about", {})
    name = about.get("data") or entry.recipe["data"]
    if about.get("data"):
        source = find_named(name, about.get("data_path"), about.get("places", {}), entry.path)
    else:
        source = find(entry.facts, entry.path)
    test = source.test()
    if list(test.x.shape[1:]) != entry.facts["data"]["shape"]:
        raise ValueError(f"{name} has images {list(test.x.shape[1:])}, the run's were {entry.facts['data']['shape']}")
    rows = balanced(test.y, min(images, len(test)))
    return to_float(test.x[rows]), test.y[rows], None, "", rows.numpy()
