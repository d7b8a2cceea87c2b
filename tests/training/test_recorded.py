"""The data of a run are recorded, found again after a move, and asked for where they are not found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gsem
from gsem.cli.main import main
from gsem.data import Dataset, load
from gsem.training.run import Run

RECIPE = gsem.Recipe(
    model="resnet10x16",
    adversarial_fraction=0.0,
    epochs=1,
    batch_size=64,
    precision="float32",
    attack_precision="float32",
)


def write_images(file: Path, *, seed: int = 0, classes: int = 2) -> Path:
    """24 training and 8 test images, 8 × 8 grey."""
    rng = np.random.default_rng(seed)
    y = np.arange(32) % classes
    x = (rng.integers(0, 100, (32, 8, 8, 1)) + 60 * y[:, None, None, None]).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, x_train=x[:24], y_train=y[:24], x_test=x[24:], y_test=y[24:])
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A project that holds images and a run on them, by a path from its own folder."""
    home = tmp_path_factory.mktemp("home") / "my project"
    write_images(home / "sets/images.npz")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(home)
        gsem.train(replace(RECIPE, data="sets/images.npz"), out="runs/x", device="cpu")
    return home


@pytest.fixture
def project(home, tmp_path, monkeypatch) -> Path:
    """A copy of it under another path; the first one is gone. Commands run in a third place."""
    shutil.copytree(home, tmp_path / "my project")
    metadata = tmp_path / "my project/runs/x/recipe.json"
    metadata.write_text(metadata.read_text().replace(str(home), "/gone"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "my project"


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Dataset:
    monkeypatch.chdir(tmp_path)
    return replace(load(write_images(tmp_path / "mine.npz")), name="mine", classes=("cat", "dog"))


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def refused(capsys, *words) -> str:
    code, _, err = run(capsys, *words)
    assert code == 2 and err.count("\n") == 1, err
    return err


def metadata_of(path: Path) -> dict:
    return json.loads((path / "recipe.json").read_text())


def trained(mine: Dataset, out: str = "r", **change) -> Run:
    return gsem.train(replace(RECIPE, **change), out=out, data=mine, device="cpu")


# --- what was passed in Python -----------------------------------------------------------------------------------


def test_data_passed_in_python_are_recorded_as_what_they_are(mine):
    found = trained(mine)
    data = metadata_of(found.path)["data"]
    assert (data["name"], data["classes"], data["shape"]) == ("mine", ["cat", "dog"], [1, 8, 8])
    assert found.recipe.data == metadata_of(found.path)["recipe"]["data"] == "mine"
    again = trained(mine, "again")
    other = trained(load(write_images(Path("other.npz"), seed=1)), "other")
    assert metadata_of(again.path)["data"] == data
    assert metadata_of(other.path)["data"]["images"] != data["images"]
    assert metadata_of(other.path)["data"]["labels"] == data["labels"]


def test_what_cannot_be_found_is_asked_for(capsys, mine):
    trained(mine)
    for words in (("evaluate", "r"), ("audit", "r"), ("train", "--resume", "r")):
        err = refused(capsys, *words)
        assert "r was trained on data that were passed in Python (mine: images [1, 8, 8], 2 classes)" in err
        assert "give them by --data (in Python: data=)" in err
    for recipe in (RECIPE, trained(mine, "same").recipe):
        with pytest.raises(ValueError, match=r"r was trained on (other data|data that were passed).*data="):
            gsem.train(recipe, out="r", resume=True, device="cpu")


def test_given_again_the_run_goes_on_and_is_evaluated(capsys, mine):
    first = trained(mine)
    assert gsem.train(RECIPE, out="r", data=mine, resume=True, device="cpu").metrics == first.metrics
    assert run(capsys, "evaluate", "r", "--data", "mine.npz", "--attacks", "clean")[0] == 0


def test_a_run_is_not_resumed_on_other_data(capsys, mine, tmp_path):
    trained(replace(mine, classes=("0", "1")))
    before = (tmp_path / "r/checkpoints/last.safetensors").read_bytes()
    for file, message in (
        (write_images(tmp_path / "other.npz", seed=1), "which differ in the images"),
        (write_images(tmp_path / "four.npz", classes=4), "which differ in their classes, the images, their labels"),
        ("digits", "which differ in their classes, the images, their labels"),
    ):
        err = refused(capsys, "train", "--resume", "r", "--data", file)
        assert "r was trained on other data (mine: images [1, 8, 8], 2 classes)" in err and message in err
    assert (tmp_path / "r/checkpoints/last.safetensors").read_bytes() == before
    # The same images by a path: from then on the run knows where they are.
    assert run(capsys, "train", "--resume", "r", "--data", "mine.npz")[0] == 0
    assert run(capsys, "evaluate", "r", "--attacks", "clean")[0] == 0


# --- moved, and used from elsewhere ------------------------------------------------------------------------------


def test_a_run_finds_its_data_from_elsewhere(capsys, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = home / "runs/x"
    assert run(capsys, "evaluate", path, "--attacks", "clean", "--out", "e", "--save-adv")[0] == 0
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert run(capsys, "verify", "../e.npz", "--model", path)[0] == 0
    assert run(capsys, "train", "--resume", path)[0] == 0


def test_a_project_that_was_moved_works(capsys, project):
    for words in (("evaluate", project / "runs/x", "--attacks", "clean"), ("train", "--resume", project / "runs/x")):
        code, _, err = run(capsys, *words)
        assert code == 0, err
    # The resumed run has noted the new place.
    assert metadata_of(project / "runs/x")["places"]["data"][0].startswith(str(project))
    assert metadata_of(project / "runs/x")["recipe"]["data"] == "sets/images.npz"


def test_additional_images_are_found_too(capsys, tmp_path, monkeypatch):
    home = tmp_path / "home"
    write_images(home / "images.npz")
    np.savez(home / "more.npz", image=np.full((9, 8, 8, 1), 7, dtype=np.uint8), label=np.zeros(9, dtype=int))
    monkeypatch.chdir(home)
    more = {"extra_data": "more.npz", "extra_share": 0.5}
    gsem.train(replace(RECIPE, data="images.npz", **more), out="r", device="cpu")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "train", "--resume", "home/r")[0] == 0
    (home / "more.npz").unlink()
    err = refused(capsys, "train", "--resume", "home/r")
    assert "the additional images of home/r are not found" in err and f"{home / 'more.npz'}" in err


def test_data_that_are_gone_are_named_with_all_places(capsys, project, tmp_path):
    (project / "sets/images.npz").rename(tmp_path / "now here.npz")
    for words in (("evaluate",), ("audit",), ("train", "--resume")):
        err = refused(capsys, *words, project / "runs/x")
        assert f"the data of {project / 'runs/x'} are not found" in err
        assert "/gone/sets/images.npz" in err and f"{project / 'sets/images.npz'}, sets/images.npz" in err
        assert f"(from {tmp_path / 'elsewhere'})" in err and "--data" in err
    there = ("--data", tmp_path / "now here.npz")
    assert run(capsys, "evaluate", project / "runs/x", *there, "--attacks", "clean")[0] == 0
    assert run(capsys, "train", "--resume", project / "runs/x", *there)[0] == 0
    assert run(capsys, "evaluate", project / "runs/x", "--attacks", "clean")[0] == 0


def test_other_images_at_the_same_path_are_not_taken_for_the_runs_own(capsys, project):
    write_images(project / "sets/images.npz", classes=4)
    assert "which differ in their classes" in refused(capsys, "evaluate", project / "runs/x")


# --- what lies in a run directory --------------------------------------------------------------------------------


def test_the_checkpoint_of_another_run_is_refused(capsys, mine, tmp_path):
    trained(mine)
    trained(mine, "seed", seed=1)
    trained(load(write_images(tmp_path / "other.npz", seed=1)), "other")
    for other, message in (("seed", "seed differ"), ("other", "data, data.classes, data.images differ")):
        shutil.copy(tmp_path / other / "checkpoints/best.safetensors", tmp_path / "r/checkpoints/best.safetensors")
        err = refused(capsys, "evaluate", "r", "--data", "mine.npz")
        assert f"r/checkpoints/best.safetensors is of another run than r/recipe.json ({message})" in err
    # Named itself, it is what it is.
    code, _, err = run(capsys, "evaluate", "r/checkpoints/best.safetensors", "--data", "mine.npz", "--attacks", "clean")
    assert code == 0, err


def test_a_missing_best_checkpoint_is_said(mine):
    found = trained(mine)
    (found.path / "checkpoints/best.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"r holds no checkpoints/best.*last\.safetensors is taken"):
        found.model()
    (found.path / "checkpoints/last.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        found.model()


def test_a_run_without_the_checkpoint_to_go_on_from_is_not_overwritten(mine):
    found = trained(mine)
    (found.path / "checkpoints/last.safetensors").unlink()
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"no checkpoints/last\.safetensors to resume from"):
            gsem.train(RECIPE, out="r", data=mine, resume=resume, device="cpu")


def test_one_training_at_a_time(mine):
    refusals = []

    def second(progress) -> None:
        with pytest.raises(ValueError, match=r"is training in r, since .*: wait for its end") as error:
            gsem.train(RECIPE, out="r", data=mine, resume=True, device="cpu")
        refusals.append(error)

    gsem.train(RECIPE, out="r", data=mine, device="cpu", on_progress=second)
    assert refusals and not Path("r/.lock").exists()


# --- options beside --resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epochs", "5"), "--epochs cannot be given with --resume: r resumes with its own recipe"),
        (("--lr", "0.2", "--batch-size", "3"), "--batch-size, --lr cannot"),
        (("--out", "s"), "--out cannot"),
        (("--warmup", "0.5"), "--warmup cannot"),
        (("--epochs", "30"), "--epochs cannot"),  # the default of the named recipe, but not what the run has
    ],
)
def test_what_would_be_ignored_is_refused(capsys, mine, words, message):
    trained(mine)
    err = refused(capsys, "train", "--resume", "r", "--data", "mine.npz", *words)
    assert message in err and "start a new run from its weights: gsem train --init-from r" in err


def test_epochs_beside_resume_are_refused_whatever_the_schedule(capsys, mine):
    trained(mine, epochs=3, warmup=2.5)
    err = refused(capsys, "train", "--resume", "r", "--data", "mine.npz", "--epochs", "2")
    assert "--epochs cannot be given with --resume" in err


def test_a_recipe_beside_resume_must_be_the_runs_own(capsys, mine):
    trained(replace(mine, classes=("0", "1")), name="trades")
    assert "the recipe mart cannot" in refused(capsys, "train", "mart", "--resume", "r", "--data", "mine.npz")
    words = ("train", "trades", "--resume", "r", "--data", "mine.npz", "--epochs", "1", "--out", "r", "--device", "cpu")
    code, _, err = run(capsys, *words)
    assert code == 0, err


def test_paths_with_spaces_are_quoted_in_commands(capsys, mine):
    trained(mine, "my run")
    with pytest.raises(ValueError, match=r"--resume 'my run'"):
        trained(mine, "my run")
    assert "--init-from 'my run'" in refused(capsys, "train", "--resume", "my run", "--lr", "1")
    code, out, _ = run(capsys, "train", "--data", "mine.npz", "--epochs", "1", "--model", "resnet10x16", "--steps", "1",
                       "--out", "one more")  # fmt: skip
    assert code == 0 and "next: gsem evaluate 'one more'" in out
