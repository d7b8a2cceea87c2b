"""The rules of the verdict: which accuracy may be quoted, from the figures and the outcomes of the checks."""

from collections.abc import Sequence

from gsem.auditing.check import GREATLY, TOLERANCE, Check, Figures, Verdict

# These checks must have an answer for TRUSTED; others may be inconclusive because there are too few images.
NEEDED = ("binarization",)
# Of the planted points, so few found mean that the attacks do not work.
HOPELESS = 0.50


def verdict(checks: Sequence[Check], *, complete: bool, figures: Figures | None) -> tuple[Verdict, str]:
    """The verdict, and why in a sentence. All rules are in this function, in their order; docs/audit.md explains them.

    OVERSTATED: the accuracy that was found is lower than the claimed one, by over a point and beyond noise (the
        interval of the difference lies above 0).
    INCOMPLETE: else, only some checks were made.
    TRUSTED: else, nothing is left to lose: the interval of the found accuracy reaches down to a point or less. (Of a
        network with noise, some images are right in a few draws whatever the attack does.)
    INVALID: else, no attack could be made to work: after all repairs, over 5% of the images are not broken without a
        bound, and less than half of the planted points were found, or none could be planted.
    SUSPECT: else, a flag is not answered: repaired as the check advises, the attack fails the check again, or there is
        no repair.
    INCOMPLETE: else, `binarization` has no answer, or a check could not be made.
    TRUSTED: else.

    Args:
        complete: whether all checks were made.
        figures: None where no check needed the attacks.
    """
    flagged = [c for c in checks if c.outcome == "flag"]
    unanswered = [c for c in flagged if not c.answered]
    if figures is not None and figures.gap is not None and figures.gap.mean > TOLERANCE and figures.gap.low > 0:
        return "OVERSTATED", _overstated(figures, flagged)
    if not complete:
        seen = f" Flagged: {_because(flagged)}." if flagged else " None of them is flagged."
        return "INCOMPLETE", f"Only some of the checks were made.{seen}"
    if figures is not None and figures.found.low <= TOLERANCE:
        seen = f" Flagged, but of no effect: {_because(flagged)}." if flagged else ""
        return "TRUSTED", f"Nothing is left to lose: the accuracy found is {figures.found.mean:.1%}.{seen}"
    named = {c.name: c for c in checks}
    if _fails(named.get("unconstrained"), over=GREATLY) and _fails(named.get("binarization"), under=HOPELESS):
        return "INVALID", f"No attack could be made to work, so the accuracy is not measured: {_because(flagged)}."
    if unanswered:
        quoted = "" if figures is None else f" of {figures.found.mean:.1%}"
        return "SUSPECT", f"The accuracy{quoted} may be too high; not answered: {_because(unanswered)}."
    unsure = [c for c in checks if c.outcome == "inconclusive"]
    barring = [c for c in unsure if c.name in NEEDED or c.figure is None]
    if barring:
        return (
            "INCOMPLETE",
            f"Nothing shows that the accuracy is too high, but a check has no answer: {_because(barring)}.",
        )
    return "TRUSTED", _trusted(checks, figures, flagged, unsure)


def _fails(check: Check | None, *, over: float | None = None, under: float | None = None) -> bool:
    """Whether, after all repairs, the figure is over or under a bound, or there is none."""
    if check is None or check.outcome in ("pass", "not applicable") or check.answered:
        return False
    figure = check.figure if check.again is None else check.again
    if figure is None:
        return True
    return (over is not None and figure > over) or (under is not None and figure < under)


def _overstated(figures: Figures, flagged: Sequence[Check]) -> str:
    assert figures.claimed is not None and figures.gap is not None
    gap, attacks = figures.gap, figures.attacks.replace(",", ", ")
    why = f" Flagged: {_because(flagged)}." if flagged else ""
    return (
        f"The claimed {figures.claimed.mean:.1%} is {100 * gap.mean:.1f} points ({100 * gap.low:.1f} – "
        f"{100 * gap.high:.1f}) above the {figures.found.mean:.1%} that {attacks} leave.{why}"
    )


def _trusted(
    checks: Sequence[Check], figures: Figures | None, flagged: Sequence[Check], unsure: Sequence[Check]
) -> str:
    agree = ""
    if figures is not None and figures.claimed is not None:
        claimed, found = f"{figures.claimed.mean:.1%}", f"{figures.found.mean:.1%}"
        agree = f"The claimed {claimed} and the {found} found agree within noise or a point. "
    asked = [c for c in checks if c.outcome in ("pass", "flag")]
    rest = f" ({', '.join(c.name for c in unsure)}: inconclusive)" if unsure else ""
    if flagged:
        return f"{agree}Every flag is answered by a repaired attack ({', '.join(c.name for c in flagged)}){rest}."
    return f"{agree}All {len(asked)} checks with an answer passed{rest}."


def _because(checks: Sequence[Check]) -> str:
    first, *others = checks
    more = f"; and {', '.join(c.name for c in others)}" if others else ""
    return f"{first.name}: {first.reason}{more}"
