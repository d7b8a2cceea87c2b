"""Evaluations in one of several processes: python evaluated_together.py CASE OUT. It prints a line of JSON."""

import hashlib
import json
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import gsem
from audited_models import Fronted, Quantise, mlp
from gsem.distributed import current
from gsem.evaluation.corruptions import evaluate_corruptions
from gsem.evaluation.result import ARRAYS, EvaluationResult
from gsem.evaluation.work import shared_out
from killed_evaluation import question
from planted import halves, small_net


def fingerprint(result: EvaluationResult) -> list:
    """Of everything but the time."""
    found = []
    for s in result.scores:
        arrays = [getattr(s, key) for key in ARRAYS] + ([] if s.x_adv is None else [s.x_adv])
        digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
        found.append([s.name, digest, s.forwards, s.gradients, s.noise])
    metadata = {key: value for key, value in result.metadata.items() if key != "about"}
    return [found, result.y.tolist(), result.rows.tolist(), json.loads(json.dumps(metadata))]


def one_step(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, seed: int) -> Tensor:
    """A random step; the environment makes it slow, and names a file that notes each call."""
    time.sleep(float(os.environ.get("SLOW", "0")))
    if "CALLS" in os.environ:
        with open(os.environ["CALLS"], "a") as file:
            file.write("called\n")
    return (x + eps * torch.randn(x.shape, generator=torch.manual_seed(seed)).sign()).clamp(0, 1)


def deterministic(out: Path) -> dict:
    x, y = halves(26, contrast=0.1)
    return {
        "model": small_net(),
        "x": x,
        "y": y,
        "attacks": [one_step, "pgd:steps=3", "apgd:steps=4:targets=1", "transfer:steps=2", "rays:queries=20"],
        "source_models": {"other": gsem.create_model("resnet10x16", num_classes=3, in_channels=1).eval()},
        "eps": 0.1,
        "batch_size": 8,
        "rows": range(100, 126),
        "save": out / "deterministic",
        "save_adv": True,
    }


class Fails:
    """An attack that fails on one batch, where the others take long."""

    __name__ = "fails"

    def __init__(self, culprit: float):
        self.culprit = culprit

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if float(x.sum()) == self.culprit:
            raise ArithmeticError("this batch")
        time.sleep(0.3)
        return x


def raised(evaluation: dict) -> list[str]:
    try:
        gsem.evaluate(**evaluation)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def equal_results(out: Path) -> dict:
    """A stochastic and a deterministic network, one batch for all processes, and the same once more."""
    reports: list = []
    stochastic = question() | {"save": out / "stochastic", "save_adv": True, "on_progress": reports.append}
    found = [gsem.evaluate(**q) for q in (stochastic, deterministic(out))]
    one_batch = deterministic(out) | {"save": None, "save_adv": False, "batch_size": 256, "attacks": "pgd:steps=2"}
    found.append(gsem.evaluate(**one_batch))
    before = (out / "stochastic.npz").stat().st_mtime_ns
    again = gsem.evaluate(**stochastic)
    return {
        "results": [fingerprint(r) for r in [*found, again]],
        "kept": (out / "stochastic.npz").stat().st_mtime_ns == before,
        "finished": {p.name: p.done == p.images for p in reports},
        "reports": len(reports),
        "another": raised(stochastic | {"eps": 0.2}),
        "left": sorted(path.name for path in out.iterdir()),
    }


def errors(out: Path) -> dict:
    x, y = halves(24, contrast=0.1)
    net, rank = small_net(), current().rank
    asked = {"model": net, "x": x, "y": y, "eps": 0.1, "batch_size": 8}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        gsem.evaluate(
            **asked | {"model": nn.Sequential(net, nn.Softmax(1)), "attacks": "apgd:steps=2:loss=dlr:targets=1"}
        )
    failing = asked | {"attacks": Fails(float(x[8:16].sum())), "save": out / "failed"}
    return {
        "in one item": raised(failing),
        "kept": len(list((out / "failed.unfinished").glob("*.npz"))),
        "other eps": raised(asked | {"eps": 0.1 + 0.1 * rank}),
        "no attack": raised(asked | {"attacks": "nothing"}),
        "warnings": sorted({str(w.message) for w in warned}),
        "at the end": fingerprint(gsem.evaluate(**asked)),
    }


def slow(out: Path) -> dict:
    return {"results": fingerprint(gsem.evaluate(**deterministic(out)))}


def first_fails() -> int:
    raise RuntimeError("item 0")


def other_fails() -> int:
    raise KeyError("item 1")


def audits(out: Path) -> dict:
    """An audit, accuracies under corruptions, a report, and items of which two fail."""
    test = gsem.data.load("digits").test()
    x, y = gsem.data.to_float(test.x[:12]), test.y[:12]
    how: dict = {"eps": 0.1, "quick": True, "draws": 3, "batch_size": 5, "save": out / "audit"}
    how |= {"only": ["silent_success", "transfer", "unconstrained", "blackbox", "noise"]}
    attacks = "apgd:steps=3:eot=2,apgd:steps=3:eot=2:loss=margin,square:queries=5:eot=2"
    stochastic = Fronted(Quantise(noise=0.05), mlp()).eval()
    reports: list = []

    found = gsem.audit(stochastic, x, y, attacks, **how, on_progress=reports.append)
    corruptions = {
        (name, s): gsem.data.Split(test.x[20 * s : 20 * s + 15], test.y[20 * s : 20 * s + 15])
        for name in ("fog", "snow")
        for s in (1, 2, 3)
    }
    cells = evaluate_corruptions(stochastic, corruptions, draws=4, batch_size=6, save=out / "corruptions.json")
    gsem.evaluate(stochastic, x, y, "clean", eps=0.1, draws=3, save=out / "evaluation")
    gsem.report(out / "evaluation.npz", out / "report.md")
    try:
        shared_out("items", [lambda: 1, first_fails, other_fails, lambda: 2])
        failed = ""
    except Exception as error:
        failed = repr(error)
    return {
        "audit": without_seconds(found.to_dict()),
        "kept": without_seconds(json.loads((out / "audit.json").read_text())),
        "reports": len(reports),
        "corruptions": [cells.to_dict(), json.loads((out / "corruptions.json").read_text())],
        "shared": shared_out("squares", [partial(pow, n, 2) for n in range(7)]),
        "failed": failed,
        "left": sorted(path.name for path in out.iterdir()),
    }


def without_seconds(audit: dict) -> dict:
    plain = json.loads(json.dumps(audit))
    del plain["metadata"]["seconds"]
    return plain


CASES = {"equal": equal_results, "errors": errors, "slow": slow, "audits": audits}

if __name__ == "__main__":
    torch.set_num_threads(1)
    case, place = sys.argv[1:]
    print(json.dumps(CASES[case](Path(place))), flush=True)
