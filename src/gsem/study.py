"""Studies: the same training and the same evaluation for several variants and seeds, in one table.

`ablation` compares the parts of GSeM: a plain network, its convolutions only, quantiser only, noise only, and all of
it, the last two also with the noise off at test. `recipes` compares the named recipes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsem._env import device_named
from gsem._io import read_metadata, write_atomically
from gsem.data import load, to_float
from gsem.distributed import current
from gsem.evaluation.evaluate import evaluate
from gsem.evaluation.result import EvaluationResult
from gsem.evaluation.statistics import Interval, t_interval
from gsem.nn.gsem import NoiseMode, noise
from gsem.training.progress import Progress
from gsem.training.recipe import Recipe
from gsem.training.recipes import RECIPES
from gsem.training.recorded import find
from gsem.training.run import Run
from gsem.training.trainer import train

OnProgress = Callable[[str, Progress | None], None]


@dataclass(frozen=True)
class Variant:
    """One line of a study: what is trained, and with which noise it is tested."""

    name: str
    recipe: Recipe
    noise: NoiseMode = "fresh"
    """Noise in the test: "fresh" or "off"."""


def ablation(base: Recipe) -> list[Variant]:
    """The matched comparison around `base`, a recipe with a GSeM model.

    All but "plain" have the same parameters; "plain" lacks the module and its parameters.

    Raises:
        ValueError: the base's model has no GSeM.
    """
    if not base.model.startswith("gsem-"):
        raise ValueError(f"the ablation needs a network with GSeM, which {base.model!r} is not")
    parts = {
        "plain": replace(base, model=base.model.removeprefix("gsem-")),
        "convolutions only": replace(base, quantiser=False, noise=0),
        "quantiser only": replace(base, noise=0),
        "noise only": replace(base, quantiser=False),
        "full GSeM": base,
    }
    variants = [Variant(name, recipe) for name, recipe in parts.items()]
    noisy = [v for v in variants if v.recipe.noise and v.recipe.model.startswith("gsem-")]
    return variants + [replace(v, name=f"{v.name} (noise off at test)", noise="off") for v in noisy]


def recipes(base: Recipe, passes: float | None = None) -> list[Variant]:
    """Every named recipe, its schedule scaled to `base`'s epochs, on its data: GSeM ones on its model, others plain.

    Recipes with generated images are left out where `base` has none.

    Args:
        passes: compare at equal cost instead: each recipe gets the epochs, at least one, that bring its passes per
            image nearest to this number.
    """
    variants = []
    for recipe in RECIPES.values():
        if recipe.extra_share > 0 and base.extra_data is None:
            continue
        extra = base.extra_data if recipe.extra_share > 0 else None
        gsem = recipe.model.startswith("gsem-")
        model = base.model if gsem else base.model.removeprefix("gsem-")
        epochs = base.epochs if passes is None else max(1, round(passes / sum(recipe.passes)))
        scaled = replace(recipe.scaled(epochs), rounds=1, extra_data=extra, steps_per_epoch=base.steps_per_epoch)
        variants.append(Variant(recipe.name, replace(scaled, data=base.data, model=model, eps=base.eps)))
    return variants


def _over_seeds(results: list[EvaluationResult], label: str) -> Interval:
    """The mean over seeds with its 95% t-interval; for one seed, the bootstrap interval over images."""
    found = [r.expected(label) for r in results]
    return found[0] if len(found) == 1 else t_interval([interval.mean for interval in found])


def study(
    variants: list[Variant],
    *,
    seeds: int,
    out: Path,
    attacks: list[str],
    images: int | None = None,
    test_data: str | None = None,
    device: str | None = None,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Train and evaluate every variant for seeds 0 … seeds − 1; one row per variant.

    Every finished piece is kept in `out` and not computed again, so an interrupted study can be resumed. Of several
    processes, all call this function with the same arguments; the first one writes and calls `on_progress`.

    Args:
        images: test images used, from the first; default: all.
        test_data: where they come from; default: the training data.
        on_progress: called as (what, training progress or None).

    Returns:
        Rows with the variant's name, passes per image and epoch, seconds of training, and for every attack
        (mean, low, high) of its expected accuracy: over seeds, 95% t-interval.
    """
    processes = current()
    progress = on_progress if on_progress is not None and processes.first else (lambda what, training: None)
    rows = []
    for variant in variants:
        results, seconds = [], []
        for seed in range(seeds):
            recipe, path = replace(variant.recipe, seed=seed), out / _folder(variant, seed)
            what = f"{variant.name}, seed {seed}"
            run = train(recipe, out=path, device=device, resume=True, on_progress=partial(progress, what))
            seconds.append(run.metrics[-1]["seconds"])
            begin = partial(progress, f"{what}: test", None)
            results.append(_evaluated(run, variant.noise, attacks, images, test_data, device_named(device), begin))
        labels = [s.name for s in results[0].scores if s.noise == "fresh"]
        attack, training = variant.recipe.passes
        rows.append(
            {
                "variant": variant.name,
                "attack_passes": attack,
                "training_passes": training,
                "epochs": variant.recipe.epochs,
                "seconds": float(np.median(seconds)),
                "images": len(results[0].y),
                "seeds": seeds,
                # The number of draws differs between stochastic and deterministic variants; the column is the same.
                "accuracy": {label.split("-eot")[0]: _over_seeds(results, label) for label in labels},
            }
        )
        with processes.together():
            if processes.first:
                write_atomically(out / "study.json", json.dumps(rows, indent=2).encode())
    return rows


def _folder(variant: Variant, seed: int) -> str:
    words = variant.name.removesuffix(" (noise off at test)").replace(" ", "-").lower()
    return f"{words}-seed{seed}"


def _evaluated(
    run: Run,
    mode: NoiseMode,
    attacks: list[str],
    images: int | None,
    test_data: str | None,
    device: torch.device,
    begin: Callable[[], None],
) -> EvaluationResult:
    source = load(test_data) if test_data else find(read_metadata(run.path), run.path)
    test = source.test()
    x, y = to_float(test.x[:images]).to(device), test.y[:images].to(device)
    eps = run.recipe.radius(source.eps)
    asked = {"attacks": attacks, "images": len(x), "eps": eps, "data": test_data or run.recipe.data}
    asked |= {"norm": run.recipe.norm} if run.recipe.norm != "Linf" else {}
    path, question = run.path / f"test-{mode}", run.path / f"test-{mode}.question.json"
    processes = current()

    def finished() -> EvaluationResult | None:
        if question.exists() and json.loads(question.read_text()) == asked:
            return EvaluationResult.load(path)
        return None

    if (found := processes.from_first(finished)) is not None:
        return found
    begin()
    model = run.model().to(device)
    with noise(model, mode):
        result = evaluate(model, x, y, attacks, eps=eps, norm=run.recipe.norm, seed=run.recipe.seed, frozen=False)
    with processes.together():
        if processes.first:
            result.save(path)
            write_atomically(question, json.dumps(asked).encode())
    return result
