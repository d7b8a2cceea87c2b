"""Reads a run directory for a report: recipe, metrics, the latest evaluation, and the audit that belongs to it.

An evaluation and an audit belong together if they are of one network, at one radius and norm, on one data set.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gsem._fingerprint import same_model
from gsem._text import pixels
from gsem.auditing import Audit
from gsem.auditing.check import FormerAudit
from gsem.evaluation.certify import CertificationResult
from gsem.evaluation.result import EvaluationResult, with_ending
from gsem.reporting.visuals import Pictures
from gsem.training.run import read_metrics, run_fingerprint


@dataclass(frozen=True, eq=False)
class RunReport:
    """The files of a run. What is missing is None or empty."""

    path: Path
    name: str
    spec: str
    """The run as commands name it."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """recipe.json: recipe, model, data, versions, machine."""
    metrics: tuple[dict[str, Any], ...] = ()
    """One per epoch (see `gsem.Run`)."""
    result: EvaluationResult | None = None
    summary: dict[str, Any] | None = None
    """`result.to_dict()`: each attack's accuracies with intervals, and the worst cases."""
    file: str = ""
    """The name of the result's file."""
    others: tuple[str, ...] = ()
    """Other evaluations of this run, which are not shown."""
    audit: Audit | None = None
    certification: CertificationResult | None = None
    unmatched: tuple[str, ...] = ()
    """Files that are not shown, each with its reason: `audit.json: it is of another network`."""
    pictures: Pictures | None = None
    missing: str = ""
    """Why some or all pictures are missing, as a sentence."""
    named: tuple[str, ...] = ()
    """Names of the classes of a network that gsem did not train, where its data hold them."""

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields of the recipe; {} where the network was not trained by gsem."""
        return self.metadata.get("recipe", {})

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels; numbers where they are not known."""
        named = self.metadata.get("data", {}).get("classes") or self.named
        if named:
            return tuple(named)
        known = [] if self.result is None else [int(self.result.y.max()) + 1]
        known += [] if self.pictures is None or self.pictures.confusion is None else [len(self.pictures.confusion)]
        return tuple(str(number) for number in range(max(known, default=0)))

    def class_name(self, label: int) -> str:
        """The name of a label, else its number."""
        return self.classes[label] if label < len(self.classes) else str(label)

    @property
    def evaluated(self) -> dict[str, Any]:
        """What the evaluation recorded of its model and data; {} where there is none."""
        return {} if self.result is None else self.result.metadata.get("about", {})

    @property
    def eps(self) -> float | None:
        """The radius of the evaluation, else of the audit, else of the data."""
        measured = [found.metadata for found in (self.result, self.audit) if found is not None]
        known = [m["eps"] for m in (*measured, self.metadata.get("data", {})) if "eps" in m]
        return float(known[0]) if known else None


def read_runs(paths: Sequence[str | Path]) -> list[RunReport]:
    """Read each run, and give it a name that no other has.

    Args:
        paths: run directories, or files of single evaluations (`.npz` or `.json` of `gsem evaluate`).

    Raises:
        FileNotFoundError: nothing is there, or it is no run. ValueError: a damaged file, or the same run twice.
    """
    if not paths:
        raise ValueError("there is no run to report: give at least one run directory")
    entries = [_read(Path(path)) for path in paths]
    resolved = [e.path.resolve() / e.file for e in entries]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise ValueError(f"{paths[number]} is given twice")
    return _with_distinct_names(entries)


def _with_distinct_names(entries: list[RunReport]) -> list[RunReport]:
    """Runs of the same name get the name of their folder in front, and if that is not enough, a number behind."""
    longer = [replace(e, name=f"{e.path.resolve().parent.name}/{e.name}") for e in entries]
    names = [e.name for e in entries]
    entries = [long if names.count(e.name) > 1 else e for e, long in zip(entries, longer, strict=True)]
    names = [e.name for e in entries]
    return [replace(e, name=f"{e.name} ({names[:i].count(e.name) + 1})") if names.count(e.name) > 1 else e
            for i, e in enumerate(entries)]  # fmt: skip


