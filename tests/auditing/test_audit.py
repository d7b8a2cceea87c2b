"""Whole audits of networks whose robustness is planted; the record, and what is refused."""

import json

import pytest
import torch
from torch import nn

import gsem
from audited_models import EPS, Fronted, Quantise, digits, mlp
from gsem.auditing import Audit
from gsem.auditing.audit import CHECKS, audited
from planted import Killed

STRONG = "apgd:steps=100,apgd:steps=100:loss=margin,apgd:steps=100:targets=9"


@pytest.fixture(scope="module")
def masked() -> tuple[nn.Module, Audit]:
    model = Fronted(Quantise(), mlp()).eval()
    x, y = digits()
    return model, gsem.audit(model, x, y, "apgd:steps=20:eot=5", eps=0.2, quick=True)


@pytest.mark.filterwarnings("ignore:fold runs")
def test_quantise_and_noise_seems_robust_is_found_out_and_is_broken(masked):
    """Plain PGD holds it for robust; the audit names the layer; through the layer nothing is left of it."""
    model, audit = masked
    x, y = digits()
    how = {"eps": 0.2, "frozen": False, "draws": 20}
    plain = gsem.evaluate(model, x, y, "pgd:steps=20:eot=1", **how)
    assert plain.expected("worst").mean > 0.9
    assert audit.verdict == "OVERSTATED" and "front" in audit.reason
    gradient = audit["gradient"]
    assert gradient.outcome == "flag" and gradient.details["layer"] == "front"
    assert gradient.details["mitigation"]["after"]["accuracy"] < 0.05
    assert audit.claimed.mean > 0.8 and audit.found.mean < 0.05
    assert audit.metadata["gap"]["mean"] == pytest.approx(audit.claimed.mean - audit.found.mean)
    assert "through=front" in audit.metadata["reached_by"]
    # The advice, followed by hand.
    through = gsem.straight_through(model, "front")
    x_adv = gsem.attacks.apgd(through, x, y, eps=0.2, steps=20, eot=5)
    with torch.random.fork_rng():
        assert (model(x_adv).argmax(1) == y).float().mean() < 0.05
    for name in ("unavailable", "unconstrained", "blackbox", "sweeps", "binarization"):
        assert audit[name].outcome == "flag" and audit[name].answered, audit[name]
    # What is said to reach it does.
    reached = gsem.evaluate(model, x, y, f"clean,{audit.metadata['reached_by']}", eps=0.2, draws=20, frozen=False)
    assert reached.expected("worst").mean == pytest.approx(audit.found.mean, abs=0.02)


def test_the_sweeps_carry_their_curves(masked):
    _, audit = masked
    details = audit["sweeps"].details
    eps = [point["eps"] for point in details["eps"]]
    assert eps == sorted(eps) and eps[0] == 0 and eps[-1] == 1
    assert all({"accuracy", "low", "high"} <= point.keys() for point in details["eps"])
    assert [p["steps"] for p in details["steps"]] == [5, 10, 20, 40]
    assert [p["eot"] for p in details["eot"]] == [1, 2, 5, 10]
    assert [p["restarts"] for p in details["restarts"]] == [1, 2]
    assert details["chance"] == 0.1


def test_a_killed_network_is_measured_without_a_gradient():
    """The 300 queries of the quick audit's Square bring it far down; 1000 to under 5% (tests/test_planted.py)."""
    x, y = digits()
    audit = gsem.audit(Killed(mlp()), x, y, "apgd:steps=20", eps=0.2, quick=True)
    assert audit.verdict == "OVERSTATED" and audit["blackbox"].outcome == "flag"
    assert not audit["gradient"].answered and not audit["unavailable"].answered
    assert audit.found.mean < 0.1 < 0.9 < audit.claimed.mean


@pytest.mark.parametrize("robust", [False, True])
def test_a_healthy_network_is_trusted(robust: bool):
    x, y = digits()
    reports = []
    before = torch.get_rng_state()
    audit = gsem.audit(mlp(robust=robust), x, y, STRONG, eps=EPS, quick=True, on_progress=reports.append)
    assert [(c.name, c.reason) for c in audit.checks if c.outcome == "flag"] == []
    assert audit.verdict == "TRUSTED", audit.reason
    assert audit.found.mean <= audit.claimed.mean < audit.found.mean + 0.03
    assert [p.ended.name for p in reports if p.ended] == list(CHECKS)
    assert torch.equal(torch.get_rng_state(), before)
    exact = gsem.evaluate(mlp(robust=robust), x, y, STRONG, eps=EPS)
    assert audit.claimed.mean == pytest.approx(exact.expected("worst").mean, abs=0.011)


def test_an_audit_is_its_file_and_a_check_alone_finds_the_same(masked, tmp_path):
    model, audit = masked
    assert Audit.load(audit.save(tmp_path / "audit.json")) == Audit(**vars(audit) | {"checks": audit.checks})
    json.loads((tmp_path / "audit.json").read_text())
    x, y = digits()
    for name in ("gradient", "binarization", "blackbox"):
        alone = gsem.audit(model, x, y, "apgd:steps=20:eot=5", eps=0.2, quick=True, only=[name])
        assert (alone[name].figure, alone[name].outcome) == (audit[name].figure, audit[name].outcome)


def test_autoattack_is_audited_by_its_parts():
    assert [a.name for a in audited("standard", quick=False)] == ["apgd", "apgd", "fab", "square"]
    assert [a.name for a in audited(None, quick=True)] == ["apgd"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": ["gradients"]}, "check 'gradients' is unknown"),
        ({"attacks": "fab"}, "at least one of the attacks apgd, pgd, cw, fgsm, square, rays"),
        ({"eps": 8}, "it must be at most 1"),
        ({"draws": 0}, "draws must be an integer of at least 1"),
    ],
)
def test_what_is_refused(change, message):
    x, y = digits()
    with pytest.raises(ValueError, match=message):
        gsem.audit(mlp(), x, y, **{"eps": EPS} | change)
    with pytest.raises(ValueError, match="image 0 has label 11"):
        gsem.audit(mlp(), x, y + 11 - y[0], eps=EPS)
