"""Runs as one self-contained HTML page, as Markdown, and as JSON cards."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gsem.reporting import tables
from gsem.reporting.card import card
from gsem.reporting.charts import sweeps, training
from gsem.reporting.classes import class_figure, confusion_figure
from gsem.reporting.dots import accuracy_figure
from gsem.reporting.figure import Figure, run_key
from gsem.reporting.gallery import choice, exhibits, surface_figures
from gsem.reporting.views import RunReport


def html(entries: Sequence[RunReport], *, version: str = "") -> str:
    """The page: nothing is loaded from anywhere, and everything that comes from files is escaped.

    Args:
        version: of gsem, for the last line.
    """
    loader = PackageLoader("gsem.reporting")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (Markup(environment.loader.get_source(environment, name)[0]) for name in ("page.css", "page.js"))  # type: ignore[union-attr]
    environment.filters["quoted"] = shlex.quote
    told = _told(entries) | {"style": style, "script": script, "version": version}
    return environment.get_template("page.html.j2").render(told)


def markdown(entries: Sequence[RunReport], *, version: str = "") -> str:
    """The verdict, the tables, the checks and the cost; charts as their data's words."""
    loader = PackageLoader("gsem.reporting")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": plain, "quoted": shlex.quote}
    return environment.get_template("page.md.j2").render(_told(entries) | {"version": version})


def cards(entries: Sequence[RunReport]) -> str:
    """One card, or a list of them for several runs, as JSON."""
    found = [card(entry) for entry in entries]
    return json.dumps(found[0] if len(found) == 1 else found, indent=2) + "\n"


def plain(value: object) -> str:
    """Text that means nothing in Markdown or HTML: names may hold anything."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_|[]":
        text = text.replace(sign, "\\" + sign)
    return text


def _told(entries: Sequence[RunReport]) -> dict[str, Any]:
    return {
        "title": "Report: " + ", ".join(e.name for e in entries),
        "runs": [_run(entries, number) for number in range(len(entries))],
        "accuracy": accuracy_figure(entries),
        "outcomes": tables.outcomes(entries),
        "training": training(entries),
        "sweeps": sweeps(entries),
        "trained": tables.trained(entries),
        "rest": tables.rest(entries),
        "costs": tables.costs(entries),
    }


def _run(entries: Sequence[RunReport], number: int) -> dict[str, Any]:
    e = entries[number]
    figures: list[Figure | None] = [class_figure(e, number), confusion_figure(e, number)]
    return {
        "number": number,
        "key": run_key(e.name, number),
        "entry": e,
        "judged": tables.judged(e),
        "accuracies": tables.accuracies(e),
        "as_published": tables.as_published(e),
        "unbounded": tables.unbounded(e),
        "evaluated": tables.evaluated(e),
        "classes": [figure for figure in figures if figure is not None],
        "exhibits": exhibits(e),
        "choice": choice(e),
        "surfaces": surface_figures(e, number),
    }
