import math
from dataclasses import replace

import pytest

from gsem.cli.main import read
from gsem.training.recipe import Recipe
from gsem.training.recipes import DESCRIPTIONS, RECIPES


def test_every_recipe_has_its_name_and_a_line():
    assert set(DESCRIPTIONS) == set(RECIPES)
    assert all(recipe.name == name for name, recipe in RECIPES.items())


def test_the_published_recipe_pays_what_the_paper_pays():
    # method: half the images, 10 steps of 10 draws; 10 passes for the parameter gradient
    assert RECIPES["gcat-published"].passes == (50, 10)


def test_the_economical_recipe_pays_at_most_a_tenth():
    ours, theirs = RECIPES["gcat"], RECIPES["gcat-published"]
    cost = [sum(r.passes) * r.epochs * r.rounds for r in (ours, theirs)]
    assert cost[0] <= cost[1] / 10


def test_step_schedule_falls_at_its_milestones():
    r = RECIPES["gcat-published"]
    assert [r.learning_rate(e) for e in (0, 59.99, 60, 110, 149)] == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-4])


def test_cosine_and_cyclic_rise_and_fall():
    r = Recipe(schedule="cosine", lr=0.2, warmup=2, epochs=12)
    assert [r.learning_rate(e) for e in (0, 1, 2, 7, 12)] == pytest.approx([0, 0.1, 0.2, 0.1, 0], abs=1e-12)
    r = replace(r, schedule="cyclic")
    assert [r.learning_rate(e) for e in (0, 1, 2, 7, 12)] == pytest.approx([0, 0.1, 0.2, 0.1, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eps", 0.0),
        ("eps", 8.0),
        ("eps", math.nan),
        ("step", -0.1),
        ("steps", 0),
        ("adversarial_fraction", 1.5),
        ("adversarial_fraction", math.nan),
        ("epochs", 0),
        ("batch_size", 2.5),
        ("lr", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("ema", 1.0),
        ("warmup", 30.0),
        ("clip", 0.0),
        ("levels", 0),
        ("noise", -1),
        ("schedule", "linear"),
        ("precision", "int8"),
        ("objective", "hinge"),
        ("milestones", (3, 2)),
    ],
)
def test_nonsense_is_refused_with_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(RECIPES["gcat"], **{field: value})


def test_milestones_past_the_end_are_refused():
    with pytest.raises(ValueError, match="before epoch 20"):
        replace(RECIPES["gcat-published"], epochs=20)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_epochs_scale_in_python_as_on_the_command_line(name, epochs):
    there = read("train", [name, "--epochs", str(epochs)]).recipe
    here = RECIPES[name].scaled(epochs)
    assert here == there and here.rounds == RECIPES[name].rounds
    assert here.warmup == pytest.approx(RECIPES[name].warmup * epochs / RECIPES[name].epochs)


def test_what_is_given_of_the_schedule_is_not_scaled():
    recipe = read("train", ["pgd-at", "--epochs", "20", "--warmup", "3"]).recipe
    assert (recipe.warmup, recipe.milestones) == (3, (10, 15))
    recipe = read("train", ["gcat", "--epochs", "20", "--swa-from", "11", "--ema", "0"]).recipe
    assert (recipe.swa_from, recipe.warmup) == (11, pytest.approx(20 / 30))
    for field in ("epochs", "warmup"):
        with pytest.raises(ValueError, match=r"recipe\.scaled\(EPOCHS\) moves the schedule along"):
            replace(RECIPES["pgd-at"] if field == "epochs" else RECIPES["gcat"], **{field: 100})


def test_a_recipe_survives_json():
    r = replace(RECIPES["gcat-published"], eps=8 / 255)
    assert Recipe.from_dict(r.to_dict()) == r
    with pytest.raises(ValueError, match="'colour'"):
        Recipe.from_dict(r.to_dict() | {"colour": 1})
