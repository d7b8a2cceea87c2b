"""gsem audit: load model and images, run the checks, print the table and the verdict."""

import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from gsem._env import device_named
from gsem._text import duration, pixels
from gsem.auditing.audit import CHECKS, Progress, audit
from gsem.auditing.check import Audit, Check
from gsem.auditing.partial import AnotherAudit
from gsem.cli.evaluate import _check_fit, _model, _subset, _told, about_data, source_and_eps
from gsem.cli.options import AuditOptions
from gsem.cli.progress import LINE_EVERY
from gsem.data import to_float
from gsem.evaluation.result import with_ending
from gsem.nn.gsem import GSeM

IMAGES, QUICK_IMAGES = 500, 128
WIDTH = 80
# Colour says it once more: the words are there without it.
STYLES = {"pass": "green", "flag": "bold red", "inconclusive": "yellow"}
VERDICTS = {"TRUSTED": "bold green", "SUSPECT": "bold yellow", "INVALID": "bold red"}


def repeated_by(o: AuditOptions) -> str:
    """The command line that repeats the audit: every option but --only, --out and those at their defaults."""
    words = ["gsem", "audit", o.model]
    for field in fields(o):
        value = getattr(o, field.name)
        if field.name in ("model", "only", "out") or value == field.default:
            continue
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option)
        elif isinstance(value, tuple):
            words += [option, *value]
        else:
            # The form with = is for values like -0.5/1, which would be taken for an option.
            text = _number(value) if isinstance(value, float) else str(value)
            words += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return shlex.join(words)


def _number(value: float) -> str:
    """The shortest text that is read as this number: 8/255, or 0.3."""
    of_255 = round(255 * value)
    return min([repr(value)] + [f"{of_255}/255"] * (of_255 / 255 == value), key=len)


def audit_command(console: Console, o: AuditOptions) -> Audit:
    """Audit, show and save, as the options say."""
    if o.suite is not None and o.attacks is not None:
        raise ValueError("give --suite or --attacks, not both")
    model, meta = _model(o.model, o)
    source_models = {spec: _model(spec, o)[0] for spec in o.source}
    surrogate = None if o.surrogate is None else _model(o.surrogate, o)[0]
    for module in model.modules():
        if o.gradient is not None and isinstance(module, GSeM):
            module.gradient = o.gradient
    source, eps = source_and_eps(o, meta)
    test = source.test()
    images = min(len(test), QUICK_IMAGES if o.quick else IMAGES) if o.images is None else o.images
    subset = {"kind": o.subset, "images": images}
    chosen = _subset(test, subset)
    x, y = to_float(chosen.x), chosen.y
    _check_fit(meta, x)
    device = device_named(o.device)
    with AuditBar(console) as bar:

        def audited(place: Path) -> Audit:
            return audit(
                model.to(device),
                x.to(device),
                y.to(device),
                o.suite or o.attacks,
                eps=eps,
                norm=o.norm,
                draws=o.draws,
                seed=o.seed,
                batch_size=o.batch_size,
                only=None if o.only is None else [name.strip() for name in o.only.split(",")],
                quick=o.quick,
                source_models={name: other.to(device) for name, other in source_models.items()},
                surrogate=None if surrogate is None else surrogate.to(device),
                save=place,
                about={
                    "model": o.model,
                    **about_data(o, meta, test, place),
                    "subset": subset,
                    "command": repeated_by(o),
                },
                on_progress=bar,
            )

        run = Path(o.model)
        found, place = _at_a_free_place(audited, o.out, run / "audit.json" if run.is_dir() else Path("audit.json"))
    what = f"{o.model} on {source.name}: {_told(subset, len(x), len(test))}, eps = {pixels(eps)} ({o.norm})"
    show_audit(console, found, what)
    console.print(f"saved in {place}", soft_wrap=True)
    return found


def _at_a_free_place(audited: Callable[[Path], Audit], out: Path | None, default: Path) -> tuple[Audit, Path]:
    """The audit and its file: `out`, or `default` with the first number at which no other audit is, finished or not."""
    if out is not None:
        return audited(out), with_ending(out, ".json")
    for number in count(1):
        place = default if number == 1 else default.with_name(f"{default.stem}-{number}{default.suffix}")
        if not place.exists():
            with suppress(AnotherAudit):
                return audited(place), place
    raise AssertionError("there is a free number")


class AuditBar:
    """A bar on a terminal, elsewhere a line now and then; and in any case one for each check that has ended.

    Args:
        clock: seconds, as `time.monotonic` counts them.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.console, self.clock, self.printed = console, clock, clock()
        self.bar = Bar(
            TextColumn("{task.description:<13}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[doing]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("audit", total=len(CHECKS), doing="")

    def __enter__(self) -> "AuditBar":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def __call__(self, p: Progress) -> None:
        left = "" if not p.seconds_left else f"{duration(p.seconds_left)} left"
        shown = f"{p.doing[:31]:<31} {left}"
        self.bar.update(self.task, description=p.check, total=p.checks, completed=p.number - 1, doing=shown)
        place = f"{p.number:>2}/{p.checks} {p.check:<13}"
        if p.ended is not None:
            line = f"{p.ended.outcome}, finished before" if p.earlier else f"{p.ended.outcome:<12} {left}".rstrip()
            self._print(f"{place} {line}")
        elif not self.console.is_terminal and self.clock() - self.printed >= LINE_EVERY:
            self._print(f"{place} {p.doing}" + (f", {left}" if left else ""))

    def _print(self, line: str) -> None:
        self.printed = self.clock()
        self.console.print(line, highlight=False, soft_wrap=True)


def show_audit(console: Console, found: Audit, what: str) -> None:
    """The checks, the advice for those that did not pass, the verdict, and how to repeat each."""
    metadata = found.metadata
    console.print(f"\n{what}", soft_wrap=True)
    console.print(f"attacks in question: {', '.join(metadata['attacks'])}\n{found.accuracies}\n", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), width=WIDTH)
    table.add_column("check", no_wrap=True)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("flagged when", ratio=1)
    table.add_column("", no_wrap=True)
    for check in found.checks:
        figure = "–" if check.figure is None else f"{round(check.figure, 3) + 0.0:.3f}"  # (no −0)
        table.add_row(check.name, figure, check.threshold, Text(check.outcome, style=STYLES[check.outcome]))
    console.print(table)
    for check in found.checks:
        if check.outcome != "pass":
            _show_advice(console, check, metadata["command"])
    console.print()
    console.print(Text(found.verdict, style=VERDICTS[found.verdict]))
    console.print(found.reason, width=WIDTH)
    seconds = duration(metadata["seconds"])
    draws = f", {metadata['draws']} scoring draws" if metadata["stochastic"] else ", deterministic"
    console.print(f"\n{metadata['images']} images{draws}, seed {metadata['seed']}, {seconds}")
    console.print(f"any check alone, to the same figure:\n  {metadata['command']} --only CHECK", soft_wrap=True)


def _show_advice(console: Console, check: Check, command: str) -> None:
    console.print()
    console.print(Text(f"{check.name}: {check.outcome}", style=STYLES[check.outcome]))
    console.print(f"{check.title} {_sentence(check.reason)}", width=WIDTH)
    if check.advice:
        console.print(f"What to do: {check.advice}", width=WIDTH)
    console.print(f"Again: {command} --only {check.name}", soft_wrap=True)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
