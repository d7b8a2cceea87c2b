"""Files: atomic writes, and checkpoints as safetensors, so that loading never executes code."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

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
    named = OSError(f"{path} could not be written: {why}. What was written before is kept")
    named.errno = error.errno
    return named


def write_atomically(path: Path, content: bytes) -> None:
    """Write all of `content`, or nothing (see `written_whole`)."""
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
    """Tensors and JSON-able metadata in one file, so that they cannot disagree.

    A tensor with several names, as tied weights have, is stored once.
    """
    tied = _tied(tensors)
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if name not in tied}
    places = Counter(t.untyped_storage().data_ptr() for t in ready.values())
    # safetensors refuses tensors that overlap, as views of one buffer do.
    ready = {name: t.clone() if places[t.untyped_storage().data_ptr()] > 1 else t for name, t in ready.items()}
    metadata = {"gsem": json.dumps(meta)} | ({"tied": json.dumps(tied)} if tied else {})
    write_atomically(path, save(ready, metadata=metadata))


def _tied(tensors: dict[str, Tensor]) -> dict[str, str]:
    """For each tensor that occurs again under another name: that name, and the name where it occurs first."""
    first: dict[tuple, str] = {}
    tied = {}
    for name, t in tensors.items():
        known = first.setdefault((t.device, t.dtype, t.data_ptr(), t.shape, t.stride()), name)
        if known != name and t.numel():
            tied[name] = known
    return tied


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        FileNotFoundError: no such file. ValueError: not a gsem checkpoint, or damaged.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tied: dict[str, str] = json.loads((file.metadata() or {}).get("tied", "{}"))
        return tensors | {name: tensors[first] for name, first in tied.items()}, _metadata_in(file)


def read_checkpoint_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone, without reading the tensors. Raises as `read_checkpoint`."""
    with _opened(path) as file:
        return _metadata_in(file)


def _metadata_in(file: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((file.metadata() or {})["gsem"])
    return metadata


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


def read_metadata(path: Path) -> dict[str, Any]:
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
