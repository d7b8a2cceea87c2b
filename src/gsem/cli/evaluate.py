"""gsem evaluate and gsem verify: load model, images and attacks, run, print, save."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gsem._text import percent
from gsem.attacks.suite import SUITES, AttackSpec, parse_attacks
from gsem.cli.corruptions import evaluate_corruptions_command
from gsem.cli.display import show_as_published, show_result
from gsem.cli.options import EvaluateOptions, VerifyOptions
from gsem.cli.progress import AttackBar
from gsem.cli.task import Task, load_task, numbered
from gsem.evaluation.corruptions import CorruptionResult
from gsem.evaluation.evaluate import evaluate
from gsem.evaluation.partial import AnotherQuestion
from gsem.evaluation.result import EvaluationResult, with_ending
from gsem.evaluation.verify import verify

DEFAULT = "clean,pgd:steps=100"


def evaluate_command(console: Console, o: EvaluateOptions) -> EvaluationResult | CorruptionResult:
    """Attack, show and save, by the options; or measure the accuracy on corrupted images."""
    if o.corruptions is not None:
        return evaluate_corruptions_command(console, o)
    attacks = attacks_of(o)  # (a wrong one is an error before anything is loaded)
    task = load_task(o)
    result, place, finished = evaluated(console, o, task, attacks)
    show_result(console, result, task.title)
    if o.suite in ("paper", "paper-code") and result.metadata["stochastic"]:
        show_as_published(console, result)
    files = f"{with_ending(place, '.json')} and {with_ending(place, '.npz')}"
    if finished and not o.again:
        console.print(f"already finished: {files}; --again computes it anew", soft_wrap=True)
    else:
        console.print(f"saved in {files}", soft_wrap=True)
    return result


def evaluated(
    console: Console, o: EvaluateOptions, task: Task, attacks: list[AttackSpec] | str
) -> tuple[EvaluationResult, Path, bool]:
    """The evaluation of a task by its options, its place, and whether it was there already."""
    with AttackBar(console) as bar:

        def at(place: Path) -> EvaluationResult:
            return evaluate(
                task.model,
                task.x,
                task.y,
                attacks,
                eps=task.eps,
                norm=o.norm,
                draws=o.draws,
                seed=o.seed,
                batch_size=o.batch_size,
                source_models=task.source_models,
                frozen=o.frozen,
                save_adv=o.save_adv,
                rows=task.rows.tolist(),
                save=place,
                again=o.again,
                about=task.about(place),
                on_progress=bar,
            )

        run = Path(o.model)
        default = run / "evaluation" if run.is_dir() else Path("evaluation")
        return _at_its_place(at, o.out, default)


def _at_its_place(
    evaluated: Callable[[Path], EvaluationResult], out: Path | None, default: Path
) -> tuple[EvaluationResult, Path, bool]:
    """The result, its place, and whether it was there already.

    The place is `out`; without it, the first of `default`, `default-2`, … that holds this evaluation or none.

    Raises:
        AnotherQuestion: `out` holds a different evaluation.
    """
    for place in [out] if out is not None else numbered(default):
        finished = with_ending(place, ".npz").exists()
        try:
            return evaluated(place), place, finished
        except AnotherQuestion:
            if out is not None or not finished:
                raise
    raise AssertionError("there is a free number")


def verify_command(console: Console, o: VerifyOptions) -> None:
    """Verify and show; what does not hold is an error."""
    task = load_task(o)
    assert task.saved is not None
    found = verify(task.saved, task.model, task.x, task.y, draws=o.draws, seed=o.seed)
    for one in found:
        verdict = "does not hold:" if one.problems else "holds"
        console.print(f"{one.name:<32} saved {percent(one.saved)}  again {percent(one.again)}  {verdict}")
        for problem in one.problems:
            console.print(f"  {problem}")
    if problems := sum(len(one.problems) for one in found):
        raise ValueError(f"{o.result}: {problems} of its saved figures could not be confirmed (see above)")
    console.print(f"{len(task.y)} images: bounds, labels, distances and accuracies hold")


def attacks_of(o: EvaluateOptions) -> list[AttackSpec] | str:
    """A list, or the name of a suite, which `evaluate` completes for the model."""
    if o.suite is not None and o.attacks is not None:
        raise ValueError("give --suite or --attacks, not both")
    if o.suite is not None:
        if o.suite not in SUITES:
            raise ValueError(f"suite {o.suite!r} is unknown: it is one of {', '.join(SUITES)}")
        return o.suite
    attacks = parse_attacks(DEFAULT if o.attacks is None else o.attacks)
    if o.source and not any(a.name == "transfer" for a in attacks):
        attacks.append(AttackSpec("transfer"))
    return attacks
