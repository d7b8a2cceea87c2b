"""gsem audit: load model and images, run the checks, print the table and the verdict."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gsem._text import duration, pixels
from gsem.auditing.audit import CHECKS, Progress, audit
from gsem.auditing.check import Audit, Check
from gsem.auditing.partial import AnotherAudit
from gsem.cli.options import AuditOptions, changed, command_line
from gsem.cli.progress import CountingBar
from gsem.cli.task import load_network, load_task, numbered
from gsem.evaluation.result import with_ending
from gsem.nn.gsem import GSeM

WIDTH = 80
# Colour only repeats the words.
STYLES = {"pass": "green", "flag": "bold red", "flag, answered": "yellow", "inconclusive": "yellow"}
VERDICTS = {
    "TRUSTED": "bold green",
    "OVERSTATED": "bold red",
    "SUSPECT": "bold yellow",
    "INVALID": "bold red",
    "INCOMPLETE": "bold yellow",
}
# Options of the audit that an evaluation of the same images does not take, or is given otherwise.
AUDIT_ONLY = ("model", "only", "out", "quick", "suite", "attacks", "surrogate", "gradient", "images", "processes")


def audit_command(console: Console, o: AuditOptions) -> Audit:
    """Audit, show and save, by the options."""
    if o.suite is not None and o.attacks is not None:
        raise ValueError("give --suite or --attacks, not both")
    task = load_task(o)
    surrogate = None if o.surrogate is None else load_network(o.surrogate, o)[0].to(task.x.device)
    for module in task.model.modules():
        if o.gradient is not None and isinstance(module, GSeM):
            module.gradient = o.gradient
    command = command_line("audit", o.model, **changed(o, "model", "only", "out", "processes"))
    known: dict[str, object] = {"command": command}
    if o.surrogate is None:  # gsem evaluate takes none
        images = {"images": len(task.x), "frozen": False}
        known["evaluate"] = command_line("evaluate", o.model, **changed(o, *AUDIT_ONLY), **images)
    with AuditBar(console) as bar:

        def audited(place: Path) -> Audit:
            return audit(
                task.model,
                task.x,
                task.y,
                o.suite or o.attacks,
                eps=task.eps,
                norm=o.norm,
                draws=o.draws,
                seed=o.seed,
                batch_size=o.batch_size,
                only=None if o.only is None else [name.strip() for name in o.only.split(",")],
                quick=o.quick,
                source_models=task.source_models,
                surrogate=surrogate,
                save=place,
                about=task.about(place) | known,
                on_progress=bar,
            )

        run = Path(o.model)
        found, place = _at_a_free_place(audited, o.out, run / "audit" if run.is_dir() else Path("audit"))
    show_audit(console, found, f"{task.title}, eps = {pixels(task.eps)} ({o.norm})")
    console.print(f"saved in {place}", soft_wrap=True)
    return found


def _at_a_free_place(audited: Callable[[Path], Audit], out: Path | None, default: Path) -> tuple[Audit, Path]:
    """The audit and its file: `out`, or `default` with the first number at which no other audit is, finished or not."""
    if out is not None:
        return audited(out), with_ending(out, ".json")
    for place in (with_ending(place, ".json") for place in numbered(default)):
        if not place.exists():
            with suppress(AnotherAudit):
                return audited(place), place
    raise AssertionError("there is a free number")


class AuditBar(CountingBar):
    """A bar on a terminal, elsewhere a line now and then. Every finished check gets a line of its own."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        super().__init__(console, 13, clock)
        self.task = self.bar.add_task("audit", total=len(CHECKS), status="")

    def __call__(self, p: Progress) -> None:
        left = "" if not p.seconds_left else f"{duration(p.seconds_left)} left"
        status = f"{p.doing[:31]:<31} {left}"
        self.bar.update(self.task, description=p.check, total=p.checks, completed=p.number - 1, status=status)
        place = f"{p.number:>2}/{p.checks} {p.check:<13}"
        if p.ended is not None:
            line = f"{p.ended.outcome}, finished before" if p.earlier else f"{p.ended.outcome:<12} {left}".rstrip()
            self.print(f"{place} {line}")
        elif self.due:
            self.print(f"{place} {p.doing}" + (f", {left}" if left else ""))


def show_audit(console: Console, found: Audit, what: str) -> None:
    """The checks, the advice for those that did not pass, the verdict, and how to repeat each."""
    metadata = found.metadata
    console.print(f"\n{what}", soft_wrap=True)
    console.print(f"audited attacks: {', '.join(metadata['attacks'])}\n{found.accuracies}\n", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), width=WIDTH)
    table.add_column("check", no_wrap=True)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("flagged when", ratio=1)
    table.add_column("", no_wrap=True)
    for check in found.checks:
        figure = "–" if check.figure is None else f"{round(check.figure, 3) + 0.0:.3f}"  # (no −0)
        outcome = check.outcome_in_words
        table.add_row(check.name, figure, check.threshold, Text(outcome, style=STYLES.get(outcome, "")))
    console.print(table)
    for check in found.checks:
        if check.outcome not in ("pass", "not applicable"):
            _show_advice(console, check, metadata["command"])
    _show_not_applicable(console, found.checks)
    console.print()
    console.print(Text(found.verdict, style=VERDICTS[found.verdict]))
    console.print(found.reason, width=WIDTH)
    if found.found_command is not None:
        console.print(f"the accuracy found, again:\n  {found.found_command}", soft_wrap=True)
    seconds = duration(metadata["seconds"])
    draws = f", {metadata['draws']} scoring draws" if metadata["stochastic"] else ", deterministic"
    console.print(f"\n{metadata['images']} images{draws}, seed {metadata['seed']}, {seconds}")
    console.print(f"to repeat one check, with the same figure:\n  {metadata['command']} --only CHECK", soft_wrap=True)


def _show_not_applicable(console: Console, checks: Sequence[Check]) -> None:
    """The checks that do not apply, those with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for check in checks:
        if check.outcome == "not applicable":
            reasons.setdefault(check.reason, []).append(check.name)
    for reason, names in reasons.items():
        console.print(f"\n{', '.join(names)}: not applicable\n{_sentence(reason)}", width=WIDTH)


def _show_advice(console: Console, check: Check, command: str) -> None:
    console.print()
    outcome = check.outcome_in_words
    console.print(Text(f"{check.name}: {outcome}", style=STYLES[outcome]))
    console.print(f"{check.title} {_sentence(check.reason)}", width=WIDTH)
    if check.advice:
        console.print(f"What to do: {check.advice}", width=WIDTH)
    console.print(f"Re-run: {command} --only {check.name}", soft_wrap=True)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
