"""gsem evaluate and gsem verify: load model, images and attacks, run, print, save."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from gsem._env import device_named
from gsem._fingerprint import data_fingerprint
from gsem._text import percent
from gsem.attacks.suite import SUITES, AttackSpec, parse_attacks
from gsem.cli.display import show_as_published, show_result
from gsem.cli.options import EvaluateOptions, VerifyOptions
from gsem.cli.progress import AttackBar
from gsem.data import Dataset, Split, balanced, load, to_float
from gsem.evaluation.evaluate import evaluate
from gsem.evaluation.partial import AnotherQuestion
from gsem.evaluation.result import EvaluationResult, with_ending
from gsem.evaluation.verify import verify
from gsem.nn.insert import normalized
from gsem.nn.load import load_model
from gsem.training.recorded import find, find_named, places_of

DEFAULT = "clean,pgd:steps=100"
# Means and standard deviations of the training pixels in [0, 1], as the field's code normalises with.
NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def source_and_eps(o: Any, meta: dict[str, Any]) -> tuple[Dataset, float]:
    """Whose test images, and how far from them: the options', else the run's own."""
    named = _named(o, meta)
    if named["data"] is None:
        raise ValueError(f"{o.model} does not tell its data: give --data")
    if o.data is None and o.data_path is None:
        source = find(meta, _folder(o.model))
    else:
        source = load(named["data"], named["data_path"])
    if o.eps is not None:
        return source, o.eps
    return source, 0.5 if o.norm == "L2" else meta.get("data", {}).get("eps", source.eps)


def _folder(spec: str) -> Path:
    """The run directory of a run or of one of its checkpoints."""
    path = Path(spec)
    return path if path.is_dir() else path.parent.parent


def evaluate_command(console: Console, o: EvaluateOptions) -> EvaluationResult:
    """Attack, show and save, as the options say."""
    attacks = _attacks(o)
    model, meta = _model(o.model, o)
    source_models = {spec: _model(spec, o)[0] for spec in o.source}
    source, eps = source_and_eps(o, meta)
    test = source.test()
    subset = {"kind": "all" if o.images is None else o.subset, "images": o.images}
    rows = _rows(test, subset)
    x, y = to_float(test.x[rows]), test.y[rows]
    _check_fit(meta, x)
    told = f"{o.model} on {source.name}: {_told(subset, len(x), len(test))}"
    run, device = Path(o.model), device_named(o.device)
    with AttackBar(console) as bar:

        def evaluated(place: Path) -> EvaluationResult:
            return evaluate(
                model.to(device),
                x.to(device),
                y.to(device),
                attacks,
                eps=eps,
                norm=o.norm,
                draws=o.draws,
                seed=o.seed,
                batch_size=o.batch_size,
                source_models={name: other.to(device) for name, other in source_models.items()},
                frozen=o.frozen,
                save_adv=o.save_adv,
                rows=rows.tolist(),
                save=place,
                again=o.again,
                about={"model": o.model, **about_data(o, meta, test, place), "subset": subset},
                on_progress=bar,
            )

        default = run / "evaluation" if run.is_dir() else Path("evaluation")
        result, place, finished = _at_its_place(evaluated, [o.out] if o.out else _places(default))
    show_result(console, result, told)
    if o.suite in ("paper", "paper-code") and result.metadata["stochastic"]:
        show_as_published(console, result)
    files = f"{with_ending(place, '.json')} and {with_ending(place, '.npz')}"
    if finished and not o.again:
        console.print(f"already finished: {files}; --again computes it anew", soft_wrap=True)
    else:
        console.print(f"saved in {files}", soft_wrap=True)
    return result


def _places(path: Path) -> list[Path]:
    """`path` and those with a number behind it as long as an evaluation is there, and the first free one."""
    places = [path]
    while with_ending(places[-1], ".npz").exists():
        places.append(path.with_name(f"{path.name}-{len(places) + 1}"))
    return places


def _at_its_place(
    evaluated: Callable[[Path], EvaluationResult], places: list[Path]
) -> tuple[EvaluationResult, Path, bool]:
    """The result at the first place that is free or holds it already; that place; and whether it was there already.

    Raises:
        AnotherQuestion: all places hold evaluations of something else.
    """
    *others, last = places
    for place in others:
        try:
            return evaluated(place), place, True
        except AnotherQuestion:
            continue
    finished = with_ending(last, ".npz").exists()
    return evaluated(last), last, finished


def _named(o: Any, meta: dict[str, Any]) -> dict[str, Any]:
    recipe = meta.get("recipe", {})
    data_path = o.data_path or (None if o.data else recipe.get("data_path"))
    return {"data": o.data or recipe.get("data"), "data_path": data_path}


def about_data(o: Any, meta: dict[str, Any], test: Split, out: Path) -> dict[str, Any]:
    """What a result keeps of the test images: their name and place, and a hash of the whole test set."""
    named = _named(o, meta)
    recorded = meta.get("places", {}) if o.data is None and o.data_path is None else {}
    name, root = (recorded[key][0] if key in recorded else named[key] for key in ("data", "data_path"))
    return named | {
        "places": places_of(name, root, out.parent),
        "test_set": "-".join(data_fingerprint((test.x, test.y)).values()),
    }


def verify_command(console: Console, o: VerifyOptions) -> None:
    result = EvaluationResult.load(o.result)
    model, meta = _model(o.model, o)
    about = result.metadata.get("about", {})
    where = o.data or about.get("data") or meta.get("recipe", {}).get("data")
    if where is None:
        raise ValueError(f"{o.result} does not tell its data: give --data")
    if o.data is None and o.data_path is None:
        test = find_named(where, about.get("data_path"), about.get("places", {}), Path(o.result).parent).test()
    else:
        test = load(where, o.data_path).test()
    if result.rows is not None and result.rows.max() < len(test):
        rows = torch.from_numpy(result.rows)
    else:
        rows = _rows(test, about.get("subset", {"kind": "first", "images": len(result.y)}))
    device = device_named(o.device)
    x, y = to_float(test.x[rows]).to(device), test.y[rows].to(device)
    found = verify(result, model.to(device), x, y, draws=o.draws, seed=o.seed)
    problems = 0
    for one in found:
        console.print(
            f"{one.name:<32} saved {percent(one.saved)}  again {percent(one.again)}  " + _verdict(one.problems)
        )
        for problem in one.problems:
            console.print(f"  {problem}")
            problems += 1
    if problems:
        raise ValueError(f"{o.result}: {problems} of its claims do not hold (above)")
    console.print(f"{len(result.y)} images: bounds, labels, distances and accuracies hold")


def _verdict(problems: list[str]) -> str:
    return "does not hold:" if problems else "holds"


def _attacks(o: EvaluateOptions) -> list[AttackSpec] | str:
    """Of the suite (by name: `evaluate` completes it for the model) or of the list."""
    if o.suite is not None and o.attacks is not None:
        raise ValueError("give --suite or --attacks, not both")
    if o.suite is not None and o.suite not in SUITES:
        raise ValueError(f"suite {o.suite!r} is unknown: it is one of {', '.join(SUITES)}")
    if o.suite is not None:
        return o.suite
    attacks = parse_attacks(DEFAULT if o.attacks is None else o.attacks)
    if o.source and not any(a.name == "transfer" for a in attacks):
        attacks.append(AttackSpec("transfer"))
    return attacks


def _model(spec: str, o: Any) -> tuple[nn.Module, dict[str, Any]]:
    model, meta = load_model(spec, name=o.arch, num_classes=o.num_classes, levels=o.levels, noise=o.noise)
    if o.normalize is None or meta:  # (a model of this package takes pixels)
        return model, meta
    return normalized(model, *_normalization(o.normalize)).eval(), meta


def _normalization(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if text in NORMALIZATION:
        return NORMALIZATION[text]
    try:
        mean, std = (tuple(float(word) for word in part.split(",")) for part in text.split("/"))
    except ValueError:
        known = ", ".join(NORMALIZATION)
        raise ValueError(
            f"--normalize {text!r} is none of {known}, nor MEAN/STD like 0.5,0.5,0.5/0.2,0.2,0.2"
        ) from None
    return mean, std


def _subset(test: Split, subset: dict[str, Any]) -> Split:
    rows = _rows(test, subset)
    return Split(test.x[rows], test.y[rows])


def _rows(test: Split, subset: dict[str, Any]) -> Tensor:
    """The numbers of the images of a subset in the test split."""
    kind, images = subset["kind"], subset["images"]
    if images is not None and images < 1:
        raise ValueError(f"--images must be at least 1, not {images}")
    if kind == "all" or images >= len(test):
        return torch.arange(len(test))
    return torch.arange(images) if kind == "first" else balanced(test.y, images)


def _told(subset: dict[str, Any], images: int, of: int) -> str:
    if images == of:
        return f"{of} test images"
    kind = "the first" if subset["kind"] == "first" else "a fixed, class-balanced subset of"
    return f"{kind} {images} of {of} test images"


def _check_fit(meta: dict[str, Any], x: Tensor) -> None:
    if meta and list(x.shape[1:]) != meta["data"]["shape"]:
        raise ValueError(f"the model was trained on images {meta['data']['shape']}, these are {list(x.shape[1:])}")
