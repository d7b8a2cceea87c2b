"""Resuming an evaluation: finished batches on disk, and saved results, for the same model, images and arguments."""

import json
import shutil
import socket
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from gsem._io import write_atomically, written_whole
from gsem._lock import locked
from gsem._text import pixels
from gsem.distributed import current
from gsem.evaluation.result import ARRAYS, FIELDS, AttackScores, EvaluationResult, saved_metadata, with_ending
from gsem.rng import derive_seed

# The metadata of a result that decide it: two results that agree in them have the same figures.
QUESTION = ("fingerprint", "eps", "norm", "draws", "seed", "noise", "options", "batch_size", "source_models")
# A network file system may show a new file to other hosts later.
SEEN_SECONDS = 20.0
_WORDS = {
    "structure": "the model's layers, settings or normalisation",
    "weights": "the model's weights",
    "images": "the images",
    "labels": "the labels",
    "noise": "the modes of the noise",
    "options": "the attacks",
    "only": "the checks",
    "source_models": "the other models of the transfer attack",
}


def question(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the metadata that decides the result: model, images, attacks, eps, seed and so on."""
    return {key: metadata[key] for key in QUESTION if key in metadata}


def differences(
    former: Mapping[str, Any], now: Mapping[str, Any], which: tuple[str, str] = ("then", "now")
) -> list[str]:
    """The differences of two questions, in words. `which` names the two behind their values."""
    former, now = _plain(former), _plain(now)
    found = []
    for key in dict.fromkeys([*now, *former]):
        one, other = former.get(key), now.get(key)
        if one == other:
            continue
        if key == "options" and one and other and list(one) == list(other):
            if former.get("eps") == now.get("eps"):  # (with another eps, the steps that follow from it are others too)
                found.append(f"the options of {', '.join(lb for lb in one if one[lb] != other[lb])}")
        elif key == "options" and one and other:
            found.append(f"{_WORDS[key]} ({', '.join(one)} {which[0]}, {', '.join(other)} {which[1]})")
        elif isinstance(one, (int, float, str)) and isinstance(other, (int, float, str)) and key not in _WORDS:
            found.append(f"{key} ({_short(one)} {which[0]}, {_short(other)} {which[1]})")
        else:
            found.append(_WORDS.get(key, key))
    return found


def refuse_differences(asked: Mapping[str, Any]) -> None:
    """Raise a ValueError if another process was called with another model, other images or other arguments."""
    first, *others = current().gathered(asked)
    for rank, other in enumerate(others, 1):
        if found := differences(first, other):
            raise ValueError(
                f"all processes must be asked the same, but process {rank} differs from process 0 in: "
                f"{'; '.join(found)}"
            )


def _short(value: float | str) -> str:
    """0.3 as it is, 0.0313725… as 8/255."""
    plain = f"{value:g}" if isinstance(value, float) else str(value)
    return pixels(value) if isinstance(value, float) and len(plain) > 5 else plain


def _plain(asked: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it, with the parts of the fingerprint beside the rest."""
    found = json.loads(json.dumps(dict(asked)))
    return (found.pop("fingerprint", None) or {}) | found


class Unfinished:
    """A folder `PATH.unfinished` with the finished parts of a computation, so that an interrupted one resumes.

    Args:
        path: where the result will go.
        question: all that decides the result (values as JSON takes them). The folder of another question is not
            touched, unless nothing in it is finished.

    Raises:
        ValueError (`refusal`): the folder holds finished parts of another question.
    """

    what = "an unfinished evaluation"
    refusal: type[ValueError] = ValueError
    patterns: tuple[str, ...] = ("*.npz",)
    """Glob patterns of the files that hold finished parts."""

    def __init__(self, path: str | Path, question: Mapping[str, Any]):
        self.folder = with_ending(path, ".unfinished")
        file = self.folder / "question.json"
        # (Pieces without their question are what a removal of the folder left that was itself interrupted.)
        if not file.exists() or not self.finished:
            self.discard()
        elif other := differences(json.loads(file.read_text()), question):
            raise self.refusal(
                f"{self.folder} holds {self.what} with other inputs. It differs in: {'; '.join(other)}. "
                "Repeat that command to finish it, choose another --out, or delete the folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.question = json.dumps(question, indent=2)
        write_atomically(file, self.question.encode())

    def check_shared(self) -> None:
        """Raise a ValueError where this process does not see the folder as the one that opened it has left it."""
        file, until = self.folder / "question.json", time.monotonic() + SEEN_SECONDS
        while not (file.exists() and file.read_text() == self.question):
            if time.monotonic() > until:
                raise ValueError(
                    f"{self.folder} on {socket.gethostname()} is not the folder of the first process: all hosts must "
                    "share it. Choose a place on a shared file system (--out)"
                )
            time.sleep(0.1)

    @property
    def finished(self) -> int:
        """Parts that are not computed again."""
        files = [file for pattern in self.patterns for file in self.folder.glob(pattern)]
        return sum(not file.name.startswith(".") for file in files)

    def discard(self) -> None:
        """The result is saved: the parts are not needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard_if_empty(self) -> None:
        """Nothing was finished: the next computation finds the place free."""
        if not self.finished:
            self.discard()


U = TypeVar("U", bound=Unfinished)


@contextmanager
def finished_parts(opened: Callable[[], U]) -> Iterator[U]:
    """The finished parts of a computation, for the length of a `with` block at whose end the result is saved.

    Args:
        opened: opens the folder. The first process does, for all.
    """
    processes = current()
    on_disk = processes.from_first(opened)
    with processes.together():
        on_disk.check_shared()
    try:
        yield on_disk
    except BaseException as error:
        # (Where one process is interrupted, others may still write.)
        if processes.first and (isinstance(error, Exception) or not processes.several):
            on_disk.discard_if_empty()
        raise
    if processes.first:
        on_disk.discard()


class FinishedBatches(Unfinished):
    """The finished batches of an evaluation: one file for each batch of each attack."""

    def _file(self, name: str, first: int) -> Path:
        return self.folder / f"{derive_seed(0, name):016x}-{first}.npz"

    def read(self, name: str, first: int) -> AttackScores | None:
        """The batch from image `first` under the attack of this name, if it was finished."""
        file = self._file(name, first)
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as arrays:
                metadata = json.loads(str(arrays["metadata"]))
                return AttackScores(**{key: arrays[key] for key in (*ARRAYS, "x_adv")}, **metadata)
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile):  # damaged, or of an earlier version
            return None

    def write(self, name: str, first: int, part: AttackScores) -> None:
        metadata = {key: getattr(part, key) for key in ("name", *FIELDS)}
        arrays = {key: getattr(part, key) for key in (*ARRAYS, "x_adv")}
        with written_whole(self._file(name, first)) as file:
            np.savez(file, metadata=np.array(json.dumps(metadata)), **arrays)


class AnotherQuestion(ValueError):
    """The result that is saved at this path has another model, other images or other arguments."""

    def __init__(self, out: Path, different: list[str]):
        self.out, self.different = out, different
        super().__init__(
            f"{with_ending(out, '.npz')} is there already, and is a different evaluation. It differs in: "
            f"{'; '.join(different)}. Choose another --out, or move the file away"
        )

    def __reduce__(self) -> tuple:
        return AnotherQuestion, (self.out, self.different)


def refuse_to_overwrite(out: str | Path, asked: Mapping[str, Any]) -> None:
    """Raise AnotherQuestion if at `out` there is the result of another question."""
    metadata = saved_metadata(out)
    if metadata is None:
        return
    other = (
        differences(question(metadata), asked)
        if "fingerprint" in metadata
        else ["the model and the images, which it does not record"]
    )
    if other:
        raise AnotherQuestion(Path(out), other)


def saved_result(
    out: str | Path, asked: Mapping[str, Any], rows: Int[np.ndarray, " n"] | None
) -> EvaluationResult | None:
    """The result of this question that is saved at `out`, if there is one.

    Args:
        rows: the rows of the images in their data set, where the caller gave them.

    Raises:
        AnotherQuestion: the result there has another question.
    """
    refuse_to_overwrite(out, asked)
    if not with_ending(out, ".npz").exists():
        return None
    result = EvaluationResult.load(out)
    if rows is not None and result.rows is not None and not np.array_equal(rows, result.rows):
        raise AnotherQuestion(Path(out), ["the rows of the images in their data set"])
    return result


def computed(
    out: str | Path, asked: dict[str, Any], scored: Callable[[FinishedBatches], EvaluationResult]
) -> EvaluationResult:
    """The result of `scored`, with its finished batches beside `out` meanwhile, saved there.

    Raises:
        AnotherQuestion: the result there has another question. Locked: another process evaluates into `out`.
    """
    out, processes = with_ending(out, ""), current()
    instead = "wait for its end, or choose another --out"
    with ExitStack() as held:

        def opened() -> FinishedBatches:
            out.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out.with_name(f".{out.name}.lock"), f"evaluating into {out}", instead))
            refuse_to_overwrite(out, asked)
            return FinishedBatches(out, asked)

        with finished_parts(opened) as on_disk:
            result = scored(on_disk)
            with processes.together():
                if processes.first:
                    result.save(out)
    return result
