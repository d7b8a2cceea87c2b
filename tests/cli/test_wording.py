"""The wording of the terminal's tables, in one place: other tests look at numbers and fields."""

import io
from dataclasses import replace
from textwrap import dedent

import numpy as np
from rich.console import Console

from gsem.auditing import Audit, Check
from gsem.cli.audit import show_audit
from gsem.cli.display import show_as_published, show_result, study_table
from gsem.evaluation.result import EvaluationResult
from planted import scores

ROW = {"attack_passes": 5.0, "training_passes": 1.0, "epochs": 30, "seconds": 150.0}


def shown(show, *values) -> str:
    file = io.StringIO()
    show(Console(file=file, width=80, highlight=False, markup=False), *values)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip()


def same(text: str, expected: str) -> bool:
    assert text == dedent(expected).strip()
    return max(map(len, text.splitlines())) <= 80


def result() -> EvaluationResult:
    """Two attacks on 30 images, with the noise fresh, frozen and off, and an attack without a bound."""
    right = np.arange(30) >= 10
    cost = {"forwards": 600, "gradients": 3000, "seconds": 65.0}
    each = [
        scores(np.full(30, 20), "clean", votes=np.ones(30), seconds=1.0),
        scores(20 * right, "pgd5-eot20", votes=1.0 * right, **cost),
        scores(np.full(30, 1), "clean@off", noise="off", seconds=1.0),
        scores(1 * right, "pgd5-eot1@off", noise="off", **cost),
        scores(20 * right, "cw9-unbounded", bounded=False, l2=np.full(30, 1.5)),
    ]
    metadata = {"draws": 20, "seed": 0, "eps": 8 / 255, "norm": "Linf", "images": 30, "stochastic": True}
    return EvaluationResult(each, np.arange(30) % 3, metadata, np.arange(30))


def audit() -> Audit:
    """A check that passes, and one that is flagged."""
    checks = (
        Check("randomness", "Is noise at work?", 0.0, "at least 0.01", "pass", "every draw agrees", "", ""),
        Check(
            "gradient",
            "Is the gradient right?",
            0.25,
            "below 0.9",
            "flag",
            "it is bent",
            "Mend it.",
            "Carlini 2019",
            answered=True,
        ),
        Check("noise", "Is it known?", None, "under 0.5", "not applicable", "there is none", "", ""),
        Check("transfer", "Is it copied?", None, "any", "not applicable", "there is none", "", ""),
    )
    metadata = {
        "attacks": ["apgd100-eot20"],
        "clean": {"accuracy": 0.95},
        "claimed": {"accuracy": 0.6, "low": 0.51, "high": 0.69},
        "found": {"accuracy": 0.5, "low": 0.41, "high": 0.59},
        "reached_by": "apgd:through=front,square",
        "command": "gsem audit runs/x",
        "evaluate": "gsem evaluate runs/x --images 128",
        "images": 128,
        "draws": 20,
        "stochastic": True,
        "seed": 0,
        "seconds": 90.0,
    }
    return Audit(checks, "OVERSTATED", "The claimed 60.0% is 10.0 points above the 50.0% found.", metadata)


def test_an_evaluation():
    assert same(
        shown(show_result, result(), "runs/x on digits: 30 test images"),
        """
        runs/x on digits: 30 test images, eps = 8/255 (Linf)
        attack     expected  95% interval   vote 10 queries passes/image     time
        clean        100.0% 100.0 – 100.0 100.0%     100.0%            0      1 s
        pgd5-eot20    66.7%   50.0 – 83.3  66.7%      66.7%          120 1:05 min
        worst         66.7%   50.0 – 83.3  66.7%      66.7%
        cw9-unbounded has no bound: it breaks 33.3% at a median L2 distance of 1.5,
        which is no robust accuracy

        with the noise known to the attacker: @frozen by a seed, @off without noise
        attack        expected  95% interval passes/image     time
        clean@off       100.0% 100.0 – 100.0            0      1 s
        pgd5-eot1@off    66.7%   50.0 – 83.3          120 1:05 min
        worst@off        66.7%   50.0 – 83.3
        30 images, seed 0; accuracy in per cent
        worst case: each image under the attack that is worst for it
        20 scoring draws. expected: accuracy of one prediction; vote: of the
        plurality of 11; 10 queries: against an attacker who sends the image ten times
        """,
    )


def test_the_last_line_where_draws_are_too_few():
    few = replace(result(), metadata=result().metadata | {"draws": 5})
    assert shown(show_result, few, "x").splitlines()[-1] == "(–: vote needs 11 draws, 10 queries needs 10)"


def test_a_printed_result():
    assert same(
        str(result()),
        """
        30 images, eps = 8/255 (Linf), 20 scoring draws, seed 0
        attack         expected   95% interval
        clean            100.0%  100.0 – 100.0
        pgd5-eot20        66.7%    50.0 – 83.3
        cw9-unbounded         –       no bound
        worst             66.7%    50.0 – 83.3
        worst@off         66.7%    50.0 – 83.3
        """,
    )


def test_the_published_judgement():
    assert same(
        shown(show_as_published, result()),
        """
        as published (success and score on one draw each, an image not broken scored
        as its clean self; not an estimate of robustness): clean 0.0%, pgd5-eot20 0.0%
        """,
    )


def test_an_audit():
    assert same(
        shown(show_audit, audit(), "runs/x on digits: 128 test images, eps = 0.15 (Linf)"),
        """
        runs/x on digits: 128 test images, eps = 0.15 (Linf)
        audited attacks: apgd100-eot20
        clean 95.0%, claimed 60.0%, found 50.0% (41.0 – 59.0)

        check       figure  flagged when
        randomness   0.000  at least 0.01                                 pass
        gradient     0.250  below 0.9                                     flag, answered
        noise            –  under 0.5                                     not applicable
        transfer         –  any                                           not applicable

        gradient: flag, answered
        Is the gradient right? It is bent.
        What to do: Mend it.
        Re-run: gsem audit runs/x --only gradient

        noise, transfer: not applicable
        There is none.

        OVERSTATED
        The claimed 60.0% is 10.0 points above the 50.0% found.
        the accuracy found, again:
          gsem evaluate runs/x --images 128 --attacks clean,apgd:through=front,square

        128 images, 20 scoring draws, seed 0, 1:30 min
        to repeat one check, with the same figure:
          gsem audit runs/x --only CHECK
        """,
    )


def test_a_study():
    assert same(
        shown(Console.print, study_table([{"variant": "plain", "accuracy": {"clean": (0.9, 0.8, 1.0)}, **ROW}])),
        """
        variant      clean passes/image epochs training
        plain   90.0 ±10.0          5+1     30 2:30 min
        """,
    )
