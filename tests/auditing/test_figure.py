"""The figure that may be quoted, of networks whose accuracy is known: claimed, found, and by which attacks.

A plainly trained network has no robust accuracy at this radius. Whatever is put behind it or around its output, the
audit has to find that.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsem
from audited_models import EPS, Fronted, Quantise, digits, mlp
from gsem.auditing import Audit
from gsem.auditing.check import Figures
from gsem.auditing.verdict import verdict
from known_defences import Temperature

WIDE = 0.3


class Answer(nn.Module):
    """What a network decides, without its logits: one-hot, as integers, or as the class alone."""

    def __init__(self, network: nn.Module, kind: str):
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, x: Tensor) -> Tensor:
        best = self.network(x).argmax(1)
        return (
            best if self.kind == "class" else F.one_hot(best, 10).to(x.dtype if self.kind == "one-hot" else best.dtype)
        )


def audited(model: nn.Module, attacks: str | None = None, *, eps: float = WIDE, images: int = 100, **how) -> Audit:
    x, y = digits(images)
    return gsem.audit(model.eval(), x, y, attacks, eps=eps, quick=True, **how)


def test_a_network_without_robustness_is_trusted_at_zero():
    audit = audited(mlp())
    assert audit.verdict == "TRUSTED" and audit.found == audit.claimed == (0, 0, 0)


def test_behind_a_temperature_of_1000_the_cross_entropy_claims_too_much():
    """Its gradient vanishes in the softmax of the loss; that of the margin does not."""
    audit = audited(nn.Sequential(mlp(), Temperature(1000)), "apgd:steps=50")
    assert audit.verdict == "OVERSTATED" and audit.claimed.mean > 0.8 and audit.found.mean == 0
    assert audit["unavailable"].answered and audit["unavailable"].again == 0
    assert "loss=margin" in audit.metadata["reached_by"] and "softmax of the loss" in str(audit["unavailable"].details)


def test_behind_a_temperature_the_audits_own_attacks_are_not_deceived():
    """The flag is a remark."""
    audit = audited(nn.Sequential(mlp(), Temperature(1000)))
    assert audit.verdict == "TRUSTED" and audit.claimed.mean == audit.found.mean == 0
    assert audit["unavailable"].outcome == "flag" and "unavailable" in audit.reason


@pytest.mark.filterwarnings("ignore:the model returns")
@pytest.mark.parametrize("kind", ["one-hot", "integers", "class"])
def test_a_network_without_a_gradient_gets_a_figure_by_black_box_attacks(kind: str):
    audit = audited(Answer(mlp(), kind))
    assert audit.claimed is None and audit.found.mean < 0.1
    assert set(audit.metadata["reached_by"].replace(":queries=300", "").split(",")) <= {"square", "rays"}
    applicable = {c.name for c in audit.checks if c.outcome != "not applicable"}
    assert applicable == {"randomness", "unavailable", "unconstrained", "binarization", "sweeps"}
    assert all("no gradient" in c.reason for c in audit.checks if c.name in ("gradient", "unstable", "incomplete"))
    assert audit["unavailable"].outcome == "flag" and not audit["unavailable"].answered


@pytest.mark.filterwarnings("ignore:the model returns")
def test_without_a_gradient_what_is_left_is_suspect():
    """Black-box attacks alone are weaker: what they leave is an upper bound."""
    audit = audited(Answer(mlp(robust=True), "class"), eps=EPS, only=["unavailable"])
    assert 0.4 < audit.found.mean < 0.8
    assert verdict(audit.checks, complete=True, figures=Figures(None, audit.found, None, ""))[0] == "SUSPECT"


def test_a_claim_by_black_box_attacks_is_compared_with_attacks_that_follow_the_gradient():
    audit = audited(mlp(), "square:queries=20", eps=EPS, only=["incomplete", "sweeps", "blackbox"])
    assert audit.verdict == "OVERSTATED" and audit.found.mean < 0.5 < audit.claimed.mean
    assert [c.outcome for c in audit.checks] == ["not applicable", "flag", "not applicable"]


def test_an_attack_of_one_loss_is_measured_again_with_the_others():
    """One step of PGD: its claim is too high, and the attack is no good."""
    audit = audited(mlp(robust=True), "pgd:steps=1", eps=EPS, only=["sweeps"])
    assert audit.verdict == "OVERSTATED" and audit["sweeps"].outcome == "flag"
    x, y = digits()
    strong = gsem.evaluate(mlp(robust=True), x, y, "clean,apgd,apgd:targets=9", eps=EPS)
    assert audit.found.mean == pytest.approx(strong.expected("worst").mean, abs=0.02)


def test_layers_of_one_class_are_passed_at_once_and_then_another():
    """Two quantisers of one class, and in front of them another one, which only shows once they are passed."""

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 40).round() / 40

    flat, first, relu, last = mlp()
    model = nn.Sequential(Quantise(30, 0.0), flat, Rounded(), first, relu, Rounded(), last)
    audit = audited(model, "apgd:steps=20", eps=EPS, only=["gradient"])
    through = audit["gradient"].details["mitigation"]["attacks"][0].rpartition("=")[2].split("+")
    assert through == ["0", "2", "5"] and audit.found.mean < 0.3 < audit.claimed.mean
    assert audit.verdict == "OVERSTATED"


def test_features_that_jump_are_attacked_along_secants():
    """Small features become 0: autograd misses the jumps, and the identity counts changes that are swallowed."""

    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.abs() > 1, x, 0.0)

    flat, first, relu, last = mlp(robust=True)
    audit = audited(nn.Sequential(flat, first, Dead(), relu, last), "apgd:steps=30", eps=EPS, only=["gradient"])
    check = audit["gradient"]
    assert check.outcome == "flag" and check.details["layer"] == "2"
    assert check.answered and check.again == pytest.approx(1, abs=0.1) and check.figure > 1.2
    assert [attack.rpartition(":")[2] for attack in check.details["mitigation"]["attacks"]][1:] == [
        "secant=0.1",
        "secant=0.2",
    ]
    assert audit.found.mean < audit.claimed.mean - 0.03 and audit.verdict == "OVERSTATED"


def test_a_masked_gradient_that_costs_nothing_is_answered():
    """An attack by signs does not feel that the gradient is too small; the slope of the repaired network is right."""

    class Masked(nn.Module):
        """A third of the gradient is missing."""

        def forward(self, x: Tensor) -> Tensor:
            return x.detach() / 3 + x * 2 / 3

    flat, first, relu, last = mlp()
    audit = audited(nn.Sequential(flat, first, relu, Masked(), last), eps=WIDE, only=["gradient"])
    check = audit["gradient"]
    assert check.outcome == "flag" and check.details["layer"] == "3"
    assert check.answered and check.again == pytest.approx(1, abs=0.1)
    assert audit.found.mean == audit.claimed.mean == 0


def test_a_loss_that_jumps_is_attacked_along_an_averaged_gradient():
    """A quantiser and noise: the margin jumps, its average over a neighbourhood does not."""
    audit = audited(Fronted(Quantise(), mlp()), "apgd:steps=20:eot=2", eps=0.2, only=["unstable"], draws=5)
    check = audit["unstable"]
    assert check.outcome == "flag" and check.answered and check.again < 0.1 < check.figure
    assert any("smooth=0.1" in attack for attack in check.details["mitigation"]["attacks"])


def test_the_audits_own_attacks_do_not_overstate_a_network_that_is_a_little_robust():
    audit = audited(mlp(), eps=EPS, images=128, only=["sweeps", "blackbox"])
    assert audit.verdict == "INCOMPLETE" and audit.claimed.mean - audit.found.mean < 0.01


def test_the_command_that_reaches_the_figure_holds_what_found_it():
    audit = audited(Fronted(Quantise(5, 0.0), mlp()), "apgd:steps=20", eps=EPS, only=["gradient"])
    assert [word for word in audit.metadata["reached_by"].split(",") if "through=front" in word]
    x, y = digits()
    model = Fronted(Quantise(5, 0.0), mlp()).eval()
    again = gsem.evaluate(model, x, y, f"clean,{audit.metadata['reached_by']}", eps=EPS)
    assert again.expected("worst").mean == pytest.approx(audit.found.mean, abs=0.02)
