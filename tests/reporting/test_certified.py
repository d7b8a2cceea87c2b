"""A certification beside the empirical accuracies: in the page, in Markdown and in the card."""

import json
from dataclasses import replace

import numpy as np
import pytest

from gsem.evaluation.certify import CertificationResult
from gsem.reporting import cards, html, markdown, read_runs
from gsem.reporting.views import certification, certified
from planted_run import planted_fingerprint, planted_result, planted_run


def planted_certification(**change) -> CertificationResult:
    """Ten images: six right with radii 0.1 … 0.6, two wrong, two abstentions."""
    radius = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0, 0])
    predicted = np.array([0, 1, 2, 3, 4, 5, 0, 0, -1, -1])
    metadata = {
        "images": 10,
        "fingerprint": planted_fingerprint(),
        "sigma": 0.25,
        "n0": 100,
        "n": 1000,
        "alpha": 0.001,
        "seed": 3,
        "stochastic": True,
        "about": {"model": "/home/somebody/run"},
    }
    y = np.arange(10)
    return CertificationResult(predicted, np.full(10, 900), radius, y, y, metadata | change)


@pytest.fixture
def run(tmp_path):
    run = planted_run(tmp_path / "planted")
    planted_certification().save(run / "certification")
    return run


def cells(table) -> dict[str, tuple[str, str]]:
    return {radius: (found.text, empirical.text) for radius, found, empirical in table.rows}


def test_the_table_counts_what_is_right_within_each_radius(run):
    entry = read_runs([run])[0]
    assert cells(certified(entry)) == {
        "0": ("60.0%", "95.0%"),
        "0.125": ("50.0%", "–"),
        "0.25": ("40.0%", "–"),
        "0.375": ("30.0%", "–"),
        "0.5": ("20.0%", "–"),
    }
    text = certification(entry)
    assert "Mean certified radius 0.210" in text and "abstained on 20.0%" in text and "own noise" in text
    page, markdowned, card = html([entry]), markdown([entry]), json.loads(cards([entry]))["gsem"]["certified"]
    for shown in (page, markdowned):
        assert "Certified by randomised smoothing" in shown and "Mean certified radius 0.210" in shown
    assert "Certified accuracy against the L2 radius" in page
    assert card["mean_radius"] == pytest.approx(0.21) and card["certified"][1]["mean"] == 0.5
    assert "somebody" not in json.dumps(card) + page


def test_an_evaluation_in_l2_is_beside_its_radius(run):
    result = planted_result()
    replace(result, metadata=result.metadata | {"norm": "L2", "eps": 0.2}).save(run / "evaluation")
    found = cells(certified(read_runs([run])[0]))
    assert found["0.2"] == ("50.0%", "45.0%") and found["0"][1] == "95.0%"


def test_a_certification_of_another_network_or_an_unfinished_one_is_named(run):
    planted_certification(fingerprint={"structure": "a", "weights": "b"}).save(run / "certification-2")
    planted_certification(images=20).save(run / "certification-3")
    (run / "certification-4.json").write_text("{}")
    entry = read_runs([run])[0]
    assert entry.certification is not None and entry.certification.metadata["seed"] == 3  # the first file
    reasons = {line.partition(":")[0] for line in entry.unmatched}
    assert reasons >= {f"certification-{n}.json" for n in (2, 3, 4)}
    (run / "certification.json").unlink()
    assert certified(read_runs([run])[0]) is None
