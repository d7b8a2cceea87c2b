"""gsem audit: from what a user names to the checks, their table and the verdict."""

import shlex
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from gsem._text import duration, pixels
from gsem.audit.record import Audit, Check
from gsem.audit.run import CHECKS, Progress, audit, told
from gsem.cli_evaluate import _check_fit, _model, _subset, _told, about_data, source_and_eps
from gsem.data import to_float
from gsem.device import device_named
from gsem.fingerprint import data_fingerprint, model_fingerprint
from gsem.ledger import differences
from gsem.module import GSeM
from gsem.options import AuditOptions

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
    sources = {spec: _model(spec, o)[0] for spec in o.source}
    surrogate = None if o.surrogate is None else _model(o.surrogate, o)[0]
    for module in model.modules():
        if o.gradient is not None and isinstance(module, GSeM):
            module.gradient = o.gradient
    source, eps = source_and_eps(o, meta)
    test = source.test()
    images = min(len(test), QUICK_IMAGES if o.quick else IMAGES) if o.images is None else o.images
    subset = {"kind": "first" if o.first else "balanced", "images": images}
    chosen = _subset(test, subset)
    x, y = to_float(chosen.x), chosen.y
    _check_fit(meta, x)
    run = Path(o.model)
    place = o.out or (run / "audit.json" if run.is_dir() else Path("audit.json"))
    only = None if o.only is None else [name.strip() for name in o.only.split(",")]
    if o.out is not None:
        fingerprint = model_fingerprint(model) | data_fingerprint((x, y))
        _refuse_to_overwrite(o.out, {"fingerprint": fingerprint, "command": repeated_by(o), "only": only})
    device = device_named(o.device)
    with AuditBar(console) as bar:
        found = audit(
            model.to(device),
            x.to(device),
            y.to(device),
            o.suite or o.attacks,
            eps=eps,
            norm=o.norm,
            draws=o.draws,
            seed=o.seed,
            batch=o.batch,
            only=only,
            quick=o.quick,
            sources={name: other.to(device) for name, other in sources.items()},
            surrogate=None if surrogate is None else surrogate.to(device),
            about={"model": o.model, **about_data(o, meta, test, place), "subset": subset, "command": repeated_by(o)},
            report=bar,
        )
    what = f"{o.model} on {source.name}: {_told(subset, len(x), len(test))}, eps = {pixels(eps)} ({o.norm})"
    show_audit(console, found, what)
    console.print(f"saved in {found.save(o.out or _unused(place))}", soft_wrap=True)
    return found


def _refuse_to_overwrite(out: Path, asked: dict[str, Any]) -> None:
    """Raise a ValueError if at `out` there is a file that is not of the same audit."""
    if not out.exists():
        return
    try:
        facts = Audit.load(out).facts
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{out} is there already, and is no audit: choose another --out") from None
    if other := differences({key: facts.get(key) for key in asked}, asked):
        raise ValueError(
            f"{out} is there already, and is an audit of something else. Different are: {'; '.join(other)}. "
            "Choose another --out, or move it away"
        )


def _unused(path: Path) -> Path:
    """`path`, or with a number in it: an earlier audit is not overwritten."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


class AuditBar:
    """A bar on a terminal, and in any case a line for each check that has ended."""

    def __init__(self, console: Console):
        self.console = console
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
        self.bar.update(self.task, description=p.check, total=p.checks, completed=p.number - 1, doing=p.doing[:44])
        if p.ended is not None:
            place = f"{p.number:>2}/{p.checks}"
            self.console.print(f"{place} {p.check:<13} {p.ended.outcome}", highlight=False)


def show_audit(console: Console, found: Audit, what: str) -> None:
    """The checks, the advice for those that did not pass, the verdict, and how to repeat each."""
    facts = found.facts
    console.print(f"\n{what}", soft_wrap=True)
    console.print(f"attacks in question: {', '.join(facts['attacks'])}\n{told(found)}\n", soft_wrap=True)
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
            _show_advice(console, check, facts["command"])
    console.print()
    console.print(Text(found.verdict, style=VERDICTS[found.verdict]))
    console.print(found.reason, width=WIDTH)
    seconds = duration(facts["seconds"])
    draws = f", {facts['draws']} scoring draws" if facts["stochastic"] else ", deterministic"
    console.print(f"\n{facts['images']} images{draws}, seed {facts['seed']}, {seconds}")
    console.print(f"any check alone, to the same figure:\n  {facts['command']} --only CHECK", soft_wrap=True)


def _show_advice(console: Console, check: Check, command: str) -> None:
    console.print()
    console.print(Text(f"{check.name}: {check.outcome}", style=STYLES[check.outcome]))
    console.print(f"{check.title} {_sentence(check.reason)}", width=WIDTH)
    if check.advice:
        console.print(f"What to do: {check.advice}", width=WIDTH)
    console.print(f"Again: {command} --only {check.name}", soft_wrap=True)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
