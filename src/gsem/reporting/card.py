"""A run as JSON with the field names of RobustBench's model cards, and what those lack under `gsem`."""

from typing import Any

from gsem._text import pixels
from gsem.evaluation.certify import CertificationResult
from gsem.reporting.read import RunReport, bare


def card(entry: RunReport) -> dict[str, Any]:
    """RobustBench's fields in the form of its cards: accuracies in per cent as text, eps as a fraction.

    `reported` is the worst case over the evaluation's attacks; `autoattack_acc` is null where AutoAttack was not run.
    Both are expected accuracies. `unreliable` is true unless the audit's verdict is TRUSTED, and null without an audit.
    `link`, `authors` and `venue` are empty: the publisher of the card fills them in.
    """
    summary = entry.summary or {"attacks": [], "worst": {}}
    rows = {r["attack"]: r for r in summary["attacks"] if r["noise"] == "fresh"}
    autoattack = next((r for name, r in rows.items() if name.startswith("autoattack") and r["bounded"]), None)
    audit, eps = entry.audit, entry.eps
    metadata = {} if entry.result is None else entry.result.metadata
    return {
        "link": "",
        "name": entry.name,
        "authors": "",
        "additional_data": entry.recipe.get("extra_data") is not None,
        "number_forward_passes": 1,
        "dataset": bare(entry.evaluated.get("data") or entry.recipe.get("data", "")),
        "venue": "",
        "architecture": entry.metadata.get("model", {}).get("name", "") or bare(entry.evaluated.get("model", "")),
        "eps": None if eps is None else pixels(eps),
        "clean_acc": _percent(rows.get("clean")),
        "reported": _percent(summary["worst"].get("worst", {}).get("expected")),
        "autoattack_acc": _percent(autoattack),
        "footnote": _footnote(entry, autoattack),
        "unreliable": None if audit is None else audit.verdict != "TRUSTED",
        "gsem": {
            "verdict": None if audit is None else audit.verdict,
            "reason": None if audit is None else audit.reason,
            **{key: None if audit is None else audit.metadata.get(key) for key in ("claimed", "found", "reached_by")},
            "checks": [
                {"name": c.name, "figure": c.figure, "outcome": c.outcome_in_words}
                for c in ([] if audit is None else audit.checks)
            ],
            "evaluation": {key: value for key, value in metadata.items() if key != "about"},
            "certified": None if entry.certification is None else _certified(entry.certification),
            "not_used": list(entry.unmatched),
            "attacks": summary["attacks"],
            "worst": summary["worst"],
            "recipe": {key: bare(v) if isinstance(v, str) else v for key, v in entry.recipe.items()},
        },
    }


def _certified(found: CertificationResult) -> dict[str, Any]:
    """The summary of a certification, without its images."""
    summary = {key: value for key, value in found.to_dict().items() if key != "images"}
    return summary | {"metadata": {key: value for key, value in found.metadata.items() if key != "about"}}


def _percent(accuracy: dict[str, Any] | None) -> str | None:
    return None if accuracy is None else f"{100 * accuracy['mean']:.2f}"


def _footnote(entry: RunReport, autoattack: dict[str, Any] | None) -> str:
    if entry.result is None:
        return "Not evaluated."
    sentences = [f"On {len(entry.result.y)} test images."]
    if entry.result.draws > 1:
        sentences.append(
            f"Stochastic model: expected accuracies of one prediction, on {entry.result.draws} draws that no attack "
            "used. RobustBench's own list takes deterministic models only."
        )
    if autoattack is None:
        sentences.append("AutoAttack was not run: `reported` is the worst case over the attacks that were.")
    if entry.audit is None:
        sentences.append("Not audited.")
    else:
        sentences.append(f"Audit: {entry.audit.verdict}. {entry.audit.reason}")
    return " ".join([*sentences, *(f"Not used: {line}." for line in entry.unmatched)])
