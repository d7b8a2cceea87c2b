"""gsem report: from run directories to a page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gsem.compose import IMAGES, report
from gsem.options import ReportOptions


def report_command(console: Console, o: ReportOptions) -> None:
    if not o.runs:
        raise ValueError("give at least one RUN: gsem report runs/NAME (gsem report --help tells the options)")
    first = Path(o.runs[0])
    out = o.out or (first / "report.html" if len(o.runs) == 1 and first.is_dir() else Path("report.html"))
    others = [path for path in (o.markdown, o.json) if path is not None]
    for path, ending in ((o.markdown, ".md"), (o.json, ".json")):
        if path is not None and path.suffix != ending:
            raise ValueError(f"{path}: its name must end in {ending}")
    write_report(console, o.runs, [out, *others], images=o.images, device=o.device)


def write_report(
    console: Console, runs: Sequence[str], out: list[Path], *, images: int = IMAGES, device: str | None = None
) -> None:
    """Write, and say where."""
    with console.status("") as status:
        written = report(runs, out, images=images, device=device, tell=status.update)
    for path in written:
        console.print(f"report: {path}", soft_wrap=True)
