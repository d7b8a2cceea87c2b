"""The registry of checks, and the rules of the verdict."""

from types import SimpleNamespace

from gsem.auditing import Check
from gsem.auditing.audit import CHECKS
from gsem.auditing.check import Finding, check, verdict


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
        return Finding(3.0, "flag", "it is 3", "Make it smaller.", invalidates=True, details={"all": [3]})

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
        invalidates=True,
        details={"all": [3]},
    )


def test_a_check_that_torch_cannot_make_has_no_answer():
    @check(name="broken", question="Is it?", threshold="never", reference="A, 2018")
    def broken(ctx) -> Finding:
        raise RuntimeError("out of memory")

    found = broken(SimpleNamespace())
    assert (found.outcome, found.figure, found.threshold) == ("inconclusive", None, "never")
    assert "out of memory" in found.reason and found.advice


def made(outcome, **how) -> Check:
    return Check(**{"name": "x", "title": "", "figure": 1.0, "threshold": "", "outcome": outcome, "reason": "because"}
                 | {"advice": "", "reference": ""} | how)  # fmt: skip


def test_the_rules_of_the_verdict():
    passed = made("pass", name="p")
    assert verdict([passed], complete=True)[0] == "TRUSTED"
    assert verdict([passed], complete=False)[0] == "SUSPECT"
    assert verdict([passed, made("flag")], complete=True)[0] == "SUSPECT"
    word, reason = verdict([passed, made("flag"), made("flag", name="z", invalidates=True)], complete=True)
    assert word == "INVALID" and "z: because" in reason
    # That a check invalidates has no effect while it passes.
    assert verdict([made("pass", invalidates=True)], complete=True)[0] == "TRUSTED"
    assert verdict([passed, made("inconclusive", name="binarization")], complete=True)[0] == "SUSPECT"
    assert verdict([passed, made("inconclusive", name="sweeps")], complete=True)[0] == "TRUSTED"
    assert verdict([passed, made("inconclusive", name="gradient", figure=None)], complete=True)[0] == "SUSPECT"
