"""The sentences and tables of a report, for the page and the Markdown."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsem._text import duration, pixels
from gsem.auditing import Check
from gsem.reporting.figure import interval, percent
from gsem.reporting.views import RunReport
from gsem.training.recipe import Recipe

# The fields of a recipe that a reader asks for first; all others are listed below them.
FIRST = ("name", "data", "model", "levels", "noise", "gradient", "objective", "steps", "eot", "draws", "epochs", "seed")
SIGNS = {"TRUSTED": "✓", "SUSPECT": "!", "INVALID": "✗", "": "?"}
ORDER = {"flag": 0, "inconclusive": 1, "pass": 2}


@dataclass(frozen=True)
class VerdictView:
    """The verdict on a run, ready to be printed."""

    word: str
    """TRUSTED, SUSPECT, INVALID; empty where no audit was made."""
    sign: str
    reason: str
    asked: str
    """On what: attacks, images, eps."""
    command: str
    checks: tuple["CheckView", ...]


@dataclass(frozen=True)
class CheckView:
    """A check of the audit, ready to be printed."""

    check: Check
    figure: str
    reason: str
    """Of the check, as a sentence."""
    command: str
    """What repeats it."""


def judged(entry: RunReport) -> VerdictView:
    """The verdict on a run, or that there is none and how to get it."""
    a = entry.audit
    if a is None:
        left_out = any(line.startswith("audit") for line in entry.unmatched)
        none = "No audit here is of these accuracies." if left_out else "No audit was made."
        reason = f"{none} Whether the accuracies are real was not asked: a masked gradient would not have been noticed."
        return VerdictView("", SIGNS[""], reason, "", _audit_command(entry), ())
    command = _command(a.metadata.get("command"), entry)
    checks = tuple(
        CheckView(
            c,
            "–" if c.figure is None else f"{c.figure:.3f}",
            sentence(c.reason),
            f"{command} --only {shlex.quote(c.name)}",
        )
        for c in sorted(a.checks, key=lambda c: ORDER.get(c.outcome, 0))
    )
    return VerdictView(a.verdict, SIGNS.get(a.verdict, "?"), a.reason, _asked(a.metadata), command, checks)


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    if not text:
        return ""
    # (A label of an attack, like apgd50-eot5, stays as it is.)
    begins = text[:1].upper() + text[1:] if text.split()[0].isalpha() else text
    return begins + ("" if text.endswith((".", "!", "?")) else ".")


def _command(told: Any, entry: RunReport) -> str:
    """As it was given; of what lies elsewhere on the machine that made it, the last part of the path."""
    if not isinstance(told, str) or not told:
        return _audit_command(entry)
    try:
        words = shlex.split(told)
    except ValueError:
        return told
    return shlex.join(bare(word) for word in words)


def _audit_command(entry: RunReport) -> str:
    """What audits the accuracies of the entry: with its data, eps and norm, where they are not the run's own."""
    words = ["gsem", "audit", entry.spec]
    metadata = {} if entry.result is None else entry.result.metadata
    about, own = metadata.get("about", {}), entry.metadata.get("data", {}).get("eps")
    if about.get("data") and about["data"] != entry.recipe.get("data"):
        words += ["--data", bare(about["data"])]
    if metadata.get("eps") and metadata["eps"] != own:
        words += ["--eps", pixels(metadata["eps"])]
    if metadata.get("norm", "Linf") != "Linf":
        words += ["--norm", metadata["norm"]]
    return shlex.join(words)


def bare(word: Any) -> str:
    """A path that is not relative says where things lie on one machine only: its last part."""
    text = str(word)
    return Path(text).name if text.startswith(("/", "~")) else text


def _asked(metadata: dict[str, Any]) -> str:
    parts = []
    if metadata.get("quick"):
        parts.append("the quick form, with fewer steps, draws and queries")
    if metadata.get("only"):
        parts.append("some of the checks only")
    if metadata.get("attacks"):
        parts.append("attacks " + ", ".join(map(str, metadata["attacks"])))
    if metadata.get("images"):
        parts.append(f"{metadata['images']} images")
    if metadata.get("eps"):
        parts.append(f"eps = {pixels(metadata['eps'])} ({metadata.get('norm', 'Linf')})")
    for key, told in (("clean", "clean"), ("attacked", "under these attacks"), ("lowest", "lowest found")):
        found = metadata.get(key)
        if isinstance(found, dict) and "accuracy" in found:
            parts.append(f"{told} {percent(found['accuracy'])}")
    return "; ".join(parts)


