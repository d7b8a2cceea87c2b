"""The progress of an audit, and the time left, estimated from the passes that remain."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gsem.attacks import Step
from gsem.attacks.suite import AttackSpec
from gsem.auditing.check import Check
from gsem.auditing.context import AuditContext
from gsem.auditing.partial import Finished
from gsem.auditing.sweeps import boxes
from gsem.evaluation.evaluate import REPORT_EVERY

# Of the whole work, before the time it took says anything.
ENOUGH = 0.02
# A pass with a gradient, in passes without.
GRADIENT = 3.0
# Images that a gradient attack leaves for the next one, and steps that it needs without a bound: typical shares.
STANDING, UNBOUNDED = 0.5, 0.1


@dataclass(frozen=True)
class Progress:
    """Where an audit stands, for whoever shows it."""

    check: str
    number: int
    """Of the check, from 1, of `checks`."""
    checks: int
    doing: str
    """What it does now; empty when it has ended."""
    ended: Check | None = None
    seconds_left: float | None = None
    """Until the end of the audit, by the work that the checks plan and the time that finished ones took; None while
    too little is finished."""
    earlier: bool = False
    """Whether the check was finished by the interrupted audit that this one goes on with."""


def attack_passes(s: AuditContext, attack: AttackSpec) -> float:
    """For each image that it attacks, at most."""
    o = s.options(attack)
    each = o.get("eot", 1) * o.get("restarts", 1)
    if "queries" in o:
        return each * o["queries"]
    return GRADIENT * each * o.get("steps", 1) * max(1, o.get("targets") or 1)


def planned(s: AuditContext, names: Sequence[str]) -> dict[str, float]:
    """Passes per image of each check, roughly; the first check that needs the attacks in question runs them."""
    lead, white = attack_passes(s, s.primary_attack), sum(attack_passes(s, a) for a in s.white)
    scored = 2.0 * s.draws
    few = min(s.draws, 2 if s.quick else 5)
    curves = sum(key in s.options(s.primary_attack) for key in ("steps", "restarts")) + s.stochastic
    passes = {
        "randomness": 4.0,
        "gradient": (8 if s.quick else 16) * few * (18 + GRADIENT),
        "unavailable": GRADIENT * s.options(s.primary_attack)["eot"],
        "unstable": 101.0 * few,
        "silent_success": scored,
        "incomplete": 1.0,
        "transfer": scored,
        "unconstrained": UNBOUNDED * white + scored,
        "binarization": (128 if s.quick else 256) + white + 200 * (3 if s.stochastic else 1),
        "sweeps": STANDING * (3 * lead + curves * (white + 2 * lead)) + (3 if s.quick else 10) * scored,
        "blackbox": STANDING * sum(attack_passes(s, a) for a in boxes(s)),
        "noise": 3 * white / max(1, s.options(s.primary_attack)["eot"]) if s.stochastic or s.source_models else 1.0,
    }
    for work, users in (
        (lead + 2 * scored, ("silent_success", "incomplete", "transfer", "sweeps", "blackbox", "noise")),
        (STANDING * (white - lead), ("sweeps", "blackbox", "noise")),
    ):
        first = next((name for name in names if name in users), None)
        if first is not None:
            passes[first] += work
    return {name: passes[name] for name in names}


class TimeLeft:
    """An estimate from the planned work and the seconds that finished checks took."""

    def __init__(self, plan: Mapping[str, float]):
        self.plan: dict[str, float] = dict(plan)
        self.took: dict[str, float] = {}

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


class Teller:
    """Calls `report`, if there is one."""

    def __init__(self, on_progress: Callable[[Progress], None] | None):
        self.on_progress, self.number, self.name, self.doing = on_progress, 0, "", ""
        self.time = TimeLeft({})
        self.began = self.told = time.monotonic()

    def expects(self, plan: Mapping[str, float], took: Mapping[str, float]) -> None:
        """The work of each check, and the seconds of those that are finished."""
        self.time = TimeLeft(plan)
        for name, seconds in took.items():
            self.time.ended(name, seconds)

    def begins(self, name: str) -> None:
        self.name, self.number, self.began = name, self.number + 1, time.monotonic()
        self.say("begins")

    def say(self, doing: str) -> None:
        self.doing = doing
        self._tell()

    def on_step(self, step: Step) -> None:
        """A step of an attack was made: what is done goes on."""
        if time.monotonic() - self.told >= REPORT_EVERY:
            self._tell()

    def ended(self, part: Finished, *, earlier: bool) -> None:
        self.time.ended(self.name, part.seconds)
        self.doing = ""
        self._tell(ended=part.check, earlier=earlier)

    def _tell(self, ended: Check | None = None, earlier: bool = False) -> None:
        if self.on_progress is None:
            return
        self.told = time.monotonic()
        left = self.time.left(None if ended else self.name, self.told - self.began)
        self.on_progress(Progress(self.name, self.number, len(self.time.plan), self.doing, ended, left, earlier))
