"""Attacks as text, their labels, and the suites."""

import pytest
import torch

import gsem
from audited_models import EPS, Fronted, Quantise, Sharp, digits, mlp
from gsem.attacks.suite import SUITES, AttackSpec, parse_attacks, suite
from gsem.losses import margin
from gsem.nn.surrogate import repaired

# --- attacks as text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stochastic", "label"),
    [
        ("clean", True, "clean"),
        ("pgd", False, "pgd100-eot1"),
        ("pgd", True, "pgd100-eot20"),
        ("pgd:steps=7:eot=3", True, "pgd7-eot3"),
        ("pgd:steps=7:eot=3", False, "pgd7-eot1"),
        ("fgsm", False, "fgsm-eot1"),
        ("cw", True, "cw100-eot20"),
        ("cw:form=unbounded:steps=500:c=2", True, "cw500-unbounded-eot20-c2"),
        ("apgd", False, "apgd100-eot1"),
        ("apgd:steps=500:restarts=5:loss=dlr", True, "apgd500-eot20-dlr-x5"),
        ("apgd:targets=9", False, "apgd100-t9-eot1"),
        ("apgd:targets=9:order=malt:eot=5", True, "apgd100-t9-eot5-malt"),
        ("apgd:loss=pm:order=logits", False, "apgd100-eot1-pm"),
        ("fab:targets=9", False, "fab100-t9-eot1"),
        ("square", True, "square5000-eot20"),
        ("rays:queries=300", False, "rays300-eot1"),
        ("transfer", False, "transfer100-eot1"),
        ("autoattack", True, "autoattack-eot20"),
        ("autoattack:version=rand:steps=10:eot=5", True, "autoattack-rand-eot5-steps10"),
        ("pgd:loss=margin:restarts=4:keep=last", False, "pgd100-eot1-margin-x4-last"),
        ("pgd:step=2/255", False, "pgd100-eot1-step0.007843"),
        (" pgd:step=0.01 ", False, "pgd100-eot1-step0.01"),
        ("apgd:through=front+net.2:smooth=4/255", False, "apgd100-eot1-through-front+net.2-smooth0.01569"),
    ],
)
def test_labels_are_made_of_the_arguments_that_run(text, stochastic, label):
    assert AttackSpec.parse(text).label(eps=0.1, stochastic=stochastic) == label


def test_files_have_the_order_of_targets_only_where_it_is_set():
    """So that an evaluation saved before the option existed is known again."""
    assert "order" not in AttackSpec.parse("apgd:targets=9:order=logits").resolved(eps=0.1, stochastic=False)
    assert AttackSpec.parse("apgd:targets=9:order=malt").resolved(eps=0.1, stochastic=False)["order"] == "malt"


@pytest.mark.parametrize("text", ["clean", "pgd:steps=5:step=2/255:through=front", "apgd:targets=9", "square"])
def test_an_attack_is_its_text(text):
    assert AttackSpec.parse(str(AttackSpec.parse(text))) == AttackSpec.parse(text)


def test_an_attack_through_a_layer_has_its_gradient_and_the_models_predictions():
    """In front of the network, a quantiser that leaves PGD without a gradient."""
    x, y = digits(40)
    model = Fronted(Quantise(5, 0.0), mlp()).eval()
    found = gsem.evaluate(model, x, y, "clean,apgd:steps=20:through=front", eps=EPS)
    assert found.expected("apgd20-eot1-through-front").mean < 0.3 < 0.9 < found.expected("clean").mean
    assert found["apgd20-eot1-through-front"].gradients > 0
    with pytest.raises(ValueError, match="no layer 'fron'"):
        gsem.evaluate(model, x, y, "apgd:steps=20:through=fron", eps=EPS)


@pytest.mark.filterwarnings("ignore:the model returns probabilities", "ignore:the gradient of the logits is zero")
def test_the_softmax_of_a_models_own_forward_is_passed_by_its_logarithm():
    x, y = digits(40)
    model = Sharp(mlp(), 8)
    passed = repaired(model, through=["softmax"])

    def without_gradient(network: torch.nn.Module) -> float:
        point = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(margin(network(point), y).sum(), point)
        return float((grad.flatten(1).norm(dim=1) < 1e-4).float().mean())

    assert torch.equal(passed(x).argmax(1), model(x).argmax(1))
    # (Where even the smallest probability that a float holds is passed, nothing is left to take a logarithm of.)
    assert without_gradient(model) > 0.5 and without_gradient(passed) == 0


def test_parse_attacks():
    assert parse_attacks("clean, pgd:steps=5") == [AttackSpec("clean"), AttackSpec("pgd", {"steps": 5})]


@pytest.mark.parametrize(
    ("name", "options"), [("deepfool", {}), ("pgd", {"stepz": 3}), ("clean", {"steps": 3}), ("square", {"smooth": 1})]
)
def test_an_attack_that_cannot_be_is_refused_when_it_is_made(name, options):
    with pytest.raises(ValueError, match=r"unknown: it is one of|has no option"):
        AttackSpec(name, options)


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_is_of_attacks_that_exist_and_begins_clean(name):
    attacks = suite(name)
    assert attacks[0] == AttackSpec("clean")
    labels = [a.label(eps=0.1, stochastic=True) for a in attacks]
    assert len(set(labels)) == len(labels)


def test_the_papers_five_at_their_true_strength():
    labels = [a.label(eps=8 / 255, stochastic=True) for a in suite("paper")]
    assert labels == [
        "clean",
        "pgd500-eot20",
        "cw100-eot20",
        "cw100-unbounded-eot20",
        "apgd500-eot20-x5",
        "autoattack-eot20",
    ]
    with pytest.raises(ValueError, match="suite 'hard' is unknown: it is one of quick, standard"):
        suite("hard")
