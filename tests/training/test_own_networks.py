"""Networks of a user in training: trained, killed, resumed, loaded, evaluated, audited and reported like any other."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import gsem
import own_networks
from gsem._io import read_checkpoint
from gsem.cli.main import main
from gsem.training import trainer
from gsem.training.step import Stepper

RECIPE = gsem.Recipe(steps=1, epochs=2, batch_size=40, ema=0.9, lr=0.05, insert_after=("stem",))
FEW = ["--epochs", "1", "--steps", "1", "--batch-size", "1024", "--device", "cpu"]
VIT = replace(RECIPE, model="own_networks:vit")


def fit(recipe: gsem.Recipe, path: Path, data, **how) -> gsem.Run:
    return gsem.train(recipe, out=path, data=data, device="cpu", **how)


def state(path: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return read_checkpoint(path / "checkpoints" / f"{name}.safetensors")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def killed_in_step(number: int, *args, **how) -> None:
    """Train in a fork that dies by SIGKILL in its step of that number, with a checkpoint after every step before."""
    child = os.fork()
    if child == 0:
        steps, update = 0, Stepper._update

        def die(*words):
            nonlocal steps
            steps += 1
            if steps == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(*words)

        Stepper._update, trainer.SAVE_SECONDS = die, 0.0
        try:
            fit(*args, **how)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("given", [False, True])
def test_killed_twice_a_transformer_with_dropout_comes_to_the_same_end(tmp_path, few_digits, given):
    def how() -> dict:
        torch.manual_seed(3)
        return {"model": own_networks.TinyViT()} if given else {}

    recipe = replace(VIT, optimizer="adamw", lr=2e-3) if given else VIT
    whole = fit(recipe, tmp_path / "whole", few_digits, **how())
    # Six steps in two epochs.
    killed_in_step(3, recipe, tmp_path / "killed", few_digits, **how())
    assert not same(state(tmp_path / "killed"), state(whole.path))
    killed_in_step(2, recipe, tmp_path / "killed", few_digits, resume=True, **how())
    ended = fit(recipe, tmp_path / "killed", few_digits, resume=True, **how())
    for name in ("last", "best"):
        assert same(state(ended.path, name), state(whole.path, name))
    assert [m["loss"] for m in ended.metrics] == [m["loss"] for m in whole.metrics]
    assert state(ended.path)["model.seen"] > 0  # its own buffer counts the passes in train mode


def test_dropout_drops_in_training(tmp_path, few_digits):
    runs = [
        fit(RECIPE, tmp_path / str(p), few_digits, model=lambda p=p: own_networks.TinyViT(dropout=p))
        for p in (0.0, 0.5)
    ]
    assert runs[0].metrics[0]["loss"] != runs[1].metrics[0]["loss"]


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path, few_digits):
    run = fit(VIT, tmp_path / "run", few_digits)
    model = run.model()
    assert model.again is model.encoder.layers[0].linear2
    tensors = state(run.path, "best")
    assert tensors["model.again.weight"] is tensors["model.encoder.layers.0.linear2.weight"]
    assert same(model.state_dict(), {k.removeprefix("model."): t for k, t in tensors.items()})


def test_a_network_in_python_is_copied_starts_from_its_weights_and_is_given_again_to_load(tmp_path, few_digits):
    net = own_networks.Convolutional()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    recipe = replace(RECIPE, lr=1e-12, ema=0.0, epochs=1, normalize="0.5/0.25")
    run = fit(recipe, tmp_path / "run", few_digits, model=net)
    assert same(net.state_dict(), before)
    assert run.recipe.model == "Convolutional"
    assert torch.allclose(run.model().state_dict()["model.model.head.weight"], before["head.weight"])
    with pytest.raises(ValueError, match=r"passed in Python \(Convolutional\).*model=net"):
        gsem.load_model(run.path)
    with pytest.raises(ValueError, match="passed in Python"):
        fit(run.recipe, run.path, few_digits, resume=True)
    for again in (own_networks.Convolutional(), own_networks.convolutional):
        model, _ = gsem.load_model(run.path, model=again)
        assert same(model.state_dict(), run.model().state_dict())
    with pytest.raises(ValueError, match="another structure"):
        gsem.load_model(run.path, model=own_networks.TinyViT())
    fit(recipe, run.path, few_digits, model=net, resume=True)
    with pytest.raises(ValueError, match="other modules or settings"):
        fit(recipe, run.path, few_digits, model=Deeper(), resume=True)


class Deeper(own_networks.Convolutional):
    """Another network of the same name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*self.body, nn.Identity())