def outcomes(entries: Sequence[RunReport]) -> list[tuple[str, list[str], bool]]:
    """Every check of several runs side by side: name, outcome and figure of each run, whether they differ."""
    audits = [{} if e.audit is None else {c.name: c for c in e.audit.checks} for e in entries]
    names = list(dict.fromkeys(name for checks in audits for name in checks))
    rows = [(name, [checks[name].outcome if name in checks else "–" for checks in audits]) for name in names]
    return [(name, [_outcome(checks.get(name)) for checks in audits], len(set(words)) > 1) for name, words in rows]


def _outcome(check: Check | None) -> str:
    if check is None:
        return "–"
    return check.outcome if check.figure is None else f"{check.outcome} ({check.figure:.3f})"


# --- accuracies ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """A row of the table of accuracies."""

    name: str
    cells: tuple[tuple[str, str, str], ...]
    """For each column: its heading, the value, and its interval (empty where there is none)."""
    worst: bool = False


def accuracies(entry: RunReport) -> list[Accuracy]:
    """A row for each attack within eps, and the worst case; with the noise known, beside it."""
    if entry.summary is None:
        return []
    rows = [r for r in entry.summary["attacks"] if r["bounded"]]
    fresh = [r for r in rows if r["noise"] == "fresh"]
    table = [_row(entry, r["attack"], r, _same(rows, r["attack"])) for r in fresh]
    if len(fresh) > 1:
        worst = entry.summary["worst"]
        known = {mode: worst[f"worst@{mode}"]["expected"] for mode in ("frozen", "off") if f"worst@{mode}" in worst}
        table.append(_row(entry, "worst", worst["worst"] | worst["worst"]["expected"], known, worst=True))
    return table


def _same(rows: list[dict[str, Any]], attack: str) -> dict[str, Any]:
    """The same attack with the noise known. Its draws differ (one is enough), so the label does too."""
    plain = re.split("-eot|@", attack)[0]
    return {r["noise"]: r for r in rows if r["noise"] != "fresh" and re.split("-eot|@", r["attack"])[0] == plain}


def _row(entry: RunReport, name: str, r: dict[str, Any], known: dict[str, Any], *, worst: bool = False) -> Accuracy:
    assert entry.result is not None and entry.summary is not None
    cells = [("expected", percent(r["mean"]), interval(r))]
    if entry.result.draws > 1:
        for key, heading in (("vote", "vote of 11"), ("persistent10", "sent ×10")):
            found = r.get(key)
            cells.append((heading, percent(found and found["mean"]), interval(found) if found else ""))
    for noise, heading in (("frozen", "noise known"), ("off", "noise off")):
        if f"worst@{noise}" in entry.summary["worst"]:
            found = known.get(noise)
            cells.append((heading, percent(found and found["mean"]), interval(found) if found else ""))
    return Accuracy(name, tuple(cells), worst)


def as_published(entry: RunReport) -> list[tuple[str, str, str]]:
    """Attack, accuracy and interval as the released evaluation would have printed them; of noisy models only."""
    result = entry.result
    if result is None or result.draws == 1 or not any(s.name == "clean" for s in result.scores):
        return []
    found = [(s.name, result.as_published(s.name)) for s in result.scores if s.noise == "fresh" and s.bounded]
    return [(name, percent(one.mean), interval(one)) for name, one in found if name != "clean"]


def unbounded(entry: RunReport) -> list[str]:
    """A sentence for each attack without a bound."""
    rows = [] if entry.summary is None else [r for r in entry.summary["attacks"] if not r["bounded"]]
    told = []
    for r in rows:
        median = r.get("median_l2_of_broken")
        distance = "" if median is None else f" at a median L2 distance of {median:.3g}"
        told.append(
            f"{r['attack']} has no bound: it breaks {percent(r.get('broken'))}{distance}, which is no robust accuracy."
        )
    return told


def evaluated(entry: RunReport) -> str:
    """On what the accuracies were measured, a sentence."""
    if entry.result is None:
        return ""
    f = entry.result.metadata
    draws = f"{f['draws']} scoring draws for each point" if f["draws"] > 1 else "deterministic, one draw"
    parts = [f"{len(entry.result.y)} test images{_subset(f)}", f"eps = {pixels(f['eps'])} ({f.get('norm', 'Linf')})"]
    parts += [draws, f"seed {f['seed']}"]
    if f.get("torch"):
        parts.append(f"torch {f['torch']} on {f.get('machine', '')} {f.get('device', '')}".rstrip())
    return ", ".join(parts) + f". From {entry.file}."


