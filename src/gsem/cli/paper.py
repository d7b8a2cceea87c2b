"""What the paper's commands do: the same names of files, run by this package's published recipes.

Differences from the released code: the best epoch is chosen on held-out training images instead of the test set;
`--milestones`, `--use_amp` can be set; `--device N` without a GPU runs on the CPU, with a message; MART corrects the
gradient of both branches.
"""

import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import torch
from rich.console import Console

from gsem._io import write_atomically
from gsem.attacks.suite import AttackSpec, suite
from gsem.cli.display import show_as_published, show_result
from gsem.cli.paper_options import EvaluateOptions, TrainOptions
from gsem.cli.progress import AttackBar
from gsem.data import load, to_float
from gsem.evaluation.evaluate import evaluate
from gsem.evaluation.result import EvaluationResult, with_ending
from gsem.nn.load import load_model
from gsem.nn.models import canonical_name
from gsem.training.progress import Progress
from gsem.training.recipe import Recipe
from gsem.training.recipes import RECIPES
from gsem.training.trainer import train

DATASETS = ("cifar10", "cifar100", "svhn")


def parse_bool(name: str, word: str) -> bool:
    """A boolean option that can be false.

    Raises:
        ValueError: neither true nor false.
    """
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if word.lower() not in words:
        raise ValueError(f"--{name} must be true or false, not {word!r}")
    return words[word.lower()]


def recipe_of(options: TrainOptions, published: str) -> Recipe:
    """The published recipe with the script's options.

    Raises:
        ValueError: options that make no sense.
    """
    o = options
    if o.dataset_name not in DATASETS:
        raise ValueError(f"--dataset_name must be one of {', '.join(DATASETS)}, not {o.dataset_name!r}")
    marks = [mark for word in o.milestones for mark in word.split(",") if mark]
    if not all(mark.isdigit() for mark in marks):
        raise ValueError(f"--milestones must be epochs, like 60 110 or 60,110, not {' '.join(o.milestones)!r}")
    milestones = tuple(int(mark) for mark in marks)
    if options.milestones == TrainOptions.milestones:
        # The defaults belong to 150 epochs; a shorter run without milestones of its own has those that it reaches.
        milestones = tuple(m for m in milestones if m < o.epochs)
    return replace(
        RECIPES[published],
        model=canonical_name(o.classifier_name),
        data=o.dataset_name,
        data_path=o.data_path,
        batch_size=o.batch_size,
        lr=o.lr,
        momentum=o.momentum,
        weight_decay=o.weight_decay,
        milestones=milestones,
        epochs=o.epochs,
        rounds=o.reload,
        precision="fp16" if parse_bool("use_amp", o.use_amp) else "float32",
        levels=o.alpha,
        noise=o.beta,
        draws=o.gra_eot_num,
        eot=o.att_eot_num,
        init_from=o.model_load_path or None,
    )


def device_of(word: str) -> str:
    """`cuda:N` for the number of a GPU that is there; else the CPU, with a message."""
    if word == "cpu":
        return "cpu"
    if not word.isdigit():
        raise ValueError(f"--device must be the number of a GPU, or cpu, not {word!r}")
    if torch.cuda.is_available():
        return f"cuda:{word}"
    print("there is no GPU here: running on the CPU", file=sys.stderr)
    return "cpu"


def export(state: dict[str, torch.Tensor], options: TrainOptions, accuracy: float) -> Path:
    """Save `MODEL_SAVE_PATH/DATASET/CLASSIFIER_alpha_beta_ACC.pt`, ACC in per cent, as the paper's code names it."""
    o = options
    name = f"{o.classifier_name}_{o.alpha}_{o.beta}_{100 * accuracy:.2f}.pt"
    path = Path(o.model_save_path) / o.dataset_name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    torch.save(state, content)
    write_atomically(path, content.getvalue())
    return path


def run_training(options: TrainOptions, published: str) -> Path | None:
    """Train, or resume the same training; export the best weights. The path of the .pt, or None."""
    o = options
    recipe, device = recipe_of(o, published), device_of(o.device)
    directory = Path(o.model_save_path) / o.dataset_name / f"{o.classifier_name}_{o.alpha}_{o.beta}_{published}"

    def report(p: Progress) -> None:
        if p.epoch_ended:
            accuracies = "" if p.clean is None or p.robust is None else f"clean {p.clean:.2%} robust {p.robust:.2%}"
            print(f"epoch {p.epoch}/{p.epochs} loss {p.loss:.4f} {accuracies}", flush=True)

    run = train(recipe, out=directory, device=device, resume=True, on_progress=report)
    robust = run.best["robust"]
    if 100 * robust < o.best_acc:
        print(f"robust validation accuracy {robust:.2%} is below --best_acc {o.best_acc:g}: nothing exported")
        return None
    path = export(run.model().state_dict(), o, robust)
    print(f"saved {path}")
    return path


def run_evaluation(options: EvaluateOptions) -> EvaluationResult:
    """The suite (default: paper) on the whole test set; the result is saved beside the .pt."""
    o = options
    device = device_of(o.device)
    source = load(o.dataset_name, root=o.data_path)
    model, _ = load_model(
        o.model_load_path, name=o.classifier_name, num_classes=len(source.classes), levels=o.alpha, noise=o.beta
    )
    test = source.test()
    x, y = to_float(test.x).to(device), test.y.to(device)
    attacks = [
        replace(a, options=a.options | ({"eot": o.att_eot_num} if "eot" in a.entry.options else {}))
        for a in (*suite(o.suite), *([AttackSpec("transfer")] if o.suite in ("paper", "standard") else []))
    ]
    console = Console(highlight=False, markup=False, emoji=False)
    out = Path(o.model_load_path.removesuffix(".pt"))
    finished = with_ending(out, ".npz").exists()
    with AttackBar(console) as bar:
        result = evaluate(
            model.to(device), x, y, attacks, eps=8 / 255, batch_size=o.batch_size, save=out, on_progress=bar
        )
    show_result(console, result, f"{o.model_load_path} on {o.dataset_name}: {len(test)} test images")
    if result.metadata["stochastic"]:
        show_as_published(console, result)
    if finished:  # (of anything else, `evaluate` would have refused it)
        console.print(f"already finished: {with_ending(out, '.npz')}; delete it to compute it anew", soft_wrap=True)
    return result
