"""Per class: robust and clean accuracy with intervals, and the confusion matrix."""

import math

import numpy as np
from markupsafe import Markup

from gsem.evaluation.result import EvaluationResult, Interval
from gsem.reporting.figure import Figure, Key, percent, rounded, swatch
from gsem.reporting.svg import drawing, tag
from gsem.reporting.views import Pictures, RunReport

MANY = 20  # classes; of more, the extremes are shown, and the data have all
ROW, LABEL, BARS = 20, 92, 200


def wilson(share: float, n: int) -> Interval:
    """The 95% Wilson interval of a mean of `n` values in [0, 1]: never too short, also where all are 0 or 1."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def per_class(result: EvaluationResult, name: str) -> dict[int, tuple[Interval, int]]:
    """Of each label that occurs: expected accuracy under an attack, and the number of its images."""
    scores = result[name]
    right = scores.correct / result.draws_of(scores)
    found = {}
    for label in np.unique(result.y):
        mine = right[result.y == label]
        found[int(label)] = (wilson(float(mine.mean()), len(mine)), len(mine))
    return found


def class_figure(entry: RunReport, number: int) -> Figure | None:
    """Bars of each class's worst-case accuracy, with a line where the clean accuracy is."""
    result = entry.result
    if result is None or not any(s.noise == "fresh" and s.bounded for s in result.scores):
        return None
    worst = per_class(result, "worst")
    has_clean = any(s.name == "clean" for s in result.scores)
    clean = per_class(result, "clean") if has_clean else {}
    names = {label: _name(entry, label) for label in worst}
    shown = sorted(worst)
    if len(shown) > MANY:
        order = sorted(worst, key=lambda label: worst[label][0].mean)
        shown = [*order[: MANY // 2], *order[-MANY // 2 :]]
    key, title = f"classes-{number}", "Accuracy of each class"
    lowest = min(worst, key=lambda label: worst[label][0].mean)
    highest = max(worst, key=lambda label: worst[label][0].mean)
    says = (
        f"Worst case over the attacks: lowest {names[lowest]} with {percent(worst[lowest][0].mean)}, highest "
        f"{names[highest]} with {percent(worst[highest][0].mean)}."
    )
    rows = tuple(
        (names[k], n, *(rounded(v) for v in found), rounded(clean[k][0].mean) if k in clean else None)
        for k, (found, n) in worst.items()
    )
    caption = "Expected accuracy in each image's worst case, with the 95% Wilson interval over the class's images."
    if len(worst) > MANY:
        caption += f" The {MANY // 2} lowest and the {MANY // 2} highest of {len(worst)} classes."
    keys = [swatch("worst", "bar"), *([_clean_key()] if clean else [])]
    chart = _bars(key, title, says, [(names[k], worst[k][0], clean.get(k)) for k in shown])
    return Figure(key, title, caption, chart, ("class", "images", "worst", "low", "high", "clean"), rows, tuple(keys))


def _clean_key() -> Key:
    line = tag("path", d="M14 1V13", class_="clean")
    return Key("clean", tag("svg", line, viewBox="0 0 28 14", width=28, height=14, aria_hidden="true", class_="sign"))


def _name(entry: RunReport, label: int) -> str:
    return entry.classes[label] if label < len(entry.classes) else str(label)


def _bars(key: str, title: str, says: str, rows: list[tuple[str, Interval, tuple[Interval, int] | None]]) -> Markup:
    parts = []
    height = ROW * len(rows) + 24
    for percentage in (0, 50, 100):
        x = LABEL + BARS * percentage / 100
        parts.append(tag("line", x1=x, x2=x, y1=2, y2=height - 18, class_="grid"))
        parts.append(tag("text", f"{percentage}%", x=x, y=height - 4, text_anchor="middle"))
    for number, (name, found, clean) in enumerate(rows):
        y = 2 + ROW * number
        parts.append(tag("text", shortened(name, 14), x=LABEL - 6, y=y + 14, text_anchor="end"))
        parts.append(tag("rect", x=LABEL, y=y + 4, width=BARS * found.mean, height=ROW - 8, class_="bar"))
        low, high = LABEL + BARS * found.low, LABEL + BARS * found.high
        middle = y + ROW / 2
        parts.append(tag("path", d=f"M{low:.1f} {middle:g}H{high:.1f}", class_="whisker on-bar"))
        if clean is not None:
            at = LABEL + BARS * clean[0].mean
            parts.append(tag("path", d=f"M{at:.1f} {y + 2:g}v{ROW - 4:g}", class_="clean"))
        parts.append(tag("text", percent(found.mean), x=LABEL + BARS + 10, y=y + 14))
    return drawing(key, title, says, *parts, width=360, height=height)


def shortened(name: str, letters: int) -> str:
    """At most so many letters."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def confusion_figure(entry: RunReport, number: int) -> Figure | None:
    """What each class is taken for under attack: a matrix, or the most frequent errors where classes are many."""
    p = entry.pictures
    if p is None or p.confusion is None or not p.images:
        return None
    names = [_name(entry, label) for label in range(len(p.confusion))]
    totals = p.confusion.sum(1, keepdims=True)
    shares = np.divide(p.confusion, totals, out=np.zeros_like(p.confusion), where=totals > 0)
    errors = [(p.confusion[i, j], i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
    errors = sorted((e for e in errors if e[0] > 0), reverse=True)
    title = "What is taken for what, under attack"
    says = "; ".join(f"{names[i]} is answered as {names[j]} in {percent(shares[i, j])}" for _, i, j in errors[:3])
    says = f"Most frequent errors: {says}." if says else "There are no errors."
    rows = tuple(
        (names[i], names[j], rounded(p.confusion[i, j]), rounded(shares[i, j]))
        for i in range(len(names))
        for j in range(len(names))
        if p.confusion[i, j] > 0
    )
    caption = f"{_counted(p)} Share of answers in per cent, a row for each label; {p.how}."
    key = f"confusion-{number}"
    if len(names) > MANY:
        chart = _most(key, title, says, [(f"{names[i]} → {names[j]}", count) for count, i, j in errors[:MANY]])
    else:
        chart = _matrix(key, title, says, names, shares)
    return Figure(key, title, caption, chart, ("label", "answer", "images", "share"), rows)


def _counted(p: Pictures) -> str:
    return f"{p.images} images" + (f", {p.draws} draws each." if p.draws > 1 else ".")


def _matrix(key: str, title: str, says: str, names: list[str], shares: np.ndarray) -> Markup:
    longest = max(len(shortened(name, 10)) for name in names)
    left, top, room = 18 + 6 * longest, 30 + 4.5 * longest, 276
    cell = room / len(names)
    parts = [tag("text", "label ↓   answer →", x=4, y=14, class_="name")]
    for j, name in enumerate(names):
        x = left + cell * (j + 0.5)
        turned = f"rotate(-50 {x:.1f} {top - 6:.1f})"
        parts.append(tag("text", shortened(name, 10), x=x, y=top - 6, transform=turned))
        y = top + cell * (j + 0.5) + 4
        parts.append(tag("text", shortened(name, 11), x=left - 5, y=y, text_anchor="end"))
    for (i, j), value in np.ndenumerate(shares):
        x, y = left + cell * j, top + cell * i
        kind = "cell right" if i == j else "cell wrong"
        box = {"x": x, "y": y, "width": cell - 1, "height": cell - 1}
        parts.append(tag("rect", **box, class_="cell"))
        if value > 0:
            parts.append(tag("rect", **box, class_=kind, fill_opacity=0.12 + 0.88 * float(value)))
        if value >= 0.005 and cell > 18:
            number = f"{100 * value:.0f}"
            tone = "number strong" if value > 0.55 else "number"
            middle = {"x": x + cell / 2 - 0.5, "y": y + cell / 2 + 3.5}
            parts.append(tag("text", number, **middle, text_anchor="middle", class_=tone))
    return drawing(key, title, says, *parts, width=left + room + 20, height=top + room + 4)


def _most(key: str, title: str, says: str, rows: list[tuple[str, float]]) -> Markup:
    parts = []
    widest = max((count for _, count in rows), default=1.0)
    for number, (name, count) in enumerate(rows):
        y = 2 + ROW * number
        parts.append(tag("text", shortened(name, 30), x=190, y=y + 14, text_anchor="end"))
        parts.append(tag("rect", x=196, y=y + 4, width=120 * count / widest, height=ROW - 8, class_="cell wrong"))
        parts.append(tag("text", f"{count:.1f}", x=200 + 120 * count / widest, y=y + 14))
    return drawing(key, title, says, *parts, width=360, height=ROW * max(1, len(rows)) + 4)
