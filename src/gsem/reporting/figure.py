"""A figure: a chart, a sentence that describes it, and its data."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from gsem.evaluation.result import Interval
from gsem.reporting.svg import marker, tag

Cell = str | int | float | None


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    sign: Markup


@dataclass(frozen=True)
class Figure:
    """A chart with all that belongs to it."""

    key: str
    """Unique on the page."""
    title: str
    caption: str
    chart: Markup
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    legend: tuple[Key, ...] = ()


def run_key(name: str, run: int, *, dashed: bool = False) -> Key:
    """The sign of a run's line in a legend."""
    line = tag("path", d="M1 7H27", class_="line dashed" if dashed else "line")
    return Key(name, _sign(tag("g", line, marker(run, 14, 7), class_=f"run s{run % 6}")))


def swatch(name: str, kind: str) -> Key:
    """A patch of a colour, by its CSS class."""
    return Key(name, _sign(tag("rect", x=6, y=1, width=16, height=12, class_=kind)))


def _sign(content: Markup) -> Markup:
    return tag("svg", content, viewBox="0 0 28 14", width=28, height=14, aria_hidden="true", class_="sign")


def percent(value: float | None) -> str:
    """`72.2%`, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}%"


def interval(found: Interval | dict | Sequence[float] | None) -> str:
    """`66.2 – 78.1`, in per cent."""
    if found is None:
        return "–"
    low, high = (found["low"], found["high"]) if isinstance(found, dict) else (found[1], found[2])
    return f"{100 * low:.1f} – {100 * high:.1f}"


def rounded(value: float | None, digits: int = 4) -> float | None:
    """For tables of data."""
    return None if value is None else round(float(value), digits)
