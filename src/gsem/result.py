"""What an evaluation found, per image and attack: the four accuracies of a stochastic classifier, and files."""

import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from gsem.checkpoint import write_atomically, written_whole
from gsem.streams import split

BOOTSTRAP = 10_000
KEPT = 50_000_000  # counts of resamples that are kept for the next interval: 100 MB
VOTERS = 11
PERSISTENCE = (1, 10, 100)


class Interval(NamedTuple):
    """An estimate with its 95% bootstrap interval over images."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """What one attack did, per image."""

    label: str
    correct: Int[np.ndarray, " n"]
    """Scoring draws in which the image was still classified as its label."""
    votes: Float[np.ndarray, " n"]
    """Share of votes, each of 11 scoring draws of its own, that the label won; NaN where there are too few draws."""
    selection: Int[np.ndarray, " n"]
    """Selection draws in which it was still classified as its label: by them the worst attack is chosen."""
    single: Bool[np.ndarray, "n 2"]
    """Whether it was right in the first selection draw and in the first scoring draw: the published judgement."""
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

    @property
    def name(self) -> str:
        """The label, with the noise unless it is fresh."""
        return self.label if self.noise == "fresh" else f"{self.label}@{self.noise}"


ARRAYS = ("correct", "votes", "selection", "single", "linf", "l2")
FIELDS = ("forwards", "gradients", "seconds", "noise", "bounded")


@dataclass(frozen=True)
class Result:
    """An evaluation: for each attack, per image, how many scoring draws stayed right."""

    scores: list[Scores]
    y: Int[np.ndarray, " n"]
    facts: dict[str, Any]
    """eps, norm, draws, seed, stochastic, images, options of each attack, versions."""

    @property
    def draws(self) -> int:
        return self.facts["draws"]

    def __getitem__(self, name: str) -> Scores:
        """Of an attack by its name (`apgd100-eot20`, `apgd100-eot1@frozen`), or of the worst: `worst`."""
        if name.split("@")[0] == "worst":
            return self.worst(name.removeprefix("worst").removeprefix("@") or "fresh")
        for scores in self.scores:
            if scores.name == name:
                return scores
        raise KeyError(f"no attack {name!r} in this result: {', '.join(s.name for s in self.scores)}")

    def draws_of(self, scores: Scores) -> int:
        """Scoring draws behind these scores: one where the noise was frozen or off."""
        return self.draws if scores.noise == "fresh" else 1

    def worst(self, noise: str = "fresh") -> Scores:
        """Per image the attack, clean included, whose point the most selection draws misclassify; its scores.

        The scoring draws have no part in the choice: the worst of six attacks on the draws that also score them
        would turn a flip probability of 0.5 into 0.56.
        """
        all_ = [s for s in self.scores if s.noise == noise and s.bounded]
        if not all_:
            raise KeyError(f"nothing was evaluated with the noise {noise}")
        chosen = np.stack([s.selection for s in all_]).argmin(0)
        arrays = {
            key: np.stack([getattr(s, key) for s in all_])[chosen, np.arange(len(chosen))]
            for key in ("correct", "votes", "selection", "single", "linf", "l2")
        }
        cost = {key: sum(getattr(s, key) for s in all_) for key in ("forwards", "gradients", "seconds")}
        return Scores(label="worst", **arrays, **cost, noise=noise)

    # --- the accuracies ------------------------------------------------------------------------------------

    def expected(self, name: str) -> Interval:
        """Expected accuracy under an attack: the mean of 1 − p over images, p the share of wrong scoring draws."""
        scores = self[name]
        return self._interval(scores.correct / self.draws_of(scores))

    def vote(self, name: str) -> Interval | None:
        """Accuracy of the plurality of 11 draws, ties wrong, each prediction on draws of its own.

        None with fewer than 11 scoring draws of a stochastic model."""
        votes = self[name].votes
        return None if np.isnan(votes).any() else self._interval(votes)

    def persistent(self, name: str, sends: int) -> Interval | None:
        """Accuracy against someone who sends the image `sends` times and needs one error: C(c, N) / C(m, N).

        Unbiased, where (c/m)^N is not. None with fewer scoring draws than that of a stochastic model."""
        scores = self[name]
        draws = self.draws_of(scores)
        if draws == 1:  # deterministic: every answer is the same
            return self._interval(scores.correct.astype(float))
        if sends > draws:
            return None
        # C(c, N) / C(m, N) = Π (c − i) / (m − i), without the large numbers.
        stays = np.ones(len(scores.correct))
        for i in range(sends):
            stays *= np.maximum(scores.correct - i, 0) / (draws - i)
        return self._interval(stays)

    def as_published(self, name: str) -> Interval:
        """The accuracy that the released evaluation would have printed for these points.

        Whether the attack succeeded, and the score, are each one draw; an image on which it did not succeed is
        scored as its clean self. Not an estimate of robustness: printed beside the honest figure, labelled.
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
        means = np.concatenate(
            [counts @ values / len(values) for counts in _resamples(self.facts["seed"], len(values))]
        )
        low, high = np.quantile(means, [0.025, 0.975])
        return Interval(float(values.mean()), float(low), float(high))

    # --- files ---------------------------------------------------------------------------------------------

    def summary(self, name: str) -> dict[str, Any]:
        """One attack's accuracies, each with its mean, low and high, or None."""
        scores = self[name]
        found = {"expected": self.expected(name), "vote": self.vote(name)}
        found |= {f"persistent{n}": self.persistent(name, n) for n in PERSISTENCE}
        summary: dict[str, Any] = {key: None if value is None else value._asdict() for key, value in found.items()}
        if not scores.bounded:
            reached = scores.l2[self.broken(name)]
            median = float(np.median(reached)) if len(reached) else None
            summary |= {"broken": float(self.broken(name).mean()), "median_l2_of_broken": median}
        return summary

    def to_dict(self) -> dict[str, Any]:
        """The summary: facts, each attack's accuracies with intervals and cost, and the worst case."""
        rows = [
            {
                "attack": s.label,
                **self.expected(s.name)._asdict(),
                **{key: value for key, value in self.summary(s.name).items() if key != "expected"},
                **{key: getattr(s, key) for key in FIELDS},
            }
            for s in self.scores
        ]
        modes = sorted({s.noise for s in self.scores if s.bounded}, key=("fresh", "frozen", "off").index)
        worst = {noise: self.summary("worst" if noise == "fresh" else f"worst@{noise}") for noise in modes}
        return {"facts": self.facts, "attacks": rows, "worst": worst}

    def save(self, path: str | Path) -> Path:
        """`PATH.json`, the summary, and `PATH.npz`, everything per image. PATH may carry either ending.

        Returns:
            PATH without an ending.
        """
        path = with_ending(path, "")
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {"y": self.y}
        for number, s in enumerate(self.scores):
            arrays |= {f"{number}.{key}": getattr(s, key) for key in ARRAYS}
            if s.x_adv is not None:
                arrays[f"{number}.x_adv"] = s.x_adv
        summary = self.to_dict()
        arrays["meta"] = np.array(json.dumps(summary))
        with written_whole(with_ending(path, ".npz")) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # (its stub takes them for its flag)
        write_atomically(with_ending(path, ".json"), json.dumps(summary, indent=2).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """What `save` wrote."""
        with np.load(with_ending(path, ".npz"), allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            scores = [
                Scores(
                    label=row["attack"],
                    **{key: file[f"{number}.{key}"] for key in ARRAYS},
                    **{key: row[key] for key in FIELDS},
                    x_adv=file.get(f"{number}.x_adv"),
                )
                for number, row in enumerate(meta["attacks"])
            ]
            return cls(scores, file["y"], meta["facts"])

    @classmethod
    def saved_facts(cls, path: str | Path) -> dict[str, Any] | None:
        """The facts of the result that was saved there, {} of a file that holds none; None where there is no file."""
        file = with_ending(path, ".npz")
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as arrays:
                facts = json.loads(str(arrays["meta"]))["facts"]
        except (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile):
            return {}
        return facts if isinstance(facts, dict) else {}


def _resamples(seed: int, n: int) -> Iterable[Int[np.ndarray, "500 n"]]:
    """The bootstrap's resamples of n images: how often each image is drawn, in blocks, so that memory stays small."""
    return _kept_resamples(seed, n) if n * BOOTSTRAP <= KEPT else _drawn_resamples(seed, n)


@lru_cache(maxsize=2)
def _kept_resamples(seed: int, n: int) -> list[Int[np.ndarray, "500 n"]]:
    # Every interval of a result uses the same ones; drawing them is nearly all of its time.
    return [counts.astype(np.uint16) for counts in _drawn_resamples(seed, n)]


def _drawn_resamples(seed: int, n: int) -> Iterator[Int[np.ndarray, "500 n"]]:
    random = np.random.Generator(np.random.PCG64(split(seed, "bootstrap")))
    for _ in range(BOOTSTRAP // 500):
        yield random.multinomial(n, np.full(n, 1 / n), size=500)


def joined(parts: list[Scores], *, keep_images: bool) -> Scores:
    """The scores of consecutive batches as one."""
    arrays: dict[str, Any] = {key: np.concatenate([getattr(p, key) for p in parts]) for key in ARRAYS}
    images = np.concatenate([p.x_adv for p in parts if p.x_adv is not None]) if keep_images else None
    costs: dict[str, Any] = {key: sum(getattr(p, key) for p in parts) for key in ("forwards", "gradients", "seconds")}
    return replace(parts[0], **arrays, **costs, x_adv=images)


def with_ending(path: str | Path, ending: str) -> Path:
    # Not with_suffix alone: of "pgd-eps0.15" it would take ".15" for an ending.
    path = Path(path)
    path = path.with_suffix("") if path.suffix in (".json", ".npz") else path
    return path.with_name(path.name + ending)
