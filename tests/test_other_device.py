"""The whole package on a pretended accelerator: nothing on the wrong device, and the numbers of the CPU."""

import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import gsem
from gsem.attacks._active import Remaining
from gsem.auditing import binarization
from gsem.auditing.check import Check, RegisteredCheck
from gsem.auditing.context import AuditContext
from gsem.losses import margin
from gsem.nn.folded import fold
from gsem.nn.gsem import IntegerNoise
from gsem.nn.predict import predict_draws
from gsem.reporting.visuals import pictures
from gsem.training.progress import Progress
from gsem.training.step import Stepper
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


@pytest.fixture
def marked(monkeypatch):
    """The CPU, too, marks finished rows, and all devices cut to small sizes."""
    monkeypatch.setattr(Remaining, "sizes", (4, 2))


@pytest.mark.filterwarnings("ignore:all logits")
@pytest.mark.parametrize("model", ["gsem-resnet10x16", "resnet10x16"])
@pytest.mark.parametrize(
    ("name", "norm"), [(name, "Linf") for name in ATTACKS] + [(name, "L2") for name in ATTACKS if name != "autoattack"]
)
def test_an_attack_finds_the_same_points(name, model, norm, marked):
    (x, _), net, attack = digits(6), network(model), getattr(gsem.attacks, name)
    y = net(x).argmax(1)  # as it classifies them, so that there is something to break
    how = {"eps": 0.1 if norm == "Linf" else 0.8, "norm": norm, "eot": 2 if model.startswith("gsem") else 1}
    expected = attack(net, x, y, seed=1, **how, **ATTACKS[name])
    with pretended() as device:
        found = attack(device.put(net), device.put(x), device.put(y), seed=1, **how, **ATTACKS[name])
        assert found.device == DEVICE
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)


NOISE = [("fresh", None), ("fresh", 3), ("frozen", 3), ("off", None)]


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("mode", "seed"), NOISE)
def test_all_feature_maps_of_a_folded_model_are_channels_last(mode, seed, draws):
    """The noise too: two memory formats in one operation are slow on a GPU."""
    (x, _), net = digits(3), network("gsem-resnet10x16")
    last = {}
    with pretended() as device:
        folded = fold(device.put(net))
        for name, part in (*folded.graph.named_modules(), ("noise", folded.gate.offsets)):
            part.register_forward_hook(lambda part, args, out, name=name: last.update({name: out.stride()[1] == 1}))
        images = device.put(x).requires_grad_()
        device.counts.clear()
        with gsem.noise(net, mode, seed=seed):
            folded.logits_of_draws(images, draws).sum().backward()
    assert {"noise", "part0"} < last.keys() and len(last) > 10
    assert all(last.values()), last
    assert not +device.counts.mixed


@pytest.mark.parametrize("mode", ["fresh", "frozen"])
def test_seeded_noise_belongs_to_the_element_whatever_the_memory_format(mode):
    source, x = IntegerNoise(4), torch.zeros(2, 16, 5, 7)
    with gsem.noise(source, mode, seed=3):
        expected = source(x, 2)
    with pretended() as device, gsem.noise(device.put(source), mode, seed=3):
        found = source(device.put(x.to(memory_format=torch.channels_last)), 2)
        assert found.is_contiguous(memory_format=torch.channels_last) and not found.is_contiguous()
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("name", ["gcat", "gcat-awp", "trades", "gcat-published"])
def test_a_training_step_ends_with_the_same_weights(name, tmp_path, monkeypatch):
    recipe = replace(gsem.RECIPES[name], **SMALL, eot=1, draws=1, augment="crop")
    data = gsem.data.load("digits")
    few = gsem.data.Split(data.read_train().x[:160], data.read_train().y[:160])
    data = replace(data, read_train=lambda: few)
    expected = gsem.train(recipe, out=tmp_path / "cpu", data=data, device="cpu").model().state_dict()
    with pretended():
        monkeypatch.setattr("gsem.distributed.device_named", lambda _: DEVICE)
        run = gsem.train(recipe, out=tmp_path / "device", data=data)
    found = run.model().state_dict()
    for key, weight in expected.items():  # (Rounding may turn a sign of the attack, or a level of the quantiser.)
        assert (found[key] - weight).abs().max() <= 0.1 * weight.abs().max(), key


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # (it is not: the copy is made)
def test_a_training_with_averaged_weights_resumes_to_the_same_bits(tmp_path, monkeypatch):
    recipe = replace(gsem.RECIPES["gcat"], **SMALL | {"batch_size": 16}, eot=1, draws=1, ema=0.9)
    data = gsem.data.load("digits")
    few = gsem.data.Split(data.read_train().x[:80], data.read_train().y[:80])
    data = replace(data, read_train=lambda: few)

    def interrupt(progress: Progress) -> None:
        if progress.step == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("gsem.distributed.device_named", lambda _: DEVICE)
    with pretended():
        whole = gsem.train(recipe, out=tmp_path / "whole", data=data)
        with pytest.raises(gsem.TrainingInterrupted):
            gsem.train(recipe, out=tmp_path / "parts", data=data, on_progress=interrupt)
        parts = gsem.train(recipe, out=tmp_path / "parts", data=data, resume=True)
    assert len(whole.metrics) == len(parts.metrics) > 0
    for name, weight in whole.model().state_dict().items():
        assert torch.equal(parts.model().state_dict()[name], weight), name


def test_evaluation_audit_and_a_second_judgement_have_the_same_figures():
    (x, y), net = digits(6), network("gsem-resnet10x16")
    how = {"eps": 0.1, "draws": 3}
    checks = ["randomness", "gradient", "incomplete", "noise"]

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


