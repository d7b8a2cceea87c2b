"""A check and an audit as they are recorded, and the decorator that registers a check."""

import json
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gsem._env import DEVICE_FAULTS
from gsem._io import write_atomically
from gsem._text import between
from gsem.distributed import OtherProcessFailed, ProcessLost
from gsem.evaluation.result import with_ending
from gsem.evaluation.statistics import Interval

if TYPE_CHECKING:
    from gsem.auditing.context import AuditContext

Needs = Literal["gradient", "path"]
"""What a check needs, to apply: a gradient of the model, or also an attack that follows it step by step."""
Outcome = Literal["pass", "flag", "inconclusive", "not applicable"]
Verdict = Literal["TRUSTED", "OVERSTATED", "SUSPECT", "INVALID", "INCOMPLETE"]
NOT_THE_MODELS_FAULT: tuple[type[Exception], ...] = (*DEVICE_FAULTS, ProcessLost, OtherProcessFailed)
WIDTH = 80  # of the lines of `print(audit)`
# By how much an accuracy must fall to count as lower at all, and to count as much lower.
SLIGHTLY, GREATLY = 0.003, 0.05
# By how much a claim may exceed what was found. Each further attack may find slightly more, and an audit tries many.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Finding:
    """What the function of a check returns. The fields are those of `Check`."""

    figure: float | None
    outcome: Outcome
    reason: str
    advice: str = ""
    again: float | None = None
    answered: bool = False
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class Check:
    """One question about the robust accuracy, and its answer."""

    name: str
    """As on the command line: `gsem audit MODEL --only NAME` repeats it."""
    title: str
    """The question, in one line."""
    figure: float | None
    """What was measured; None where the check could not be made, or does not apply."""
    threshold: str
    """When it is flagged, in words with the figure: `over 0.10`, `interval outside [0.93, 1.07]`."""
    outcome: Outcome
    reason: str
    """A sentence with the figures behind the outcome."""
    advice: str
    """What to do about it; empty where it passed."""
    reference: str
    """The paper the check comes from."""
    again: float | None = None
    """Of a flagged check: the figure when it is asked again of the repaired attack; None where it was not."""
    answered: bool = False
    """Of a flagged check: whether it passes then."""
    details: dict[str, Any] | None = None
    """The check's data, for tables and charts (values as JSON takes them)."""

    @property
    def outcome_in_words(self) -> str:
        """The outcome; `flag, answered` where the repaired attack passes."""
        return f"{self.outcome}, answered" if self.outcome == "flag" and self.answered else self.outcome


@dataclass(frozen=True)
class Figures:
    """What the audit is about: the accuracy that is claimed, and the lowest of all that was tried."""

    claimed: Interval | None
    """Under the attacks whose accuracy is claimed, worst case per image; None where none of them can be run."""
    found: Interval
    """Under all attacks of the audit, worst case per image."""
    gap: Interval | None
    """By how much `found` is lower, image by image."""
    attacks: str
    """The attacks that reach `found`, as `gsem evaluate --attacks` takes them."""


@dataclass(frozen=True)
class RegisteredCheck:
    """The function of a check with its name, question, threshold and paper. A call with a context gives a `Check`."""

    function: "Callable[[AuditContext], Finding]"
    name: str
    question: str
    threshold: "str | Callable[[AuditContext], str]"
    reference: str
    needs: Needs | None = None
    """Without it the check is not applicable."""

    def __call__(self, ctx: "AuditContext") -> Check:
        threshold = self.threshold if isinstance(self.threshold, str) else self.threshold(ctx)
        found = self._finding(ctx)
        return Check(name=self.name, title=self.question, threshold=threshold, reference=self.reference, **vars(found))

    def _finding(self, ctx: "AuditContext") -> Finding:
        if self.needs is not None and (why := ctx.lacks(self.needs)) is not None:
            return Finding(None, "not applicable", why)
        try:
            return self.function(ctx)
        except NOT_THE_MODELS_FAULT:
            raise
        except RuntimeError as error:  # of torch: a model that cannot be differentiated
            reason = f"the check could not be made: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Finding(None, "inconclusive", reason, "See the check unavailable.")


