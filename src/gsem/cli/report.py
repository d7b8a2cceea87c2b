"""gsem report: from run directories to a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gsem.cli.evaluate import _model
from gsem.cli.options import ReportOptions
from gsem.reporting.report import report


def report_command(console: Console, o: ReportOptions) -> None:
    if not o.runs:
        raise ValueError("give at least one RUN: gsem report runs/NAME (gsem report --help tells the options)")
    first = Path(o.runs[0])
    out = o.out or (first / "report.html" if len(o.runs) == 1 and first.is_dir() else Path("report.html"))
    others = [path for path in (o.markdown, o.json) if path is not None]
    for path, ending in ((o.markdown, ".md"), (o.json, ".json")):
        if path is not None and path.suffix != ending:
            raise ValueError(f"{path}: its name must end in {ending}")
    model = None if o.model is None else _model(o.model, o)[0]
    how: dict[str, Any] = {"data": o.data, "data_path": o.data_path, "images": o.images, "device": o.device}
    write_report(console, o.runs, [out, *others], model=model, **how)


def write_report(console: Console, runs: Sequence[str], out: list[Path], **how: Any) -> None:
    """Write (see `gsem.report` for what more it takes), and say where."""
    with console.status("") as status:
        written = report(runs, out, on_progress=status.update, **how)
    for path in written:
        console.print(f"report: {path}", soft_wrap=True)
