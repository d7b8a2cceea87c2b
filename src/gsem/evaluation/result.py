"""The result of an evaluation, per image and attack: four accuracies with intervals, and files.

An attack has one name everywhere, in tables, in files and as the key of a result: the label of the arguments that ran,
with `@frozen` or `@off` behind it where the noise was not fresh (`pgd100-eot20`, `pgd100-eot1@frozen`). The worst case
over the attacks is `worst`, `worst@frozen` and `worst@off`.
"""

import json
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from gsem._io import write_atomically, written_whole
from gsem._text import between, columns, percent, pixels
from gsem.evaluation.statistics import Interval, bootstrap_mean

BOOTSTRAP = 10_000  # resamples of each interval
VOTERS = 11
PERSISTENCE = (1, 10, 100)
ACCURACIES = ("expected", "vote", *(f"persistent{n}" for n in PERSISTENCE))
NOISES = ("fresh", "frozen", "off")
SHOWN = 7  # attacks in the short table of `print(result)`


def attack_name(label: str, noise: str) -> str:
    """The name of an attack in a result: `pgd100-eot20`, `pgd100-eot1@frozen`."""
    return label if noise == "fresh" else f"{label}@{noise}"


@dataclass(frozen=True, repr=False)
class AttackScores:
    """What one attack did, per image."""

    name: str
    """The attack's key in the result, in files and in tables."""
    correct: Int[np.ndarray, " n"]
    """Scoring draws in which the image was still classified as its label."""
    votes: Float[np.ndarray, " n"]
    """Share of votes, each of 11 scoring draws of its own, that the label won; NaN where there are too few draws."""
    selection: Int[np.ndarray, " n"]
    """Selection draws in which it was still classified as its label: by them the worst attack is chosen."""
    single: Bool[np.ndarray, "n 2"]
    """Whether it was right in the first selection and the first scoring draw, as the released evaluation counts it."""
    linf: Float[np.ndarray, " n"]
    l2: Float[np.ndarray, " n"]
    forwards: int
    gradients: int
    """Image rows passed through the network by the attack: without and with a gradient."""
    seconds: float
    noise: str = "fresh"
    """The model's noise while it was attacked and scored: fresh, frozen by a known seed, or off."""
    bounded: bool = True
    """Whether the points lie within eps. Others have distances, not a robust accuracy."""
    x_adv: Float[np.ndarray, "n c h w"] | None = None

    def __repr__(self) -> str:
        return f"Scores({self.name!r}, {len(self.correct)} images)"


