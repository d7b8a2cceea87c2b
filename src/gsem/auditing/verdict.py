"""The rules of the verdict: TRUSTED, SUSPECT or INVALID, from the outcomes of the checks."""

from collections.abc import Sequence

from gsem.auditing.check import Check, Verdict

# These checks must have an answer for TRUSTED; others may be inconclusive because there are too few images.
NEEDED = ("binarization",)


def verdict(checks: Sequence[Check], *, complete: bool) -> tuple[Verdict, str]:
    """The verdict, and why in a sentence. All rules are in this function; docs/audit.md explains them.

    INVALID: a flagged check has `invalidates`: the number is no measurement. The gradient that the attacks follow is
        masked, or missing in over 5% of the images; an attack without a bound does not break over 5% of them; the
        accuracy stays over 5 points above chance, or rises by over 5 points, as eps grows; the attack finds less than
        half of what was planted; or a mitigation, more effort or a black-box attack lowers the accuracy by over 5
        points (the interval of the difference above 0).
    SUSPECT: any other check is flagged, the binarization test has no answer, a check could not be made, or only some
        checks were made.
    TRUSTED: all checks were made, and none of the above.

    Args:
        complete: whether all checks were made.
    """
    flagged = [c for c in checks if c.outcome == "flag"]
    invalid = [c for c in flagged if c.invalidates]
    if invalid:
        return "INVALID", f"The robust accuracy is no measurement: {_because(invalid)}."
    if flagged:
        return "SUSPECT", f"The robust accuracy may be too high: {_because(flagged)}."
    unsure = [c for c in checks if c.outcome == "inconclusive"]
    barring = [c for c in unsure if c.name in NEEDED or c.figure is None]
    if barring:
        return "SUSPECT", f"No check found the robust accuracy too high, but one has no answer: {_because(barring)}."
    if not complete:
        return "SUSPECT", "No check found the robust accuracy too high, but only some checks were made."
    rest = f" ({', '.join(c.name for c in unsure)}: inconclusive)" if unsure else ""
    return "TRUSTED", f"All {len(checks) - len(unsure)} checks with an answer passed{rest}."


def _because(checks: Sequence[Check]) -> str:
    first, *others = checks
    more = f"; and {', '.join(c.name for c in others)}" if others else ""
    return f"{first.name}: {first.reason}{more}"
