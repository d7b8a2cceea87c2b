import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gsem
from gsem.training.awp import awp, perturbed_parameters


@pytest.fixture(params=["gsem-resnet10x16", "resnet10x16", "gsem-wideresnet10x2"])
def model(request):
    torch.manual_seed(1)
    model = gsem.create_model(request.param, in_channels=1).double().train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            nn.init.uniform_(m.weight, 0.5, 1.5)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(2)
    return torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)


def reference_perturbation(model, x, y, gamma, draws):
    """AWP as its paper's code makes it: an SGD step up the loss on a proxy, then rescaled to each weight's norm."""
    proxy = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    with gsem.noise(proxy, "fresh", seed=7):
        loss = -sum(F.cross_entropy(proxy(x), y) for _ in range(draws)) / draws
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    moved = {}
    for (name, new), old in zip(proxy.named_parameters(), model.parameters(), strict=True):
        if "weight" in name and old.ndim > 1:
            diff = new.detach() - old.detach()
            moved[name] = old.detach() + gamma * old.detach().norm() / (diff.norm() + 1e-20) * diff
    return moved


@pytest.mark.parametrize("draws", [1, 3])
def test_equals_the_reference_with_a_proxy(model, batch, draws):
    wanted = reference_perturbation(model, *batch, gamma=0.01, draws=draws)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    noise = gsem.noise(model, "fresh", seed=7)
    with noise, awp(model, *batch, gamma=0.01, draws=draws):
        for name, p in model.named_parameters():
            target = wanted.get(name, before[name])
            torch.testing.assert_close(p.detach(), target, rtol=1e-10, atol=1e-12)
            # not by being too small to see: each moved by γ of its norm
            if name in wanted:
                moved = (p.detach() - before[name]).norm() / before[name].norm()
                assert float(moved) == pytest.approx(0.01, rel=1e-6)
    assert len(wanted) == len(perturbed_parameters(model))


def test_of_many_confident_images_the_direction_is_left_in_fp16():
    """At a lead of 12 logits the cross-entropy's gradient is 6e-6; that of the mean over 512 images is 0 in fp16."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 10, bias=False)
    with torch.no_grad():
        layer.weight.mul_(0.01)[0] = 12 / 64
    x, y = 0.9 + torch.rand(512, 64) / 5, torch.zeros(512, dtype=torch.int64)
    before, moved = layer.weight.detach().clone(), []
    for context in (nullcontext(), torch.autocast("cpu", torch.float16)):
        with context, awp(layer, x, y, gamma=0.1):
            moved.append(layer.weight.detach() - before)
    exact, low = moved
    assert (low - exact).norm() < 0.02 * exact.norm()


def test_it_raises_the_loss_it_ascends(model, batch):
    x, y = batch
    with gsem.noise(model, "off"):
        before = F.cross_entropy(model(x), y)
        with awp(model, x, y, gamma=0.01):
            inside = F.cross_entropy(model(x), y)
    assert inside > before + 0.01


def test_statistics_gradients_and_weights_are_untouched_without_a_step(model, batch):
    before = copy.deepcopy(model.state_dict())
    with awp(model, *batch, gamma=0.05):
        pass
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_before_the_step_restores_bit_for_bit(model, batch):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="planted"), awp(model, *batch, gamma=0.05):
        raise RuntimeError("planted")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_step_stays_also_before_an_exception(model, batch, fails, foreach):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=foreach)
    with pytest.raises(RuntimeError, match="planted") if fails else nullcontext(), awp(model, *batch, gamma=0.05):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        steps = {n: 0.1 * p.grad for n, p in model.named_parameters()}
        optimizer.step()
        if fails:
            raise RuntimeError("planted")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - steps[name], rtol=1e-12, atol=1e-13)


def test_gamma_zero_moves_nothing(model, batch):
    before = [w.detach().clone() for w in perturbed_parameters(model)]
    with awp(model, *batch, gamma=0.0):
        assert all(torch.equal(a, b) for a, b in zip(before, perturbed_parameters(model), strict=True))


def test_nonsense_is_refused(model, batch):
    with pytest.raises(ValueError, match="gamma"), awp(model, *batch, gamma=-1.0):
        pass
    with pytest.raises(ValueError, match="draws"), awp(model, *batch, gamma=0.1, draws=0):
        pass
