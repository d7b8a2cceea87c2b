"""Whole trainings on several processes. Started by test_distributed_training.py.

python distributed_runs.py FOLDER killed     process 1 kills itself in the fifth step
python distributed_runs.py FOLDER            everything else; prints what happened on this process as JSON
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gsem
import gsem.training.trainer as trainer
from gsem._fingerprint import model_fingerprint
from gsem.data import DamagedImage
from gsem.data.batches import Streamed
from gsem.distributed import current
from gsem.training.step import Stepper
from planted import small_digits

RECIPE = gsem.Recipe(
    model="gsem-resnet10x16", adversarial_fraction=0.5, steps=1, epochs=1, rounds=2, batch_size=33, ema=0.9, lr=0.05
)
DATA = small_digits()


@contextmanager
def in_step(number: int, act: Callable[[Stepper], None], rank: int = 1) -> Iterator[None]:
    """In this step of the process `rank`, `act` is called first."""
    plain, calls = Stepper.__call__, 0

    def step(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and current().rank == rank:
            act(self)
        plain(self, *args, **kwargs)

    Stepper.__call__ = step
    try:
        yield
    finally:
        Stepper.__call__ = plain


def send(number: int) -> Callable[[Stepper], None]:
    return lambda stepper: os.kill(os.getpid(), number)


def spoil(stepper: Stepper) -> None:
    stepper._augmented = lambda pixels, *_: torch.full(pixels.shape, torch.nan)


def end(**arguments: Any) -> dict[str, Any]:
    """Train: the error's type and text, if one was raised, and the hashes of the weights in memory."""
    steppers = []
    plain = trainer.Trainer.run

    def run(self, *args):
        steppers.append(self.stepper)
        plain(self, *args)

    trainer.Trainer.run = run
    found: dict[str, Any] = {}
    try:
        run_ = gsem.train(**{"recipe": RECIPE, "data": DATA, "device": "cpu"} | arguments)
        found["metrics"] = [{k: v for k, v in line.items() if k != "seconds"} for line in run_.metrics]
    except (Exception, KeyboardInterrupt) as error:
        found |= {"error": type(error).__name__, "text": str(error)}
    finally:
        trainer.Trainer.run = plain
    for stepper in steppers:
        models = [stepper.model] + ([stepper.average.model] if stepper.average else [])
        found["weights"] = [model_fingerprint(model) for model in models]
    return found


def damaged(folder: Path) -> dict[str, Any]:
    """Streamed images, of which one cannot be read on one process in the third batch."""
    extra = folder / "extra.npz"
    generated = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    current().from_first(lambda: np.savez(extra, image=generated, label=np.arange(40) % 10))
    how = {"recipe": replace(RECIPE, extra_data=str(extra), extra_share=0.25, rounds=1, ema=0.0)}
    found = {"held": end(out=folder / "held", **how)}
    plain = Streamed.batches

    def batches(self, rows):
        for number, batch in enumerate(plain(self, rows), start=1):
            if number == 3 and current().rank == 1:
                raise DamagedImage("planted")
            yield batch

    streamed = {"out": folder / "streamed", "hold": False} | how
    Streamed.batches = batches
    try:
        found["damaged"] = end(**streamed)
    finally:
        Streamed.batches = plain
    return found | {"streamed": end(resume=True, **streamed)}


def everything(folder: Path) -> dict[str, Any]:
    found = {"whole": end(out=folder / "whole")}
    found["again"] = end(out=folder / "whole")
    found["too many"] = end(out=folder / "many", recipe=replace(RECIPE, batch_size=1))
    with in_step(4, send(signal.SIGINT)):
        found["stopped"] = end(out=folder / "stopped")
    found["resumed"] = end(out=folder / "stopped", resume=True)
    with in_step(4, send(signal.SIGTERM)):
        found["terminated"] = end(out=folder / "elsewhere")
    with in_step(2, spoil):
        found["diverged"] = end(out=folder / "diverged")
    found["after the kill"] = end(out=folder / "killed", resume=True)
    return found | damaged(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer.SAVE_SECONDS = 0.0
    if "killed" in sys.argv:
        with in_step(5, send(signal.SIGKILL)):
            gsem.train(RECIPE, data=DATA, device="cpu", out=Path(sys.argv[1]) / "killed")
    print(json.dumps(everything(Path(sys.argv[1]))))
