"""An evaluation that is interrupted ends with the table of the uninterrupted one; saved examples are judged again."""

import json
import random
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
from gsem.evaluate import evaluate
from gsem.ledger import Ledger, fingerprint
from gsem.result import Result
from gsem.verify import verify
from killed_evaluation import question
from planted import Flipper, Halves, halves, small_net


def table(result: Result) -> list:
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
def uninterrupted(tmp_path_factory) -> Result:
    return evaluate(**question(), save=tmp_path_factory.mktemp("whole") / "r", keep_images=True)


def test_killed_at_ten_random_moments_it_ends_with_the_table_of_the_uninterrupted_one(tmp_path, uninterrupted):
    chance = random.Random(0)
    words = [sys.executable, str(Path(__file__).with_name("killed_evaluation.py")), str(tmp_path / "r")]
    kills, pieces = 0, set()
    for _ in range(10):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        time.sleep(chance.uniform(0.0, 0.8))
        if process.poll() is None:
            kills += 1
        process.kill()
        process.wait()
        pieces |= {p.name for p in tmp_path.glob("r.unfinished/*.npz")}
    assert kills > 0
    result = evaluate(**question(), save=tmp_path / "r", keep_images=True)
    assert table(result) == table(uninterrupted)
    for a, b in zip(result.scores, uninterrupted.scores, strict=True):
        assert np.array_equal(a.x_adv, b.x_adv)
    assert table(Result.load(tmp_path / "r")) == table(uninterrupted)
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
        evaluate(**question(), save=tmp_path / "r", keep_images=True, report=stop)
    finished = list(tmp_path.glob("r.unfinished/*-*.npz"))
    assert finished
    before = {f: f.stat().st_mtime_ns for f in finished}
    seen = []
    result = evaluate(
        **question(),
        save=tmp_path / "r",
        keep_images=True,
        report=lambda p: seen.append([f.stat() for f in before if f.exists()]),
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
        evaluate(**question(), save=tmp_path / "r", keep_images=True, report=stop)
    folder = tmp_path / "r.unfinished"
    piece = next(folder.glob("[0-9a-f]*.npz"))
    half = folder / f".{piece.stem}.writing.npz"
    half.write_bytes(piece.read_bytes()[:200])
    piece.unlink()
    assert table(evaluate(**question(), save=tmp_path / "r", keep_images=True)) == table(uninterrupted)


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 0.2},
        {"draws": 13},
        {"attacks": "clean,pgd:steps=5"},
        {"batch": 4},
        {"seed": 1},
        {"sources": {"other": small_net()}},
    ],
)
def test_another_question_does_not_touch_what_is_there(tmp_path, change):
    def stop(p) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(**question(), save=tmp_path / "r", report=stop)
    before = {p: p.read_bytes() for p in (tmp_path / "r.unfinished").iterdir()}
    what = "options" if "attacks" in change else next(iter(change))
    with pytest.raises(ValueError, match=rf"asked something else \(.*{what}.* differ\): repeat that command"):
        evaluate(**question() | change, save=tmp_path / "r")
    assert {p: p.read_bytes() for p in (tmp_path / "r.unfinished").iterdir()} == before


def test_the_fingerprint_tells_weights_images_and_labels_apart():
    x, y = halves(4)
    net, other = small_net(), small_net()
    first = fingerprint(x, y, net)
    assert fingerprint(x.clone(), y.clone(), other) == first
    assert fingerprint(x + 1e-3, y, net) != first
    assert fingerprint(x, 1 - y, net) != first
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(x, y, other) != first
    assert fingerprint(x, y, Halves()) != fingerprint(x, y, Flipper())


def test_the_question_is_what_json_makes_of_it(tmp_path):
    Ledger(tmp_path / "r", {"noise": ("fresh",), "eps": 0.1})
    Ledger(tmp_path / "r", {"noise": ["fresh"], "eps": 0.1})
    assert json.loads((tmp_path / "r.unfinished/question.json").read_text()) == {"noise": ["fresh"], "eps": 0.1}


# --- verify ------------------------------------------------------------------------------------------------------


def test_what_was_found_is_found_again(uninterrupted):
    q = question()
    found = verify(uninterrupted, q["model"], q["x"], q["y"], draws=200)
    assert [v.name for v in found] == [s.name for s in uninterrupted.scores]
    assert [v.problems for v in found] == [[]] * len(found)


def changed(result: Result, number: int, **change) -> Result:
    every = list(result.scores)
    every[number] = replace(every[number], **change)
    return replace(result, scores=every)


@pytest.fixture
def plain() -> tuple[Result, dict]:
    x, y = halves(40, contrast=0.15)
    how = {"model": Halves(), "x": x, "y": y}
    return evaluate(**how, attacks="clean,pgd:steps=9", eps=0.05, keep_images=True), how


def test_planted_lies_are_found(plain):
    result, how = plain
    scores = result.scores[1]
    x_adv = scores.x_adv

    def problems(number: int = 1, **change) -> str:
        return " ".join(verify(changed(result, number, **change), **how)[number].problems)

    assert problems() == ""
    far = x_adv.copy()
    far[3] = (how["x"][3] + 1.01 * 0.05).clamp(0, 1).numpy()
    assert "image 3 lies 0.0505 away (Linf), farther than eps = 0.05" in problems(x_adv=far)
    outside = x_adv.copy()
    outside[5, 0, 0, 0] = 1.2
    assert "image 5 leaves [0, 1]" in problems(x_adv=outside)
    assert "expected accuracy is" in problems(correct=1 - scores.correct)
    assert "the saved l2 distance of image 0" in problems(l2=scores.l2 + 0.1)
    moved = result.scores[0].x_adv + 0.001
    assert "the clean images are not those given" in problems(0, x_adv=moved)
    other = replace(result, y=1 - result.y)
    assert "40 labels differ from the saved ones" in verify(other, **how)[0].problems


@pytest.mark.filterwarnings("ignore:search_twin runs Flipper")
def test_chance_is_allowed_and_no_more():
    x, y = halves(300)
    flips = evaluate(Flipper(0.3), x, y, "clean", eps=0.1, keep_images=True)
    found = verify(flips, Flipper(0.3), x, y)[0]
    assert found.problems == [] and found.again != found.saved  # the draws are others
    assert "expected accuracy" in verify(flips, Flipper(0.34), x, y)[0].problems[0]


def test_a_result_without_images_cannot_be_verified(plain):
    result, how = plain
    without = replace(result, scores=[replace(s, x_adv=None) for s in result.scores])
    with pytest.raises(ValueError, match=r"holds no adversarial examples.*keep_images"):
        verify(without, **how)
    with pytest.raises(ValueError, match="the result is of images"):
        verify(result, how["model"], how["x"][:3], how["y"][:3])


def test_a_saved_result_is_verified_from_its_file(tmp_path, plain):
    result, how = plain
    result.save(tmp_path / "r")
    shutil.move(tmp_path / "r.npz", tmp_path / "moved.npz")
    assert verify(Result.load(tmp_path / "moved.npz"), **how)[1].problems == []
