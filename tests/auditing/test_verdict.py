"""The rules of the verdict: what may be said of the claimed figure."""

import pytest

from gsem.auditing import Check
from gsem.auditing.check import Figures
from gsem.auditing.verdict import verdict
from gsem.evaluation.statistics import Interval


def made(outcome, **how) -> Check:
    return Check(**{"name": "x", "title": "", "figure": 1.0, "threshold": "", "outcome": outcome, "reason": "because"}
                 | {"advice": "", "reference": ""} | how)  # fmt: skip


def measured(claimed: float | None, found: float, *, low: float | None = None, gap_low: float | None = None) -> Figures:
    """A claimed and a found accuracy, each ± 4 points; the gap between them ± 2 points, if its low end is not given."""
    gap = None if claimed is None else claimed - found
    return Figures(
        claimed=None if claimed is None else Interval(claimed, claimed - 0.04, claimed + 0.04),
        found=Interval(found, found - 0.04 if low is None else low, found + 0.04),
        gap=None if gap is None else Interval(gap, gap - 0.02 if gap_low is None else gap_low, gap + 0.02),
        attacks="apgd:loss=margin",
    )


AGREE, BELOW, ZERO = measured(0.41, 0.405), measured(0.72, 0.69), measured(0.0, 0.0, low=0.0, gap_low=0.0)
PASSED = made("pass", name="p")
ANSWERED = made("flag", name="gradient", answered=True)
OPEN = made("flag", name="gradient")
PLANTED, STUCK = made("flag", name="binarization", figure=0.2), made("flag", name="unconstrained", figure=0.9)


@pytest.mark.parametrize(
    ("checks", "figures", "word"),
    [
        # Claimed and found agree within noise, and nothing was flagged, or every flag is answered.
        ([PASSED], AGREE, "TRUSTED"),
        ([PASSED, ANSWERED], AGREE, "TRUSTED"),
        ([PASSED, made("inconclusive", name="sweeps")], AGREE, "TRUSTED"),
        ([PASSED, made("not applicable", figure=None)], AGREE, "TRUSTED"),
        # Nothing is left to lose, whatever is flagged.
        ([PASSED, OPEN], ZERO, "TRUSTED"),
        ([PLANTED, STUCK], ZERO, "TRUSTED"),
        ([OPEN], measured(None, 0.01, low=0.0), "TRUSTED"),
        ([OPEN], measured(None, 0.02, low=0.01), "TRUSTED"),
        ([OPEN], measured(None, 0.02, low=0.011), "SUSPECT"),
        # A lower figure is known.
        ([PASSED], BELOW, "OVERSTATED"),
        ([PASSED, ANSWERED], BELOW, "OVERSTATED"),
        ([PASSED, OPEN], BELOW, "OVERSTATED"),
        ([OPEN], measured(0.97, 0.0, low=0.0), "OVERSTATED"),
        # … not where the difference may be noise, or is below the tolerance.
        ([PASSED], measured(0.72, 0.69, gap_low=0.0), "TRUSTED"),
        ([PASSED], measured(0.72, 0.711, gap_low=0.001), "TRUSTED"),
        ([PASSED], measured(0.72, 0.709, gap_low=0.001), "OVERSTATED"),
        # A flag that no mitigation answers.
        ([PASSED, OPEN], AGREE, "SUSPECT"),
        ([ANSWERED, OPEN], AGREE, "SUSPECT"),
        ([OPEN], measured(None, 0.3), "SUSPECT"),
        # No attack could be made to work.
        ([PLANTED, STUCK], AGREE, "INVALID"),
        ([made("inconclusive", name="binarization", figure=None), STUCK], AGREE, "INVALID"),
        # … which is not so if one of the two was answered, or nearly everything was found.
        ([made("flag", name="binarization", figure=0.2, answered=True), STUCK], AGREE, "SUSPECT"),
        ([PLANTED, made("flag", name="unconstrained", figure=0.9, answered=True)], AGREE, "SUSPECT"),
        ([made("flag", name="binarization", figure=0.2, again=0.9), STUCK], AGREE, "SUSPECT"),
        ([PLANTED, made("flag", name="unconstrained", figure=0.9, again=0.01)], AGREE, "SUSPECT"),
        # A check that is needed has no answer, or could not be made.
        ([PASSED, made("inconclusive", name="binarization")], AGREE, "INCOMPLETE"),
        ([PASSED, made("inconclusive", name="gradient", figure=None)], AGREE, "INCOMPLETE"),
        ([OPEN, made("inconclusive", name="binarization")], AGREE, "SUSPECT"),
    ],
)
def test_the_verdict_is_about_the_figure(checks, figures, word):
    found, reason = verdict(checks, complete=True, figures=figures)
    assert found == word, reason
    if word == "OVERSTATED":
        assert f"{100 * figures.gap.mean:.1f} points" in reason and "apgd:loss=margin" in reason
    assert all(c.name in reason for c in checks if c.outcome == "flag" and not c.answered)


def test_some_of_the_checks_are_not_all():
    """A lower figure is one, whatever was not asked; any other answer needs all checks."""
    for checks, figures in (([PASSED], AGREE), ([OPEN], AGREE), ([PASSED], ZERO), ([PASSED], None), ([OPEN], None)):
        assert verdict(checks, complete=False, figures=figures)[0] == "INCOMPLETE"
    assert verdict([OPEN], complete=False, figures=BELOW)[0] == "OVERSTATED"
    assert "gradient" in verdict([OPEN], complete=False, figures=AGREE)[1]
