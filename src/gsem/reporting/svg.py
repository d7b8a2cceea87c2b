"""SVG charts without a library: lines and bars with their intervals. Colours are the page's CSS variables."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 40
LETTER, LETTERS = 6.9, 21  # width of a letter of 12 px; letters of a bar's name that are shown
BAND, GAP = 12, 8  # height of a bar, and space between two groups of bars
# The markers of the runs, in turn: their shapes differ too, for readers who see no colours and for print.
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "ring")


@dataclass(frozen=True)
class Point:
    """A value with its interval, if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """What one line of a chart shows."""

    points: tuple[Point, ...]
    run: int = 0
    """Number of the run: its colour and marker."""
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """A horizontal bar."""

    value: float
    """Its length as a share of the axis, 0 to 1."""
    low: float | None = None
    high: float | None = None
    run: int | None = None
    """Number of the run: its colour and marker. None where the chart shows a single run."""
    reference: float | None = None
    """Where a second value is marked across the bar."""
    text: str = ""
    """Written to the right of the axis."""


@dataclass(frozen=True)
class Drawing:
    """The elements of a chart, and its size."""

    parts: Sequence[Markup]
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True)
class Key:
    """A line of a legend."""

    name: str
    sign: Markup


@dataclass(frozen=True)
class Axis:
    """One direction of a chart."""

    name: str
    ticks: tuple[tuple[float, str], ...]
    """Values and their labels."""
    place: Callable[[float], float]
    """From a value to 0 … 1, the ends of the axis."""


