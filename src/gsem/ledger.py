"""What of an evaluation is finished, batch by batch, so that an interrupted one goes on."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from gsem.checkpoint import write_atomically
from gsem.result import ARRAYS, FIELDS, Scores, with_ending
from gsem.streams import split


def fingerprint(x: Tensor, y: Tensor, model: nn.Module) -> str:
    """Of the images, their labels, and the model's weights and structure."""
    digest = hashlib.sha256(str(model).encode())
    for tensor in (x, y, *model.state_dict().values()):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


class Ledger:
    """A folder `PATH.unfinished` with one file for each finished batch of each attack.

    Args:
        path: where the result will go.
        question: all that decides the result. A ledger of another question is not touched.

    Raises:
        ValueError: an unfinished evaluation of another question is there.
    """

    def __init__(self, path: str | Path, question: dict[str, Any]):
        self.folder = with_ending(path, ".unfinished")
        file = self.folder / "question.json"
        question = json.loads(json.dumps(question))
        if file.exists():
            former = json.loads(file.read_text())
            other = sorted(key for key in former.keys() | question.keys() if former.get(key) != question.get(key))
            if other:
                raise ValueError(
                    f"{self.folder} holds an unfinished evaluation that asked something else ({', '.join(other)} "
                    "differ): repeat that command to finish it, choose another --out, or delete the folder"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(question, indent=2).encode())

    def _file(self, name: str, first: int) -> Path:
        return self.folder / f"{split(0, name):016x}-{first}.npz"

    def read(self, name: str, first: int) -> Scores | None:
        """The batch from image `first` under the attack of this name, if it was finished."""
        file = self._file(name, first)
        if not file.exists():
            return None
        with np.load(file, allow_pickle=False) as arrays:
            facts = json.loads(str(arrays["facts"]))
            return Scores(**{key: arrays[key] for key in (*ARRAYS, "x_adv")}, **facts)

    def write(self, name: str, first: int, part: Scores) -> None:
        facts = {key: getattr(part, key) for key in ("label", *FIELDS)}
        arrays = {key: getattr(part, key) for key in (*ARRAYS, "x_adv")}
        file = self._file(name, first)
        beside = self.folder / f".{file.stem}.writing.npz"
        np.savez(beside, facts=np.array(json.dumps(facts)), **arrays)
        beside.replace(file)

    def discard(self) -> None:
        """The result is saved: the pieces are not needed any more."""
        shutil.rmtree(self.folder)
