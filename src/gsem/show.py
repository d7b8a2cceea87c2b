"""Results as tables on a terminal of 80 columns."""

from typing import Any

from rich.console import Console
from rich.table import Table

from gsem.evaluate import Result
from gsem.progress import duration, percent


def show_result(console: Console, result: Result, what: str) -> None:
    facts = result.facts
    console.print(f"\n{what}, eps = {pixels(facts['eps'])} ({facts['norm']})")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("attack", no_wrap=True)
    for heading in ("expected accuracy", "95% interval", "passes/image", "time"):
        table.add_column(heading, justify="right")
    for s in result.scores:
        mean, low, high = result.expected(s.label)
        table.add_row(
            s.label,
            percent(mean),
            f"{100 * low:.1f} – {100 * high:.1f}",
            f"{(s.forwards + s.gradients) / len(result.y):.0f}",
            duration(s.seconds),
        )
    console.print(table)
    noise = "1 draw: the model is deterministic" if result.draws == 1 else f"{result.draws} scoring draws"
    console.print(f"{facts['images']} images, {noise}, seed {facts['seed']}")


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
