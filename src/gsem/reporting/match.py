"""Which evaluation and which audit belong together: those of one network, at one radius, on one data set."""

from collections.abc import Mapping
from typing import Any

from gsem._fingerprint import same_model
from gsem._text import pixels
from gsem.reporting.tables import bare

Facts = Mapping[str, Any]


def other_network(metadata: Facts, subject: Mapping[str, str] | None) -> str | None:
    """Why this metadata is not of the network `subject` (a fingerprint); None where it is.

    Args:
        metadata: of an evaluation or an audit.
        subject: None where there is nothing to compare with; {} of an evaluation that does not say what it is of.
    """
    found = metadata.get("fingerprint")
    if subject is None or same_model(found, subject):
        return None
    if not subject:
        return "whether it is of the evaluated network is not known (an earlier version of gsem evaluated it)"
    if not found:
        return "it does not say which network it is of (it was made by an earlier version of gsem)"
    named = metadata.get("about", metadata).get("model")
    name = f" ({bare(named)})" if named else ""
    if found.get("structure") == subject.get("structure"):
        return f"it is of other weights{name}"
    if found.get("weights") == subject.get("weights"):
        return f"it is of the same weights in another network, or with another setting{name}"
    return f"it is of another network{name}"


def other_question(audit: Facts, evaluation: Facts) -> str | None:
    """Why an audit of the same network does not judge the evaluation's accuracies; None where it does.

    It may be of other images of the same data set, and of other attacks.
    """
    then, now = ((f.get("eps", 0.0), f.get("norm", "Linf")) for f in (audit, evaluation))
    if "eps" in audit and then != now:
        radii = [f"eps = {pixels(eps)} ({norm})" for eps, norm in (then, now)]
        return f"it was made at {radii[0]}, the evaluation at {radii[1]}"
    one, other = audit.get("test_set"), evaluation.get("about", {}).get("test_set")
    if one and other and one != other:
        return f"it was made on other data ({bare(audit.get('data', ''))})"
    return None
