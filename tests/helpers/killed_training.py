"""Trains while something kills it, again and again, until the run ends. Started by test_train.py.

    python killed_training.py RUN_DIRECTORY SEED_OF_THE_KILLS KILLS

Each life is a fork that dies by SIGKILL at a planted or random place: inside a step, with a checkpoint half
written, between the write and the rename, between the metrics and the checkpoint, or after a random time.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import gsem._io
from gsem.training.recipe import Recipe
from gsem.training.step import Stepper
from gsem.training.trainer import Trainer, train
from planted import small_digits

RECIPE = Recipe(
    model="gsem-resnet10x16", adversarial_fraction=0.5, steps=2, epochs=3, rounds=2, batch_size=32, ema=0.9, lr=0.05
)
DATA = small_digits()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def plant(place: str, after: int) -> None:
    calls = 0

    def counted(function, before=None):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > after:
                if before is not None:
                    before(*args, **kwargs)
                die()
            return function(*args, **kwargs)

        return call

    def tear(descriptor):  # half of the content, as a crash in the middle of the write leaves it
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

    if place == "step":
        Stepper._update = counted(Stepper._update)
    elif place == "write":
        gsem._io.os.fsync = counted(os.fsync, before=tear)
    elif place == "rename":
        gsem._io.os.replace = counted(os.replace)
    elif place == "save":
        Trainer.save = counted(Trainer.save)
    elif place == "round":
        Trainer._begin_round = counted(Trainer._begin_round)


def life(path: Path, place: str | None, after: int) -> bool:
    """Whether the run came to its end."""
    child = os.fork()
    if child == 0:
        try:
            gsem.train.__globals__["SAVE_SECONDS"] = 0.0  # a checkpoint after every step
            if place not in (None, "time"):
                plant(place, after)
            train(RECIPE, out=path, data=DATA, device="cpu", resume=True)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if place == "time":
        time.sleep(after / 10)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a life ended by an error, not by its kill")
    return os.WIFEXITED(status)


def main() -> None:
    path, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads
    rng = random.Random(seed)
    places = ["step", "write", "rename", "save", "round", "time"]
    died = 0
    for number in range(kills):
        place = places[number % len(places)]
        # A round begins once: its first call is the one.
        if life(path, place, 0 if place == "round" else rng.randrange(1, 3)):
            break
        died += 1
    assert life(path, None, 0)
    print(f"died {died} times")


if __name__ == "__main__":
    main()
