"""A run as JSON with the field names of RobustBench's model cards, and what those have no place for under `gsem`."""

from typing import Any

from gsem._text import pixels
from gsem.reporting.tables import bare
from gsem.reporting.views import RunReport


def card(entry: RunReport) -> dict[str, Any]:
    """RobustBench's fields as its cards write them: accuracies in per cent as text, eps as a fraction.

    `autoattack_acc` is filled where AutoAttack was run, `reported` with the worst of all attacks; both are expected
    accuracies. `unreliable` is what the audit says: null where none was made. `link`, `authors` and `venue` are
    empty, for whoever publishes the card.
    """
    summary = entry.summary
    rows = {} if summary is None else {r["attack"]: r for r in summary["attacks"] if r["noise"] == "fresh"}
    worst = None if summary is None or "worst" not in summary["worst"] else summary["worst"]["worst"]["expected"]
    autoattack = next((r for name, r in rows.items() if name.startswith("autoattack") and r["bounded"]), None)
    eps = entry.eps
    return {
        "link": "",
        "name": entry.name,
        "authors": "",
        "additional_data": entry.recipe.get("extra_data") is not None,
        "number_forward_passes": 1,
        "dataset": bare(_about(entry).get("data") or entry.recipe.get("data", "")),
        "venue": "",
        "architecture": entry.metadata.get("model", {}).get("name", "") or bare(_about(entry).get("model", "")),
        "eps": None if eps is None else pixels(eps),
        "clean_acc": _percent(rows.get("clean")),
        "reported": _percent(worst),
        "autoattack_acc": _percent(autoattack),
        "footnote": _footnote(entry, autoattack),
        "unreliable": None if entry.audit is None else entry.audit.verdict != "TRUSTED",
        "gsem": _ours(entry),
    }


def _about(entry: RunReport) -> dict[str, Any]:
    about: dict[str, Any] = {} if entry.result is None else entry.result.metadata.get("about", {})
    return about


def _percent(row: dict[str, Any] | None) -> str | None:
    return None if row is None else f"{100 * row['mean']:.2f}"


def _footnote(entry: RunReport, autoattack: dict[str, Any] | None) -> str:
    if entry.result is None:
        return "Not evaluated."
    told = [f"On {len(entry.result.y)} test images."]
    if entry.result.draws > 1:
        told.append(
            f"Stochastic: expected accuracies of one answer, on {entry.result.draws} draws that no attack has seen; "
            "RobustBench's own list takes deterministic models only."
        )
    if autoattack is None:
        told.append("AutoAttack was not run: `reported` is the worst of the attacks that were.")
    if entry.audit is None:
        told.append("Not audited.")
    else:
        told.append(f"Audit: {entry.audit.verdict}. {entry.audit.reason}")
    told += [f"Not used: {line}." for line in entry.unmatched]
    return " ".join(told)


def _ours(entry: RunReport) -> dict[str, Any]:
    audit, result = entry.audit, entry.result
    metadata = {} if result is None else {k: v for k, v in result.metadata.items() if k != "about"}
    return {
        "verdict": None if audit is None else audit.verdict,
        "reason": None if audit is None else audit.reason,
        "checks": []
        if audit is None
        else [{"name": c.name, "figure": c.figure, "outcome": c.outcome} for c in audit.checks],
        "evaluation": metadata,
        "not_used": list(entry.unmatched),
        "attacks": [] if entry.summary is None else entry.summary["attacks"],
        "worst": {} if entry.summary is None else entry.summary["worst"],
        "recipe": {key: bare(v) if isinstance(v, str) else v for key, v in entry.recipe.items()},
    }
