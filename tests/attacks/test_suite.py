"""Attacks as text, their labels, and the suites."""

import pytest

from gsem.attacks.suite import SUITES, AttackSpec, parse_attacks, suite

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
        ("fab:targets=9", False, "fab100-t9-eot1"),
        ("square", True, "square5000-eot20"),
        ("rays:queries=300", False, "rays300-eot1"),
        ("transfer", False, "transfer100-eot1"),
        ("autoattack", True, "autoattack-eot20"),
        ("autoattack:version=rand:steps=10:eot=5", True, "autoattack-rand-eot5-steps10"),
        ("pgd:loss=margin:restarts=4:keep=last", False, "pgd100-eot1-margin-x4-last"),
        ("pgd:step=2/255", False, "pgd100-eot1-step0.007843"),
        (" pgd:step=0.01 ", False, "pgd100-eot1-step0.01"),
    ],
)
def test_labels_are_made_of_the_arguments_that_run(text, stochastic, label):
    assert AttackSpec.parse(text).label(eps=0.1, stochastic=stochastic) == label


def test_parse_attacks():
    assert parse_attacks("clean, pgd:steps=5") == [AttackSpec("clean"), AttackSpec("pgd", {"steps": 5})]


@pytest.mark.parametrize(("name", "options"), [("deepfool", {}), ("pgd", {"stepz": 3}), ("clean", {"steps": 3})])
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
