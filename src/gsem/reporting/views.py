"""The words and tables of a report: the verdict, the accuracies, the recipe, the cost."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gsem._text import between, duration, pixels
from gsem._text import percent as padded_percent
from gsem.auditing import Audit, Check
from gsem.reporting.read import RunReport, bare
from gsem.training.recipe import Recipe

# The fields of a recipe that a reader looks for first; all others are listed below them.
FIRST = ("name", "data", "model", "levels", "noise", "gradient", "objective", "steps", "eot", "draws", "epochs", "seed")
SIGNS = {"TRUSTED": "✓", "OVERSTATED": "✗", "SUSPECT": "!", "INVALID": "✗", "INCOMPLETE": "?", "": "?"}
SIGNS |= {"pass": "✓", "flag": "✗", "flag, answered": "!", "inconclusive": "?", "not applicable": "–"}
ORDER = {outcome: n for n, outcome in enumerate(("flag", "flag, answered", "inconclusive", "pass", "not applicable"))}
QUERIES = "persistent10"  # the accuracy against ten queries, as files name it
KNOWN_NOISE = {"frozen": "noise known", "off": "noise off"}


class Value(NamedTuple):
    """A value with its interval."""

    text: str
    interval: str


Cell = str | int | float | Value | None


@dataclass(frozen=True)
class Table:
    """A table of the page or of the data below a chart."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    strong: frozenset[int] = frozenset()
    """Numbers of the rows that are set off: the worst case, or values that differ between runs."""


def percent(share: float | None) -> str:
    """`72.2%`, or a dash."""
    return padded_percent(share).strip()


