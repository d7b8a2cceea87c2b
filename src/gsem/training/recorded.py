"""What a run records about its data, and how the data are found again from another directory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gsem._fingerprint import data_fingerprint
from gsem.data import DATASETS, Dataset, Split, load
from gsem.data.dataset import without_validation
from gsem.data.download import ROOT
from gsem.training.recipe import Recipe

# Field of the recipe → [its absolute path, its path from the run directory].
Places = dict[str, list[str]]


@dataclass(frozen=True)
class TrainingData:
    """The data of a training, and what the run records of them."""

    source: Dataset
    recipe: Recipe
    """As the run records it: data passed in Python are called by their own name."""
    passed: bool
    """Whether they were passed in Python, as `data=`, so that they cannot be found by a name or path."""
    places: Places
    extra: str | None
    """The file of the additional images."""
    run: Path
    then: Mapping[str, Any] | None = None
    """Metadata of the data, as the run that is resumed recorded them."""

    def read(self, seed: int) -> tuple[Split, Split, dict[str, Any]]:
        """Training and validation images, and what the run records: name, classes, shape, hashes, whether passed.

        Raises:
            ValueError: the run that is resumed was trained on others.
        """
        s = self.source
        found: dict[str, Any] = {"name": s.name, "classes": list(s.classes), "shape": list(s.shape), "eps": s.eps}
        # The hash is that of all training images, whatever is held out of them.
        whole = s.whole_training()
        found |= data_fingerprint((whole.x, whole.y))
        if self.then is not None:
            check_same(self.then, found, self.run)
        return *without_validation(whole, s.classes, seed), found | {"passed": self.passed}


def training_data(recipe: Recipe, data: Dataset | None, former: Mapping[str, Any] | None, run: Path) -> TrainingData:
    """Find the data of a new run, or those of the run that is resumed.

    Args:
        data: passed by the caller, instead of what the recipe names.
        former: the run's recipe.json, where the run is resumed.
        run: the run directory.

    Raises:
        ValueError, FileNotFoundError: they are not found; the message names the places.
    """
    if recipe.extra_share > 0 and recipe.extra_data is None:
        raise ValueError(
            f"recipe {recipe.name} takes {recipe.extra_share:.0%} of each batch from generated images: give their .npz "
            "file (image [n, h, w, c] uint8, label [n]) by --extra-data, or set --extra-share 0"
        )
    if former is None:
        source = data or load(recipe.data, recipe.data_path, resize=recipe.resize)
        if data is not None:
            recipe = replace(recipe, data=data.name, data_path=None)
        places = places_of(None if data else recipe.data, recipe.data_path, run, recipe.extra_data)
        return TrainingData(source, recipe, data is not None, places, recipe.extra_data, run)
    then = former["recipe"]
    places, passed = former.get("places", {}), former["data"].get("passed", False)
    extra = recipe.extra_data and _located("extra_data", recipe.extra_data, places, run)
    # Where data lie may change; what they are called in the run, and what it is compared by, does not.
    as_then = replace(recipe, data=then["data"], data_path=then.get("data_path"))
    if data is None and as_then != recipe:
        source = load(recipe.data, recipe.data_path, resize=recipe.resize)
        passed, places = False, places_of(recipe.data, recipe.data_path, run, extra)
    else:
        source = data or find(former, run)
        found = {field: _located(field, was[0], places, run, needed=False) for field, was in places.items()}
        places = {field: _place(path, run) for field, path in found.items()}
    return TrainingData(source, as_then, passed, places, extra, run, former["data"])


def find(metadata: Mapping[str, Any], run: Path) -> Dataset:
    """The data that a run was trained on.

    Args:
        metadata: of the run, from its recipe.json or its checkpoint.
        run: its directory.

    Raises:
        ValueError, FileNotFoundError: they are not found, or are others; the message names the places where they
            were looked for, and that --data (data= in Python) helps.
    """
    recipe, data = metadata["recipe"], metadata["data"]
    if data.get("passed"):
        raise ValueError(
            f"{run} was trained on data that were passed in Python ({described(data)}), and cannot be "
            "found again: give them by --data (in Python: data=)"
        )
    where = recipe["data"], recipe.get("data_path")
    source = find_named(*where, metadata.get("places", {}), run, recipe.get("resize"))
    check_same(data, {"classes": list(source.classes), "shape": list(source.shape)}, run)
    return source


def find_named(name: str, root: str | None, places: Places, folder: Path, resize: int | None = None) -> Dataset:
    """The data set of that name or path, where a path may have been recorded elsewhere.

    Args:
        name, root, resize: as they were given then (see `gsem.data.load`).
        places: recorded then by `places_of`, for files in `folder`.

    Raises:
        ValueError, FileNotFoundError: as `find`.
    """
    if name not in DATASETS or "data" in places:
        return load(_located("data", name, places, folder), resize=resize)
    if root is None and "data_path" not in places:
        return load(name, resize=resize)
    # (The folder of a data set that can be downloaded may be missing.)
    needed = name in ("folder", "npz", "parquet")
    return load(name, _located("data_path", root or str(ROOT), places, folder, needed=needed), resize=resize)


def described(data: Mapping[str, Any]) -> str:
    """`mine: images [1, 8, 8], 2 classes`."""
    name = f"{data['name']}: " if "name" in data else ""
    return f"{name}images {list(data['shape'])}, {len(data['classes'])} classes"


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], run: Path) -> None:
    """Raise a ValueError if these are not the data of the run. What only one of them records is not compared."""
    words = {"shape": "their shape", "classes": "their classes", "images": "the images", "labels": "their labels"}
    other = [word for key, word in words.items() if key in then and key in now and then[key] != now[key]]
    if other:
        raise ValueError(
            f"{run} was trained on other data ({described(then)}), which differ in {', '.join(other)}. "
            "Give the data of the run by --data (in Python: data=)"
        )


def places_of(name: str | None, root: str | None, folder: Path, extra: str | None = None) -> Places:
    """The present place of data that were given by name or path, for the records of files in `folder`."""
    named = name in DATASETS
    given = {"data": None if named else name, "data_path": (root or str(ROOT)) if named else None, "extra_data": extra}
    return {field: _place(path, folder) for field, path in given.items() if path and Path(path).expanduser().exists()}


def _place(path: str, folder: Path) -> list[str]:
    absolute = Path(path).expanduser().absolute()
    return [str(absolute), os.path.relpath(absolute, folder.absolute())]


def _located(field: str, given: str, places: Places, folder: Path, *, needed: bool = True) -> str:
    """The first path that exists: the recorded absolute one, the one relative to the folder, or the given one."""
    absolute, *beside = places.get(field, [given])
    tried = list(dict.fromkeys(os.path.normpath(p) for p in (absolute, *(str(folder / b) for b in beside), given)))
    for path in tried:
        if Path(path).expanduser().exists():
            return path
    if not needed:
        return given
    what = "additional images" if field == "extra_data" else "data"
    raise FileNotFoundError(
        f"the {what} of {folder} are not found. Looked for: {', '.join(tried)} (from {Path.cwd()}). "
        f"Give their place by --{field.replace('_', '-')}"
    )
