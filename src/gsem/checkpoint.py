"""Weights and states on disk: safetensors, so that loading never executes code, written beside and renamed."""

import importlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gsem.models import create_model, load_published
from gsem.recipes import Recipe

LAST, BEST = (f"checkpoints/{name}.safetensors" for name in ("last", "best"))


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes `path` at the end of the block.

    `path` holds either its former content or all of the new, also after a crash in between.

    Raises:
        OSError: it cannot be written, for instance because the disk is full. The message names `path`, and nothing
            half-written is left.
    """
    beside = path.with_name(f".{path.name}.writing")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise not_written(path, error) from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def not_written(path: Path, error: OSError) -> OSError:
    """The error with a message for people: which file, why, and what is kept."""
    why = error.strerror or str(error)
    told = OSError(f"{path} could not be written: {why}. What was written before is kept")
    told.errno = error.errno
    return told


def write_atomically(path: Path, content: bytes) -> None:
    """All of `content`, or nothing (see `written_whole`)."""
    with written_whole(path) as file:
        file.write(content)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, all of it or nothing.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab", buffering=0) as file:
            content = f"{line}\n".encode()
            while content:
                content = content[file.write(content) :]
    except OSError as error:
        if path.exists():
            os.truncate(path, before)
        raise not_written(path, error) from error


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Tensors and JSON-able facts in one file, so that they cannot disagree."""
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, save(ready, metadata={"gsem": json.dumps(meta)}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        FileNotFoundError: no such file. ValueError: not a gsem checkpoint, or damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _facts_in(file)  # noqa: SIM118


def read_checkpoint_facts(path: Path) -> dict[str, Any]:
    """The facts alone, without reading the tensors. Raises as `read_checkpoint`."""
    with _opened(path) as file:
        return _facts_in(file)


def _facts_in(file: Any) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((file.metadata() or {})["gsem"])
    return facts


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no gsem checkpoint, or it is damaged: {error!r}") from None


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}


def model_meta(recipe: Recipe, *, classes: tuple[str, ...], shape: tuple[int, int, int], eps: float) -> dict:
    """What a checkpoint tells of its model and data."""
    return {
        "recipe": recipe.to_dict(),
        "model": {
            "name": recipe.model,
            "num_classes": len(classes),
            "in_channels": shape[0],
            "levels": recipe.levels,
            "noise": recipe.noise,
            "gradient": recipe.gradient,
            "quantiser": recipe.quantiser,
        },
        "data": {"classes": list(classes), "shape": list(shape), "eps": eps},
    }


def read_facts(path: Path) -> dict[str, Any]:
    """recipe.json of an existing run directory: recipe, model, data, versions.

    Raises:
        FileNotFoundError: no run there. ValueError: it is damaged.
    """
    file = path / "recipe.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no recipe.json: it is no run of gsem train")
    try:
        found = json.loads(file.read_text())
        if {"recipe", "model", "data"} <= found.keys():
            return found
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None
    raise ValueError(f"{file} is damaged: recipe, model or data are missing")


def _checkpoint_of(path: Path) -> Path | None:
    if not path.is_dir():
        return path if path.suffix == ".safetensors" else None
    if (path / BEST).is_file():
        return path / BEST
    if not (path / LAST).is_file():
        raise FileNotFoundError(f"{path} holds no {BEST}: it is no finished run of gsem train")
    warnings.warn(f"{path} holds no {BEST} (the best epoch's weights): {LAST} is taken", stacklevel=3)
    return path / LAST


def _of_this_run(path: Path, checkpoint: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's facts, with what the run directory knows of where the data lie.

    Raises:
        ValueError: the checkpoint is of another run than recipe.json.
    """
    if not (path / "recipe.json").is_file():
        return meta
    facts = read_facts(path)
    recipes = [Recipe.from_dict(one["recipe"]).to_dict() for one in (meta, facts)]
    differ = [key for key in recipes[0] if recipes[0][key] != recipes[1][key]]
    differ += [f"model.{key}" for key in meta["model"] if meta["model"][key] != facts["model"].get(key)]
    then, now = meta["data"], facts["data"]
    differ += [
        f"data.{k}" for k in ("classes", "shape", "images", "labels") if k in then and k in now and then[k] != now[k]
    ]
    if differ:
        raise ValueError(
            f"{checkpoint} is of another run than {path / 'recipe.json'} ({', '.join(differ)} differ): put the right "
            f"file there, or name the checkpoint itself, {shlex.quote(str(checkpoint))}, to take it as it is"
        )
    return meta | {key: facts[key] for key in ("data", "places") if key in facts}


def load_model(
    spec: str | Path,
    *,
    name: str | None = None,
    num_classes: int = 10,
    levels: int = 6,
    noise: int = 4,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model in eval mode, and what its checkpoint tells (see `model_meta`; empty for strangers).

    Args:
        spec: a run directory (its best checkpoint; where there is none, its last, with a warning), a `.safetensors`
            checkpoint, a published `.pt` state dict (then `name`, `num_classes`, `levels` and `noise` say what it
            is), or `package.module:function`, a function without arguments that returns the model.

    Raises:
        FileNotFoundError, ValueError: naming what was not found, or not understood; a run directory with the
            checkpoint of another run.
    """
    path = Path(spec)
    if path.exists() or path.suffix in (".safetensors", ".pt", ".pth"):
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        checkpoint = _checkpoint_of(path)
        if checkpoint is None:
            if path.suffix not in (".pt", ".pth"):
                raise ValueError(f"{path} is no run directory, no .safetensors checkpoint and no published .pt")
            if name is None:
                raise ValueError(f"{path} does not say what model it is: give its name (see `gsem models`)")
            published = load_published(path, name=name, num_classes=num_classes, levels=levels, noise=noise)
            return published.eval(), {}
        tensors, meta = read_checkpoint(checkpoint)
        if path.is_dir():
            meta = _of_this_run(path, checkpoint, meta)
        model = create_model(**meta["model"])
        # A `last` checkpoint carries averaged weights beside the raw ones; they are the model.
        model.load_state_dict(part(tensors, "ema") or part(tensors, "model"))
        return model.eval(), meta
    if ":" in str(spec):
        return _from_factory(str(spec)).eval(), {}
    raise FileNotFoundError(
        f"{str(spec)!r} is no run directory, checkpoint or published .pt that exists here, and no "
        "package.module:function"
    )


def _from_factory(spec: str) -> nn.Module:
    module, _, function = spec.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # the caller's own files, as `python -m` would find them
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot take a model from {spec!r}: {error}") from error
    finally:
        sys.path.remove(here)
    made = make if isinstance(make, nn.Module) else make()
    if not isinstance(made, nn.Module):
        raise ValueError(f"{spec!r} returned a {type(made).__name__}, not a torch.nn.Module")
    return made