ARRAYS = ("correct", "votes", "selection", "single", "linf", "l2")
FIELDS = ("forwards", "gradients", "seconds", "noise", "bounded")


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """An evaluation: for each attack and image, the number of correct scoring draws. `print(result)` is a table."""

    scores: list[AttackScores]
    y: Int[np.ndarray, " n"]
    metadata: dict[str, Any]
    """eps, norm, draws, seed, stochastic, images, options of each attack, versions."""
    rows: Int[np.ndarray, " n"] | None = None
    """Row of each image in the data set's test split, from 0; None where it is not known."""
    _bounds: dict[bytes, tuple[float, float]] = field(default_factory=dict, init=False, compare=False)
    """Bootstrap intervals computed so far, by the values that they are of: at 10,000 images one takes seconds."""

    @property
    def draws(self) -> int:
        return self.metadata["draws"]

    @property
    def names(self) -> list[str]:
        """The key of every attack, then those of the worst cases: all that `result[name]` takes."""
        modes = {s.noise for s in self.scores if s.bounded}
        return [*(s.name for s in self.scores), *(attack_name("worst", noise) for noise in NOISES if noise in modes)]

    def __getitem__(self, name: str) -> AttackScores:
        """The scores of an attack (`pgd100-eot20`, `pgd100-eot1@frozen`) or of a worst case (`worst`, `worst@off`)."""
        if name not in self.names:
            raise KeyError(f"no attack {name!r} in this result: {', '.join(self.names)}")
        for scores in self.scores:
            if scores.name == name:
                return scores
        return self.worst(name.removeprefix("worst").removeprefix("@") or "fresh")

    def __repr__(self) -> str:
        """A table of the attacks with the noise fresh and of the worst cases: expected accuracy, 95% interval."""
        return _table(self)

    def draws_of(self, scores: AttackScores) -> int:
        """Scoring draws behind these scores: one where the noise was frozen or off."""
        return self.draws if scores.noise == "fresh" else 1

    def worst(self, noise: str = "fresh") -> AttackScores:
        """Per image the attack, clean included, whose point the most selection draws misclassify; its scores.

        The scoring draws have no part in the choice: the worst of six attacks on the draws that also score them
        would turn a flip probability of 0.5 into 0.56.
        """
        all_ = [s for s in self.scores if s.noise == noise and s.bounded]
        if not all_:
            raise KeyError(f"nothing was evaluated with the noise {noise}")
        chosen = np.stack([s.selection for s in all_]).argmin(0)
        arrays = {
            array: np.stack([getattr(s, array) for s in all_])[chosen, np.arange(len(chosen))] for array in ARRAYS
        }
        cost = {what: sum(getattr(s, what) for s in all_) for what in ("forwards", "gradients", "seconds")}
        return AttackScores(name=attack_name("worst", noise), **arrays, **cost, noise=noise)

    # --- the accuracies ------------------------------------------------------------------------------------

    def expected(self, name: str) -> Interval:
        """Expected accuracy under an attack: the mean of 1 − p over images, p the share of wrong scoring draws."""
        values = self._values(name, "expected")
        assert values is not None
        return self._interval(values)

    def vote(self, name: str) -> Interval | None:
        """Accuracy of the plurality of 11 draws, ties wrong, each prediction on draws of its own.

        None with fewer than 11 scoring draws of a stochastic model."""
        values = self._values(name, "vote")
        return None if values is None else self._interval(values)

    def persistent(self, name: str, sends: int) -> Interval | None:
        """Accuracy against an attacker who sends the image N = `sends` times and needs one error: C(c, N) / C(m, N).

        Unbiased, where (c/m)^N is not. None with fewer scoring draws than that of a stochastic model."""
        values = self._values(name, f"persistent{sends}")
        return None if values is None else self._interval(values)

    def _values(self, name: str, accuracy: str) -> Float[np.ndarray, " n"] | None:
        """Per image what an accuracy is the mean of; None where there are too few draws for it."""
        scores = self[name]
        draws = self.draws_of(scores)
        if accuracy == "expected":
            return scores.correct / draws
        if accuracy == "vote":
            return None if np.isnan(scores.votes).any() else scores.votes
        sends = int(accuracy.removeprefix("persistent"))
        if draws == 1:  # deterministic: every answer is the same
            return scores.correct.astype(float)
        if sends > draws:
            return None
        # C(c, N) / C(m, N) = Π (c − i) / (m − i), without the large numbers.
        stays = np.ones(len(scores.correct))
        for i in range(sends):
            stays *= np.maximum(scores.correct - i, 0) / (draws - i)
        return stays

    def as_published(self, name: str) -> Interval:
        """The accuracy that the released evaluation would have printed for these points.

        Whether the attack succeeded, and the score, are each one draw; an image on which it did not succeed is
        scored as its clean image. It is no estimate of robustness, and is labelled so where it is printed.
        """
        attacked, clean = self[name].single, self["clean"].single
        return self._interval(np.where(attacked[:, 0], clean[:, 1], attacked[:, 1]).astype(float))

    def broken(self, name: str) -> Bool[np.ndarray, " n"]:
        """Per image, whether most scoring draws misclassify the attack's point."""
        scores = self[name]
        return scores.correct * 2 < self.draws_of(scores)

    def flips(self, name: str) -> Float[np.ndarray, " n"]:
        """Per image, the share of scoring draws that misclassify the attack's point."""
        scores = self[name]
        return 1 - scores.correct / self.draws_of(scores)

    def _interval(self, values: Float[np.ndarray, " n"]) -> Interval:
        of = values.tobytes()
        if of not in self._bounds:
            _, low, high = bootstrap_mean(values, resamples=BOOTSTRAP, seed=self.metadata["seed"])
            self._bounds[of] = low, high
        return Interval(float(values.mean()), *self._bounds[of])

    # --- files ---------------------------------------------------------------------------------------------

    def summary(self, name: str) -> dict[str, Any]:
        """One attack's accuracies, each with its mean, low and high, or None."""
        scores = self[name]
        found = {a: self._values(name, a) for a in ACCURACIES}
        summary: dict[str, Any] = {a: None if v is None else self._interval(v)._asdict() for a, v in found.items()}
        if not scores.bounded:
            reached = scores.l2[self.broken(name)]
            median = float(np.median(reached)) if len(reached) else None
            summary |= {"broken": float(self.broken(name).mean()), "median_l2_of_broken": median}
        return summary

    def to_dict(self) -> dict[str, Any]:
        """The summary: metadata, each attack's accuracies with intervals and cost, and the worst case."""
        rows = [
            {
                "attack": s.name,
                **self.expected(s.name)._asdict(),
                **{key: value for key, value in self.summary(s.name).items() if key != "expected"},
                **{key: getattr(s, key) for key in FIELDS},
            }
            for s in self.scores
        ]
        worst = {name: self.summary(name) for name in self.names if name.split("@")[0] == "worst"}
        return {"metadata": self.metadata, "attacks": rows, "worst": worst}

    def save(self, path: str | Path) -> Path:
        """`PATH.json`, the summary, and `PATH.npz`, everything per image. PATH may carry either ending.

        The npz holds `y`, `rows`, and for each attack `NAME.correct`, `NAME.votes`, … and `NAME.x_adv`, if kept.

        Returns:
            PATH without an ending.
        """
        return _save(self, with_ending(path, ""))

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        """What `save` wrote.

        Raises:
            ValueError: an .npz file that holds no result.
        """
        return _load(with_ending(path, ".npz"))


