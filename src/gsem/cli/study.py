"""gsem study: variants over seeds, and their table."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gsem._text import percent
from gsem.attacks.suite import parse_attacks
from gsem.cli.display import study_table
from gsem.cli.options import StudyOptions, unknown
from gsem.nn.build import named
from gsem.study import Variant, ablation, recipes, study
from gsem.training.progress import Progress
from gsem.training.recipe import Recipe
from gsem.training.run import TrainingInterrupted


def study_command(console: Console, o: StudyOptions) -> None:
    attacks = [text.strip() for text in o.attacks.split(",")]
    parse_attacks(o.attacks)  # before the first training starts
    variants = _variants(replace(o.recipe, model=named(o.recipe.model)), o)
    out = o.out or Path("runs") / f"study-{o.study}-{Path(o.recipe.data).stem}"

    def report(what: str, progress: Progress | None) -> None:
        if progress is None:
            console.print(what)
        elif progress.step == progress.steps:
            console.print(
                f"{what}: validation clean {percent(progress.clean).strip()}, robust {percent(progress.robust).strip()}"
            )

    try:
        rows = study(
            variants,
            seeds=o.seeds,
            out=out,
            attacks=attacks,
            images=o.images,
            test_data=o.test_data,
            device=o.device,
            on_progress=report,
        )
    except TrainingInterrupted as stopped:
        raise stopped.kind from None  # the study is resumed, not this one training
    console.print()
    console.print(study_table(rows))
    of = f"{o.seeds} seeds", "t-interval over seeds"
    seeds, interval = of if o.seeds > 1 else ("1 seed", "bootstrap interval over images")
    console.print(f"{rows[0]['images']} test images, {seeds}; expected accuracy in per cent, 95% {interval}")
    console.print(f"saved in {out / 'study.json'}")


def _variants(base: Recipe, o: StudyOptions) -> list[Variant]:
    if o.passes is not None and o.study != "recipes":
        raise ValueError("--passes is an option of gsem study recipes only: the variants of the ablation cost the same")
    if o.passes is not None and not o.passes > 0:
        raise ValueError(f"--passes must be positive, not {o.passes:g}")
    variants = {v.name: v for v in (recipes(base, o.passes) if o.study == "recipes" else ablation(base))}
    names = list(variants) if o.only is None else [name.strip() for name in o.only.split(",")]
    for name in names:
        if name not in variants:
            raise ValueError(unknown("variant", name, variants))
    return [variants[name] for name in names]