def compared(entries: Sequence[RunReport], rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """A column for each run; rows in which all are missing are left out, rows that differ are set off."""
    known = [(name, values) for name, values in rows if set(values) != {"–"}]
    differing = frozenset(i for i, (_, values) in enumerate(known) if len(set(values)) > 1)
    return Table(("", *(e.name for e in entries)), tuple((name, *values) for name, values in known), differing)


# --- the audit ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckView:
    """A check of the audit, ready to be printed."""

    check: Check
    figure: str
    reason: str
    command: str
    """The command that repeats this check."""


@dataclass(frozen=True)
class VerdictView:
    """The verdict on a run, ready to be printed."""

    word: str
    """The verdict of the audit; empty without an audit."""
    reason: str
    audited: str
    """Attacks, images and eps of the audit."""
    command: str
    """The command that repeats the audit, or makes one."""
    found: str = ""
    """The lowest accuracy that the audit found, and the attacks that reach it; empty where it ran no attack."""
    found_command: str = ""
    """The command that reaches it."""
    checks: tuple[CheckView, ...] = ()


def verdict(entry: RunReport) -> VerdictView:
    """The verdict on a run, or that there is none and how to get it."""
    audit = entry.audit
    if audit is None:
        others = any(line.startswith("audit") for line in entry.unmatched)
        none = "No audit here belongs to these accuracies." if others else "No audit was made."
        return VerdictView("", f"{none} A masked gradient would not have been noticed.", "", _audit_command(entry))
    command = _command(audit.metadata.get("command"), entry)
    checks = tuple(
        CheckView(c, _figure(c), sentence(c.reason), f"{command} --only {shlex.quote(c.name)}")
        for c in sorted(audit.checks, key=lambda c: ORDER.get(c.outcome_in_words, 0))
    )
    return VerdictView(
        audit.verdict,
        audit.reason,
        _audited(audit.metadata),
        command,
        _found(audit),
        "" if audit.found_command is None else _bared(audit.found_command),
        checks,
    )


def _found(audit: Audit) -> str:
    found, attacks = audit.found, audit.metadata.get("reached_by")
    if found is None:
        return ""
    by = f" by {', '.join(str(attacks).split(','))}" if attacks else ""
    return f"{percent(found.mean)} ({between(found.low, found.high)}){by}"


def _figure(check: Check) -> str:
    return "–" if check.figure is None else f"{check.figure:.3f}"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    if not text:
        return ""
    # (A label of an attack, like apgd50-eot5, stays as it is.)
    begins = text[:1].upper() + text[1:] if text.split()[0].isalpha() else text
    return begins + ("" if text.endswith((".", "!", "?")) else ".")


def _command(recorded: Any, entry: RunReport) -> str:
    """The recorded command, its absolute paths without their folders."""
    if not isinstance(recorded, str) or not recorded:
        return _audit_command(entry)
    return _bared(recorded)


def _bared(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    return shlex.join(bare(word) for word in words)


def _audit_command(entry: RunReport) -> str:
    """The command that audits the accuracies: with their data, eps and norm where these are not the run's own."""
    words = ["gsem", "audit", entry.spec]
    metadata = {} if entry.result is None else entry.result.metadata
    data = entry.evaluated.get("data")
    if data and data != entry.recipe.get("data"):
        words += ["--data", bare(data)]
    if metadata.get("eps") and metadata["eps"] != entry.metadata.get("data", {}).get("eps"):
        words += ["--eps", pixels(metadata["eps"])]
    if metadata.get("norm", "Linf") != "Linf":
        words += ["--norm", metadata["norm"]]
    return shlex.join(words)


def _audited(metadata: dict[str, Any]) -> str:
    parts = [", ".join(map(str, metadata.get("attacks") or ()))]
    if metadata.get("images"):
        parts.append(f"{metadata['images']} images")
    if metadata.get("eps"):
        parts.append(f"eps = {pixels(metadata['eps'])} ({metadata.get('norm', 'Linf')})")
    if metadata.get("quick"):
        parts.append("quick form, with fewer steps, draws and queries")
    if metadata.get("only"):
        parts.append("some of the checks only")
    for key, name in (("clean", "clean"), ("claimed", "claimed"), ("found", "found")):
        found = metadata.get(key)
        if isinstance(found, dict) and "accuracy" in found:
            parts.append(f"{name} {percent(found['accuracy'])}")
    return "; ".join(part for part in parts if part)


def outcomes(entries: Sequence[RunReport]) -> Table:
    """The outcome of every check with its figure, for each run."""
    audits = [{} if e.audit is None else {c.name: c for c in e.audit.checks} for e in entries]
    names = list(dict.fromkeys(name for checks in audits for name in checks))
    table = compared(entries, [(name, [_outcome(checks.get(name)) for checks in audits]) for name in names])
    differing = (i for i, row in enumerate(table.rows) if len({str(cell).split()[0] for cell in row[1:]}) > 1)
    return replace(table, strong=frozenset(differing))


def _outcome(check: Check | None) -> str:
    if check is None:
        return "–"
    outcome = check.outcome_in_words
    return outcome if check.figure is None else f"{outcome} ({_figure(check)})"


# --- accuracies --------------------------------------------------------------------------------------------------


def accuracies(entry: RunReport) -> Table | None:
    """A row for each attack within eps and for the worst case; columns for each kind of accuracy."""
    if entry.summary is None or entry.result is None:
        return None
    rows = [r for r in entry.summary["attacks"] if r["bounded"]]
    fresh = [r for r in rows if r["noise"] == "fresh"]
    if not fresh:
        return None
    worst = entry.summary["worst"]
    noises = [noise for noise in KNOWN_NOISE if f"worst@{noise}" in worst]
    kinds = {"expected": "expected"}
    if entry.result.draws > 1:
        kinds |= {"vote": "vote of 11", QUERIES: "10 queries"}
    lines = [(r["attack"], r | {"expected": r}, _with_known_noise(rows, r["attack"])) for r in fresh]
    if len(fresh) > 1:
        known = {noise: worst[f"worst@{noise}"]["expected"] for noise in noises}
        lines.append(("worst case", worst["worst"], known))
    table = tuple(
        (name, *(_value(own.get(kind)) for kind in kinds), *(_value(known.get(noise)) for noise in noises))
        for name, own, known in lines
    )
    header = ("attack", *kinds.values(), *(KNOWN_NOISE[noise] for noise in noises))
    return Table(header, table, frozenset({len(fresh)} if len(fresh) > 1 else ()))


def _value(found: dict[str, Any] | None) -> Value:
    return Value("–", "") if not found else Value(percent(found["mean"]), between(found["low"], found["high"]))


def _with_known_noise(rows: list[dict[str, Any]], attack: str) -> dict[str, Any]:
    """The rows of the same attack with the noise frozen or off, whose labels differ in the number of draws."""
    stem = re.split("-eot|@", attack)[0]
    return {r["noise"]: r for r in rows if r["noise"] != "fresh" and re.split("-eot|@", r["attack"])[0] == stem}


def certified(entry: RunReport) -> Table | None:
    """Certified accuracy at each radius, beside the empirical accuracies of the same radius in L2."""
    found = entry.certification
    if found is None:
        return None
    empirical = _empirical_in_l2(entry)
    radii = {radius for radius, _ in found.table()} | empirical.keys()
    rows = tuple(
        (f"{radius:g}", _value(found.accuracy(radius)._asdict()), empirical.get(radius, _value(None)))
        for radius in sorted(radii)
    )
    return Table(("L2 radius", "certified (smoothed)", "attacked (not smoothed)"), rows)


def _empirical_in_l2(entry: RunReport) -> dict[float, Value]:
    """The evaluation's accuracy at radius 0, and in the worst case at its radius, where that is one in L2."""
    if entry.summary is None or entry.result is None:
        return {}
    clean = [row for row in entry.summary["attacks"] if row["attack"] == "clean"]
    found = {0.0: _value(clean[0])} if clean else {}
    if entry.result.metadata.get("norm") == "L2" and "worst" in entry.summary["worst"]:
        found[entry.result.metadata["eps"]] = _value(entry.summary["worst"]["worst"]["expected"])
    return found


def certification(entry: RunReport) -> str:
    """How the radii were certified, their mean, and the share of abstentions; as sentences."""
    found = entry.certification
    if found is None:
        return ""
    m = found.metadata
    sentences = [
        f"{len(found.y)} test images, sigma = {m['sigma']:g}, {m['n0']} draws that select and {m['n']} that estimate, "
        f"seed {m['seed']}.",
        f"Mean certified radius {found.mean_radius:.3f} (0 where the answer is wrong); abstained on "
        f"{percent(found.abstained)}. No radius above {found.largest_radius:.3f} can be certified by so many draws.",
        f"Each certificate is wrong with probability at most {m['alpha']:g}.",
    ]
    if m["stochastic"]:
        sentences.append("The smoothed classifier includes the model's own noise, drawn anew for every noisy image.")
    return " ".join(sentences)


def as_published(entry: RunReport) -> list[tuple[str, Value]]:
    """For each attack the accuracy that the released evaluation would have printed; stochastic models only."""
    result = entry.result
    if result is None or result.draws == 1 or not any(s.name == "clean" for s in result.scores):
        return []
    names = [s.name for s in result.scores if s.noise == "fresh" and s.bounded and s.name != "clean"]
    return [(name, _value(result.as_published(name)._asdict())) for name in names]


def unbounded(entry: RunReport) -> list[str]:
    """A sentence for each attack without a bound."""
    sentences = []
    for r in [] if entry.summary is None else entry.summary["attacks"]:
        if not r["bounded"]:
            median = r.get("median_l2_of_broken")
            distance = "" if median is None else f" at a median L2 distance of {median:.3g}"
            share = percent(r.get("broken"))
            sentences.append(f"{r['attack']} has no bound: it breaks {share}{distance}, which is no robust accuracy.")
    return sentences


def evaluated(entry: RunReport) -> str:
    """The images, radius, draws and machine of the evaluation, as a sentence."""
    if entry.result is None:
        return ""
    m = entry.result.metadata
    kinds = {"balanced": " (a fixed, class-balanced subset)", "first": " (the first ones)", "all": " (all)"}
    subset = kinds.get(entry.evaluated.get("subset", {}).get("kind"), "")
    parts = [f"{len(entry.result.y)} test images{subset}", f"eps = {pixels(m['eps'])} ({m.get('norm', 'Linf')})"]
    parts += [f"{m['draws']} scoring draws for each point" if m["draws"] > 1 else "deterministic, one draw"]
    parts += [f"seed {m['seed']}"]
    if m.get("torch"):
        parts.append(f"torch {m['torch']} on {m.get('machine', '')} {m.get('device', '')}".rstrip())
    return ", ".join(parts) + f". From {entry.file}."


# --- training and cost -------------------------------------------------------------------------------------------


def trained(entries: Sequence[RunReport]) -> Table:
    """The main fields of the recipes, the data, the machine and the versions."""

    def field(entry: RunReport, name: str) -> str:
        # A plain network has no GSeM, whatever its recipe holds.
        plain = not str(entry.recipe.get("model", "gsem-")).startswith("gsem-")
        return "–" if plain and name in ("levels", "noise", "gradient") else _text(entry.recipe.get(name))

    rows = [("recipe" if name == "name" else name, [field(e, name) for e in entries]) for name in FIRST]
    rows += [
        ("eps", [_training_eps(e) for e in entries]),
        ("classes", [str(len(e.classes) or "–") for e in entries]),
        ("machine", [_machine(e) for e in entries]),
        ("commit", [_text(e.metadata.get("commit"), "not recorded") for e in entries]),
    ]
    for name, key in (("training images", "training_images"), ("torch", "gsem_torch"), ("gsem", "gsem")):
        rows.append((name, [_text(e.metadata.get(key)) for e in entries]))
    return compared(entries, rows)


def other_fields(entries: Sequence[RunReport]) -> Table:
    """The other fields of the recipes."""
    names = dict.fromkeys(name for e in entries for name in e.recipe if name not in FIRST)
    return compared(entries, [(name, [_text(e.recipe.get(name), "none") for e in entries]) for name in names])


def _text(value: Any, none: str = "–") -> str:
    if value is None:
        return none
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return bare(f"{value:g}" if isinstance(value, float) else value)


def _training_eps(entry: RunReport) -> str:
    """The radius of the training attack: the recipe's, else the data's."""
    eps = entry.recipe.get("eps") or entry.metadata.get("data", {}).get("eps")
    return "–" if eps is None else pixels(eps)


def _machine(entry: RunReport) -> str:
    return " ".join(str(entry.metadata[key]) for key in ("machine", "device") if entry.metadata.get(key)) or "–"


def costs(entries: Sequence[RunReport]) -> Table:
    """Passes and time of training, evaluation, audit and pictures."""
    attacks = [_attack_costs(e) for e in entries]
    rows = [
        ("training time", [_seconds(e.metrics[-1].get("seconds") if e.metrics else None) for e in entries]),
        ("training passes/image", [_training_passes(e) for e in entries]),
    ]
    labels = dict.fromkeys(label for costs in attacks for label in costs)
    rows += [(label, [costs.get(label, "–") for costs in attacks]) for label in labels]
    rows += [
        ("evaluation, all attacks", [_seconds(_evaluation_seconds(e)) for e in entries]),
        ("audit", [_seconds(e.audit.metadata.get("seconds") if e.audit else None) for e in entries]),
        ("pictures of this report", [_seconds(e.pictures.seconds if e.pictures else None) for e in entries]),
    ]
    return compared(entries, rows)


def _attack_costs(entry: RunReport) -> dict[str, str]:
    if entry.summary is None or entry.result is None:
        return {}
    return {
        r[
            "attack"
        ]: f"{(r['forwards'] + r['gradients']) / len(entry.result.y):.0f} passes/image, {duration(r['seconds'])}"
        for r in entry.summary["attacks"]
        if r["noise"] == "fresh" and r["attack"] != "clean"
    }


def _evaluation_seconds(entry: RunReport) -> float | None:
    return None if entry.summary is None else sum(r["seconds"] for r in entry.summary["attacks"])


def _training_passes(entry: RunReport) -> str:
    try:
        attack, training = Recipe.from_dict(entry.recipe).passes
    except (ValueError, TypeError):  # of another version
        return "–"
    return f"{attack:g} attack, {training:g} training in each epoch" if entry.recipe else "–"


def _seconds(value: float | None) -> str:
    return "–" if value is None else duration(value)
