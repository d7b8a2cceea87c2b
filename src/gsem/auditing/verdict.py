"""The verdict's rules, all in this file; docs/audit.md explains them.

INVALID   a flagged check says that the number is no measurement: the gradient that the attacks follow is masked or
          missing in over 5% of the images; an attack that may do anything leaves over 5% standing, or the accuracy
          stays over 5 points above chance or rises by over 5 points with eps; the attack finds less than half of
          what was planted; or a mitigation, more effort or a black-box attack lowers the accuracy by over 5 points
          (the interval of the difference above 0). Such checks have `invalidates`.
SUSPECT   any other check is flagged, or the binarization test has no answer, or a check could not be made.
TRUSTED   none of that: every check that was asked passed. Where only some were asked, it is never said.
"""

from collections.abc import Sequence

from gsem.auditing.check import Check, Verdict

# An answer of these is needed for trust; others may be inconclusive for want of images.
NEEDED = ("binarization",)


def verdict(checks: Sequence[Check], *, complete: bool) -> tuple[Verdict, str]:
    """The verdict, and why in a sentence.

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
        return "SUSPECT", f"Nothing speaks against the robust accuracy, but a check has no answer: {_because(barring)}."
    if not complete:
        return "SUSPECT", "Nothing speaks against the robust accuracy, but only some checks were made."
    rest = f" ({', '.join(c.name for c in unsure)}: inconclusive)" if unsure else ""
    return "TRUSTED", f"All {len(checks) - len(unsure)} checks with an answer passed{rest}."


def _because(checks: Sequence[Check]) -> str:
    first, *others = checks
    more = f"; and {', '.join(c.name for c in others)}" if others else ""
    return f"{first.name}: {first.reason}{more}"
