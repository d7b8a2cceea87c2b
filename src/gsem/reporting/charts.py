"""Curves of several runs in one chart: training, and accuracy against eps, steps and draws."""

from collections.abc import Sequence
from typing import Any

from gsem._text import pixels
from gsem.reporting.figure import Cell, Figure, percent, rounded, run_key
from gsem.reporting.svg import Line, Point, doubling, linear, lines, share
from gsem.reporting.views import RunReport

SWEEPS = {
    "eps": ("Accuracy against eps", "radius eps, doubling"),
    "steps": ("Accuracy against attack steps", "steps of the attack"),
    "eot": ("Accuracy against draws", "draws per gradient (EOT)"),
    "restarts": ("Accuracy against restarts", "random starts"),
}


def training(entries: Sequence[RunReport]) -> list[Figure]:
    """Validation accuracies and the loss over epochs, of the runs that have metrics."""
    told = [(run, e) for run, e in enumerate(entries) if e.metrics]
    figures = []
    series: list[Line] = []
    keys, rows = [], []
    for run, e in told:
        for field, name, dashed in (("robust", "under PGD-10", False), ("clean", "clean", True)):
            points = tuple(Point(m["epoch"], m[field]) for m in e.metrics if m.get(field) is not None)
            if points:
                series.append(Line(name, points, run, dashed))
                keys.append(run_key(_of(entries, e, name), run, dashed=dashed))
        rows += [(e.name, m["epoch"], rounded(m.get("robust")), rounded(m.get("clean"))) for m in e.metrics]
    if series:
        ends = "; ".join(f"{_of(entries, e, 'last epoch')}: {_last(e)}" for _, e in told)
        title = "Validation accuracy while training"
        chart = lines("training", title, f"{ends}.", series, _epochs(told), share())
        caption = "On held-out training images. The weights of the most robust epoch are the model."
        header = ("run", "epoch", "robust", "clean")
        figures.append(Figure("training", title, caption, chart, header, tuple(rows), tuple(keys)))
    return figures + _loss(entries, told)


def _loss(entries: Sequence[RunReport], told: list[tuple[int, RunReport]]) -> list[Figure]:
    series, keys, rows = [], [], []
    for run, e in told:
        points = tuple(Point(m["epoch"], m["loss"]) for m in e.metrics if m.get("loss") is not None)
        if points:
            series.append(Line("loss", points, run))
            keys.append(run_key(_of(entries, e, "loss"), run))
            rows += [(e.name, p.x, rounded(p.y)) for p in points]
    if not series:
        return []
    highest = max(p.y for line in series for p in line.points)
    lowest = min(0.0, *(p.y for line in series for p in line.points))
    ends = "; ".join(f"{key.name} {line.points[-1].y:.3f}" for key, line in zip(keys, series, strict=True))
    title = "Training loss"
    up = linear("loss", lowest, highest * 1.05)
    chart = lines("loss", title, f"After the last epoch: {ends}.", series, _epochs(told), up)
    caption = "Mean over each epoch, of the recipe's own objective: of different objectives it is not comparable."
    return [Figure("loss", title, caption, chart, ("run", "epoch", "loss"), tuple(rows), tuple(keys))]


def _epochs(told: list[tuple[int, RunReport]]) -> Any:
    epochs = [m["epoch"] for _, e in told for m in e.metrics]
    return linear("epoch", min(epochs) if len(set(epochs)) > 1 else min(epochs) - 1, max(epochs))


def _last(entry: RunReport) -> str:
    last = entry.metrics[-1]
    return f"robust {percent(last.get('robust'))}, clean {percent(last.get('clean'))}"


def _of(entries: Sequence[RunReport], entry: RunReport, what: str) -> str:
    return what if len(entries) == 1 else f"{entry.name}, {what}"


def swept(entry: RunReport, key: str) -> list[dict[str, float]]:
    """What the audit measured against `key` (eps, steps, eot): rows with key, accuracy and perhaps low and high."""
    rows: list[dict[str, float]] = []
    for check in () if entry.audit is None else entry.audit.checks:
        found = (check.details or {}).get(key)
        if isinstance(found, list):
            rows += [r for r in found if isinstance(r, dict) and _number(r.get(key)) and _number(r.get("accuracy"))]
    return sorted({r[key]: r for r in rows}.values(), key=lambda r: r[key])


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sweeps(entries: Sequence[RunReport]) -> list[Figure]:
    """A chart for each of eps, steps and draws that an audit has swept."""
    return [figure for key in SWEEPS if (figure := _sweep(entries, key)) is not None]


def _sweep(entries: Sequence[RunReport], key: str) -> Figure | None:
    series, keys, data = [], [], []
    for run, e in enumerate(entries):
        rows = swept(e, key)
        if rows:
            points = tuple(Point(r[key], r["accuracy"], r.get("low"), r.get("high")) for r in rows)
            series.append(Line(e.name, points, run))
            keys.append(run_key(e.name, run))
            data += [(e.name, *(rounded(r.get(k), 6) for k in (key, "accuracy", "low", "high"))) for r in rows]
    if not series:
        return None
    title, name = SWEEPS[key]
    told = _radius if key == "eps" else _plain
    across = doubling(name, [p.x for line in series for p in line.points], told)
    says = "; ".join(
        f"{line.name}: " + ", ".join(f"{percent(p.y)} at {told(p.x)}" for p in line.points) for line in series
    )
    chance_level = _chance(entries) if key == "eps" else None
    level = None if chance_level is None else (chance_level, f"chance {percent(chance_level)}")
    chart = lines(f"sweep-{key}", title, f"{says}.", series, across, share(), level=level)
    caption = {
        "eps": "It must fall to chance: an attack that may do anything, but does not break the network, is at fault.",
        "steps": "Where more steps still lower it, the attack had too few.",
        "eot": "Where more draws still lower it, the attack averaged over too few.",
        "restarts": "Where more random starts still lower it, the attack had too few.",
    }[key]
    if key != "eps":
        caption += " The last point adds the leading attack with twice as many."
    header: tuple[str, ...] = ("run", key, "accuracy", "low", "high")
    rows_: tuple[tuple[Cell, ...], ...] = tuple(data)
    return Figure(f"sweep-{key}", title, f"{caption} 95% intervals over images.", chart, header, rows_, tuple(keys))


def _plain(value: float) -> str:
    return f"{value:g}"


def _radius(value: float) -> str:
    """0.15 and 1 as they are, 0.0313725… as 8/255."""
    plain = f"{value:g}"
    return plain if len(plain) <= 5 else pixels(value)


def _chance(entries: Sequence[RunReport]) -> float | None:
    """One over the number of classes, where all runs have as many."""
    counts = {len(e.classes) for e in entries if swept(e, "eps")}
    known = {c["chance"] for e in entries for c in _details(e) if _number(c.get("chance"))}
    if len(known) == 1:
        return float(known.pop())
    return 1 / counts.pop() if len(counts) == 1 and 0 not in counts else None


def _details(entry: RunReport) -> list[dict[str, Any]]:
    return [] if entry.audit is None else [c.details for c in entry.audit.checks if c.details]
