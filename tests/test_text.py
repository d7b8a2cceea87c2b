"""Audits and runs as they print, and the numbers in all tables."""

from dataclasses import replace
from pathlib import Path

import gsem
from gsem._text import between, columns, duration, percent, pixels
from gsem.auditing import Audit, Check

EPOCHS = [{"epoch": e, "loss": 1.0, "clean": 0.2 * e, "robust": 0.1 * e} for e in range(1, 4)]


def check(name: str, outcome: str, figure: float | None = None, reason: str = "it holds") -> Check:
    return Check(name, "A question?", figure, "over 0.10", outcome, reason, "", "A, 2018", details={"x": [0.5] * 9999})


def test_an_audit_prints_its_verdict_its_reason_and_every_check():
    names = ["randomness", "gradient", "unavailable", "unstable", "incomplete", "transfer", "unconstrained", "noise"]
    checks = (
        *(check(name, "pass", 0.01) for name in names),
        check(
            "silent_success",
            "flag",
            0.2,
            "apgd100-eot20 passed a point that breaks 3 images of 128, and returned another",
        ),
        check("binarization", "inconclusive", None, "random search finds 60% of the planted points"),
    )
    reason = "The robust accuracy may be too high: 3 images of 128 are broken by points that were passed."
    lines = repr(Audit(checks, "SUSPECT", reason, {})).splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= 80
    assert " ".join(lines).startswith(f"SUSPECT: {reason} ")
    assert lines[2].startswith("flag          silent_success  apgd100-eot20 passed a point that breaks 3")
    assert lines[3] == "inconclusive  binarization    random search finds 60% of the planted points"
    assert lines[4].startswith("pass          randomness, gradient, ")
    assert all(name in " ".join(lines[4:]) for name in names)
    assert str(Audit(checks, "SUSPECT", reason, {})) == "\n".join(lines)


def test_a_run_prints_what_was_trained_and_how_accurate_its_best_epoch_is():
    recipe = replace(gsem.RECIPES["gcat"], epochs=4, seed=7)
    assert repr(gsem.Run(Path("runs/x"), recipe, EPOCHS)).splitlines() == [
        "run runs/x: gcat, gsem-resnet10x16 on digits, seed 7",
        "3 of 4 epochs; best: epoch 3, validation clean 60.0%, robust 30.0%",
    ]
    assert repr(gsem.Run(Path("runs/x"), recipe, [])).endswith("0 of 4 epochs; no epoch is validated yet")


def test_numbers_in_tables():
    assert [percent(v) for v in (None, 0.0, 0.7654, 1.0)] == ["   –  ", "  0.0%", " 76.5%", "100.0%"]
    assert [duration(s) for s in (0.4, 59.4, 200, 3900)] == ["0 s", "59 s", "3:20 min", "1:05 h"]
    assert [pixels(e) for e in (8 / 255, 0.15)] == ["8/255", "0.15"]
    assert between(0.7081, 1.0) == "70.8 – 100.0"
    assert columns([("a", "b"), ("long", "1.5")]) == ["a       b", "long  1.5"]
