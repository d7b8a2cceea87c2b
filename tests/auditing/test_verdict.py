"""The rules of the verdict."""

from gsem.auditing import Check
from gsem.auditing.verdict import verdict


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
