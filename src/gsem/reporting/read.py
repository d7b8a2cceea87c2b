"""Reads a run directory for a report: recipe, metrics, the latest evaluation, the latest whole audit."""

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gsem.auditing import Audit
from gsem.evaluation.result import EvaluationResult, with_ending
from gsem.reporting.match import other_network, other_question
from gsem.reporting.tables import bare
from gsem.reporting.views import RunReport
from gsem.training.run import read_metrics, run_fingerprint


def read_runs(paths: Sequence[str | Path]) -> list[RunReport]:
    """Each run, with a name that no other of them has.

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
    return _told_apart(entries)


def _told_apart(entries: list[RunReport]) -> list[RunReport]:
    """Runs of the same name are called by their folder's too, and at last by their number."""
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
    recipe = path / "recipe.json"
    if not recipe.is_file() and chosen is None:
        raise FileNotFoundError(f"{path} holds no recipe.json: it is no run of gsem train")
    metadata = _json(recipe) if recipe.is_file() else {}
    results = _numbered(path, "evaluation", ".npz") or sorted(path.glob("test-fresh.npz"))
    subject, unmatched = _subject(path) if metadata else (None, [])
    if chosen is not None:
        return _of_evaluation(path, chosen, metadata, subject, unmatched)
    entry = RunReport(path=path, name=path.resolve().name, spec=_spec(path), metadata=metadata, metrics=_metrics(path))
    skipped: list[Path] = []
    for file in reversed(results):
        result, summary = _result(file)
        other = other_network(result.metadata, subject)
        if other is None:
            others = tuple(f.name for f in results if f != file and f not in skipped)
            entry = replace(entry, result=result, summary=summary, file=file.name, others=others)
            break
        skipped.append(file)
        unmatched.append(f"{file.name}: {other}")
    return _with_audit(entry, subject, unmatched)


def _subject(path: Path) -> tuple[dict[str, str] | None, list[str]]:
    """The fingerprint of the run's model, if its checkpoint is there; and if it cannot be read, a sentence."""
    try:
        return run_fingerprint(path), []
    except (ValueError, OSError, RuntimeError):
        return None, ["checkpoints: they cannot be read, so that it is not known whether the figures are of this run"]


def _of_evaluation(
    path: Path, file: Path, metadata: dict[str, Any], subject: dict[str, str] | None, unmatched: list[str]
) -> RunReport:
    """An evaluation that was asked for by its file. What was trained beside it belongs to it if it is its network."""
    result, summary = _result(file)
    other = other_network(result.metadata, subject)
    entry = RunReport(
        path=path, name=path.resolve().name, spec=_spec(path), result=result, summary=summary, file=file.name
    )
    if metadata and other is None:
        others = tuple(f.name for f in _numbered(path, "evaluation", ".npz") if f != file)
        entry = replace(entry, metadata=metadata, metrics=_metrics(path), others=others)
    else:
        model = result.metadata.get("about", {}).get("model")
        name = bare(model) if model else with_ending(file, "").name
        entry = replace(entry, name=name, spec=name if model else entry.spec)
        if metadata:
            unmatched = [*unmatched, f"recipe.json, metrics.jsonl: {file.name} is not of this run ({other})"]
    return _with_audit(entry, None, unmatched)


def _spec(path: Path) -> str:
    """The run as a command names it; nothing of where it lies on the machine that made the report."""
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
    """The files of audits, the latest last: as gsem audit names them, and what --out called otherwise.

    Those that gsem audit named are in the order of their numbers; among others only the time of the file tells.
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
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: it holds no object")
    return found


def _metrics(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        return tuple(read_metrics(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / 'metrics.jsonl'} is damaged: {error}") from None


def _result(file: Path) -> tuple[EvaluationResult, dict[str, Any]]:
    try:
        result = EvaluationResult.load(file)
        return result, result.to_dict()  # (its intervals are those that were saved: nothing is computed twice)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no evaluation {file}") from None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is damaged, or of an earlier version of gsem ({' '.join(str(error).split())}): evaluate again"
        ) from None


def _with_audit(entry: RunReport, subject: dict[str, str] | None, unmatched: list[str]) -> RunReport:
    """The latest audit of this network that made all checks; where there is none, the latest.

    Args:
        subject: the fingerprint of the network, where there is no evaluation of it.
        unmatched: what is not shown, and why; completed here.
    """
    audits = []
    if entry.result is not None:
        subject = entry.result.metadata.get("fingerprint", {})
    for file in _audits(entry.path):
        try:
            audit = Audit.load(file)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is damaged, or of another version of gsem ({error}): audit again") from None
        other = other_network(audit.metadata, subject)
        if other is None and entry.result is not None:
            other = other_question(audit.metadata, entry.result.metadata)
        if other is None:
            audits.append(audit)
        else:
            unmatched = [*unmatched, f"{file.name}: {other}"]
    chosen = [a for a in audits if not a.metadata.get("only")] or audits
    return replace(entry, audit=chosen[-1] if chosen else None, unmatched=tuple(unmatched))
