"""The ensemble: its parts, their order and budgets, and what it finds beside pyautoattack."""

import pytest
import torch
from pyautoattack import AutoAttack

import gsem
from gsem.attacks import apgd, autoattack, counting, fab, square
from gsem.attacks.autoattack import parts


def wrong(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) != y


def budget(attack) -> tuple:
    return attack.func.__name__, dict(attack.keywords)


def test_the_parts_have_the_references_order_and_budgets():
    standard = [budget(attack) for _, attack in parts("standard", 10)]
    assert standard == [
        ("apgd", {"steps": 100, "restarts": 1}),
        ("apgd", {"steps": 100, "targets": 9}),
        ("fab", {"steps": 100, "targets": 9}),
        ("square", {"queries": 5000}),
    ]
    assert [budget(attack) for _, attack in parts("rand", 10)] == [
        ("apgd", {"steps": 100, "restarts": 1}),
        ("apgd", {"steps": 100, "restarts": 1, "loss": "dlr"}),
    ]
    plus = [budget(attack) for _, attack in parts("plus", 100)]
    assert plus[:3] == [
        ("apgd", {"steps": 100, "restarts": 5}),
        ("apgd", {"steps": 100, "loss": "dlr", "restarts": 5}),
        ("fab", {"steps": 100, "restarts": 5}),
    ]
    assert plus[3:] == [standard[3], standard[1], standard[2]]
    assert [name for name, _ in parts("standard", 10)] == ["apgd-ce100", "apgd-t100", "fab-t100", "square5000"]


def test_with_few_classes_losses_and_targets_give_way():
    assert [budget(attack)[1] for _, attack in parts("rand", 2)][1]["loss"] == "margin"
    assert [budget(attack)[1] for _, attack in parts("standard", 3)][1]["targets"] == 2


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5)])
def test_it_ends_no_higher_than_the_reference(attacked, norm, eps):
    """Shorter than the standard, both sides alike."""
    model, x, y = attacked
    counted = counting(model)
    stages = []
    x_adv = autoattack(
        counted, x, y, eps=eps, norm=norm, steps=20, queries=300, on_progress=lambda *news: stages.append(news)
    )
    reference = counting(model)
    peer = AutoAttack(reference, norm=norm, eps=eps, seed=0, device="cpu")
    peer.apgd.n_iter = peer.apgd_targeted.n_iter = peer.fab.n_iter = 20
    peer.square.n_queries = 300
    theirs = wrong(model, peer.run_standard_evaluation(x, y, batch_size=200)[0], y)
    ours = wrong(model, x_adv, y)
    assert 0.2 < theirs.double().mean() < 0.95
    assert ours.double().mean() >= theirs.double().mean() - 0.01
    # Remaining images cost every step on both sides; ours are dearer in FAB's second pass where it has crossed.
    assert counted.forwards + 2 * counted.gradients < 1.15 * (reference.forwards + 2 * reference.gradients)
    remaining = [left for _, left in stages]
    assert remaining == sorted(remaining, reverse=True) and remaining[-1] == int((~ours).sum())


def test_each_part_works_on_what_the_former_left(attacked):
    model, x, y = attacked
    how = {"eps": 0.1}
    first = wrong(model, apgd(model, x, y, **how, steps=10), y)
    stages: list[tuple[str, int]] = []
    autoattack(model, x, y, **how, steps=10, queries=50, on_progress=lambda *news: stages.append(news))
    assert [name for name, _ in stages] == ["apgd-ce10", "apgd-t10", "fab-t10", "square50"]
    assert abs(stages[0][1] - int((~first).sum())) <= 3  # (its random start is another)
    for attack in (fab, square):
        assert attack in {a.func for _, a in parts("standard", 10)}


def test_batches_are_regrouped_and_the_result_stays_in_the_ball(attacked):
    model, x, y = attacked
    x_adv = autoattack(model, x, y, eps=0.1, steps=5, queries=20, batch_size=32)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    whole = autoattack(model, x, y, eps=0.1, steps=5, queries=20)
    assert abs(int(wrong(model, x_adv, y).sum()) - int(wrong(model, whole, y).sum())) <= 4


def test_more_draws_come_after_few():
    torch.manual_seed(2)
    model = gsem.create_model("gsem-resnet10x16", in_channels=1).eval()
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    stages: list[str] = []
    with torch.no_grad():
        y = torch.stack([model(x) for _ in range(20)]).mean(0).argmax(1)
    before = torch.get_rng_state()
    x_adv = autoattack(
        model, x, y, eps=0.003, version="rand", steps=2, eot=6, on_progress=lambda name, left: stages.append(name)
    )
    assert stages == ["apgd-ce2", "apgd-dlr2"] * 2
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x_adv, autoattack(model, x, y, eps=0.003, version="rand", steps=2, eot=6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "custom"}, "version 'custom' is unknown: it is 'standard', 'plus' or 'rand'"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_what_it_refuses(attacked, change, message):
    model, x, y = attacked
    with pytest.raises(ValueError, match=message):
        autoattack(model, x, y, **({"eps": 0.1} | change))
