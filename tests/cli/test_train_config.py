"""gsem train --config and --print-config, and the radius of a run that was trained in L2."""

from dataclasses import replace

import pytest

import gsem
from gsem.cli.main import main, read
from gsem.cli.options import EvaluateOptions
from gsem.cli.task import load_task
from gsem.training.recipe import Recipe


def printed(capsys, *words: str) -> str:
    assert main(["train", *words, "--print-config"]) == 0
    return capsys.readouterr().out


def test_what_is_printed_is_read_again(capsys, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(printed(capsys, "trades", "--norm", "L2", "--eps", "1/2", "--data", "my photos"))
    wanted = replace(gsem.RECIPES["trades"], norm="L2", eps=0.5, data="my photos")
    assert Recipe.read(file) == read("train", ["--config", str(file)]).recipe == wanted
    assert printed(capsys, "--config", str(file)) == file.read_text()
    assert not (tmp_path / "runs").exists()


def test_options_win_over_the_file(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('name = "pgd-at"\nlr = 0.3\nweight_decay = 0.0\n')
    recipe = read("train", ["--config", str(file), "--lr", "0.2", "--epochs", "20"]).recipe
    assert recipe == replace(gsem.RECIPES["pgd-at"].scaled(20), lr=0.2, weight_decay=0.0)
    assert recipe.milestones == (10, 15)


@pytest.mark.parametrize("more", [["mart"], ["--resume", "runs/x"]])
def test_a_second_recipe_beside_the_file_is_refused(tmp_path, more):
    file = tmp_path / "r.toml"
    file.write_text("")
    with pytest.raises(ValueError, match="--config is a recipe of its own"):
        read("train", [*more, "--config", str(file)])


def test_a_wrong_file_is_one_line(capsys, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text("lrr = 1")
    assert main(["train", "--config", str(file)]) == 2
    assert capsys.readouterr().err.replace("\n", " ").strip().endswith("near it is 'lr'")


@pytest.mark.parametrize(("eps", "in_l2"), [(1.5, 1.5), (None, 0.5)])
def test_an_l2_run_is_evaluated_at_its_radius_in_l2_and_at_the_datas_in_linf(tmp_path, few_digits, eps, in_l2):
    recipe = Recipe(model="resnet10x16", norm="L2", eps=eps, steps=1, epochs=1, adversarial_fraction=0.1)
    run = gsem.train(recipe, out=tmp_path / "run", data=few_digits, device="cpu")
    options = EvaluateOptions(model=str(run.path), data="digits", images=4)
    assert load_task(replace(options, norm="L2")).eps == in_l2
    assert load_task(options).eps == few_digits.eps
