"""Results as tables on a terminal of 80 columns."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gsem.progress import duration, percent
from gsem.result import Interval, Result, Scores


def show_result(console: Console, result: Result, what: str) -> None:
    """The accuracies of every attack, the worst case, and what stands beside them."""
    facts = result.facts
    console.print(f"\n{what}, eps = {pixels(facts['eps'])} ({facts['norm']})")
    fresh = [s for s in result.scores if s.noise == "fresh" and s.bounded]
    several = result.draws > 1
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("attack", no_wrap=True)
    headings = ("expected", "95% interval", *(("vote", "sent ×10") if several else ()), "passes", "time")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for s in fresh:
        table.add_row(s.label, *_accuracies(result, s.name, several), *_cost(s))
    if len(fresh) > 1:
        table.add_row("worst of all", *_accuracies(result, "worst", several), "", "")
    console.print(table)
    for s in result.scores:
        if not s.bounded:
            _show_unbounded(console, result, s)
    _show_known_noise(console, result)
    console.print(f"{facts['images']} images, seed {facts['seed']}; accuracy in per cent, passes per image")
    if several:
        console.print(
            f"{result.draws} scoring draws. expected: of one answer; vote: of the plurality of 11;\n"
            "sent ×10: against someone who sends the image ten times"
        )
    else:
        console.print("deterministic, one draw")


def _accuracies(result: Result, name: str, several: bool) -> list[str]:
    mean, low, high = result.expected(name)
    cells = [percent(mean), f"{100 * low:.1f} – {100 * high:.1f}"]
    if several:
        cells += [_cell(result.vote(name)), _cell(result.persistent(name, 10))]
    return cells


def _cell(interval: Interval | None) -> str:
    return percent(None if interval is None else interval.mean)


def _cost(s: Scores) -> tuple[str, str]:
    return f"{(s.forwards + s.gradients) / len(s.correct):.0f}", duration(s.seconds)


def _show_unbounded(console: Console, result: Result, s: Scores) -> None:
    reached = s.l2[result.broken(s.name)]
    distance = f" at a median L2 distance of {np.median(reached):.3g}" if len(reached) else ""
    console.print(
        f"{s.label} has no bound: it breaks {percent(len(reached) / len(s.correct)).strip()}{distance}, "
        "which is no robust accuracy"
    )


def _show_known_noise(console: Console, result: Result) -> None:
    modes = [mode for mode in ("frozen", "off") if any(s.noise == mode for s in result.scores)]
    if not modes:
        return
    told = {"frozen": "noise frozen by a known seed", "off": "noise off"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("\nexpected, with the", no_wrap=True)
    for mode in modes:
        table.add_column(f"\n{told[mode]}", justify="right")
    for label in [s.label for s in result.scores if s.noise == modes[0]]:
        table.add_row(label, *(percent(result.expected(f"{label}@{mode}").mean) for mode in modes))
    table.add_row("worst of all", *(percent(result.expected(f"worst@{mode}").mean) for mode in modes))
    console.print(table)


def show_as_published(console: Console, result: Result) -> None:
    """The block that stands beside the honest figures, and is no estimate of robustness."""
    cells = [
        f"{s.label} {percent(result.as_published(s.name).mean).strip()}"
        for s in result.scores
        if s.noise == "fresh" and s.bounded
    ]
    console.print(
        "\nas published (success and score on one draw each, an image not broken scored\nas its clean self; not an "
        f"estimate of robustness): {', '.join(cells)}"
    )


def pixels(eps: float) -> str:
    of_255 = eps * 255
    return f"{round(of_255)}/255" if abs(of_255 - round(of_255)) < 1e-6 else f"{eps:g}"


def study_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("variant")
    # (Per image and epoch; the time is that of the whole training.)
    for heading in (*rows[0]["accuracy"], "passes", "epochs", "training"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{100 * mean:.1f} ±{100 * (high - low) / 2:4.1f}" for mean, low, high in row["accuracy"].values()]
        passes = f"{row['attack_passes']:g}+{row['training_passes']:g}"
        table.add_row(row["variant"], *cells, passes, str(row["epochs"]), duration(row["seconds"]))
    return table


def show_list(console: Console, kind: str, entries: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(kind, no_wrap=True)
    table.add_column("what")
    for name, line in entries.items():
        table.add_row(name, line)
    console.print(table)
