"""No attack breaks less than pyautoattack's, alone, on a network where each has images that only it breaks.

The sets of broken images are kept in strength.npz, which strength.py makes.
"""

from functools import partial

import pytest
import torch

from gsem.attacks import apgd, autoattack, fab, square
from strength import EPS, PARTS, QUERIES, STEPS, load, wrong

OURS = {
    "apgd-ce": partial(apgd, steps=STEPS),
    "apgd-t": partial(apgd, steps=STEPS, targets=9),
    "fab-t": partial(fab, steps=STEPS, targets=9),
    "square": partial(square, queries=QUERIES),
}


@pytest.fixture(scope="module")
def kept():
    return load()


def test_the_kept_sets_tell_the_attacks_apart(kept):
    model, x, y, broken = kept
    assert len(x) >= 200 and not wrong(model, x, y).any()
    assert all(40 <= int(which.sum()) <= 150 for which in broken.values())
    gradient = broken["apgd-ce"] | broken["apgd-t"]
    assert int((broken["fab-t"] & ~gradient).sum()) >= 5
    assert int((broken["square"] & ~gradient).sum()) >= 5
    assert int((broken["fab-t"] & ~gradient & ~broken["square"]).sum()) >= 3


@pytest.mark.parametrize("part", PARTS)
def test_an_attack_alone_breaks_what_the_reference_breaks(kept, part):
    """As many images, and the same ones but for luck.

    On such a landscape a path depends on its random start: with another seed the reference's own APGD-CE misses 7
    of the 43 images that it broke with the first, APGD-T 5 of 45, Square 3 of 53. So the number may fall short by
    1% of the images, and the images missed get two more seeds, after which 97% of the reference's set must be
    reached. (FAB's first start is the image: it has one path, whatever the seed.)
    """
    model, x, y, broken = kept
    theirs = broken[part]
    reached = wrong(model, OURS[part](model, x, y, eps=EPS, seed=0), y)
    assert int(reached.sum()) >= int(theirs.sum()) - 0.01 * len(x)
    for seed in (1, 2):
        missed = (theirs & ~reached).nonzero()[:, 0]
        if len(missed):
            reached[missed] = wrong(model, OURS[part](model, x[missed], y[missed], eps=EPS, seed=seed), y[missed])
    assert int((theirs & reached).sum()) >= 0.97 * int(theirs.sum()), (theirs & ~reached).nonzero()[:, 0].tolist()


def test_the_ensemble_reaches_what_any_reference_reaches(kept):
    model, x, y, broken = kept
    any_ = torch.stack(list(broken.values())).any(0)
    x, y = x[any_], y[any_]
    stages: list[tuple[str, int]] = []
    how = {"eps": EPS, "steps": STEPS, "queries": QUERIES, "on_progress": lambda *news: stages.append(news)}
    reached = wrong(model, autoattack(model, x, y, **how), y)
    assert int((~reached).sum()) <= 1, any_.nonzero()[:, 0][~reached].tolist()
    # What gradient signs cannot reach is left to the later parts, and they reach it.
    remaining = [left for _, left in stages]
    assert remaining[1] > 5 > remaining[-1]