def _read(path: Path) -> RunReport:
    if path.is_dir():
        return _read_run(path, None)
    if not path.exists():
        raise FileNotFoundError(f"there is no run {path}")
    if path.suffix not in (".npz", ".json"):
        raise ValueError(f"{path} is neither a run directory nor the .npz of an evaluation")
    return _read_run(path.parent, with_ending(path, ".npz"))


def _read_run(path: Path, chosen: Path | None) -> RunReport:
    """The run with its latest evaluation, or with the `chosen` one.

    A chosen evaluation of another network is shown alone, without the recipe and metrics beside it.
    """
    recipe = path / "recipe.json"
    if not recipe.is_file() and chosen is None:
        raise FileNotFoundError(f"{path} holds no recipe.json: it is no run of gsem train")
    metadata = _json(recipe) if recipe.is_file() else {}
    entry = RunReport(path=path, name=path.resolve().name, spec=_spec(path), metadata=metadata, metrics=_metrics(path))
    network, unmatched = _fingerprint_of(path) if metadata else (None, [])
    results = _numbered(path, "evaluation", ".npz") or sorted(path.glob("test-fresh.npz"))
    skipped, other = [], None
    for file in reversed(results) if chosen is None else [chosen]:
        result, summary = _result(file)
        other = other_network(result.metadata, network)
        if other is None or chosen is not None:
            others = tuple(f.name for f in results if f != file and f not in skipped)
            entry = replace(entry, result=result, summary=summary, file=file.name, others=others)
            break
        skipped.append(file)
        unmatched.append(f"{file.name}: {other}")
    if chosen is not None and (other is not None or not metadata):
        model = entry.evaluated.get("model")
        name = bare(model) if model else with_ending(chosen, "").name
        spec = name if model else entry.spec
        entry = replace(entry, name=name, spec=spec, metadata={}, metrics=(), others=())
        if metadata:
            unmatched.append(f"recipe.json, metrics.jsonl: {chosen.name} is not of this run ({other})")
    entry = _with_audit(entry, network if chosen is None else None, unmatched)
    return _with_certification(entry, network)


def _fingerprint_of(path: Path) -> tuple[dict[str, str] | None, list[str]]:
    """The fingerprint of the run's model, where it has a checkpoint; and a sentence where that cannot be read."""
    try:
        return run_fingerprint(path), []
    except (ValueError, OSError, RuntimeError):
        return None, ["checkpoints: they cannot be read, so the results may be of another network"]


def _spec(path: Path) -> str:
    """The run as a command names it, without the absolute path."""
    here = Path.cwd()
    if path.is_absolute():
        return str(path.relative_to(here)) if path.is_relative_to(here) else path.name
    return str(path) if ".." not in path.parts else path.resolve().name


def _numbered(path: Path, stem: str, ending: str) -> list[Path]:
    """`STEM.ENDING`, `STEM-2.ENDING`, … as gsem evaluate and gsem audit name them, the latest last."""
    named = re.compile(rf"{re.escape(stem)}(?:-(\d+))?{re.escape(ending)}")
    found = [(int(match[1] or 1), f) for f in path.glob(f"{stem}*{ending}") if (match := named.fullmatch(f.name))]
    return [f for _, f in sorted(found)]


def _audits(path: Path) -> list[Path]:
    """The files of audits, the latest last.

    Files that gsem audit named are ordered by their numbers, files named by --out by their time.
    """
    numbered = _numbered(path, "audit", ".json")
    others = [(f.stat().st_mtime, f) for f in path.glob("*.json") if f not in numbered and _is_audit(f)]
    last = numbered[-1].stat().st_mtime if numbered else 0.0
    earlier, later = ([f for time, f in sorted(others) if (time < last) == before] for before in (True, False))
    return [*earlier, *numbered, *later]


def _is_audit(file: Path) -> bool:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"checks", "verdict", "metadata"} <= found.keys()


def _json(file: Path) -> dict[str, Any]:
    with _damage_named(file):
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        return found


def _metrics(path: Path) -> tuple[dict[str, Any], ...]:
    with _damage_named(path / "metrics.jsonl"):
        return tuple(read_metrics(path))


def _result(file: Path) -> tuple[EvaluationResult, dict[str, Any]]:
    if not file.exists():
        raise FileNotFoundError(f"there is no evaluation {file}")
    with _damage_named(file, "evaluate again"):
        result = EvaluationResult.load(file)
        return result, result.to_dict()  # (with the intervals that were saved)