def _subset(metadata: dict[str, Any]) -> str:
    kind = metadata.get("about", {}).get("subset", {}).get("kind")
    return {"balanced": " (a fixed, class-balanced subset)", "first": " (the first ones)", "all": " (all)"}.get(
        kind, ""
    )


# --- training and cost -----------------------------------------------------------------------------------------


def trained(entries: Sequence[RunReport]) -> list[tuple[str, list[str], bool]]:
    """What was trained: field, value of each run, whether they differ."""
    rows: list[tuple[str, list[str]]] = [(name, [_told(e.recipe.get(name)) for e in entries]) for name in FIRST]
    rows[0] = ("recipe", rows[0][1])
    plain = [not str(e.recipe.get("model", "gsem-")).startswith("gsem-") for e in entries]
    # What a GSeM has, a plain network has not, whatever its recipe says.
    own = ("levels", "noise", "gradient")
    rows = [
        (name, ["–" if no and name in own else v for no, v in zip(plain, values, strict=True)]) for name, values in rows
    ]
    rows += [
        ("eps", [_eps(e) for e in entries]),
        ("classes", [str(len(e.classes) or "–") for e in entries]),
        ("training images", [_told(e.metadata.get("training_images")) for e in entries]),
        ("machine", [_machine(e) for e in entries]),
        ("torch", [_told(e.metadata.get("gsem_torch")) for e in entries]),
        ("gsem", [_told(e.metadata.get("gsem")) for e in entries]),
        ("commit", [_told(e.metadata.get("commit"), "not recorded") for e in entries]),
    ]
    return [(name, values, len(set(values)) > 1) for name, values in rows if set(values) != {"–"}]


def rest(entries: Sequence[RunReport]) -> list[tuple[str, list[str], bool]]:
    """The other fields of the recipes."""
    names = list(dict.fromkeys(name for e in entries for name in e.recipe if name not in FIRST))
    rows = [(name, [_told(e.recipe.get(name)) for e in entries]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def _told(value: Any, none: str = "–") -> str:
    if value is None:
        return none
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return bare(f"{value:g}" if isinstance(value, float) else value)


def _eps(entry: RunReport) -> str:
    """That of the training attack: the data's own unless the recipe tells another."""
    eps = entry.recipe.get("eps") or entry.metadata.get("data", {}).get("eps")
    return "–" if eps is None else pixels(eps)


def _machine(entry: RunReport) -> str:
    return " ".join(str(entry.metadata[key]) for key in ("machine", "device") if entry.metadata.get(key)) or "–"


def costs(entries: Sequence[RunReport]) -> list[tuple[str, list[str], bool]]:
    """Passes and time of training, evaluation, audit and pictures: what, value of each run, whether they differ."""
    rows: list[tuple[str, list[str]]] = [
        ("training time", [_seconds(e.metrics[-1].get("seconds")) if e.metrics else "–" for e in entries]),
        ("passes per image and epoch", [_passes(e) for e in entries]),
    ]
    labels = list(dict.fromkeys(r["attack"] for e in entries if e.summary for r in _attacks(e)))
    rows += [(label, [_cost(e, label) for e in entries]) for label in labels]
    audits = [_seconds(e.audit.metadata.get("seconds")) if e.audit else "–" for e in entries]
    rows += [
        ("evaluation, all attacks", [_seconds(_total(e)) for e in entries]),
        ("audit", audits),
        ("pictures of this report", [_seconds(e.pictures.seconds if e.pictures else None) for e in entries]),
    ]
    return [(name, values, len(set(values)) > 1) for name, values in rows if set(values) != {"–"}]


def _attacks(entry: RunReport) -> list[dict[str, Any]]:
    rows = [] if entry.summary is None else entry.summary["attacks"]
    return [r for r in rows if r["noise"] == "fresh" and r["attack"] != "clean"]


def _total(entry: RunReport) -> float | None:
    return None if entry.summary is None else sum(r["seconds"] for r in entry.summary["attacks"])


def _cost(entry: RunReport, label: str) -> str:
    for r in _attacks(entry):
        if r["attack"] == label and entry.result is not None:
            passes = (r["forwards"] + r["gradients"]) / len(entry.result.y)
            return f"{passes:.0f} passes per image, {duration(r['seconds'])}"
    return "–"


def _passes(entry: RunReport) -> str:
    try:
        attack, training = Recipe.from_dict(entry.recipe).passes
    except (ValueError, TypeError):  # of another version
        return "–"
    return f"{attack:g} attack, {training:g} training" if entry.recipe else "–"


def _seconds(value: float | None) -> str:
    return "–" if value is None else duration(value)
