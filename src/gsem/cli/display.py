"""Results as tables on a terminal of 80 columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gsem._text import between, duration, percent, pixels
from gsem.evaluation.result import VOTERS, AttackScores, EvaluationResult
from gsem.evaluation.statistics import Interval


def show_result(console: Console, result: EvaluationResult, what: str) -> None:
    """The accuracies of every attack and of the worst cases, and what the columns mean."""
    metadata = result.metadata
    console.print(f"\n{what}, eps = {pixels(metadata['eps'])} ({metadata['norm']})")
    several = result.draws > 1
    headings = ("expected", "95% interval", *(("vote", "10 queries") if several else ()), "passes/image", "time")
    fresh = [name for name in result.names if "@" not in name]
    _show_attacks(console, result, headings, fresh, several)
    for s in result.scores:
        if not s.bounded:
            _show_unbounded(console, result, s)
    known = [name for mode in ("frozen", "off") for name in result.names if name.endswith(f"@{mode}")]
    if known:
        console.print("\nwith the noise known to the attacker: @frozen by a seed, @off without noise")
        _show_attacks(console, result, ("expected", "95% interval", "passes/image", "time"), known, False)
    console.print(f"{metadata['images']} images, seed {metadata['seed']}; accuracy in per cent")
    if len(fresh) > 2:
        console.print("worst case: each image under the attack that is worst for it")
    if several:
        console.print(
            f"{result.draws} scoring draws. expected: accuracy of one prediction; vote: of the\n"
            f"plurality of {VOTERS}; 10 queries: against an attacker who sends the image ten times"
        )
        if result.draws < VOTERS:
            console.print(f"(–: vote needs {VOTERS} draws, 10 queries needs 10)")
    else:
        console.print("deterministic, one draw")


def _show_attacks(
    console: Console, result: EvaluationResult, headings: Sequence[str], names: Sequence[str], several: bool
) -> None:
    """A row for each of these attacks that has a bound, under the name that `result[name]` takes."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("attack", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    bounded = [name for name in names if result[name].bounded]
    for name in bounded:
        worst = name.partition("@")[0] == "worst"
        # The worst of one attack would be that attack again.
        if not worst or len(bounded) > 2:
            table.add_row(name, *_accuracies(result, name, several), *(("", "") if worst else _cost(result[name])))
    console.print(table)


def _accuracies(result: EvaluationResult, name: str, several: bool) -> list[str]:
    mean, low, high = result.expected(name)
    cells = [percent(mean), between(low, high)]
    if several:
        cells += [_cell(result.vote(name)), _cell(result.persistent(name, 10))]
    return cells


def _cell(interval: Interval | None) -> str:
    return percent(None if interval is None else interval.mean)


def _cost(s: AttackScores) -> tuple[str, str]:
    return f"{(s.forwards + s.gradients) / len(s.correct):.0f}", duration(s.seconds)


def _show_unbounded(console: Console, result: EvaluationResult, s: AttackScores) -> None:
    reached = s.l2[result.broken(s.name)]
    distance = f" at a median L2 distance of {np.median(reached):.3g}" if len(reached) else ""
    console.print(
        f"{s.name} has no bound: it breaks {percent(len(reached) / len(s.correct)).strip()}{distance}, "
        "which is no robust accuracy"
    )


def show_as_published(console: Console, result: EvaluationResult) -> None:
    """The accuracies that the released evaluation would print, which are no estimate of robustness."""
    cells = [
        f"{s.name} {percent(result.as_published(s.name).mean).strip()}"
        for s in result.scores
        if s.noise == "fresh" and s.bounded
    ]
    console.print(
        "\nas published (success and score on one draw each, an image not broken scored\nas its clean self; not an "
        f"estimate of robustness): {', '.join(cells)}"
    )


def study_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("variant")
    # (Per image and epoch; the time is that of the whole training.)
    for heading in (*rows[0]["accuracy"], "passes/image", "epochs", "training"):
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