def saved_metadata(path: str | Path) -> dict[str, Any] | None:
    """The metadata of the result saved there; {} if the file holds none, None if there is no file."""
    file = with_ending(path, ".npz")
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            metadata = json.loads(str(arrays["meta"]))["metadata"]
    except (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _table(result: EvaluationResult) -> str:
    metadata, names = result.metadata, [s.name for s in result.scores if s.noise == "fresh"]
    worst = [name for name in result.names if name.split("@")[0] == "worst"]
    cut = names[: SHOWN if len(names) <= SHOWN else SHOWN - 1]
    rows = [("attack", "expected", "95% interval")]
    for name in [*cut, *(worst if len(result.scores) > 1 else [])]:
        mean, low, high = result.expected(name)
        bounded = result[name].bounded
        rows.append((name, percent(mean), between(low, high)) if bounded else (name, "–", "no bound"))
    lines = columns(rows)
    if len(names) > len(cut):
        lines.insert(1 + len(cut), f"and {len(names) - len(cut)} more (result.names lists all)")
    first = [f"{len(result.y)} images"]
    first += [f"eps = {pixels(metadata['eps'])} ({metadata.get('norm', 'Linf')})"] if "eps" in metadata else []
    first += [f"{result.draws} scoring draws" if result.draws > 1 else "deterministic", f"seed {metadata['seed']}"]
    return "\n".join([", ".join(first), *lines])


def _save(result: EvaluationResult, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {"y": result.y} if result.rows is None else {"y": result.y, "rows": result.rows}
    for s in result.scores:
        arrays |= {f"{s.name}.{array}": getattr(s, array) for array in ARRAYS}
        if s.x_adv is not None:
            arrays[f"{s.name}.x_adv"] = s.x_adv
    summary = result.to_dict()
    arrays["meta"] = np.array(json.dumps(summary))
    with written_whole(with_ending(path, ".npz")) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # (its stub takes them for its flag)
    write_atomically(with_ending(path, ".json"), json.dumps(summary, indent=2).encode())
    return path


def _load(path: Path) -> EvaluationResult:
    if path.exists() and not zipfile.is_zipfile(path):  # numpy would advise unpickling it
        raise ValueError(f"{path} is not an .npz file, or is damaged")
    with np.load(path, allow_pickle=False) as file:
        if "meta" not in file:
            raise ValueError(f"{path} holds no result of gsem evaluate")
        meta = json.loads(str(file["meta"]))
        scores = []
        for row in meta["attacks"]:
            name = row["attack"]
            values = {array: file[f"{name}.{array}"] for array in ARRAYS} | {field: row[field] for field in FIELDS}
            scores.append(AttackScores(name=name, **values, x_adv=file.get(f"{name}.x_adv")))
        result = EvaluationResult(scores, file["y"], meta["metadata"], file.get("rows"))
    _take_bounds(result, meta)
    return result


def _take_bounds(result: EvaluationResult, meta: dict[str, Any]) -> None:
    """The intervals of a summary, so that they are not computed again."""
    known = {s.name: row | {"expected": row} for s, row in zip(result.scores, meta["attacks"], strict=True)}
    known |= meta["worst"]
    for name in result.names:
        for accuracy in ACCURACIES:
            saved, values = known[name].get(accuracy), result._values(name, accuracy)
            if saved is not None and values is not None:
                result._bounds[values.tobytes()] = (saved["low"], saved["high"])


def joined(parts: list[AttackScores], *, save_adv: bool) -> AttackScores:
    """The scores of consecutive batches as one."""
    arrays: dict[str, Any] = {array: np.concatenate([getattr(p, array) for p in parts]) for array in ARRAYS}
    images = np.concatenate([p.x_adv for p in parts if p.x_adv is not None]) if save_adv else None
    costs: dict[str, Any] = {
        what: sum(getattr(p, what) for p in parts) for what in ("forwards", "gradients", "seconds")
    }
    return replace(parts[0], **arrays, **costs, x_adv=images)


def with_ending(path: str | Path, ending: str) -> Path:
    # Not with_suffix alone: it would take the ".15" of "pgd-eps0.15" for an ending.
    path = Path(path)
    path = path.with_suffix("") if path.suffix in (".json", ".npz") else path
    return path.with_name(path.name + ending)
