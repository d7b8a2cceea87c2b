"""gsem report: from run directories to a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gsem.cli.options import ReportOptions
from gsem.cli.task import load_network
from gsem.data import load
from gsem.reporting.report import report


def report_command(console: Console, o: ReportOptions) -> None:
    """Write the page and the other files that the options name."""
    if not o.run:
        raise ValueError("give at least one RUN: gsem report runs/NAME (gsem report --help lists the options)")
    for run in map(Path, o.run):
        # As a RUN it would be read, and the page would replace ./report.html.
        if run.suffix in (".json", ".html", ".md"):
            npz = run.with_suffix(".npz")
            instead = npz if run.suffix == ".json" and npz.exists() else "a run directory, or the .npz of an evaluation"
            raise ValueError(f"{run} cannot be a RUN: give {instead}. To write to {run}: gsem report RUN -o {run}")
    first = Path(o.run[0])
    out = o.out or (first / "report.html" if len(o.run) == 1 and first.is_dir() else Path("report.html"))
    for path, ending in ((o.markdown, ".md"), (o.json, ".json")):
        if path is not None and path.suffix != ending:
            raise ValueError(f"{path}: its name must end in {ending}")
    files = [path for path in (out, o.markdown, o.json) if path is not None]
    model = None if o.model is None else load_network(o.model, o)[0]
    data = o.data if o.data is None or o.resize is None else load(o.data, o.data_path, resize=o.resize)
    write_report(console, o.run, files, model=model, data=data, data_path=o.data_path, images=o.images, device=o.device)


def write_report(console: Console, runs: Sequence[str], out: list[Path], **options: Any) -> None:
    """Write, with the options of `gsem.report`, and print where."""
    with console.status("") as status:
        written = report(runs, out, on_progress=status.update, **options)
    for path in written:
        console.print(f"report: {path}", soft_wrap=True)
