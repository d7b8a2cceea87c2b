"""The charts of a report: accuracies, sweeps, training curves, classes, confusion and loss surfaces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from gsem._text import pixels
from gsem.evaluation.result import EvaluationResult
from gsem.evaluation.statistics import Interval, wilson_interval
from gsem.reporting import svg
from gsem.reporting.read import RunReport
from gsem.reporting.views import Table, percent
from gsem.reporting.visuals import Pictures, Surface, image_number, png

CURVE = 60  # intervals of the curve of certified accuracy
MANY = 20  # classes; of more, only the extremes are drawn
# Title and name of the axis of each sweep.
SWEEPS = {
    "eps": ("Accuracy against eps", "radius eps, doubling"),
    "steps": ("Accuracy against attack steps", "attack steps"),
    "eot": ("Accuracy against draws", "draws per gradient (EOT)"),
    "restarts": ("Accuracy against restarts", "random starts"),
}


@dataclass(frozen=True)
class Figure:
    """A chart with its caption, its legend and its data."""

    key: str
    """Unique on the page."""
    title: str
    description: str
    """Text alternative."""
    caption: str
    drawing: svg.Drawing
    data: Table
    legend: tuple[svg.Key, ...] = ()

    @property
    def chart(self) -> Markup:
        return svg.image(self.drawing, self.key, self.title, self.description)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """For tables of data; whole numbers stay as they are."""
    return value if value is None or isinstance(value, int) else round(float(value), digits)


def _of(entries: Sequence[RunReport], entry: RunReport, what: str) -> str:
    return what if len(entries) == 1 else f"{entry.name}, {what}"


# --- accuracies of all runs ----------------------------------------------------------------------------------------


def accuracy_figure(entries: Sequence[RunReport]) -> Figure | None:
    """Expected accuracy under each attack within eps, the worst case last; None without an evaluation."""
    found = [(run, e, _expected(e)) for run, e in enumerate(entries) if e.summary is not None]
    names = list(dict.fromkeys(name for _, _, values in found for name in values))
    if not names:
        return None
    names.sort(key=lambda name: name == "worst case")
    groups = [(name, [svg.Bar(*values[name], run=run) for run, _, values in found if name in values]) for name in names]
    description = "; ".join(
        f"{e.name}: " + ", ".join(f"{name} {percent(one.mean)}" for name, one in values.items())
        for _, e, values in found
    )
    rows = tuple((e.name, name, *map(rounded, one)) for _, e, values in found for name, one in values.items())
    return Figure(
        "accuracy",
        "Expected accuracy under each attack",
        f"{description}.",
        "With 95% bootstrap intervals over images.",
        svg.bars(groups),
        Table(("run", "attack", "expected", "low", "high"), rows),
        tuple(svg.run_key(e.name, run) for run, e, _ in found),
    )


def _expected(entry: RunReport) -> dict[str, Interval]:
    assert entry.summary is not None
    rows = [r for r in entry.summary["attacks"] if r["bounded"] and r["noise"] == "fresh"]
    found = {r["attack"]: Interval(r["mean"], r["low"], r["high"]) for r in rows}
    if len(rows) > 1:
        found["worst case"] = Interval(**entry.summary["worst"]["worst"]["expected"])
    return found


def certified_figure(entries: Sequence[RunReport]) -> Figure | None:
    """Certified accuracy against the radius; None without a certification."""
    found = [(run, e, e.certification) for run, e in enumerate(entries) if e.certification is not None]
    if not found:
        return None
    largest = max(c.largest_radius for _, _, c in found)
    series, rows = [], []
    for run, e, c in found:
        radii = [largest * i / CURVE for i in range(CURVE + 1)]
        series.append(svg.Line(tuple(svg.Point(r, c.accuracy(r).mean) for r in radii), run))
        rows += [(e.name, *map(rounded, (radius, *accuracy))) for radius, accuracy in c.table()]
    description = "; ".join(
        f"{e.name}: " + ", ".join(f"{percent(a.mean)} at {radius:g}" for radius, a in c.table()) for _, e, c in found
    )
    return Figure(
        "certified",
        "Certified accuracy against the L2 radius",
        f"{description}.",
        "Of the smoothed classifier: the share of images that are right and stay so within the radius.",
        svg.lines(series, svg.linear("L2 radius", 0.0, largest), svg.share()),
        Table(("run", "radius", "certified", "low", "high"), tuple(rows)),
        tuple(svg.run_key(_of(entries, e, f"sigma {c.metadata['sigma']:g}"), run) for run, e, c in found),
    )


# --- training curves -----------------------------------------------------------------------------------------------


def training(entries: Sequence[RunReport]) -> list[Figure]:
    """Validation accuracies and the loss over epochs, of the runs that have metrics."""
    losses = [m["loss"] for e in entries for m in e.metrics if m.get("loss") is not None]
    figures = [
        _curves(
            entries,
            "training",
            "Validation accuracy while training",
            "On held-out training images. The model has the weights of the epoch with the highest robust accuracy.",
            {"robust": "under PGD-10", "clean": "clean"},
            percent,
            svg.share(),
        ),
        _curves(
            entries,
            "loss",
            "Training loss",
            "Mean over each epoch of the recipe's own objective. Different objectives are not comparable.",
            {"loss": "loss"},
            lambda loss: "–" if loss is None else f"{loss:.3f}",
            svg.linear("loss", min([0.0, *losses]), 1.05 * max([0.0, *losses])),
        ),
    ]
    return [figure for figure in figures if figure is not None]


def _curves(
    entries: Sequence[RunReport],
    key: str,
    title: str,
    caption: str,
    fields: dict[str, str],
    text: Callable[[float | None], str],
    up: svg.Axis,
) -> Figure | None:
    """Fields of the metrics over epochs, the second field dashed; None where no run has them."""
    series, legend, rows, last = [], [], [], []
    epochs: list[int] = []
    for run, e in enumerate(entries):
        metrics = [m for m in e.metrics if any(m.get(field) is not None for field in fields)]
        for number, (field, name) in enumerate(fields.items()):
            points = tuple(svg.Point(m["epoch"], m[field]) for m in metrics if m.get(field) is not None)
            if points:
                series.append(svg.Line(points, run, dashed=number > 0))
                legend.append(svg.run_key(_of(entries, e, name), run, dashed=number > 0))
        if metrics:
            epochs += [m["epoch"] for m in metrics]
            rows += [(e.name, m["epoch"], *(rounded(m.get(field)) for field in fields)) for m in metrics]
            values = ", ".join(f"{field} {text(metrics[-1].get(field))}" for field in fields)
            last.append(f"{_of(entries, e, 'last epoch')}: {values}")
    if not series:
        return None
    first, last_epoch = min(epochs) - (len(set(epochs)) == 1), max(epochs)
    across = svg.linear("epoch", first, last_epoch, count=min(5, last_epoch - first))
    data = Table(("run", "epoch", *fields), tuple(rows))
    return Figure(key, title, f"{'; '.join(last)}.", caption, svg.lines(series, across, up), data, tuple(legend))


# --- sweeps of the audit -------------------------------------------------------------------------------------------


def sweeps(entries: Sequence[RunReport]) -> list[Figure]:
    """A chart for each of eps, steps, draws and restarts that an audit has swept."""
    return [figure for key in SWEEPS if (figure := _sweep(entries, key)) is not None]


def swept(entry: RunReport, key: str) -> list[dict[str, float]]:
    """What the audit measured against `key` (eps, steps, eot): rows with key, accuracy and perhaps low and high."""
    rows: list[dict[str, float]] = []
    for details in _details(entry):
        found = details.get(key)
        if isinstance(found, list):
            rows += [r for r in found if isinstance(r, dict) and _number(r.get(key)) and _number(r.get("accuracy"))]
    return sorted({r[key]: r for r in rows}.values(), key=lambda r: r[key])


def _details(entry: RunReport) -> list[dict[str, Any]]:
    return [] if entry.audit is None else [c.details for c in entry.audit.checks if c.details]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sweep(entries: Sequence[RunReport], key: str) -> Figure | None:
    found = [(run, e, rows) for run, e in enumerate(entries) if (rows := swept(e, key))]
    if not found:
        return None
    title, name = SWEEPS[key]
    text = _radius if key == "eps" else "{:g}".format
    series = [
        svg.Line(tuple(svg.Point(r[key], r["accuracy"], r.get("low"), r.get("high")) for r in rows), run)
        for run, _, rows in found
    ]
    across = svg.doubling(name, [r[key] for _, _, rows in found for r in rows], text)
    description = "; ".join(
        f"{e.name}: " + ", ".join(f"{percent(r['accuracy'])} at {text(r[key])}" for r in rows) for _, e, rows in found
    )
    chance = _chance_level([e for _, e, _ in found]) if key == "eps" else None
    level = None if chance is None else (chance, f"chance {percent(chance)}")
    if key == "eps":
        caption = "It must fall to chance: otherwise the attack fails even where every change is allowed."
    else:
        caption = f"If it still falls, the attack had too few {name}."
        caption += " The last point adds the primary attack with twice as many."
    columns = (key, "accuracy", "low", "high")
    data = tuple((e.name, *(rounded(r.get(k), 6) for k in columns)) for _, e, rows in found for r in rows)
    return Figure(
        f"sweep-{key}",
        title,
        f"{description}.",
        f"{caption} 95% intervals over images.",
        svg.lines(series, across, svg.share(), level),
        Table(("run", *columns), data),
        tuple(svg.run_key(e.name, run) for run, e, _ in found),
    )


def _radius(value: float) -> str:
    """0.15 and 1 as they are, 0.0313725… as 8/255."""
    plain = f"{value:g}"
    return plain if len(plain) <= 5 else pixels(value)


def _chance_level(entries: Sequence[RunReport]) -> float | None:
    """The level that the audits name, else one over the number of classes; None where the runs differ in it."""
    known = {c["chance"] for e in entries for c in _details(e) if _number(c.get("chance"))}
    counts = {len(e.classes) for e in entries}
    if len(known) == 1:
        return float(known.pop())
    return 1 / counts.pop() if len(counts) == 1 and 0 not in counts else None


# --- classes -------------------------------------------------------------------------------------------------------


def per_class(result: EvaluationResult, name: str) -> dict[int, tuple[Interval, int]]:
    """For each label that occurs: expected accuracy under an attack, and the number of its images."""
    scores = result[name]
    right = scores.correct / result.draws_of(scores)
    groups = {int(label): right[result.y == label] for label in np.unique(result.y)}
    return {
        label: (wilson_interval(float(values.mean()), len(values)), len(values)) for label, values in groups.items()
    }


def class_figure(entry: RunReport, number: int) -> Figure | None:
    """Bars of each class's worst-case accuracy, with a mark at the clean accuracy."""
    result = entry.result
    if result is None or not any(s.noise == "fresh" and s.bounded for s in result.scores):
        return None
    worst = per_class(result, "worst")
    has_clean = any(s.name == "clean" for s in result.scores)
    clean = {label: one.mean for label, (one, _) in per_class(result, "clean").items()} if has_clean else {}
    order = sorted(worst, key=lambda label: worst[label][0].mean)
    shown = sorted(worst) if len(worst) <= MANY else [*order[: MANY // 2], *order[-MANY // 2 :]]
    low, high = (f"{entry.class_name(label)} with {percent(worst[label][0].mean)}" for label in (order[0], order[-1]))
    groups = [
        (entry.class_name(k), [svg.Bar(*worst[k][0], reference=clean.get(k), text=percent(worst[k][0].mean))])
        for k in shown
    ]
    caption = "Expected accuracy in each image's worst case, with the 95% Wilson interval over the class's images."
    if len(worst) > MANY:
        caption += f" The {MANY // 2} lowest and the {MANY // 2} highest of {len(worst)} classes."
    rows = tuple((entry.class_name(k), n, *map(rounded, one), rounded(clean.get(k))) for k, (one, n) in worst.items())
    return Figure(
        f"classes-{number}",
        "Accuracy of each class",
        f"Worst case over the attacks: lowest {low}, highest {high}.",
        caption,
        svg.bars(groups),
        Table(("class", "images", "worst", "low", "high", "clean"), rows),
        (svg.swatch("worst case", "bar"), *([svg.reference_key("clean")] if clean else [])),
    )


def confusion_figure(entry: RunReport, number: int) -> Figure | None:
    """What each class is taken for under attack: a matrix, or for many classes the most frequent errors."""
    p = entry.pictures
    if p is None or p.confusion is None or not p.images:
        return None
    counts, names = p.confusion, [entry.class_name(label) for label in range(len(p.confusion))]
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    pairs = [(int(i), int(j)) for i, j in np.argwhere(counts > 0)]
    errors = sorted(((counts[i, j], i, j) for i, j in pairs if i != j), reverse=True)
    frequent = "; ".join(f"{names[i]} is taken for {names[j]} in {percent(shares[i, j])}" for _, i, j in errors[:3])
    description = f"Most frequent errors: {frequent}." if errors else "There are no errors."
    if len(names) > MANY:
        caption = "Images for each of the most frequent errors"
        labels = [f"{svg.shortened(names[i], 9)} → {svg.shortened(names[j], 9)}" for _, i, j in errors[:MANY]]
        counted = [svg.Bar(n / errors[0][0], text=f"{n:.1f}") for n, _, _ in errors[:MANY]]
        drawing = svg.bars([(label, [bar]) for label, bar in zip(labels, counted, strict=True)], axis=False)
    else:
        caption, drawing = "Share of predictions in per cent by label", _matrix(names, shares)
    caption += f"; {p.images} images{f', {p.draws} draws each' if p.draws > 1 else ''}; {p.origin}."
    rows = tuple((names[i], names[j], rounded(counts[i, j]), rounded(shares[i, j])) for i, j in pairs)
    data = Table(("label", "prediction", "images", "share"), rows)
    return Figure(f"confusion-{number}", "Predictions under attack", description, caption, drawing, data)


def _matrix(names: list[str], shares: np.ndarray) -> svg.Drawing:
    longest = max(len(svg.shortened(name, 10)) for name in names)
    left, top, room = 18 + 6 * longest, 30 + 4.5 * longest, 276
    cell = room / len(names)
    parts = [svg.tag("text", "label ↓   prediction →", x=4, y=14, class_="name")]
    for j, name in enumerate(names):
        x, y = left + cell * (j + 0.5), top + cell * (j + 0.5) + 4
        turned = f"rotate(-50 {x:.1f} {top - 6:.1f})"
        parts.append(svg.tag("text", svg.shortened(name, 10), x=x, y=top - 6, transform=turned))
        parts.append(svg.tag("text", svg.shortened(name, 11), x=left - 5, y=y, text_anchor="end"))
    for (i, j), value in np.ndenumerate(shares):
        box = {"x": left + cell * j, "y": top + cell * i, "width": cell - 1, "height": cell - 1}
        parts.append(svg.tag("rect", **box, class_="cell"))
        if value > 0:
            kind = "cell right" if i == j else "cell wrong"
            parts.append(svg.tag("rect", **box, class_=kind, fill_opacity=0.12 + 0.88 * float(value)))
        if value >= 0.005 and cell > 18:
            tone = "number strong" if value > 0.55 else "number"
            place = {"x": box["x"] + cell / 2 - 0.5, "y": box["y"] + cell / 2 + 3.5, "text_anchor": "middle"}
            parts.append(svg.tag("text", f"{100 * value:.0f}", **place, class_=tone))
    return svg.Drawing(parts, left + room + 20, top + room + 4)


# --- loss surfaces -------------------------------------------------------------------------------------------------


def surface_figures(entry: RunReport, number: int) -> list[Figure]:
    """A map of the margin around each of a few images."""
    p = entry.pictures
    return [] if p is None else [_surface(entry, p, s, f"surface-{number}-{i}") for i, s in enumerate(p.surfaces)]


def _surface(entry: RunReport, p: Pictures, s: Surface, key: str) -> Figure:
    image = p.gallery[s.number]
    middle, end = int(np.abs(s.along).argmin()), int(np.abs(s.along - 1).argmin())
    description = (
        f"Margin on a plane through the image: {s.margin[middle, middle]:.2f} at the image, "
        f"{s.margin[middle, end]:.2f} at the adversarial point; misclassified in {percent((s.margin > 0).mean())} "
        "of the plane."
    )
    caption = (
        f"Highest other logit minus the label's, {'mean of several draws, ' if p.draws > 1 else ''}"
        f"from {s.margin.min():.1f} to {s.margin.max():.1f}. A stronger colour is farther from 0. "
        f"Axes are in units of eps = {pixels(p.eps)}; the dashed frame is the threat model."
    )
    along = [rounded(value) for value in s.along]
    rows = tuple((along[j], along[i], rounded(float(margin))) for (i, j), margin in np.ndenumerate(s.margin))
    return Figure(
        key,
        f"Around {image_number(image, s.number).lower()}: {entry.class_name(image.label)}",
        description,
        caption,
        _map(key, s),
        Table(("towards_x_adv", "across", "margin"), rows),
        (svg.swatch("still right", "cell right"), svg.swatch("misclassified", "cell wrong")),
    )


def _map(key: str, s: Surface) -> svg.Drawing:
    left, top, room = 44, 8, 200
    low, high = float(s.along[0]), float(s.along[-1])
    cell = room / len(s.along)

    def place(value: float) -> float:
        return (value - low) / (high - low) * (room - cell) + cell / 2

    # The PNGs are masks over the page's colours, so that the map follows its light and dark scheme.
    strength = 0.1 + 0.9 * np.abs(s.margin) / (float(np.abs(s.margin).max()) or 1.0)
    box = {"x": left, "y": top, "width": room, "height": room}
    parts = []
    for kind, chosen in (("right", s.margin <= 0), ("wrong", s.margin > 0)):
        mask = png(np.where(chosen, strength, 0)[None, ::-1])
        image = svg.tag("image", href=mask, **box, preserveAspectRatio="none", class_="mask")
        parts.append(svg.tag("mask", image, id=f"{key}-{kind}"))
        parts.append(svg.tag("rect", **box, class_=f"cell {kind}", mask=f"url(#{key}-{kind})"))
    parts.append(svg.tag("path", d=_boundary(s.margin > 0, left, top, cell), class_="boundary"))
    x0, x1, y0, y1 = left + place(-1), left + place(1), top + room - place(-1), top + room - place(1)
    parts.append(svg.tag("path", d=f"M{x0:.1f} {y0:.1f}H{x1:.1f}V{y1:.1f}H{x0:.1f}Z", class_="ball"))
    middle = top + room - place(0)
    for value, name in ((0.0, "x"), (1.0, "x_adv")):
        x = left + place(value)
        parts.append(svg.tag("circle", cx=x, cy=middle, r=3, class_="spot"))
        parts.append(svg.tag("text", name, x=x, y=middle - 7, text_anchor="middle", class_="spot-name"))
    for value in (-1, 0, 1):
        parts.append(svg.tag("text", f"{value}", x=left + place(value), y=top + room + 14, text_anchor="middle"))
        parts.append(svg.tag("text", f"{value}", x=left - 5, y=top + room - place(value) + 4, text_anchor="end"))
    up = top + room / 2
    axis = {"text_anchor": "middle", "class_": "name"}
    parts.append(svg.tag("text", "towards x_adv", x=left + room / 2, y=top + room + 30, **axis))
    parts.append(svg.tag("text", "across", x=12, y=up, transform=f"rotate(-90 12 {up:g})", **axis))
    return svg.Drawing(parts, left + room + 10, top + room + 36)


def _boundary(broken: np.ndarray, left: float, top: float, cell: float) -> str:
    """The edges between right and misclassified cells, which are visible without colours too."""
    count = len(broken)
    down, right = (np.argwhere(np.diff(broken, axis=axis)) for axis in (0, 1))
    vertical = [f"M{left + cell * (j + 1):.1f} {top + cell * (count - 1 - i):.1f}v{cell:.1f}" for i, j in right]
    horizontal = [f"M{left + cell * j:.1f} {top + cell * (count - 1 - i):.1f}h{cell:.1f}" for i, j in down]
    return "".join([*vertical, *horizontal])
