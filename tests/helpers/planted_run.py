"""Run directories whose every figure is known: recipe, metrics, evaluation, audit, and weights if asked for."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import gsem
from gsem._fingerprint import model_fingerprint
from gsem._io import save_checkpoint
from gsem.attacks.suite import EOT
from gsem.auditing import Audit, Check
from gsem.evaluation.result import AttackScores, EvaluationResult
from gsem.training.recipes import RECIPES
from gsem.training.run import model_meta

IMAGES, DRAWS, EPS = 40, 100, 0.15
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ATTACKED = f"apgd100-eot{EOT}-margin"


def planted_scores(name: str, correct: np.ndarray, draws: int, **change: Any) -> AttackScores:
    n = len(correct)
    cost = {"forwards": 50 * n, "gradients": 2000 * n, "seconds": 61.0} if not name.startswith("clean") else {}
    free = {"forwards": 0, "gradients": 0, "seconds": 0.0}
    return AttackScores(
        **{
            "name": name,
            "correct": correct,
            "votes": (correct * 2 > draws).astype(float),
            "selection": correct,
            "single": np.stack([correct * 2 > draws] * 2, axis=1),
            "linf": np.zeros(n),
            "l2": np.zeros(n),
        }
        | free
        | cost
        | change
    )


def planted_model() -> torch.nn.Module:
    recipe = RECIPES["gcat"]
    torch.manual_seed(3)
    return gsem.create_model(**model_meta(recipe, classes=CLASSES, shape=(1, 8, 8), eps=EPS)["model"])


@cache
def planted_fingerprint() -> dict[str, str]:
    return model_fingerprint(planted_model())


def planted_result(x: np.ndarray | None = None, x_adv: np.ndarray | None = None) -> EvaluationResult:
    """Four images of each of ten classes. Under attack the images of class k stay right in 10 · k of 100 draws."""
    y = np.arange(IMAGES) % 10
    kept: dict[str, Any] = {"x_adv": x}
    moved: dict[str, Any] = {"x_adv": x_adv}
    scores = [
        planted_scores("clean", np.full(IMAGES, 95), DRAWS, **kept),
        planted_scores(ATTACKED, 10 * y, DRAWS, **moved),
        planted_scores("cw100-unbounded-eot20", 0 * y, DRAWS, bounded=False, l2=np.full(IMAGES, 0.75)),
        planted_scores("clean@frozen", np.ones(IMAGES, dtype=int), 1, noise="frozen", **kept),
        planted_scores("apgd100-eot1@frozen", (y > 6).astype(int), 1, noise="frozen", **moved),
        planted_scores("clean@off", np.ones(IMAGES, dtype=int), 1, noise="off", **kept),
        planted_scores("apgd100-eot1@off", (y > 4).astype(int), 1, noise="off", **moved),
    ]  # fmt: skip
    metadata = {
        "images": IMAGES,
        "fingerprint": planted_fingerprint(),
        "eps": EPS,
        "norm": "Linf",
        "draws": DRAWS,
        "stochastic": True,
        "seed": 0,
        "noise": ["fresh", "frozen", "off"],
        "options": {},
        "torch": "2.13.0",
        "machine": "x86_64",
        "device": "cpu",
        "about": {"model": "run", "data": "digits", "data_path": None, "subset": {"kind": "first", "images": IMAGES}},
    }
    return EvaluationResult(scores, y, metadata)


@cache
def _evaluation() -> tuple[tuple[str, bytes], ...]:
    """Its files. (The bootstrap of forty intervals takes longer than all else here.)"""
    with TemporaryDirectory() as folder:
        saved = planted_result().save(Path(folder) / "evaluation")
        return tuple((ending, saved.with_suffix(ending).read_bytes()) for ending in (".json", ".npz"))


def planted_audit(**change: Any) -> Audit:
    """One check of each outcome, and sweeps, of an accuracy that is overstated by 12 points."""
    curves = {
        "eps": [
            {"eps": eps, "accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02}
            for eps, accuracy in ((0.0, 0.95), (0.075, 0.71), (0.15, 0.43), (0.3, 0.125), (1.0, 0.03))
        ],
        "steps": [{"steps": 100, "accuracy": 0.43}, {"steps": 200, "accuracy": 0.428}],
        "eot": [{"eot": 20, "accuracy": 0.43}, {"eot": 40, "accuracy": 0.429}],
        "chance": 0.1,
    }
    checks = (
        Check("randomness", "Does it answer alike?", 1.0, "outputs differ", "pass", "they differ", "", "A, 2018"),
        Check("gradient", "Is it so?", 1.358, "outside [0.93, 1.07]", "flag", "slope 1.36", "Correct it.", "B, 2019",
              again=1.01, answered=True, details={"layer": "gsem"}),
        Check("binarization", "Is a point found?", None, "under 0.95", "inconclusive", "too few", "More.", "C, 2022"),
        Check("noise", "Is it known?", None, "under 0.5", "not applicable", "there is none", "", "E, 2020"),
        Check("sweeps", "Does it fall?", 0.002, "over 0.003", "pass", "it falls", "", "D, 2019", details=curves),
    )  # fmt: skip
    metadata = {
        "images": 128,
        "fingerprint": planted_fingerprint(),
        "eps": EPS,
        "norm": "Linf",
        "attacks": [ATTACKED],
        "quick": True,
        "only": None,
        "seconds": 125.0,
        "command": "gsem audit runs/planted --quick",
        "claimed": {"accuracy": 0.43, "low": 0.4, "high": 0.46},
        "found": {"accuracy": 0.31, "low": 0.27, "high": 0.35},
        "gap": {"mean": 0.12, "low": 0.09, "high": 0.15},
        "reached_by": "apgd:through=gsem,square:queries=300",
        "evaluate": "gsem evaluate runs/planted --images 128",
    }
    reason = "The claimed 43.0% is 12.0 points above the 31.0% found. Flagged: gradient: slope 1.36."
    return replace(Audit(checks, "OVERSTATED", reason, metadata), **change)


def planted_run(
    path: Path, *, classes: tuple[str, ...] = CLASSES, weights: bool = False, audit: bool = True, data: str = "digits"
) -> Path:
    """A run directory as gsem train, evaluate and audit leave it."""
    path.mkdir(parents=True)
    recipe = replace(RECIPES["gcat"], epochs=4, warmup=0.0, seed=7, data=data)
    meta = model_meta(recipe, classes=classes, shape=(1, 8, 8), eps=EPS)
    recorded = {
        "gsem_torch": "2.13.0",
        "machine": "x86_64",
        "device": "cpu",
        "training_images": 1177,
        "commit": "0123456789ab",
    }
    (path / "recipe.json").write_text(json.dumps(meta | recorded))
    lines = [
        {"epoch": e, "step": 9 * e, "loss": 2.5 / e, "seconds": 10.0 * e, "clean": 0.2 * e, "robust": 0.15 * e}
        for e in range(1, 5)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if weights:
        model = planted_model()
        (path / "checkpoints").mkdir()
        tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
        save_checkpoint(path / "checkpoints/best.safetensors", tensors, meta)
    for ending, content in _evaluation():
        (path / f"evaluation{ending}").write_bytes(content)
    if audit:
        planted_audit().save(path / "audit.json")
    return path
