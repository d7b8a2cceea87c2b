"""Numbers and tables as plain text, for the terminal, for `print` and for the report. Nothing slow is imported."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def percent(share: float | None) -> str:
    """` 76.5%`, six characters wide, of a share between 0 and 1."""
    return "   –  " if share is None else f"{100 * share:5.1f}%"


def between(low: float, high: float) -> str:
    """`70.8 – 81.9`: an interval of shares, in per cent."""
    return f"{100 * low:z.1f} – {100 * high:z.1f}"


def duration(seconds: float) -> str:
    """`4 s`, `3:20 min`, `1:05 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02} h"


def pixels(eps: float) -> str:
    """`8/255` where eps is a whole number of 255ths, else the number itself."""
    of_255 = eps * 255
    return f"{round(of_255)}/255" if abs(of_255 - round(of_255)) < 1e-6 else f"{eps:g}"


def with_rows(text: str, rows: "Sequence[int] | np.ndarray | None") -> str:
    """`image 7` becomes `image 7 (row 412 of the data set)` where the rows are known and are not the numbers."""

    def named(match: re.Match[str]) -> str:
        number = int(match[1])
        if rows is None or number >= len(rows) or int(rows[number]) == number:
            return match[0]
        return f"{match[0]} (row {int(rows[number])} of the data set)"

    return re.sub(r"\bimage (\d+)\b", named, text)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
