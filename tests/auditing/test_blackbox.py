"""Black-box attacks are flagged where they break more than chance explains."""

import pytest
import scipy.stats
import torch
from torch import nn

import gsem
from audited_models import digits, mlp
from gsem.auditing.blackbox import most_by_chance


class Hiding(nn.Module):
    """A network that has no gradient near the first few images, and is whole everywhere else."""

    def __init__(self, network: nn.Module, x: torch.Tensor, hidden: int):
        super().__init__()
        self.network, self.x, self.hidden = network, x, hidden

    def forward(self, x):
        nearest = torch.cdist(x.detach().flatten(1), self.x.flatten(1)).argmin(1)
        return self.network(torch.where((nearest < self.hidden)[:, None, None, None], x.detach(), x))


@pytest.mark.parametrize(("hidden", "outcome"), [(1, "pass"), (2, "pass"), (3, "flag")])
def test_a_black_box_flags_beyond_what_chance_explains(hidden: int, outcome: str):
    """2 of 100 images may be chance. The white box breaks all but the planted images of a fragile network."""
    x, y = digits()
    network = mlp()
    order = (network(x).argmax(1) != y).int().argsort(stable=True)  # those that are right first
    x, y = x[order], y[order]
    how = {"eps": 0.3, "quick": True, "only": ["blackbox"]}
    audit = gsem.audit(Hiding(network, x, hidden), x, y, "apgd:steps=20", **how)
    check = audit["blackbox"]
    assert (check.outcome, check.figure) == (outcome, hidden / 100)
    assert ("up to 2 may be chance" in check.reason) == (outcome == "pass")
    # Whether flagged or not, what was broken counts.
    assert audit.claimed.mean == pytest.approx(hidden / 100) and audit.found.mean == 0


@pytest.mark.parametrize("images", [1, 20, 100, 128, 500, 10_000])
def test_what_chance_explains_is_a_binomial_bound(images: int):
    count = most_by_chance(images)
    assert scipy.stats.binom.sf(count, images, 0.003) <= 0.025 < scipy.stats.binom.sf(count - 1, images, 0.003)
