"""The paper's command lines: the same options as in the released code.

The four scripts at the repository's root call `train_main` and `evaluate_main`. What the commands do is imported
when their options have been read, so that `--help` loads no torch.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import tyro

from gsem._interrupt import exit_code, sigterm_raises
from gsem._world import world


@dataclass(frozen=True)
class TrainOptions:
    """The options of the paper's training scripts."""

    classifier_name: str = "GSeMResNet18"
    """GSeMResNet18, GSeMWideResNet28x10, … (see `gsem models`)."""
    dataset_name: str = "cifar10"
    """cifar10, cifar100 or svhn."""
    data_path: str = "dataset"
    """Directory of the original files; they are downloaded there when missing."""
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0035
    milestones: tuple[str, ...] = ("60", "110")
    """Epochs after which the learning rate falls to a tenth: 60 110 or 60,110."""
    epochs: int = 150
    reload: int = 5
    """Rounds of the schedule, each from the best checkpoint of those before."""
    model_save_path: str = "adv_model"
    model_load_path: str = ""
    """Weights to start from: a .pt of these scripts, or a checkpoint of gsem train."""
    best_acc: float = 0.0
    """Per cent: weights whose robust validation accuracy is below it are not exported."""
    use_amp: str = "true"
    """true or false: 16-bit training passes."""
    alpha: int = 6
    """GSeM's levels."""
    beta: int = 4
    """GSeM's noise."""
    gra_eot_num: int = 10
    """Draws of the noise per parameter gradient."""
    att_eot_num: int = 10
    """Draws of the noise per attack gradient."""
    device: str = "0"
    """Number of the GPU, or cpu."""


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of the paper's evaluation script."""

    model_load_path: str
    """A .pt of the training scripts."""
    data_path: str = "dataset"
    batch_size: int = 512
    dataset_name: str = "cifar10"
    """cifar10, cifar100 or svhn."""
    classifier_name: str = "GSeMResNet18"
    alpha: int = 6
    """GSeM's levels."""
    beta: int = 4
    """GSeM's noise."""
    att_eot_num: int = 20
    """Draws of the noise per attack gradient."""
    suite: str = "paper"
    """Not in the paper's script: paper, standard, quick, or paper-code (the budgets that its code really ran)."""
    device: str = "0"
    """Number of the GPU, or cpu."""


def _main(kind: Any, function: str, *more: str) -> int:
    try:
        if world().size > 1:
            raise ValueError("this script runs in one process: in several, use gsem train or gsem evaluate")
        options = tyro.cli(kind)
        with sigterm_raises():
            getattr(import_module("gsem.cli.paper"), function)(options, *more)
        return 0
    except KeyboardInterrupt as stopped:
        print("stopped; the same command resumes from here", file=sys.stderr)
        kind = getattr(stopped, "kind", type(stopped))  # (a training keeps which signal stopped it)
        return exit_code(kind())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def train_main(published: str) -> int:
    """A training script: `published` names the recipe. Returns the exit code."""
    return _main(TrainOptions, "run_training", published)


def evaluate_main() -> int:
    """The evaluation script. Returns the exit code."""
    return _main(EvaluateOptions, "run_evaluation")
