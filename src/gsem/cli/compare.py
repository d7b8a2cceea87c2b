"""gsem compare: evaluate two networks where that has not been done, and show their differences."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gsem._fingerprint import data_fingerprint
from gsem.cli.evaluate import attacks_of, evaluated
from gsem.cli.options import CompareOptions, EvaluateOptions
from gsem.cli.task import Task, load_task
from gsem.distributed import current
from gsem.evaluation.compare import ABOUT, compare, refuse_to_compare
from gsem.evaluation.result import EvaluationResult


def compare_command(console: Console, o: CompareOptions) -> None:
    """Compare, show and save, by the options."""
    if o.out.suffix != ".json":
        raise ValueError(f"{o.out}: its name must end in .json")
    names = (o.one, o.two)
    saved = [EvaluationResult.load(name) if Path(name).suffix == ".npz" else None for name in names]
    one, two = _evaluated(console, o, names, saved)
    found = compare(one, two, names)
    if current().first:
        file = found.save(o.out)
    console.print(f"\n{found}\n", soft_wrap=True)
    console.print(
        "accuracy in per cent; one − two: difference of the expected accuracies, in points;\n"
        "only one, only two: images that this network alone loses, in most of its draws;\n"
        "p: McNemar's exact test on these. " + ABOUT
    )
    if current().first:
        console.print(f"saved in {file}", soft_wrap=True)


def _evaluated(
    console: Console, o: CompareOptions, names: tuple[str, str], saved: list[EvaluationResult | None]
) -> list[EvaluationResult]:
    """The results that are saved, and those of the other networks. All are loaded before any is evaluated, so that what
    cannot be compared costs nothing."""
    own = {field.name: getattr(o, field.name) for field in fields(o) if field.name not in ("one", "two", "out")}
    options = EvaluateOptions(**own)
    attacks = attacks_of(options)
    tasks: list[Task | None] = []
    for name, result in zip(names, saved, strict=True):
        # Without --eps, the second network is attacked at the eps of the first.
        known = [r.metadata["eps"] for r in saved if r is not None] + [task.eps for task in tasks if task is not None]
        eps = o.eps if o.eps is not None or not known else known[0]
        tasks.append(None if result is not None else load_task(replace(options, model=name, eps=eps)))
    first, second = (_images(r, t) for r, t in zip(saved, tasks, strict=True))
    refuse_to_compare(first, second, names)
    results = []
    for name, result, task in zip(names, saved, tasks, strict=True):
        if task is not None:
            console.print(f"{name}: {len(task.y)} images")
            result, place, finished = evaluated(console, replace(options, model=name, eps=task.eps), task, attacks)
            console.print(f"{'found' if finished else 'saved'} in {place}.npz", soft_wrap=True)
        assert result is not None
        results.append(result)
    return results


def _images(result: EvaluationResult | None, task: Task | None) -> dict[str, Any]:
    """The images, the radius and the norm of a saved evaluation, or of one that is to be made."""
    if task is not None:
        norm = task.options.norm  # type: ignore[union-attr]  # (these are no options of gsem verify)
        return {"eps": task.eps, "norm": norm, **data_fingerprint((task.x, task.y))}
    assert result is not None
    metadata = result.metadata
    hashes = {key: metadata.get("fingerprint", {}).get(key) for key in ("images", "labels")}
    return {key: metadata.get(key) for key in ("eps", "norm")} | hashes
