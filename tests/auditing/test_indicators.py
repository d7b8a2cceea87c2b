"""Every planted failure is flagged by its indicator; no healthy network is flagged by any."""

import numpy as np
import pytest
import torch

import gsem
from audited_models import EPS, digits, mlp
from gsem.auditing import Audit
from gsem.auditing.context import Trace
from gsem.auditing.indicators import progress_at_end
from planted_failures import CONTROLS, FAILURES, HEALTHY, VARIANTS


def audited(model, only, attacks=HEALTHY, eps=EPS, **how) -> Audit:
    x, y = digits()
    return gsem.audit(model.eval(), x, y, attacks, eps=eps, only=only, quick=True, **how)


@pytest.mark.parametrize("name", FAILURES)
def test_a_planted_failure_is_flagged_in_every_variant(name: str):
    missed = []
    for seed in range(VARIANTS):
        check = audited(only=[name], **FAILURES[name](seed))[name]
        if check.outcome != "flag" or not check.advice:
            missed.append((seed, check.figure, check.reason))
    assert missed == []


@pytest.mark.parametrize("number", range(len(CONTROLS)))
def test_no_indicator_is_flagged_on_a_healthy_control(number: int):
    audit = audited(CONTROLS[number](), list(FAILURES))
    assert [(c.name, c.reason) for c in audit.checks if c.outcome != "pass"] == []
    assert audit.verdict == "INCOMPLETE"


def test_the_controls_hold_a_really_robust_network():
    x, y = digits()
    held = {
        robust: gsem.evaluate(mlp(0, robust=robust), x, y, "apgd", eps=EPS).expected("worst").mean for robust in (0, 1)
    }
    assert held[1] > 0.5 > 0.3 > held[0]


def test_mitigations_lower_the_accuracy_and_say_so():
    found = audited(only=["silent_success", "transfer"], **FAILURES["silent_success"](0))
    lost = found["silent_success"].details["mitigation"]
    assert lost["how"] == "the best point of the path"
    assert lost["after"]["accuracy"] < lost["before"]["accuracy"]
    assert f"{100 * lost['after']['accuracy']:.1f}%" in found["silent_success"].reason
    assert found["transfer"].outcome == "pass"


def test_unfinished_is_the_mean_share_of_the_rise_in_the_last_ten_steps():
    rising = np.linspace(0, 1, 21)  # half of its rise in the last ten steps
    early = np.minimum(np.linspace(0, 4, 21), 1)
    falling = 1 - rising  # never above its start: nothing was gained
    loss = np.stack([rising, early, falling, rising])
    x = torch.zeros(4, 1, 1, 1)
    figure, curve, images = progress_at_end(Trace(x, x, loss, np.array([0.0, 0.5, 0.0, 1.0])))
    assert images == 3 and figure == pytest.approx(0.5 / 3)
    assert curve[-1] == 1 and len(curve) == 21