def check(
    *,
    name: str,
    question: str,
    threshold: "str | Callable[[AuditContext], str]",
    reference: str,
    needs: Needs | None = None,
) -> "Callable[[Callable[[AuditContext], Finding]], RegisteredCheck]":
    """Decorator: make a check of a function (context) -> Finding. `audit.CHECKS` collects the checks of each module.

    Args:
        threshold: in words, or a function of the context where it depends on the number of images.
        needs: without which the check is not applicable.
    """
    return lambda function: RegisteredCheck(function, name, question, threshold, reference, needs)


class FormerAudit(ValueError):
    """A file holds an audit of an earlier version of gsem."""


@dataclass(frozen=True, repr=False)
class Audit:
    """All checks of one model, and the verdict. `print(audit)` is a short table."""

    checks: tuple[Check, ...]
    verdict: Verdict
    reason: str
    """Why, in a sentence with the figure behind it."""
    metadata: dict[str, Any]
    """Model, data, images, eps, norm, attack, draws, seed, versions, seconds, the command that repeats it; and the
    accuracies "clean", "claimed", "found" with their intervals, and "reached_by", the attacks that reach "found"."""

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r} in this audit: {', '.join(c.name for c in self.checks)}")

    def __repr__(self) -> str:
        """The figures, the verdict and its reason; a line for each check that did not pass; the names of the others."""
        lines = textwrap.wrap(self.accuracies, WIDTH)
        lines += textwrap.wrap(f"{self.verdict}: {self.reason}", WIDTH)
        doubtful = [c for c in self.checks if c.outcome not in ("pass", "not applicable")]
        wide = max((len(c.name) for c in doubtful), default=0)
        for c in doubtful:
            line = f"{c.outcome_in_words:<12}  {c.name:<{wide}}  "
            lines.append(line + textwrap.shorten(c.reason, WIDTH - len(line), placeholder=" …"))
        for outcome in ("pass", "not applicable"):
            names = ", ".join(c.name for c in self.checks if c.outcome == outcome)
            lines += textwrap.wrap(f"{outcome:<12}  {names}", WIDTH, subsequent_indent=14 * " ") if names else []
        return "\n".join(lines)

    @property
    def found(self) -> Interval | None:
        """The lowest accuracy of all that was tried, worst case per image; None where no check needed an attack."""
        return self._interval("found")

    @property
    def claimed(self) -> Interval | None:
        """The accuracy under the attacks whose accuracy is claimed; None where none of them ran."""
        return self._interval("claimed")

    @property
    def found_command(self) -> str | None:
        """The command that attacks the model so that `found` is reached, to within noise; None where it is not known.

        Metadata hold its beginning as "evaluate".
        """
        begins, attacks = (self.metadata.get(key) for key in ("evaluate", "reached_by"))
        return None if not begins or not attacks else f"{begins} --attacks {shlex.quote(f'clean,{attacks}')}"

    def _interval(self, name: str) -> Interval | None:
        known = self.metadata.get(name)
        return None if known is None else Interval(known["accuracy"], known["low"], known["high"])

    @property
    def accuracies(self) -> str:
        """In words: `clean 88.3%, claimed 41.4%, found 40.6% (32.0 – 49.2)`; the interval is that of 95%."""
        known = {name: self.metadata.get(name) for name in ("clean", "claimed", "found")}
        parts = [f"{name} {each['accuracy']:.1%}" for name, each in known.items() if each is not None]
        found = known["found"]
        interval = "" if found is None else f" ({between(found['low'], found['high'])})"
        return ", ".join(parts) + interval

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
        """What `save` wrote.

        Raises:
            FormerAudit: an audit whose verdict had other rules.
        """
        found = json.loads(Path(path).read_text())
        if any("invalidates" in check for check in found["checks"]):
            raise FormerAudit("it was made by an earlier version of gsem, whose verdicts had other rules: audit again")
        checks = tuple(Check(**check) for check in found.pop("checks"))
        return cls(checks=checks, **found)
