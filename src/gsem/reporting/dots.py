"""All accuracies of all runs in one chart: a mark with its interval for each attack."""

from collections.abc import Sequence

from gsem.evaluation.result import Interval
from gsem.reporting.classes import shortened
from gsem.reporting.figure import Figure, percent, rounded, run_key
from gsem.reporting.svg import drawing, marker, tag
from gsem.reporting.views import RunReport

WIDTH, GAP, BAND = 360, 12, 12
LETTER, LETTERS = 6.9, 21  # width of a letter of 12 px, and how many are shown


def accuracy_figure(entries: Sequence[RunReport]) -> Figure | None:
    """Expected accuracy under each attack within eps, the worst last; None without an evaluation."""
    found = [(run, e, _expected(e)) for run, e in enumerate(entries) if e.summary is not None]
    names = list(dict.fromkeys(name for _, _, values in found for name in values if name != "worst"))
    if not names:
        return None
    names += ["worst"] if any("worst" in values for _, _, values in found) else []
    labels = {name: shortened(name, LETTERS) for name in names}
    left = 12 + LETTER * max(map(len, labels.values()))
    bars = WIDTH - 26 - left
    grid, parts, y = [], [], 4.0
    for name in names:
        here = [(run, values[name]) for run, _, values in found if name in values]
        height = BAND * len(here) + GAP
        parts.append(tag("text", labels[name], x=left - 8, y=y + height / 2 + 4, text_anchor="end"))
        for turn, (run, one) in enumerate(here):
            at = y + GAP / 2 + BAND * (turn + 0.5)
            low, high = left + bars * one.low, left + bars * one.high
            whisker = tag("path", d=f"M{low:.1f} {at:g}H{high:.1f}", class_="whisker wide")
            parts.append(tag("g", whisker, marker(run, left + bars * one.mean, at, 4), class_=f"run s{run % 6}"))
        y += height
        grid.append(tag("line", x1=4, x2=left + bars, y1=y, y2=y, class_="grid"))
    for share in (0, 25, 50, 75, 100):
        x = left + bars * share / 100
        grid.append(tag("line", x1=x, x2=x, y1=2, y2=y, class_="grid"))
        parts.append(tag("text", f"{share}%", x=x, y=y + 15, text_anchor="middle"))
    title = "Expected accuracy under each attack"
    says = "; ".join(
        f"{e.name}: " + ", ".join(f"{name} {percent(one.mean)}" for name, one in values.items())
        for _, e, values in found
    )
    rows = tuple((e.name, name, *(rounded(v) for v in one)) for _, e, values in found for name, one in values.items())
    keys = tuple(run_key(e.name, run) for run, e, _ in found)
    chart = drawing("accuracy", title, f"{says}.", *grid, *parts, width=WIDTH, height=y + 20)
    header = ("run", "attack", "expected", "low", "high")
    return Figure("accuracy", title, "With 95% bootstrap intervals over images.", chart, header, rows, keys)


def _expected(entry: RunReport) -> dict[str, Interval]:
    assert entry.summary is not None
    rows = [r for r in entry.summary["attacks"] if r["bounded"] and r["noise"] == "fresh"]
    found = {r["attack"]: Interval(r["mean"], r["low"], r["high"]) for r in rows}
    if len(rows) > 1:
        found["worst"] = Interval(**entry.summary["worst"]["worst"]["expected"])
    return found
