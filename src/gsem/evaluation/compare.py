"""Two networks on the same images and attacks: the difference of their accuracies, image by image."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from gsem._io import write_atomically
from gsem._text import between, columns, percent, pixels
from gsem.evaluation.partial import differences
from gsem.evaluation.result import EvaluationResult, with_ending
from gsem.evaluation.statistics import Interval, mcnemar, paired_interval

WIDTH = 80  # of a terminal
ABOUT = "The interval is about the images, given the two networks: trainings with other seeds differ by more."


@dataclass(frozen=True)
class Difference:
    """Two networks under one attack."""

    name: str
    """The attack's name in the result of the first network. In that of the second, `eot` may be another."""
    one: Interval
    two: Interval
    """Expected accuracies, as the results themselves give them."""
    difference: Interval
    """Expected accuracy of the first network minus that of the second, with its paired 95% interval over images."""
    only_one: Int[np.ndarray, " k"]
    only_two: Int[np.ndarray, " m"]
    """Numbers of the images that one network alone loses: fewer than half of its scoring draws are right."""
    p: float
    """Of McNemar's exact test on these images."""

    def to_dict(self, rows: Int[np.ndarray, " n"]) -> dict[str, Any]:
        """As JSON has it, with the images by their rows in the data set."""
        intervals = {key: getattr(self, key)._asdict() for key in ("one", "two", "difference")}
        lost = {f"lost_by_{key}_only": rows[getattr(self, f"only_{key}")].tolist() for key in ("one", "two")}
        return {"attack": self.name, **intervals, **lost, "p": self.p}


@dataclass(frozen=True, repr=False)
class Comparison:
    """A `Difference` for each attack that both networks were evaluated under. `print(comparison)` is a table."""

    differences: list[Difference]
    left_out: list[str]
    """Attacks that only one of the two was evaluated under, and attacks without a bound."""
    rows: Int[np.ndarray, " n"]
    """Row of each image in the data set, as far as the results know it."""
    metadata: dict[str, Any]
    """The number of images, the threat model, and for each network: its name, draws, seed, fingerprint."""

    def __getitem__(self, name: str) -> Difference:
        for found in self.differences:
            if found.name == name:
                return found
        raise KeyError(f"no attack {name!r} in this comparison: {', '.join(d.name for d in self.differences)}")

    def __repr__(self) -> str:
        return table(self)

    def to_dict(self) -> dict[str, Any]:
        attacks = [d.to_dict(self.rows) for d in self.differences]
        return {"metadata": self.metadata, "attacks": attacks, "left_out": self.left_out, "about": ABOUT}

    def save(self, path: str | Path) -> Path:
        """Write `to_dict` as JSON to PATH, which may lack its ending .json. Returns the file."""
        file = with_ending(path, ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(self.to_dict(), indent=2).encode())
        return file


def compare(
    one: EvaluationResult | str | Path, two: EvaluationResult | str | Path, names: Sequence[str] = ("one", "two")
) -> Comparison:
    """Compare two networks by evaluations on the same images under the same attacks.

    For each attack, d_i is the difference of the probabilities that a prediction of image i is right, estimated from
    the scoring draws. Its mean is the difference of the expected accuracies, and its 95% interval is over images
    (`paired_interval`). Then every image has one verdict for each network: it is lost where fewer than half of the
    scoring draws are right. McNemar's exact test compares how many images each network alone loses.

    Both are about the images, given the two networks and the points that were found for them. Two trainings by one
    recipe with different seeds are two networks, whose accuracies on all images differ: a statement about recipes needs
    several seeds (`gsem study`).

    Args:
        one, two: results of `evaluate`, or the .npz files of saved ones. The attacks are matched by their names. If
            only one of the networks is stochastic, the number of draws (`eot`) is left out of the names.
        names: of the networks, for tables and files.

    Returns:
        a `Comparison`. The worst case is in it only if both were evaluated under the same attacks.

    Raises:
        ValueError: other images, labels, eps or norm, or the same attack with other options; all that differs is named.
    """
    first, second = (r if isinstance(r, EvaluationResult) else EvaluationResult.load(r) for r in (one, two))
    pairs, left_out = _matched(first, second)
    refuse_to_compare(
        _asked(first, second, [name for name, _ in pairs]), _asked(second, first, [n for _, n in pairs]), names
    )
    if not pairs:
        raise ValueError(f"there is no attack that both {names[0]} and {names[1]} were evaluated under")
    found = [_difference(first, second, *pair) for pair in pairs]
    rows = np.arange(len(first.y)) if first.rows is None else first.rows
    metadata = {
        "images": len(first.y),
        **_kept(first, "eps", "norm"),
        "networks": [
            {"name": name} | _kept(result, "draws", "seed", "fingerprint")
            for name, result in zip(names, (first, second), strict=True)
        ],
    }
    return Comparison(found, left_out, rows, metadata)


