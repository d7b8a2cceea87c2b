"""The whole package on a pretended accelerator: nothing on the wrong device, and the numbers of the CPU."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gsem
from gsem.reporting.visuals import pictures
from pretend_device import DEVICE, pretended

ATTACKS = {
    "fgsm": {},
    "pgd": {"step": 0.03, "steps": 3, "keep": "best", "restarts": 2},
    "apgd": {"steps": 6, "restarts": 2},
    "fab": {"steps": 3, "restarts": 2},
    "square": {"queries": 12},
    "rays": {"queries": 12},
    "cw": {"steps": 4},
    "autoattack": {"steps": 1, "queries": 2},
}
# One step: later ones would carry what one level of the quantiser makes of rounding.
SMALL = {"epochs": 1, "rounds": 1, "steps": 2, "warmup": 0.0, "milestones": (), "batch_size": 128, "awp_warmup": 0.0,
         "model": "gsem-resnet10x16", "precision": "float32", "attack_precision": "float32"}  # fmt: skip


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return gsem.create_model(name, in_channels=1).eval()


def digits(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    test = gsem.data.load("digits").test()
    return gsem.data.to_float(test.x[:n]), test.y[:n]


@pytest.mark.filterwarnings("ignore:all logits")
@pytest.mark.parametrize("model", ["gsem-resnet10x16", "resnet10x16"])
@pytest.mark.parametrize(
    ("name", "norm"), [(name, "Linf") for name in ATTACKS] + [(name, "L2") for name in ATTACKS if name != "autoattack"]
)
def test_an_attack_finds_the_same_points(name, model, norm):
    (x, _), net, attack = digits(6), network(model), getattr(gsem.attacks, name)
    y = net(x).argmax(1)  # as it classifies them, so that there is something to break
    how = {"eps": 0.1 if norm == "Linf" else 0.8, "norm": norm, "eot": 2 if model.startswith("gsem") else 1}
    expected = attack(net, x, y, seed=1, **how, **ATTACKS[name])
    with pretended() as device:
        found = attack(device.put(net), device.put(x), device.put(y), seed=1, **how, **ATTACKS[name])
        assert found.device == DEVICE
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gcat", "gcat-awp", "trades", "gcat-published"])
def test_a_training_step_ends_with_the_same_weights(name, tmp_path, monkeypatch):
    recipe = replace(gsem.RECIPES[name], **SMALL, eot=1, draws=1, augment="crop")
    data = gsem.data.load("digits")
    few = gsem.data.Split(data.read_train().x[:160], data.read_train().y[:160])
    data = replace(data, read_train=lambda: few)
    expected = gsem.train(recipe, out=tmp_path / "cpu", data=data, device="cpu").model().state_dict()
    with pretended():
        monkeypatch.setattr("gsem.training.trainer.device_named", lambda _: DEVICE)
        run = gsem.train(recipe, out=tmp_path / "device", data=data)
    found = run.model().state_dict()
    for key, weight in expected.items():  # (Rounding may turn a sign of the attack, or a level of the quantiser.)
        assert (found[key] - weight).abs().max() <= 0.1 * weight.abs().max(), key


def test_evaluation_audit_and_a_second_judgement_have_the_same_figures():
    (x, y), net = digits(6), network("gsem-resnet10x16")
    how = {"eps": 0.1, "draws": 3}
    checks = ["randomness", "gradient", "unstable", "incomplete", "transfer", "noise"]

    def results(put: Callable) -> tuple:
        model, images, labels = put(net), put(x), put(y)
        found = gsem.evaluate(model, images, labels, "clean,pgd:steps=2:eot=2", **how, save_adv=True)
        again = gsem.verify(found, model, images, labels, draws=3)
        audit = gsem.audit(model, images, labels, "apgd:steps=3:eot=2", **how, quick=True, only=checks)
        return (
            {name: found.expected(name) for name in found.names},
            [(one.saved, one.again, one.problems) for one in again],
            {check.name: (pytest.approx(check.figure, abs=1e-6), check.outcome) for check in audit.checks},
        )

    expected = results(lambda thing: thing)
    with pretended() as device:
        assert results(device.put) == expected


def test_the_pictures_of_a_report_are_the_same():
    (x, y), net = digits(4), network("gsem-resnet10x16")
    expected = pictures(net, x, y, eps=0.1)
    with pretended() as device:
        found = pictures(device.put(net), device.put(x), device.put(y), eps=0.1)
    assert np.array_equal(found.confusion, expected.confusion)
    for ours, theirs in zip(found.gallery, expected.gallery, strict=True):
        np.testing.assert_allclose(ours.x_adv, theirs.x_adv, atol=1e-5)
    for ours, theirs in zip(found.surfaces, expected.surfaces, strict=True):
        np.testing.assert_allclose(ours.margin, theirs.margin, atol=1e-4)