def tag(name: str, *content: str, **attributes: object) -> Markup:
    """An element; `class_` and `stroke_width` become `class` and `stroke-width`. Everything is escaped."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{}{}>{}</{}>").format(Markup(name), pairs, Markup("").join(map(escape, content)), Markup(name))


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def image(drawing: Drawing, key: str, title: str, description: str) -> Markup:
    """A whole image with its text alternative; `key` is unique on the page."""
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *drawing.parts,
        viewBox=f"0 0 {drawing.width:g} {drawing.height:g}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
        class_="chart",
        style=f"max-width:{1.3 * drawing.width:g}px",
    )


def linear(name: str, low: float, high: float, label: Callable[[float], str] | None = None, count: int = 5) -> Axis:
    """An axis from `low` to `high` with round ticks."""
    high = high if high > low else low + 1
    step = nice(high - low, count)
    values = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(name, tuple((v, label(v) if label else f"{v:g}") for v in values), lambda v: (v - low) / (high - low))


def nice(width: float, count: int) -> float:
    """A distance of ticks of 1, 2 or 5 times a power of ten, so that about `count` fit into `width`."""
    power = 10.0 ** math.floor(math.log10(width / count))
    return next(power * m for m in (1, 2, 5, 10) if power * m * count >= width * 0.999)


def doubling(name: str, values: Sequence[float], label: Callable[[float], str]) -> Axis:
    """A logarithmic axis with the values as ticks; 0 is placed one step before the smallest other one."""
    above = sorted({v for v in values if v > 0})
    low, high = math.log2(above[0]), math.log2(above[-1])
    zero = low - max(1.0, (high - low) / 6) if min(values) <= 0 else low
    width = high - zero or 1.0

    def place(value: float) -> float:
        return ((math.log2(value) if value > 0 else zero) - zero) / width

    def clear(one: float, other: float) -> bool:
        return abs(place(one) - place(other)) > 0.02 + 0.0115 * len(label(one) + label(other))

    # Labels that would touch are left out, but not the first and the last; the data table has every value.
    first, *between, last = sorted({min(values), max(values), *values}) if len(set(values)) > 1 else [values[0]] * 2
    kept = [first]
    for value in between:
        if clear(value, kept[-1]) and clear(value, last):
            kept.append(value)
    return Axis(name, tuple((value, label(value)) for value in dict.fromkeys([*kept, last])), place)


def share() -> Axis:
    """From 0 to 100%, for charts whose title names the quantity."""
    return linear("", 0.0, 1.0, lambda v: f"{100 * v:.0f}%")


def lines(series: Sequence[Line], across: Axis, up: Axis, level: tuple[float, str] | None = None) -> Drawing:
    """A line chart.

    Args:
        level: a horizontal line of reference, and its name.
    """
    parts = [*_frame(across, up)]
    if level is not None:
        y = _y(up, level[0])
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="level"))
        parts.append(tag("text", level[1], x=WIDTH - RIGHT - 2, y=y - 4, text_anchor="end", class_="note"))
    parts += [_line(line, across, up) for line in series]
    return Drawing(parts)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _frame(across: Axis, up: Axis) -> list[Markup]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value, label in up.ticks:
        y = _y(up, value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", label, x=LEFT - 5, y=y + 4, text_anchor="end"))
    for value, label in across.ticks:
        x = _x(across, value)
        parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(tag("text", label, x=x, y=bottom + 16, text_anchor="middle"))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis"))
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(tag("text", across.name, x=middle, y=HEIGHT - 6, text_anchor="middle", class_="name"))
    upright = (HEIGHT - BOTTOM + TOP) / 2
    turned = f"rotate(-90 11 {upright:g})"
    if up.name:
        parts.append(tag("text", up.name, x=11, y=upright, text_anchor="middle", transform=turned, class_="name"))
    return parts


def _line(line: Line, across: Axis, up: Axis) -> Markup:
    placed = [(_x(across, p.x), _y(up, p.y), p) for p in line.points]
    path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y, _) in enumerate(placed))
    parts = [tag("path", d=path, class_="line dashed" if line.dashed else "line")]
    for x, _, p in placed:
        if p.low is not None and p.high is not None:
            low, high = _y(up, p.low), _y(up, p.high)
            ends = "".join(f"M{x - 3:.1f} {end:.1f}h6" for end in (low, high))
            parts.append(tag("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}{ends}", class_="whisker"))
    # (On a long line only some points have markers, at equal distances; the last always has one.)
    every = max(1, len(placed) // 12)
    for number, (x, y, _) in enumerate(placed):
        if number == len(placed) - 1 or number % every == 0:
            parts.append(marker(line.run, x, y))
    return tag("g", *parts, class_=f"run s{line.run % len(MARKERS)}")


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, axis: bool = True) -> Drawing:
    """A bar chart.

    Args:
        groups: a name and its bars, one below the other.
        axis: whether the lengths are shares, so that an axis from 0 to 100% is drawn.
    """
    names = [shortened(name, LETTERS) for name, _ in groups]
    left = 12 + LETTER * max(map(len, names), default=0)
    width = WIDTH - left - (60 if any(bar.text for _, group in groups for bar in group) else 26)
    grid, parts, y = [], [], 4.0
    for name, (_, group) in zip(names, groups, strict=True):
        height = BAND * len(group) + GAP
        parts.append(tag("text", name, x=left - 8, y=y + height / 2 + 4, text_anchor="end"))
        parts += [_bar(bar, left, width, y + GAP / 2 + BAND * (turn + 0.5)) for turn, bar in enumerate(group)]
        y += height
    for percentage in (0, 25, 50, 75, 100) if axis else ():
        x = left + width * percentage / 100
        grid.append(tag("line", x1=x, x2=x, y1=2, y2=y, class_="grid"))
        if percentage in (0, 50, 100):
            parts.append(tag("text", f"{percentage}%", x=x, y=y + 15, text_anchor="middle"))
    return Drawing([*grid, *parts], height=y + (20 if axis else 4))


def _bar(bar: Bar, left: float, width: float, middle: float) -> Markup:
    def x(value: float) -> float:
        return left + width * value

    parts = [
        tag("rect", x=left, y=middle - BAND / 2 + 1, width=width * bar.value, height=float(BAND - 2), class_="bar")
    ]
    if bar.low is not None and bar.high is not None:
        parts.append(tag("path", d=f"M{x(bar.low):.1f} {middle:g}H{x(bar.high):.1f}", class_="whisker on-bar"))
    if bar.reference is not None:
        top = middle - BAND / 2 - 2
        parts.append(tag("path", d=f"M{x(bar.reference):.1f} {top:g}v{BAND + 4}", class_="clean"))
    if bar.run is not None:
        parts.append(marker(bar.run, x(bar.value), middle, 4))
    if bar.text:
        parts.append(tag("text", bar.text, x=left + width + 10, y=middle + 4))
    return tag("g", *parts, class_=None if bar.run is None else f"run s{bar.run % len(MARKERS)}")


def shortened(name: str, letters: int) -> str:
    """At most so many letters."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def marker(run: int, x: float, y: float, size: float = 3.5) -> Markup:
    """The sign of a run."""
    kind, s = MARKERS[run % len(MARKERS)], size
    if kind in ("circle", "ring"):
        return tag("circle", cx=x, cy=y, r=s, class_="mark hollow" if kind == "ring" else "mark")
    d = f"{1.4 * s:g}"
    shapes = {
        "square": f"M{x - s:.1f} {y - s:.1f}h{2 * s:g}v{2 * s:g}h{-2 * s:g}z",
        "triangle": f"M{x:.1f} {y - 1.3 * s:.1f}l{1.2 * s:g} {2.2 * s:g}h{-2.4 * s:g}z",
        "diamond": f"M{x:.1f} {y - 1.4 * s:.1f}l{d} {d}l-{d} {d}l-{d} -{d}z",
        "cross": f"M{x - s:.1f} {y - s:.1f}l{2 * s:g} {2 * s:g}m0 {-2 * s:g}l{-2 * s:g} {2 * s:g}",
    }
    return tag("path", d=shapes[kind], class_="mark hollow" if kind == "cross" else "mark")


def run_key(name: str, run: int, *, dashed: bool = False) -> Key:
    """The line and marker of a run, for a legend."""
    line = tag("path", d="M1 7H27", class_="line dashed" if dashed else "line")
    return Key(name, _sign(tag("g", line, marker(run, 14, 7), class_=f"run s{run % len(MARKERS)}")))


def swatch(name: str, kind: str) -> Key:
    """A patch with the colour of a CSS class, for a legend."""
    return Key(name, _sign(tag("rect", x=6, y=1, width=16, height=12, class_=kind)))


def reference_key(name: str) -> Key:
    """The mark across a bar, for a legend."""
    return Key(name, _sign(tag("path", d="M14 1V13", class_="clean")))


def _sign(content: Markup) -> Markup:
    return tag("svg", content, viewBox="0 0 28 14", width=28, height=14, aria_hidden="true", class_="sign")
