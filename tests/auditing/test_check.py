"""The registry of checks."""

from types import SimpleNamespace

from gsem.auditing import Check
from gsem.auditing.audit import CHECKS
from gsem.auditing.check import Finding, check


def test_the_checks_are_registered_in_the_order_of_the_documents():
    assert list(CHECKS) == [
        "randomness",
        "gradient",
        "unavailable",
        "unstable",
        "silent_success",
        "incomplete",
        "transfer",
        "unconstrained",
        "binarization",
        "sweeps",
        "blackbox",
        "noise",
    ]
    assert all(c.question.endswith("?") and c.threshold and c.reference for c in CHECKS.values())


def test_a_check_is_a_function_that_finds_and_what_the_decorator_adds():
    @check(name="size", question="Is it small?", threshold=lambda ctx: f"over {ctx.limit}", reference="A, 2018")
    def size(ctx) -> Finding:
        return Finding(3.0, "flag", "it is 3", "Make it smaller.", again=1.0, answered=True, details={"all": [3]})

    found = size(SimpleNamespace(limit=2))
    assert found == Check(
        name="size",
        title="Is it small?",
        figure=3.0,
        threshold="over 2",
        outcome="flag",
        reason="it is 3",
        advice="Make it smaller.",
        reference="A, 2018",
        again=1.0,
        answered=True,
        details={"all": [3]},
    )


def test_a_check_that_torch_cannot_make_has_no_answer():
    @check(name="broken", question="Is it?", threshold="never", reference="A, 2018")
    def broken(ctx) -> Finding:
        raise RuntimeError("out of memory")

    found = broken(SimpleNamespace())
    assert (found.outcome, found.figure, found.threshold) == ("inconclusive", None, "never")
    assert "out of memory" in found.reason and found.advice


def test_a_check_without_what_it_needs_does_not_apply():
    @check(name="slope", question="Is it?", threshold="never", reference="A, 2018", needs="gradient")
    def slope(ctx) -> Finding:
        return Finding(1.0, "pass", "it is")

    assert slope(SimpleNamespace(lacks=lambda needs: None)).outcome == "pass"
    found = slope(SimpleNamespace(lacks=lambda needs: f"there is no {needs}"))
    assert (found.outcome, found.figure, found.reason) == ("not applicable", None, "there is no gradient")
