"""A check and an audit as they are recorded, and the decorator that registers a check."""

import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gsem._env import DEVICE_FAULTS
from gsem._io import write_atomically
from gsem.distributed import OtherProcessFailed, ProcessLost
from gsem.evaluation.result import with_ending

if TYPE_CHECKING:
    from gsem.auditing.context import AuditContext

Outcome = Literal["pass", "flag", "inconclusive"]
Verdict = Literal["TRUSTED", "SUSPECT", "INVALID"]
NOT_THE_MODELS_FAULT: tuple[type[Exception], ...] = (*DEVICE_FAULTS, ProcessLost, OtherProcessFailed)
WIDTH = 80  # of the lines of `print(audit)`


@dataclass(frozen=True)
class Finding:
    """What the function of a check returns. The fields are those of `Check`."""

    figure: float | None
    outcome: Outcome
    reason: str
    advice: str = ""
    invalidates: bool = False
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class Check:
    """One question about the robust accuracy, and its answer."""

    name: str
    """As on the command line: `gsem audit MODEL --only NAME` repeats it."""
    title: str
    """The question, in one line."""
    figure: float | None
    """What was measured; None where the check could not be made."""
    threshold: str
    """When it is flagged, in words with the figure: `over 0.10`, `interval outside [0.93, 1.07]`."""
    outcome: Outcome
    reason: str
    """A sentence with the figures behind the outcome."""
    advice: str
    """What to do about it; empty where it passed."""
    reference: str
    """The paper the check comes from."""
    invalidates: bool = False
    """Whether a flag here means that the robust accuracy is no measurement at all (INVALID), rather than doubtful."""
    details: dict[str, Any] | None = None
    """The check's data, for tables and charts (values as JSON takes them)."""


@dataclass(frozen=True)
class RegisteredCheck:
    """The function of a check with its name, question, threshold and paper. A call with a context gives a `Check`."""

    function: "Callable[[AuditContext], Finding]"
    name: str
    question: str
    threshold: "str | Callable[[AuditContext], str]"
    reference: str

    def __call__(self, ctx: "AuditContext") -> Check:
        try:
            found = self.function(ctx)
        except NOT_THE_MODELS_FAULT:
            raise
        except RuntimeError as error:  # of torch: a model that cannot be differentiated
            reason = f"the check could not be made: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            advice = "See the check unavailable; with no gradient at all, evaluate with square and rays."
            found = Finding(None, "inconclusive", reason, advice)
        threshold = self.threshold if isinstance(self.threshold, str) else self.threshold(ctx)
        return Check(name=self.name, title=self.question, threshold=threshold, reference=self.reference, **vars(found))


def check(
    *, name: str, question: str, threshold: "str | Callable[[AuditContext], str]", reference: str
) -> "Callable[[Callable[[AuditContext], Finding]], RegisteredCheck]":
    """Decorator: make a check of a function (context) -> Finding. `audit.CHECKS` collects the checks of each module.

    Args:
        threshold: in words, or a function of the context where it depends on the number of images.
    """
    return lambda function: RegisteredCheck(function, name, question, threshold, reference)


@dataclass(frozen=True, repr=False)
class Audit:
    """All checks of one model, and the verdict. `print(audit)` is a short table."""

    checks: tuple[Check, ...]
    verdict: Verdict
    reason: str
    """Why, in a sentence with the figure behind it."""
    metadata: dict[str, Any]
    """Model, data, images, eps, norm, attack, draws, seed, versions, seconds, the command that repeats it."""

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r} in this audit: {', '.join(c.name for c in self.checks)}")

    def __repr__(self) -> str:
        """The verdict and its reason; a line for each check that did not pass, and the names of those that did."""
        lines = textwrap.wrap(f"{self.verdict}: {self.reason}", WIDTH)
        doubtful = [c for c in self.checks if c.outcome != "pass"]
        wide = max((len(c.name) for c in doubtful), default=0)
        for c in doubtful:
            line = f"{c.outcome:<12}  {c.name:<{wide}}  "
            lines.append(line + textwrap.shorten(c.reason, WIDTH - len(line), placeholder=" …"))
        passed = ", ".join(c.name for c in self.checks if c.outcome == "pass")
        lines += textwrap.wrap(f"{'pass':<12}  {passed}", WIDTH, subsequent_indent=14 * " ") if passed else []
        return "\n".join(lines)

    @property
    def accuracies(self) -> str:
        """The audited accuracy, in words: `clean 88.3%, attacked 41.4%, lowest found 40.6%`."""
        names = {"clean": "clean", "attacked": "attacked", "lowest": "lowest found"}
        known = {words: self.metadata.get(key) for key, words in names.items()}
        return ", ".join(f"{words} {found['accuracy']:.1%}" for words, found in known.items() if found is not None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """As JSON in PATH.json, whole or not at all. PATH may carry the ending.

        Returns:
            PATH.json.
        """
        path = with_ending(path, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_dict(), indent=2, allow_nan=False).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Audit":
        """What `save` wrote."""
        found = json.loads(Path(path).read_text())
        checks = tuple(Check(**check) for check in found.pop("checks"))
        return cls(checks=checks, **found)