Deeper.__name__ = "Convolutional"


def test_logits_in_a_dict_are_trained_on(tmp_path, few_digits):
    runs = [
        fit(RECIPE, tmp_path / name, few_digits, model=f"own_networks:{name}") for name in ("holding", "convolutional")
    ]
    assert [m["loss"] for m in runs[0].metrics] == [m["loss"] for m in runs[1].metrics]


def test_a_run_starts_from_the_weights_of_another(tmp_path, few_digits):
    first = fit(VIT, tmp_path / "first", few_digits)
    still = replace(VIT, init_from=str(first.path), lr=1e-12, epochs=1, ema=0.0)
    second = fit(still, tmp_path / "second", few_digits)
    assert torch.allclose(second.model().head.weight, first.model().head.weight, atol=1e-6)
    other = replace(still, model="own_networks:convolutional")
    with pytest.raises(ValueError, match=r"init_from .*does not fit own_networks:convolutional"):
        fit(other, tmp_path / "third", few_digits)


@pytest.mark.parametrize("recipe", ["gcat-awp", "trades"])
def test_weights_that_a_forward_does_not_use_are_left_alone(tmp_path, few_digits, recipe):
    net = own_networks.Convolutional()
    net.spare = nn.Linear(3, 3)
    short = replace(gsem.RECIPES[recipe].scaled(1), steps=1, batch_size=60, lr=0.01, weight_decay=0.0)
    run = fit(short, tmp_path / "run", few_digits, model=net)
    assert torch.equal(run.model().state_dict()["model.spare.weight"], net.spare.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "own_networks:with_arguments"}, "needs arguments"),
        ({"model": "own_networks:no_module"}, "returned a str"),
        ({"model": "own_networks:of_five_classes"}, "5 logits, but the data have 10 classes"),
        ({"insert_after": ("stemm",)}, "near it are stem"),
        ({"model": "timm_that_is_not_there:make"}, "timm_that_is_not_there"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(tmp_path, few_digits, change, message):
    with pytest.raises(ValueError, match=message):
        fit(replace(VIT, **change), tmp_path / "run", few_digits)
    assert not (tmp_path / "run").exists()


def test_the_command_line_takes_it_through(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "own_networks:vit", *FEW]
    inserted = ["--insert-after", "stem", "--normalize", "0.3/0.38"]
    assert main(["train", "gcat", *words, *inserted]) == 0
    run = Path("runs/gcat-digits-own_networks-vit-seed0")
    described = json.loads((run / "recipe.json").read_text())["model"]["own"]
    assert (described["insert_after"], described["normalize"]) == (["stem"], "0.3/0.38")
    assert main(["train", "--resume", str(run)]) == 0
    few = ["--images", "20", "--device", "cpu"]
    assert main(["evaluate", str(run), "--attacks", "clean,pgd:steps=2", "--draws", "2", "--save-adv", *few]) == 0
    assert main(["verify", str(run / "evaluation.npz"), "--model", str(run), "--draws", "2"]) in (0, 1)
    only = ["--only", "randomness,gradient"]
    assert main(["audit", str(run), "--quick", "--attacks", "pgd:steps=2", *only, *few]) == 0
    assert main(["report", str(run), "--images", "10"]) == 0
    assert "own_networks:vit" in (run / "report.html").read_text()


def test_several_places_are_named_together_or_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "own_networks:convolutional", *FEW]
    for number, places in enumerate(
        (["--insert-after", "stem", "body.1"], ["--insert-after=stem", *words, "--insert_after", "body.1"])
    ):
        assert main(["train", "gcat", *places, *words, "--out", str(number)]) == 0
        recipe = json.loads(Path(f"{number}/recipe.json").read_text())["recipe"]
        assert recipe["insert_after"] == ["stem", "body.1"]


def test_a_recipe_file_holds_the_layers(tmp_path):
    recipe = replace(VIT, insert_after=("stem", "body.1"), normalize="0.3/0.38")
    (tmp_path / "own.toml").write_text(recipe.to_toml())
    assert gsem.Recipe.read(tmp_path / "own.toml") == gsem.Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match=r"insert_after = .* is not a list of texts"):
        gsem.Recipe.from_dict({"insert_after": [1]})
