"""What an audit found: checks, each with a figure and what to do about it, and the verdict that follows."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gsem.checkpoint import write_atomically

Outcome = Literal["pass", "flag", "inconclusive"]
Verdict = Literal["TRUSTED", "SUSPECT", "INVALID"]


@dataclass(frozen=True)
class Check:
    """One question to the robust accuracy, and its answer."""

    name: str
    """As on the command line: `gsem audit MODEL --only NAME` repeats it."""
    title: str
    """What was asked, a line for people."""
    figure: float | None
    """What was measured; None where the check could not be made."""
    threshold: str
    """When it is flagged, in words with the figure: `over 0.10`, `interval outside [0.93, 1.07]`."""
    outcome: Outcome
    reason: str
    """A sentence with the figures behind the outcome."""
    advice: str
    """What to do about it; empty where it passed."""
    source: str
    """The paper the check comes from."""
    invalidates: bool = False
    """Whether a flag here means that the robust accuracy is no measurement at all (INVALID), rather than doubtful."""
    details: dict[str, Any] | None = None
    """The check's data, for tables and charts (values as JSON takes them)."""


@dataclass(frozen=True)
class Audit:
    """All checks of one model, and what they say together."""

    checks: tuple[Check, ...]
    verdict: Verdict
    reason: str
    """Why, in a sentence with the figure behind it."""
    facts: dict[str, Any]
    """Model, data, images, eps, norm, attack, draws, seed, versions, seconds, the command that repeats it."""

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r} in this audit: {', '.join(c.name for c in self.checks)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """As JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_dict(), indent=2, allow_nan=False).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Audit":
        """What `save` wrote."""
        found = json.loads(Path(path).read_text())
        checks = tuple(Check(**check) for check in found.pop("checks"))
        return cls(checks=checks, **found)
