"""What gsem evaluate, audit, certify and verify work on: model, test images and radius, by `load_task`."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsem._env import FEWER, device_named, require_room
from gsem._fingerprint import data_fingerprint
from gsem.cli.options import CertifyOptions, NetworkOptions, TaskOptions, VerifyOptions
from gsem.data import Dataset, Split, balanced, load, to_float
from gsem.evaluation.result import EvaluationResult
from gsem.nn.insert import Normalized, normalization, normalized
from gsem.nn.load import load_model
from gsem.training.recorded import find, find_named, places_of


@dataclass(frozen=True)
class Task:
    """A model and the test images that it is attacked or certified on, all on one device."""

    options: TaskOptions | CertifyOptions | VerifyOptions
    model: nn.Module
    metadata: dict[str, Any]
    """What the model's checkpoint records; empty for a network that gsem did not train."""
    source_models: dict[str, nn.Module]
    x: Tensor
    y: Tensor
    rows: Tensor
    """Row of each image in the test split."""
    subset: dict[str, Any]
    test: Split
    eps: float
    """Radius of the threat model; 0 where there is none, for gsem certify."""
    title: str
    saved: EvaluationResult | None
    """The evaluation that is verified."""

    def about(self, out: Path) -> dict[str, Any]:
        """What a result at `out` keeps: the model, the test images' name, place and subset, a hash of the test set."""
        o, recipe = self.options, {} if self.options.data else self.metadata.get("recipe", {})
        named = {"data": o.data or recipe.get("data"), "data_path": o.data_path or recipe.get("data_path")}
        recorded = {} if o.data or o.data_path else self.metadata.get("places", {})
        name, root = (recorded[key][0] if key in recorded else value for key, value in named.items())
        return {
            "model": o.model,
            **named,
            "resize": o.resize or recipe.get("resize"),
            "places": places_of(name, root, out.parent),
            "test_set": "-".join(data_fingerprint((self.test.x, self.test.y)).values()),
            "subset": self.subset,
        }


def load_task(o: TaskOptions | CertifyOptions | VerifyOptions) -> Task:
    """Load model, further models, test images and radius; to verify, also the saved evaluation, whose images they are.

    Raises:
        ValueError, FileNotFoundError: what is not found, or does not fit to the rest.
    """
    saved = EvaluationResult.load(o.result) if isinstance(o, VerifyOptions) else None
    model, metadata = load_network(o.model, o)
    sources = {spec: load_network(spec, o)[0] for spec in o.source} if isinstance(o, TaskOptions) else {}
    dataset = _dataset(o, metadata, saved)
    test = dataset.test()
    if isinstance(o, VerifyOptions):
        assert saved is not None
        eps = saved.metadata["eps"]
        subset = saved.metadata.get("about", {}).get("subset", {"kind": "first", "images": len(saved.y)})
        known = saved.rows is not None and saved.rows.max() < len(test)
        rows = torch.from_numpy(saved.rows) if known else _rows(test, subset)
    else:
        eps = _radius(o, metadata, dataset) if isinstance(o, TaskOptions) else 0.0
        subset = _subset(o, len(test))
        rows = _rows(test, subset)
    x, y = to_float(test.x[rows]), test.y[rows]
    _check_fit(o, metadata, [model, *sources.values()], x)
    device = device_named(o.device)
    require_room(x, device, FEWER)
    return Task(
        options=o,
        model=model.to(device),
        metadata=metadata,
        source_models={name: source.to(device) for name, source in sources.items()},
        x=x.to(device),
        y=y.to(device),
        rows=rows,
        subset=subset,
        test=test,
        eps=eps,
        title=f"{o.model} on {dataset.name}: {_in_words(subset, len(x), len(test))}",
        saved=saved,
    )


def _radius(o: TaskOptions, metadata: dict[str, Any], dataset: Dataset) -> float:
    if o.eps is not None:
        return o.eps
    trained = metadata.get("recipe", {})
    if o.norm == "L2":
        return (trained.get("eps") if trained.get("norm") == "L2" else None) or 0.5
    eps: float = metadata.get("data", {}).get("eps", dataset.eps)
    return eps


def load_network(spec: str, o: NetworkOptions) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and what its checkpoint records (see `gsem.nn.load.load_model`)."""
    model, metadata = load_model(spec, name=o.arch, num_classes=o.num_classes, levels=o.levels, noise=o.noise)
    if o.normalize is None or metadata:  # (a model of this package takes pixels)
        return model, metadata
    return normalized(model, *normalization(o.normalize)).eval(), metadata


def numbered(place: Path) -> Iterator[Path]:
    """`place`, `place-2`, `place-3`, …"""
    yield from (place if number == 1 else place.with_name(f"{place.name}-{number}") for number in count(1))


def _dataset(
    o: TaskOptions | CertifyOptions | VerifyOptions, metadata: dict[str, Any], saved: EvaluationResult | None
) -> Dataset:
    """The options' data; without them those of the saved evaluation, or of the run."""
    about = {} if saved is None else saved.metadata.get("about", {})
    name = o.data or about.get("data") or metadata.get("recipe", {}).get("data")
    if name is None:
        what = o.result if isinstance(o, VerifyOptions) else o.model
        raise ValueError(f"{what} does not name its data: give --data")
    if o.data is not None or o.data_path is not None:
        own = None if o.data is not None else metadata.get("recipe", {}).get("resize")
        return load(name, o.data_path, resize=o.resize or own)
    if o.resize is not None:
        raise ValueError("--resize goes with --data: a run's own images are resized as in its training")
    if isinstance(o, VerifyOptions) and about.get("data"):
        where = Path(o.result).parent
        return find_named(name, about.get("data_path"), about.get("places", {}), where, about.get("resize"))
    run = Path(o.model)
    return find(metadata, run if run.is_dir() else run.parent.parent)  # (a checkpoint is in RUN/checkpoints)


def _subset(o: TaskOptions | CertifyOptions, of: int) -> dict[str, Any]:
    images = o.images
    if images is None and o.default_images is not None:
        images = min(of, o.default_images)
    if images is not None and images < 1:
        raise ValueError(f"--images must be at least 1, not {images}")
    return {"kind": "all" if images is None else o.subset, "images": images}


def _rows(test: Split, subset: dict[str, Any]) -> Tensor:
    """The rows of a subset in the test split."""
    kind, images = subset["kind"], subset["images"]
    if kind == "all" or images >= len(test):
        return torch.arange(len(test))
    return torch.arange(images) if kind == "first" else balanced(test.y, images)


def _in_words(subset: dict[str, Any], images: int, of: int) -> str:
    if images == of:
        return f"{of} test images"
    kind = "the first" if subset["kind"] == "first" else "a fixed, class-balanced subset of"
    return f"{kind} {images} of {of} test images"


def _check_fit(o: NetworkOptions, metadata: dict[str, Any], models: list[nn.Module], x: Tensor) -> None:
    """Raise a ValueError if the images are not of the shape that the model, or --normalize, is for."""
    if metadata and list(x.shape[1:]) != metadata["data"]["shape"]:
        raise ValueError(f"the model was trained on images {metadata['data']['shape']}, these are {list(x.shape[1:])}")
    for model in models:
        if isinstance(model, Normalized) and model.mean.numel() not in (1, x.shape[1]):
            raise ValueError(
                f"--normalize {o.normalize} is for {model.mean.numel()} channels, but the images have {x.shape[1]}: "
                "give MEAN/STD with one number for each channel, or one for all"
            )
