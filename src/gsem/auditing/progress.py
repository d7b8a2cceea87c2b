"""The progress of an audit, and the time left, estimated from the passes that remain."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gsem.attacks import Step
from gsem.attacks.suite import GRADIENT
from gsem.auditing.check import Check
from gsem.auditing.context import AuditContext
from gsem.auditing.partial import Finished
from gsem.evaluation.work import REPORT_EVERY

# Share of the whole work that must be finished before the time left is estimated.
ENOUGH = 0.02
# Images that a gradient attack leaves for the next one, and steps that it needs without a bound: typical shares.
REMAINING, UNBOUNDED = 0.5, 0.1


@dataclass(frozen=True)
class Progress:
    """How far an audit is, for display."""

    check: str
    number: int
    """Number of the check, from 1 to `checks`."""
    checks: int
    doing: str
    """What it does now; empty when it has ended."""
    ended: Check | None = None
    seconds_left: float | None = None
    """Until the end of the audit, by the work that the checks plan and the time that finished ones took; None while
    too little is finished."""
    earlier: bool = False
    """Whether the check was finished before the audit was interrupted, and read from disk now."""


def planned(ctx: AuditContext, names: Sequence[str]) -> dict[str, float]:
    """Passes per image of each check, roughly; 1 for a check that is not listed here.

    The first check that needs the audited attacks runs them.
    """
    options = ctx.options(ctx.primary_attack)
    primary, white = ctx.passes(ctx.primary_attack), sum(ctx.passes(a) for a in ctx.white)
    scored, losses = 2.0 * ctx.draws, sum(ctx.passes(a) for a in ctx.other_losses)
    curves = sum(key in options for key in ("steps", "restarts")) + ctx.stochastic
    passes = {
        "randomness": 4.0,
        "gradient": (8 if ctx.quick else 16) * ctx.few_draws * (18 + GRADIENT),
        "unavailable": GRADIENT * options["eot"],
        "unstable": 101.0 * ctx.few_draws,
        "silent_success": scored,
        "transfer": scored,
        "unconstrained": UNBOUNDED * white + scored,
        "binarization": (128 if ctx.quick else 256) + white + 200 * (3 if ctx.stochastic else 1),
        "sweeps": REMAINING * (3 * primary + curves * (white + 2 * primary) + losses)
        + (3 if ctx.quick else 10) * scored,
        "blackbox": REMAINING * sum(ctx.passes(a) for a in ctx.black_box),
        "noise": 3 * white / max(1, options["eot"]) if ctx.stochastic or ctx.source_models else 1.0,
    }
    plan = {name: passes.get(name, 1.0) for name in names}
    for work, users in (
        (primary + 2 * scored, ("silent_success", "incomplete", "transfer", "sweeps", "blackbox", "noise")),
        (REMAINING * (white - primary), ("sweeps", "blackbox", "noise")),
    ):
        first = next((name for name in names if name in users), None)
        if first is not None:
            plan[first] += work
    return plan


class TimeLeft:
    """An estimate from the planned work of each check and the seconds that finished ones took."""

    def __init__(self, plan: Mapping[str, float], took: Mapping[str, float]):
        self.plan, self.took = dict(plan), dict(took)

    def ended(self, name: str, seconds: float) -> None:
        self.took[name] = seconds

    def left(self, current: str | None, elapsed: float) -> float | None:
        """Seconds until the end; None while too little is known.

        Args:
            current: the check that is being made, since `elapsed` seconds; None between two.
        """
        done = sum(self.plan[name] for name in self.took)
        if done < ENOUGH * sum(self.plan.values()):
            return None
        rate = sum(self.took.values()) / done
        rest = {name: rate * work for name, work in self.plan.items() if name not in self.took}
        now = rest.pop(current, 0.0) if current is not None else 0.0
        return max(0.0, now - elapsed) + sum(rest.values())


class ProgressReporter:
    """Calls `on_progress`, if there is one, with what the audit does."""

    def __init__(self, on_progress: Callable[[Progress], None] | None):
        self.on_progress, self.number, self.name, self.doing = on_progress, 0, "", ""
        self.time = TimeLeft({}, {})
        self.began = self.reported = time.monotonic()

    def expects(self, plan: Mapping[str, float], took: Mapping[str, float]) -> None:
        """The work of each check, and the seconds of those that are finished."""
        self.time = TimeLeft(plan, took)

    def begins(self, name: str) -> None:
        self.name, self.number, self.began = name, self.number + 1, time.monotonic()
        self.report("begins")

    def report(self, doing: str) -> None:
        self.doing = doing
        self._call()

    def on_step(self, step: Step) -> None:
        """A step of an attack was made: the last report is repeated, with the time left."""
        if time.monotonic() - self.reported >= REPORT_EVERY:
            self._call()

    def ended(self, part: Finished, *, earlier: bool) -> None:
        self.time.ended(self.name, part.seconds)
        self.doing = ""
        self._call(ended=part.check, earlier=earlier)

    def _call(self, ended: Check | None = None, earlier: bool = False) -> None:
        if self.on_progress is None:
            return
        self.reported = time.monotonic()
        left = self.time.left(None if ended else self.name, self.reported - self.began)
        self.on_progress(Progress(self.name, self.number, len(self.time.plan), self.doing, ended, left, earlier))