def _kept(result: EvaluationResult, *keys: str) -> dict[str, Any]:
    return {key: result.metadata[key] for key in keys if key in result.metadata}


def refuse_to_compare(one: Mapping[str, Any], two: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise a ValueError that names in what two evaluations differ, if they do."""
    if found := differences(one, two, (f"of {names[0]}", f"of {names[1]}")):
        raise ValueError(f"{names[0]} and {names[1]} cannot be compared. They differ in: {'; '.join(found)}")


def _asked(result: EvaluationResult, other: EvaluationResult, attacks: Sequence[str]) -> dict[str, Any]:
    """What two results must have in common: images, labels, threat model, and the options of these attacks."""
    metadata = result.metadata
    options = {_without_draws(name): metadata.get("options", {}).get(name.partition("@")[0], {}) for name in attacks}
    asked: dict[str, Any] = {key: metadata.get(key) for key in ("eps", "norm")}
    asked |= {"number of images": len(result.y), "labels": result.y.tolist()}
    if all("fingerprint" in r.metadata for r in (result, other)):
        asked["images"] = metadata["fingerprint"]["images"]
    elif result.rows is not None and other.rows is not None:
        asked["rows of the images"] = result.rows.tolist()
    return asked | {"options": {name: {k: v for k, v in own.items() if k != "eot"} for name, own in options.items()}}


def _without_draws(name: str) -> str:
    return re.sub(r"-eot\d+", "", name)


def _matched(one: EvaluationResult, two: EvaluationResult) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of the names of one attack in both results, and the names that are left out."""
    bounded = [{name: r[name].bounded for name in r.names} for r in (one, two)]
    same_draws = one.metadata.get("stochastic") == two.metadata.get("stochastic")
    key = str if same_draws else _without_draws
    keys = [{key(name): name for name, within in own.items() if within} for own in bounded]
    both = [k for k in keys[0] if k in keys[1]]
    differing = {k.partition("@")[2] for k in keys[0].keys() ^ keys[1].keys()}
    # The worst case over other attacks is another question.
    both = [k for k in both if k.partition("@")[0] != "worst" or k.partition("@")[2] not in differing]
    pairs = [(keys[0][k], keys[1][k]) for k in both]
    used = [{pair[number] for pair in pairs} for number in (0, 1)]
    rest = [name for own, taken in zip(bounded, used, strict=True) for name in own if name not in taken]
    return pairs, list(dict.fromkeys(rest))


def _difference(one: EvaluationResult, two: EvaluationResult, name: str, other: str) -> Difference:
    p, q = 1 - one.flips(name), 1 - two.flips(other)
    lost, lost_by_other = one.broken(name), two.broken(other)
    only_one, only_two = np.nonzero(lost & ~lost_by_other)[0], np.nonzero(lost_by_other & ~lost)[0]
    return Difference(
        name=name,
        one=one.expected(name),
        two=two.expected(other),
        difference=paired_interval(p - q),
        only_one=only_one,
        only_two=only_two,
        p=mcnemar(len(only_one), len(only_two)),
    )


def table(comparison: Comparison) -> str:
    """The accuracies, their differences with intervals, how many images one network alone loses, and the test."""
    metadata = comparison.metadata
    lines: list[tuple[str, ...]] = [("attack", "one", "two", "one − two", "95% interval", "only one", "only two", "p")]
    for d in comparison.differences:
        shown = [f"{100 * d.difference.mean:+z.1f}", between(*d.difference[1:]), len(d.only_one), len(d.only_two)]
        lines.append((d.name, percent(d.one.mean), percent(d.two.mean), *map(str, shown), f"{d.p:.2g}"))
    first = [f"{metadata['images']} images"]
    first += [f"eps = {pixels(metadata['eps'])} ({metadata.get('norm', 'Linf')})"] if "eps" in metadata else []
    names = (f"{word}: {network['name']}" for word, network in zip(("one", "two"), metadata["networks"], strict=True))
    left = textwrap.wrap(f"not compared: {', '.join(comparison.left_out)}", WIDTH) if comparison.left_out else []
    return "\n".join([*names, ", ".join(first), *columns(lines), *left])
