"""The table and the JSON file of one part of the GPU benchmark."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import OverTime, described

WIDEST = 100  # characters of a value in the table; what was printed at once, and the JSON file, have all


@dataclass
class Row:
    what: str
    value: str
    mark: str = ""
    verdict: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


class Report:
    """What a part measured. Rows are printed as they come; `finish` prints them again as one table, and writes JSON."""

    def __init__(self, part: str, device: torch.device, settings: dict[str, Any]):
        self.part, self.device, self.settings = part, device, settings
        self.rows: list[Row] = []
        self.started = time.monotonic()
        self.heading = f"{part} on {described(device)}; torch {torch.__version__}, {torch.get_num_threads()} threads"
        print(self.heading, flush=True)

    def row(self, what: str, value: str, mark: str = "", verdict: str = "", **figures: Any) -> None:
        self.rows.append(Row(what, value, mark, verdict, figures))
        print("  " + "  ".join(word for word in (what, value, mark, verdict) if word), flush=True)

    def at_most(self, what: str, figure: float, most: float) -> None:
        """A check of correctness; NaN fails it."""
        verdict = "ok" if figure <= most else "FAIL"
        self.row(what, f"{figure:.2e}", f"at most {most:.0e}" if most else "0", verdict, figure=figure, most=most)

    def at_least(self, what: str, figure: float, least: float, shown: str, mark: str, **figures: Any) -> None:
        """A mark of speed, which is set for GPUs: elsewhere it has no verdict."""
        verdict = "" if self.device.type != "cuda" else "reached" if figure >= least else "missed"
        self.row(what, shown, mark, verdict, figure=figure, least=least, **figures)

    def attempt(self, what: str, work: Callable[[], None]) -> bool:
        """Run one measurement. If it fails, the table has a line for the error, and the next one runs all the same."""
        try:
            work()
        except (Exception, OverTime) as error:
            if not isinstance(error, OverTime | FileNotFoundError):
                traceback.print_exc()
            text = " ".join(str(error).split())
            self.row(what, f"{type(error).__name__}: {text}", "", "FAIL", error=text)
            if isinstance(error, OverTime):
                raise
            return False
        return True

    @property
    def failed(self) -> bool:
        return any(row.verdict == "FAIL" for row in self.rows)

    def finish(self, out: Path) -> None:
        seconds = time.monotonic() - self.started
        shown = [row.value if len(row.value) <= WIDEST else row.value[: WIDEST - 2] + " …" for row in self.rows]
        cells = [("", "measured", "mark", "")]
        cells += [(row.what, value, row.mark, row.verdict) for row, value in zip(self.rows, shown, strict=True)]
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        print(f"\n{self.heading}; {seconds:.0f} s in all\n")
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        metadata = self.settings | {"device": str(self.device), "on": described(self.device)}
        metadata |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": seconds}
        rows = [vars(row) for row in self.rows]
        found = {"part": self.part, "metadata": metadata, "failed": self.failed, "rows": rows}
        (out / f"{self.part}.json").write_text(json.dumps(found, indent=2))
