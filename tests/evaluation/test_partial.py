"""An evaluation that is interrupted ends with the table of the uninterrupted one; saved examples are checked again."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gsem
from gsem._fingerprint import data_fingerprint, model_fingerprint, same_model
from gsem.evaluation.evaluate import _Evaluation, evaluate
from gsem.evaluation.partial import FinishedBatches
from gsem.evaluation.result import EvaluationResult
from gsem.evaluation.verify import verify
from in_memory import InMemory
from killed_evaluation import question
from planted import Flipper, Halves, halves, small_net

HELPERS = Path(__file__).parents[1] / "helpers"


def gsem_net(**kwargs) -> torch.nn.Module:
    return gsem.create_model("gsem-resnet10x16", num_classes=3, in_channels=1, **kwargs).eval()


def table(result: EvaluationResult) -> list:
    """Everything but the time."""
    return [
        (
            s.name,
            s.forwards,
            s.gradients,
            *(getattr(s, key).tolist() for key in ("correct", "votes", "selection", "l2")),
        )
        for s in result.scores
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> EvaluationResult:
    return evaluate(**question(), save=tmp_path_factory.mktemp("whole") / "r", save_adv=True)


def test_killed_at_ten_random_moments_it_ends_with_the_table_of_the_uninterrupted_one(tmp_path, uninterrupted):
    rng = random.Random(0)
    words = [sys.executable, str(HELPERS / "killed_evaluation.py"), str(tmp_path / "r")]
    kills, pieces = 0, set()
    for _ in range(10):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        time.sleep(rng.uniform(0.0, 0.8))
        if process.poll() is None:
            kills += 1
        process.kill()
        process.wait()
        pieces |= {p.name for p in tmp_path.glob("r.unfinished/*.npz")}
    assert kills > 0
    result = evaluate(**question(), save=tmp_path / "r", save_adv=True)
    assert table(result) == table(uninterrupted)
    for a, b in zip(result.scores, uninterrupted.scores, strict=True):
        assert np.array_equal(a.x_adv, b.x_adv)
    assert table(EvaluationResult.load(tmp_path / "r")) == table(uninterrupted)
    assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []


@pytest.mark.parametrize("moment", range(1, 8))
def test_stopped_between_and_inside_batches_it_goes_on(tmp_path, uninterrupted, moment):
    """At planted moments: after so many finished batches, while the next is attacked."""
    done = 0

    def stop(p: gsem.evaluate.__class__) -> None:
        nonlocal done
        done += 1
        if done == 3 * moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(**question(), save=tmp_path / "r", save_adv=True, on_progress=stop)
    finished = list(tmp_path.glob("r.unfinished/*-*.npz"))
    assert finished
    before = {f: f.stat().st_mtime_ns for f in finished}
    seen = []
    result = evaluate(
        **question(),
        save=tmp_path / "r",
        save_adv=True,
        on_progress=lambda p: seen.append([f.stat() for f in before if f.exists()]),
    )
    assert all(len(stats) == len(before) for stats in seen)
    assert all([s.st_mtime_ns for s in stats] == list(before.values()) for stats in seen)  # not computed again
    assert table(result) == table(uninterrupted)


def test_a_half_written_piece_counts_as_not_written(tmp_path, uninterrupted):
    done = 0

    def stop(p) -> None:
        nonlocal done
        done += 1
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(**question(), save=tmp_path / "r", save_adv=True, on_progress=stop)
    folder = tmp_path / "r.unfinished"
    piece = next(folder.glob("[0-9a-f]*.npz"))
    half = folder / f".{piece.stem}.writing.npz"
    half.write_bytes(piece.read_bytes()[:200])
    piece.unlink()
    assert table(evaluate(**question(), save=tmp_path / "r", save_adv=True)) == table(uninterrupted)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"eps": 0.2}, "eps (0.1 then, 0.2 now)"),
        ({"draws": 13}, "draws (12 then, 13 now)"),
        (
            {"attacks": "clean,pgd:steps=5"},
            "the attacks (clean, pgd4-eot2, apgd6-eot2, square20-eot2 then, clean, pgd5-eot20 now)",
        ),
        ({"attacks": "clean,pgd:steps=4:step=0.01:eot=2,apgd:steps=6:eot=2,square:queries=20:eot=2"}, "the attacks"),
        ({"batch_size": 4}, "batch_size (8 then, 4 now)"),
        ({"seed": 1}, "seed (0 then, 1 now)"),
        ({"source_models": {"other": small_net()}}, "the other models of the transfer attack"),
        ({"model": gsem_net()}, "the model's weights"),
        ({"model": gsem_net(levels=5)}, "the model's layers, settings or normalisation; the model's weights"),
        ({"x": halves(24, contrast=0.2)[0]}, "the images"),
        ({"y": 2 - halves(24)[1]}, "the labels"),
    ],
)
def test_another_question_does_not_touch_what_is_there_and_the_error_names_what_differs(tmp_path, change, difference):
    def stop(p) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(**question(), save=tmp_path / "r", on_progress=stop)
    before = {p: p.read_bytes() for p in (tmp_path / "r.unfinished").iterdir()}
    with pytest.raises(ValueError, match=rf"It differs in: {re.escape(difference)}.*\. Repeat that command"):
        evaluate(**question() | change, save=tmp_path / "r")
    assert {p: p.read_bytes() for p in (tmp_path / "r.unfinished").iterdir()} == before


def test_an_evaluation_that_finished_nothing_leaves_the_place_free(tmp_path, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(_Evaluation, "_batch", crash)
        with pytest.raises(RuntimeError):
            evaluate(**question() | {"model": small_net()}, save=tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
    # Also where the crash left no time to clear it away.
    FinishedBatches(tmp_path / "r", {"eps": 0.3})
    halves_ = question() | {"model": Halves(), "attacks": "clean"}
    assert len(evaluate(**halves_, save=tmp_path / "r").scores) == 1


def test_a_result_of_something_else_is_not_overwritten(tmp_path):
    x, y = halves(6)
    kwargs = {"x": x, "y": y, "attacks": "clean", "eps": 0.1}
    evaluate(small_net(), **kwargs, save=tmp_path / "r")
    evaluate(small_net(), **kwargs, save=tmp_path / "r.json")  # the same once more
    before = (tmp_path / "r.npz").read_bytes()
    for model, change, difference in (
        (Halves(), {}, "the model's layers"),
        (small_net(), {"eps": 0.2}, r"eps \(0\.1 then"),
        (small_net(), {"x": x[:4], "y": y[:4]}, "the images"),
    ):
        with pytest.raises(ValueError, match=rf"r\.npz is there already.*It differs in: {difference}.*another --out"):
            evaluate(model, **kwargs | change, save=tmp_path / "r")
    (tmp_path / "other.npz").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"other\.npz is there already"):
        evaluate(small_net(), **kwargs, save=tmp_path / "other")
    assert (tmp_path / "r.npz").read_bytes() == before and (tmp_path / "other.npz").read_bytes() == b"mine"


def test_two_evaluations_into_one_place_do_not_run_at_once(tmp_path):
    x, y = halves(6)
    kwargs = {"model": Halves(), "x": x, "y": y, "attacks": "pgd:steps=3", "eps": 0.1, "save": tmp_path / "r"}
    refused = []

    def second(p) -> None:
        if not refused:
            with pytest.raises(ValueError, match=r"is evaluating into .*r, since .*: wait for its end") as error:
                evaluate(**kwargs)
            refused.append(error)

    result = evaluate(**kwargs, on_progress=second)
    assert refused and table(EvaluationResult.load(tmp_path / "r")) == table(result)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.npz"]


def test_the_fingerprint_tells_weights_images_and_labels_apart():
    x, y = halves(4)
    net, other = small_net(), small_net()
    first, data = model_fingerprint(net), data_fingerprint((x, y))
    assert same_model(first, model_fingerprint(other)) and data == data_fingerprint((x.clone(), y.clone()))
    changed = data_fingerprint((x + 1e-3, 1 - y))
    assert changed["images"] != data["images"] and changed["labels"] != data["labels"]
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert model_fingerprint(other)["structure"] == first["structure"]
    assert model_fingerprint(other)["weights"] != first["weights"] and not same_model(first, model_fingerprint(other))
    assert not same_model(model_fingerprint(Halves()), model_fingerprint(Flipper()))
    assert not same_model(first, None) and not same_model({}, {})


def test_the_fingerprint_sees_normalisation_settings_and_a_numbers_type():
    net = small_net()
    prints = [gsem.normalized(net, 0.5, s) for s in (0.2, 0.3)] + [Flipper(0.3), Flipper(0.34), net]
    prints = [model_fingerprint(m) for m in prints] + [model_fingerprint(small_net().bfloat16())]
    assert len({tuple(p.values()) for p in prints}) == len(prints)


def test_the_fingerprint_of_a_state_that_is_no_tensor():
    """As quantized modules have it."""

    class Packed(torch.nn.Module):
        def __init__(self, scale: float):
            super().__init__()
            self.packed = (torch.ones(3, dtype=torch.bfloat16), {"scale": scale})

        def get_extra_state(self):
            return self.packed

    assert model_fingerprint(Packed(0.1)) == model_fingerprint(Packed(0.1)) != model_fingerprint(Packed(0.2))


def test_the_question_is_what_json_makes_of_it(tmp_path):
    FinishedBatches(tmp_path / "r", {"noise": ("fresh",), "eps": 0.1})
    FinishedBatches(tmp_path / "r", {"noise": ["fresh"], "eps": 0.1})
    assert json.loads((tmp_path / "r.unfinished/question.json").read_text()) == {"noise": ["fresh"], "eps": 0.1}


# --- verify ------------------------------------------------------------------------------------------------------


def test_what_was_found_is_found_again(uninterrupted):
    q = question()
    found = verify(uninterrupted, q["model"], q["x"], q["y"], draws=200)
    assert [v.name for v in found] == [s.name for s in uninterrupted.scores]
    assert [v.problems for v in found] == [[]] * len(found)


def test_distances_are_computed_in_float64_batch_by_batch(plain, monkeypatch):
    result, kwargs = plain
    monkeypatch.setattr("gsem.evaluation.verify.BATCH", 4)
    with InMemory(torch.float64) as memory:
        assert all(not found.problems for found in verify(result, **kwargs))
    images = kwargs["x"].numel() * 8
    assert 0 < memory.most < images / 2  # of 40 images


def changed(result: EvaluationResult, number: int, **change) -> EvaluationResult:
    every = list(result.scores)
    every[number] = replace(every[number], **change)
    return replace(result, scores=every)


@pytest.fixture
def plain() -> tuple[EvaluationResult, dict]:
    x, y = halves(40, contrast=0.15)
    kwargs = {"model": Halves(), "x": x, "y": y}
    return evaluate(**kwargs, attacks="clean,pgd:steps=9", eps=0.05, save_adv=True), kwargs


def test_planted_lies_are_found(plain):
    result, kwargs = plain
    scores = result.scores[1]
    x_adv = scores.x_adv

    def problems(number: int = 1, **change) -> str:
        return " ".join(verify(changed(result, number, **change), **kwargs)[number].problems)

    assert problems() == ""
    far = x_adv.copy()
    far[3] = (kwargs["x"][3] + 1.01 * 0.05).clamp(0, 1).numpy()
    assert "image 3 lies 0.0505 away (Linf), farther than eps = 0.05" in problems(x_adv=far)
    outside = x_adv.copy()
    outside[5, 0, 0, 0] = 1.2
    assert "image 5 leaves [0, 1]" in problems(x_adv=outside)
    assert "expected accuracy is" in problems(correct=1 - scores.correct)
    assert "the saved l2 distance of image 0" in problems(l2=scores.l2 + 0.1)
    moved = result.scores[0].x_adv + 0.001
    assert "the clean images are not those given" in problems(0, x_adv=moved)
    other = replace(result, y=1 - result.y)
    assert "40 labels differ from the saved ones" in verify(other, **kwargs)[0].problems


@pytest.mark.filterwarnings("ignore:fold runs Flipper")
def test_chance_is_allowed_and_no_more():
    x, y = halves(300)
    flips = evaluate(Flipper(0.3), x, y, "clean", eps=0.1, save_adv=True)
    found = verify(flips, Flipper(0.3), x, y)[0]
    assert found.problems == [] and found.again != found.saved  # the draws are others
    assert "expected accuracy" in verify(flips, Flipper(0.34), x, y)[0].problems[0]


@pytest.mark.filterwarnings("ignore:fold runs Flipper")
def test_another_setting_of_the_model_is_named_where_its_accuracy_does_not_hold():
    x, y = halves(40)
    flips = evaluate(Flipper(0.0), x, y, "clean", eps=0.1, save_adv=True)
    assert verify(flips, Flipper(0.0), x, y)[0].problems == []
    *_, last = verify(flips, Flipper(1.0), x, y)[0].problems
    assert "this is not the evaluated model. By its fingerprint, different are: the model's layers" in last


def test_a_result_without_images_cannot_be_verified(plain):
    result, kwargs = plain
    without = replace(result, scores=[replace(s, x_adv=None) for s in result.scores])
    with pytest.raises(ValueError, match=r"holds no adversarial examples.*save_adv"):
        verify(without, **kwargs)
    with pytest.raises(ValueError, match="the result is of images"):
        verify(result, kwargs["model"], kwargs["x"][:3], kwargs["y"][:3])


def test_a_saved_result_is_verified_from_its_file(tmp_path, plain):
    result, kwargs = plain
    result.save(tmp_path / "r")
    shutil.move(tmp_path / "r.npz", tmp_path / "moved.npz")
    assert verify(EvaluationResult.load(tmp_path / "moved.npz"), **kwargs)[1].problems == []
