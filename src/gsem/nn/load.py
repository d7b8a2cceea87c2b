"""Load a model from a run directory, a checkpoint, a published state dict, or a function."""

import shlex
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gsem._io import BEST, LAST, part, read_checkpoint, read_metadata
from gsem.nn.build import Network, import_network, rebuild_network
from gsem.nn.models import check_weights, load_published, read_weights


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
    """The checkpoint's metadata, with the place of the data from the run directory.

    Raises:
        ValueError: the checkpoint is of another run than recipe.json.
    """
    if not (path / "recipe.json").is_file():
        return meta
    metadata = read_metadata(path)
    then, now = meta["recipe"], metadata["recipe"]
    differ = [key for key in then if key in now and then[key] != now[key]]
    differ += [f"model.{key}" for key in meta["model"] if meta["model"][key] != metadata["model"].get(key)]
    then, now = meta["data"], metadata["data"]
    differ += [
        f"data.{k}" for k in ("classes", "shape", "images", "labels") if k in then and k in now and then[k] != now[k]
    ]
    if differ:
        raise ValueError(
            f"{checkpoint} is of another run than {path / 'recipe.json'} ({', '.join(differ)} differ): put the right "
            f"file there, or name the checkpoint itself, {shlex.quote(str(checkpoint))}, to take it as it is"
        )
    return meta | {key: metadata[key] for key in ("data", "places") if key in metadata}


def load_model(
    spec: str | Path,
    *,
    model: Network | None = None,
    name: str | None = None,
    num_classes: int = 10,
    levels: int = 6,
    noise: int = 4,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model in eval mode, and the metadata of its checkpoint (empty without a checkpoint).

    Args:
        spec: a run directory (its best checkpoint; where there is none, its last, with a warning), a `.safetensors`
            checkpoint, a published `.pt` state dict (then `name`, `num_classes`, `levels` and `noise` describe
            it), `package.module:function`, a function without arguments that returns the model, `timm:NAME`, with
            timm's pretrained weights, or `robustbench:NAME:DATA:THREAT`, by robustbench's own loader.
        model: of a run or checkpoint of gsem train, the network that it was trained on, or a function that makes it,
            where none can be imported. It is copied; the copy gets what the run inserted, and its weights.

    Raises:
        FileNotFoundError, ValueError: naming what was not found, or not understood; a run directory with the
            checkpoint of another run; a network of another structure than the run's.
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
                raise ValueError(f"{path} does not hold its architecture: give its name (see `gsem models`)")
            published = load_published(path, name=name, num_classes=num_classes, levels=levels, noise=noise)
            return published.eval(), {}
        tensors, meta = read_checkpoint(checkpoint)
        if path.is_dir():
            meta = _of_this_run(path, checkpoint, meta)
        network = rebuild_network(meta["model"], model, run=path)
        weights = _averaged(tensors)
        check_weights(weights, network.state_dict(), f"{checkpoint} does not fit {meta['model']['name']}")
        network.load_state_dict(weights)
        return network.eval(), meta
    if ":" in str(spec):
        try:
            return import_network(str(spec)).eval(), {}
        except ImportError as error:
            raise ValueError(str(error)) from error
    raise FileNotFoundError(
        f"{str(spec)!r} is no run directory, checkpoint or published .pt that exists here, and no "
        "package.module:function, timm:NAME or robustbench:NAME:DATA:THREAT"
    )


def weights_in(spec: str | Path) -> dict[str, Tensor]:
    """The state dict of what `load_model` takes. Of a run, a checkpoint or a `.pt`, no network is built.

    Raises:
        FileNotFoundError, ValueError: it is not there, or is no checkpoint.
    """
    path = Path(spec)
    if path.suffix in (".pt", ".pth"):
        return read_weights(path)
    if ":" in str(spec) and not path.exists():
        return load_model(spec)[0].state_dict()
    checkpoint = _checkpoint_of(path) if path.exists() else None
    if checkpoint is None:
        raise FileNotFoundError(
            f"{path} is no run directory, .safetensors checkpoint or published .pt that exists here"
        )
    return _averaged(read_checkpoint(checkpoint)[0])


def _averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # A `last` checkpoint carries averaged weights beside the raw ones; they are the model.
    return part(tensors, "ema") or part(tensors, "model")