@contextmanager
def _damage_named(file: Path, advice: str = "") -> Iterator[None]:
    """Whatever a damaged file raises becomes a ValueError that names it."""
    try:
        yield
    except FormerAudit:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        what = "damaged, or of another version of gsem" if advice else "damaged"
        text = " ".join(str(error).split())
        raise ValueError(f"{file} is {what} ({text})" + (f": {advice}" if advice else "")) from None


def _with_audit(entry: RunReport, network: dict[str, str] | None, unmatched: list[str]) -> RunReport:
    """With the latest audit of this network that made all checks; where there is none, the latest.

    Args:
        network: the fingerprint of the network, used where there is no evaluation.
        unmatched: the files not shown so far, with their reasons.
    """
    audits = []
    if entry.result is not None:
        network = entry.result.metadata.get("fingerprint", {})
    for file in _audits(entry.path):
        try:
            with _damage_named(file, "audit again"):
                audit = Audit.load(file)
        except FormerAudit as error:
            unmatched = [*unmatched, f"{file.name}: {error}"]
            continue
        other = other_network(audit.metadata, network)
        if other is None and entry.result is not None:
            other = other_question(audit.metadata, entry.result.metadata)
        if other is None:
            audits.append(audit)
        else:
            unmatched = [*unmatched, f"{file.name}: {other}"]
    chosen = [a for a in audits if not a.metadata.get("only")] or audits
    return replace(entry, audit=chosen[-1] if chosen else None, unmatched=tuple(unmatched))


def _with_certification(entry: RunReport, network: dict[str, str] | None) -> RunReport:
    """With the latest complete certification of this network.

    Args:
        network: the fingerprint of the network, used where there is no evaluation.
    """
    if entry.result is not None:
        network = entry.result.metadata.get("fingerprint", {})
    unmatched = entry.unmatched
    for file in reversed(_numbered(entry.path, "certification", ".json")):
        try:
            found = CertificationResult.load(file)
        except ValueError as error:
            unmatched = (*unmatched, f"{file.name}: {str(error).replace(str(file), 'it')}")
            continue
        other = other_network(found.metadata, network)
        if other is None:
            return replace(entry, certification=found, unmatched=unmatched)
        unmatched = (*unmatched, f"{file.name}: {other}")
    return replace(entry, unmatched=unmatched)


def other_network(metadata: Mapping[str, Any], network: Mapping[str, str] | None) -> str | None:
    """Why an evaluation or audit is not of the network `network`; None where it is.

    Args:
        metadata: the metadata of the evaluation or audit.
        network: the network's fingerprint. None where there is nothing to compare with; {} where it is not recorded.
    """
    found = metadata.get("fingerprint")
    if network is None or same_model(found, network):
        return None
    if not network:
        return "the evaluation does not record its network (it was made by an earlier version of gsem)"
    if not found:
        return "it does not record its network (it was made by an earlier version of gsem)"
    named = metadata.get("about", metadata).get("model")
    name = f" ({bare(named)})" if named else ""
    if found.get("structure") == network.get("structure"):
        return f"it is of other weights{name}"
    if found.get("weights") == network.get("weights"):
        return f"it is of the same weights in another network, or with another setting{name}"
    return f"it is of another network{name}"


def other_question(audit: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str | None:
    """Why an audit of the same network does not apply to the evaluation's accuracies; None where it does.

    Radius, norm and data set must be equal. Images and attacks may differ.
    """
    then, now = ((f.get("eps", 0.0), f.get("norm", "Linf")) for f in (audit, evaluation))
    if "eps" in audit and then != now:
        radii = [f"eps = {pixels(eps)} ({norm})" for eps, norm in (then, now)]
        return f"it was made at {radii[0]}, the evaluation at {radii[1]}"
    one, other = audit.get("test_set"), evaluation.get("about", {}).get("test_set")
    if one and other and one != other:
        return f"it was made on other data ({bare(audit.get('data', ''))})"
    return None


def bare(word: Any) -> str:
    """An absolute path without its folders, which are of one machine only; other words as they are."""
    text = str(word)
    return Path(text).name if text.startswith(("/", "~")) else text