# How often the CPU may wait for the device in a step of an attack (a query; of both targets together), for a
# deterministic and for a stochastic model; and in the rest of a run on the stochastic one: the checks, the judgement of
# the clean images and of the result, and what is confirmed at the last step.
WAITS = {
    "pgd-last": (0, 0, 12),
    "pgd-best": (0, 0, 20),
    "apgd": (0, 0.05, 25),
    "apgd-t": (0, 0.05, 35),
    "square": (0, 0.05, 25),
    "fab": (1, 1.05, 30),
    "rays": (0, 0.05, 20),
    "cw": (0, 0.3, 30),
}
COUNTED = {
    "pgd-last": partial(gsem.attacks.pgd, step=0.01, keep="last"),
    "pgd-best": partial(gsem.attacks.pgd, step=0.01),
    "apgd": gsem.attacks.apgd,
    "apgd-t": partial(gsem.attacks.apgd, targets=2),
    "square": gsem.attacks.square,
    "fab": gsem.attacks.fab,
    "rays": gsem.attacks.rays,
    "cw": partial(gsem.attacks.cw, norm="L2"),
}


class Linear(nn.Module):
    """Five classes; with noise on the logits, from torch's stream."""

    def __init__(self, noise: float):
        super().__init__()
        self.noise = noise
        self.weight = nn.Parameter(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = (x.flatten(1) - 0.5) @ self.weight
        return logits + self.noise * torch.randn_like(logits) if self.noise else logits


def waits(attack: Callable, noise: float, eps: float, long: int) -> tuple[float, int]:
    """On 24 images: for each step, from the difference between runs of 10 and of `long` steps, and in the short run;
    uploads count as waits."""
    x = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = Linear(0)(x).argmax(1)
    length = "queries" if getattr(attack, "func", attack) in (gsem.attacks.square, gsem.attacks.rays) else "steps"
    totals = []
    for steps in (10, long):
        with pretended() as device:
            arguments = [device.put(thing) for thing in (Linear(noise), x, y)]
            device.counts.clear()
            attack(*arguments, eps=eps, eot=2 if noise else 1, seed=1, **{length: steps})
            totals.append(device.counts.waits.total() + device.counts.uploads.total())
    return (totals[1] - totals[0]) / (long - 10), totals[0]


@pytest.mark.parametrize("name", WAITS)
def test_an_attack_waits_for_the_device_no_more_often_than_this(name):
    scale = 8 if name == "cw" else 1
    certain, noisy, rest = WAITS[name]
    # Radii at which nothing can be broken, so that every step is made, and at which some images are.
    assert waits(COUNTED[name], 0.0, scale * 0.0005, long=20)[0] <= certain
    # (What is confirmed at the end varies by a few waits; FAB's steps have more than that.)
    a_step, in_all = waits(COUNTED[name], 0.02, scale * 0.02, long=20 if name == "fab" else 50)
    assert a_step <= noisy
    assert in_all <= rest + 10 * noisy


def test_scoring_waits_once_a_batch():
    x = torch.rand(24, 1, 8, 8)
    with pretended() as device:
        model, images = device.put(Linear(0.1)), device.put(x)
        device.counts.clear()
        predict_draws(model, images, draws=7, seed=0, batch_size=6)
        assert device.counts.waits.total() == 4
        assert not device.counts.uploads.total()


# How often the CPU may wait in each check of a small audit of a stochastic model, copies to the device included: for
# each batch that is scored, in the attacks, and twice for each batch on which slopes are measured.
AUDIT_WAITS = {
    "randomness": 3,
    "gradient": 16,
    "unavailable": 1,
    "unstable": 1,
    "silent_success": 28,
    "unconstrained": 28,
    "binarization": 55,  # 20 of them for the tries of the random search
    "noise": 18,
}


def test_the_checks_of_an_audit_wait_for_the_device_no_more_often_than_this(monkeypatch):
    monkeypatch.setattr(binarization, "TRIES", 20)
    x = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    logits = Linear(0)(x)
    x = x[margin(logits, y := logits.argmax(1)).argsort()[:20]]  # those that are classified most clearly
    y, found = Linear(0)(x).argmax(1), {}
    with pretended() as device:

        def counted(check: RegisteredCheck, ctx: AuditContext) -> Check:
            device.counts.clear()
            made = finished(check, ctx)
            found[check.name] = device.counts.waits.total() + device.counts.uploads.total(), made.outcome
            return made

        finished = RegisteredCheck.__call__
        monkeypatch.setattr(RegisteredCheck, "__call__", counted)
        images, labels, model = device.put(x), device.put(y), device.put(Linear(0.02))
        gsem.audit(model, images, labels, "apgd:steps=4:eot=2", eps=0.02, quick=True, draws=3, only=list(AUDIT_WAITS))
    for name, (waits, outcome) in found.items():
        # (The gradient check has no answer for so few images, but measures all the same.)
        assert outcome == ("inconclusive" if name == "gradient" else "pass"), name
        assert waits <= AUDIT_WAITS[name], (name, waits)


@pytest.mark.parametrize("name", ["gcat", "gcat-awp", "trades", "mart"])
def test_a_training_step_waits_for_nothing(name):
    source = gsem.data.load("digits")
    recipe = replace(gsem.RECIPES[name], **SMALL, eot=1, draws=1)
    data = source.read_train()
    with pretended() as device:
        stepper = Stepper(recipe, source, 0.1, device.put(network("gsem-resnet10x16")), None)
        x, y = device.put(data.x[:16]), device.put(data.y[:16])
        for step in range(2):
            device.counts.clear()  # (the first step makes the optimizer's state)
            stepper(x, y, step=step, epoch=0.5, averaged=None)
        assert not device.counts.waits.total(), device.counts.waits
        assert not device.counts.uploads.total(), device.counts.uploads
