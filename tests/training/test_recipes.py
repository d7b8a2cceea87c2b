import json
import math
from dataclasses import replace

import pytest
import torch

from gsem.cli.main import read
from gsem.nn.models import canonical_name
from gsem.training.recipe import Recipe
from gsem.training.recipes import DESCRIPTIONS, RECIPES


def test_every_recipe_has_its_name_and_a_line():
    assert set(DESCRIPTIONS) == set(RECIPES)
    assert all(recipe.name == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize(
    ("recipe", "model"), [("fast-at", "preactresnet18"), ("trades-generated", "wideresnet28x10-silu")]
)
def test_baselines_train_the_network_of_their_papers(recipe, model):
    assert RECIPES[recipe].model == canonical_name(model) == model


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


@pytest.mark.parametrize("warmup", [1, 3, 12])
def test_onecycle_is_torchs(warmup):
    steps_per_epoch, epochs = 7, 13
    r = Recipe(schedule="onecycle", lr=0.2, warmup=warmup, epochs=epochs)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    total = steps_per_epoch * epochs + 1  # the last step of torch's schedule is the end of ours
    share = (steps_per_epoch * warmup + 1) / total
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total, pct_start=share, cycle_momentum=False)
    for step in range(total):
        assert r.learning_rate(step / steps_per_epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step + 1 < total:
            schedule.step()
    assert r.learning_rate(epochs) == pytest.approx(0.2 / 25e4)


def test_radius_and_step_have_defaults_of_the_norm_and_the_start():
    r = Recipe()
    assert (r.radius(0.03), r.attack_step(0.4)) == (0.03, 0.1)
    assert replace(r, norm="L2").radius(0.03) == 0.5
    assert replace(r, norm="L2", eps=2.0, step=0.2).radius(0.03) == 2.0
    assert replace(r, attack_init="noise", steps=1).attack_step(0.4) == 0.4


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_toml(tmp_path, name):
    recipe = replace(RECIPES[name], eps=8 / 255, milestones=())
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    assert Recipe.read(tmp_path / "r.toml") == recipe


def test_a_toml_file_changes_the_recipe_that_it_names(tmp_path):
    (tmp_path / "r.toml").write_text('name = "trades"\neps = "8/255"\nlr = 1\nmilestones = [5]\n')
    wanted = replace(RECIPES["trades"], eps=8 / 255, lr=1.0, milestones=(5,))
    assert Recipe.read(tmp_path / "r.toml") == wanted
    (tmp_path / "own.toml").write_text('name = "own"\nepochs = 3\n')
    assert Recipe.read(tmp_path / "own.toml") == Recipe(name="own", epochs=3)


def test_a_run_is_a_recipe_file(tmp_path):
    recipe = replace(RECIPES["mart"], lr=0.02)
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": recipe.to_dict(), "model": {}}))
    assert Recipe.read(tmp_path) == Recipe.read(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize(
    "line",
    [
        'lr = "x"',
        "epochs = 2.5",
        "epochs = true",
        "quantiser = 1",
        "milestones = [1.5]",
        "lrr = 3",
        "lr = = 3",
        'norm = "L3"',
        "data = 3",
        "lr = -1",
    ],
)
def test_a_wrong_line_is_refused_with_its_file(tmp_path, line):
    (tmp_path / "r.toml").write_text(line)
    field = "Invalid value" if line == "lr = = 3" else line.split()[0]
    with pytest.raises(ValueError, match=rf"r\.toml: .*{field}"):
        Recipe.read(tmp_path / "r.toml")


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        Recipe.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "fields",
    [
        {"norm": "L2", "attack_init": "noise", "steps": 1},
        {"attack_init": "noise", "steps": 2},
        {"collapse": 0.5, "adversarial_fraction": 0.0},
        {"extra_data": "x.npz"},
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields):
    with pytest.raises(ValueError, match="must be"):
        replace(RECIPES["gcat"], **fields)


def test_fast_recipes_cost_two_passes_an_image():
    assert RECIPES["fast-at"].passes == RECIPES["gcat-fast"].passes == (1, 1)
    assert sum(RECIPES["gcat-fast"].passes) <= sum(RECIPES["gcat"].passes) / 2


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
        ("milestones", (-1, 2)),
        ("optimizer", "adam"),
        ("noise_radius", 0.0),
        ("collapse", 1.0),
        ("steps_per_epoch", 0),
        ("label_smoothing", 1.0),
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
