"""Finished checks on disk, so that an interrupted audit resumes and ends with the same result."""

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gsem._io import write_atomically, written_whole
from gsem.auditing.check import Audit, Check, FormerAudit
from gsem.auditing.shares import Shares
from gsem.distributed import current
from gsem.evaluation.partial import Unfinished, differences

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """A check that has ended, and what it leaves to the audit."""

    check: Check
    seconds: float
    tried: Shares | None
    """The worst points that it found within eps; None if it looked for none."""
    by_gradient: Shares | None
    """… by attacks that follow a gradient."""


# Two audits that agree in all of the question but this have the same figures.
INCIDENTAL = ("torch", "device")


class AnotherAudit(ValueError):
    """A file or an unfinished audit at this path belongs to another audit."""


def refuse_to_overwrite(out: Path, question: Mapping[str, Any]) -> None:
    """Raise AnotherAudit if at `out` there is a file that is not of the same audit."""
    if not out.exists():
        return
    try:
        metadata = Audit.load(out).metadata
    except FormerAudit as error:
        raise AnotherAudit(f"{out} is there already, and {error} into another --out, or move the file away") from None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise AnotherAudit(f"{out} is there already, and is no audit: choose another --out") from None
    asked = {key: value for key, value in question.items() if key not in INCIDENTAL}
    if other := differences({key: metadata.get(key) for key in asked}, asked):
        raise AnotherAudit(
            f"{out} is there already, and is a different audit. It differs in: {'; '.join(other)}. "
            "Choose another --out, or move the file away"
        )


class Partial(Unfinished):
    """The finished checks of an audit, and the points that several checks look at.

    Raises:
        AnotherAudit: the folder holds finished checks of another audit.
    """

    what = "an unfinished audit"
    refusal = AnotherAudit
    patterns = ("check-*.json", "*.npz")

    device = torch.device("cpu")
    """Of the tensors that are read."""

    def read(self, name: str) -> Finished | None:
        """The check of this name, if it was finished. As the first process finds it, like all that is read here."""
        return current().from_first(partial(self._read_check, name))

    def _read_check(self, name: str) -> Finished | None:
        try:
            found = json.loads((self.folder / f"check-{name}.json").read_text())
            tried, by_gradient = (found[key] and Shares.from_dict(found[key]) for key in ("tried", "by_gradient"))
            return Finished(Check(**found["check"]), found["seconds"], tried, by_gradient)
        except (OSError, KeyError, TypeError, ValueError):  # not there, or damaged
            return None

    def write(self, one: Finished) -> None:
        shares = {"tried": one.tried, "by_gradient": one.by_gradient}
        record = {key: None if each is None else each.to_dict() for key, each in shares.items()}
        with current().together():
            text = json.dumps({"check": asdict(one.check), "seconds": one.seconds} | record, allow_nan=False)
            if current().first:
                write_atomically(self.folder / f"check-{one.check.name}.json", text.encode())

    def shared(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        """What several checks look at: read if it was computed before, else made and kept.

        Args:
            kind: a dataclass whose fields are tensors and arrays.
        """
        found = current().from_first(partial(self._read_arrays, name))
        if found is not None and set(found) == {f.name for f in fields(kind)}:  # type: ignore[arg-type]
            return kind(**{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in found.items()})
        made = make()
        values = {f.name: getattr(made, f.name) for f in fields(kind)}  # type: ignore[arg-type]
        plain = {f"tensor.{k}": v.detach().cpu().numpy() for k, v in values.items() if isinstance(v, Tensor)}
        plain |= {f"array.{k}": v for k, v in values.items() if not isinstance(v, Tensor)}
        with current().together():
            if current().first:
                with written_whole(self._file(name)) as opened:
                    np.savez(opened, **plain)  # type: ignore[arg-type]  # (its stub takes them for its flag)
        return made

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def _read_arrays(self, name: str) -> dict[str, Tensor | np.ndarray] | None:
        try:
            with np.load(self._file(name), allow_pickle=False) as arrays:
                found = {key.partition("."): arrays[key] for key in arrays}
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or damaged
            return None
        return {name: torch.from_numpy(v) if kind == "tensor" else v for (kind, _, name), v in found.items()}

    def has(self, name: str) -> bool:
        """Whether `shared` of this name was computed."""
        return current().from_first(self._file(name).exists)
