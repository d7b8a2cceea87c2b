"""Accuracies by corruption and severity, against counts made by hand."""

import json

import pytest
import torch
from torch import nn

from gsem.data import Split
from gsem.evaluation.corruptions import CorruptionResult, evaluate_corruptions


class Brightness(nn.Module):
    """Class 1 where an image's mean is above one half."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


class Coin(Brightness):
    """`Brightness` that answers at random in a quarter of the draws the other way round."""

    def forward(self, x):
        logits = super().forward(x)
        return torch.where(torch.rand(len(x), 1) < 0.25, -logits, logits)


def cell(right: int, n: int = 8) -> Split:
    """Bright images, of which `right` have label 1."""
    x = torch.full((n, 1, 4, 4), 200, dtype=torch.uint8)
    return Split(x, (torch.arange(n) < right).long())


CORRUPTIONS = {("fog", 1): cell(8), ("fog", 2): cell(4), ("saturate", 1): cell(1), ("snow", 1): cell(6)}


def test_accuracies_and_means_are_counted():
    result = evaluate_corruptions(Brightness(), CORRUPTIONS)
    assert [c.accuracy for c in result.cells] == [1.0, 0.5, 0.125, 0.75]
    assert result.by_corruption() == {"fog": 0.75, "saturate": 0.125, "snow": 0.75}
    assert result.mean == 0.75  # saturate is no part of the usual mean
    assert CorruptionResult(result.cells[2:3], {}).mean == 0.125
    half = result.cells[1]
    assert half.low == pytest.approx(0.2152, abs=1e-4) and half.high == pytest.approx(0.7848, abs=1e-4)
    assert (result.cells[0].high, result.cells[0].low) == (1.0, pytest.approx(0.6756, abs=1e-4))
    assert result.metadata["draws"] == 1 and not result.metadata["stochastic"]
    lines = repr(result).splitlines()
    assert lines[0].split() == ["corruption", "1", "2", "mean"]
    assert lines[1].split() == ["fog", "100.0%", "50.0%", "75.0%"]
    assert lines[4].split() == ["mean", "87.5%", "50.0%", "75.0%"]


def test_of_a_stochastic_model_accuracy_is_expected_over_draws():
    result = evaluate_corruptions(Coin(), {("fog", 1): cell(128, 128)}, draws=40)
    assert result.metadata["draws"] == 40
    assert result.mean == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / 5120) ** 0.5)
    again = evaluate_corruptions(Coin(), {("fog", 1): cell(128, 128)}, draws=40)
    assert again.mean == result.mean
    assert evaluate_corruptions(Coin(), {("fog", 1): cell(128, 128)}, draws=40, seed=1).mean != result.mean


def test_a_subset_is_balanced_and_the_batch_does_not_matter():
    result = evaluate_corruptions(Brightness(), CORRUPTIONS, images=2, batch_size=1)
    assert [c.accuracy for c in result.cells] == [1.0, 0.5, 0.5, 0.5] and result.cells[0].images == 2


def test_an_interrupted_evaluation_is_completed_and_another_is_not_overwritten(tmp_path):
    file, seen = tmp_path / "c.json", []

    def stop(found):
        seen.append(found)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_corruptions(Brightness(), CORRUPTIONS, save=file, on_progress=stop)
    result = evaluate_corruptions(
        Brightness(), CORRUPTIONS, save=file, about={"model_spec": "x"}, on_progress=seen.append
    )
    assert [c[:2] for c in seen] == list(CORRUPTIONS)  # none twice
    assert result.cells == evaluate_corruptions(Brightness(), CORRUPTIONS).cells
    written = json.loads(file.read_text())
    assert written["mean_corruption_accuracy"] == result.mean and len(written["cells"]) == 4
    assert written["metadata"]["model_spec"] == "x"
    with pytest.raises(ValueError, match=r"c\.json holds a different evaluation \(different seed\)"):
        evaluate_corruptions(Brightness(), CORRUPTIONS, save=file, seed=1)
    file.write_text("{}")
    with pytest.raises(ValueError, match="no accuracies under corruptions"):
        evaluate_corruptions(Brightness(), CORRUPTIONS, save=file)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="there are no corruptions"):
        evaluate_corruptions(Brightness(), {})
    with pytest.raises(ValueError, match="draws must be at least 1, not 0"):
        evaluate_corruptions(Brightness(), CORRUPTIONS, draws=0)
