"""The folded model against its model: logits and input gradients, on every kind of network."""

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsem
from gsem.attacks import pgd
from gsem.attacks._core import forward_draws
from gsem.nn.convnext import ConvNeXtBlock
from gsem.nn.folded import FoldedModel, fold
from gsem.nn.gsem import GSeM, IntegerNoise
from gsem.nn.resnets import PreActResNet, WideResNet

FAMILIES = [
    *("gsem-resnet10x16", "gsem-wideresnet10x2", "gsem-preactresnet10x16", "gsem-vit2x32", "gsem-convnext3x16"),
    *("resnet10x16", "wideresnet10x2", "preactresnet10x16", "vit2x32", "convnext3x16"),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


def randomised(model: nn.Module) -> nn.Module:
    """Statistics and affine maps of every BatchNorm drawn anew: a fresh BatchNorm is nearly the identity."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor in (m.weight, m.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 2.0)
            for tensor in (m.bias, m.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor, std=0.5)
        if isinstance(m, ConvNeXtBlock):  # at its first value, 1e-6, the block is nearly the identity
            nn.init.uniform_(m.gamma, 0.2, 1.0)
    return model


def network(name: str, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    return randomised(gsem.create_model(name, num_classes=5, **options)).to(dtype).eval()


def images(b: int = 4, side: int = 8, channels: int = 3) -> Tensor:
    shape = (b, channels, side, side)
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def predict_draws(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a fixed random combination of them with respect to the images."""
    x = x.detach().clone().requires_grad_()
    logits = model(x)
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(logits.shape, generator=rng, dtype=torch.float64).to(logits.dtype)
    (grad,) = torch.autograd.grad((logits * weight).sum(), x)
    return logits.detach(), grad


def difference(folded: nn.Module, model: nn.Module, x: Tensor) -> float:
    """The largest difference of logits or gradients, relative to the model's largest."""
    pairs = zip(predict_draws(folded, x), predict_draws(model, x), strict=True)
    return max(float((ours.double() - theirs.double()).abs().max() / theirs.abs().max()) for ours, theirs in pairs)


def fold_silently(model: nn.Module, dtype: torch.dtype = torch.float64) -> FoldedModel:
    """A folded model that must be traced: the warning of the fall-back is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fold(model, dtype)


# --- the families ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", ["frozen", "off"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_the_models(name, mode, dtype):
    model, x = network(name, dtype), images().to(dtype)
    folded = fold_silently(model, dtype)
    with gsem.noise(model, mode, seed=2):
        assert difference(folded, model, x) < TOLERANCE[dtype]
        assert folded(x).dtype == dtype


@pytest.mark.parametrize("options", [{"gradient": "semi-masked"}, {"quantiser": False}, {"levels": 3, "noise": 0}])
@pytest.mark.parametrize("name", FAMILIES[:2])
def test_every_setting_of_gsem(name, options):
    model, x = network(name, **options), images()
    with gsem.noise(model, "frozen", seed=2):
        assert difference(fold_silently(model), model, x) < 1e-12


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_a_flipped_gradient_setting_shows_after_refresh(name):
    model, x = network(name, gradient="semi-masked"), images()
    folded = fold_silently(model)
    with gsem.noise(model, "frozen", seed=2):
        semi_masked = predict_draws(model, x)[1]
        model.gsem_module.gradient = "corrected"
        assert difference(folded, model, x) > 0.01  # the two gradients are not the same
        torch.testing.assert_close(predict_draws(folded, x)[1], semi_masked)
        folded.refresh()
        assert difference(folded, model, x) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_refresh_reads_changed_weights_in_place(name):
    model, x = network(name), images()
    folded = fold_silently(model)
    places = [b.data_ptr() for b in folded.buffers()]
    randomised(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    with gsem.noise(model, "frozen", seed=2):
        assert difference(folded, model, x) > 0.01
        folded.refresh()
        assert difference(folded, model, x) < 1e-12
    assert [b.data_ptr() for b in folded.buffers()] == places


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_follows_the_direction_and_answers_in_float32(name):
    model, x = network(name, torch.float32, quantiser=False), images(16).float()
    folded = fold_silently(model, torch.bfloat16)
    with gsem.noise(model, "off"):
        (logits, ours), (expected, theirs) = predict_draws(folded, x), predict_draws(model, x)
    assert logits.dtype == torch.float32
    assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert F.cosine_similarity(ours.flatten(1), theirs.flatten(1)).mean() > 0.98


# --- what it leaves alone ----------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Cannot be traced: which branch it takes depends on its input."""

    def __init__(self):
        super().__init__()
        self.body = randomised(gsem.create_model("gsem-resnet10x16", num_classes=5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.body(-x)


def state(model: nn.Module) -> tuple:
    flags = [(m.training, p.requires_grad) for m in model.modules() for p in m.parameters(recurse=False)]
    flags += [m.training for m in model.modules()]
    return flags, [sorted(vars(m)) for m in model.modules()], copy.deepcopy(model.state_dict())


def assert_same_state(a: tuple, b: tuple) -> None:
    assert a[:2] == b[:2]
    assert a[2].keys() == b[2].keys() and all(torch.equal(a[2][k], b[2][k]) for k in a[2])


@pytest.mark.filterwarnings("ignore:fold runs Branching")
@pytest.mark.parametrize("build", [lambda: gsem.create_model(FAMILIES[0], 5), Branching], ids=["traced", "not"])
def test_a_model_in_training_is_not_changed_and_its_twin_is_of_eval_time(build):
    model = randomised(build()).double().train()
    model.get_submodule("gsem_module" if isinstance(model, gsem.nn.models.ResNet) else "body.gsem_module").bn.eval()
    before, rng = state(model), torch.get_rng_state()
    folded = fold(model, torch.float64)
    assert torch.equal(torch.get_rng_state(), rng)
    assert folded.train() is folded
    assert not any(m.training for m in folded.modules() if not isinstance(m, IntegerNoise))
    folded.eval()
    with gsem.noise(model, "frozen", seed=2):
        assert difference(folded, copy.deepcopy(model).eval(), images()) < 1e-12
    folded.refresh()
    assert_same_state(state(model), before)


@pytest.mark.filterwarnings("ignore:fold runs Branching")
@pytest.mark.parametrize("build", [lambda: gsem.create_model(FAMILIES[1], 5), Branching], ids=["traced", "not"])
def test_no_parameter_of_a_twin_requires_a_gradient_and_the_models_get_none(build):
    model = build().eval()
    folded = fold(model)
    assert not any(t.requires_grad for t in [*folded.parameters(), *folded.buffers()])
    x = images().float().requires_grad_()
    folded(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_noise_is_shared_in_both_directions():
    model, x = network(FAMILIES[0]), images()
    folded = fold_silently(model)
    with gsem.noise(model, "frozen", seed=1):
        first = folded(x)
        assert torch.equal(folded(x), first)
    with gsem.noise(model, "frozen", seed=2):
        assert not torch.equal(folded(x), first)
    with gsem.noise(folded, "frozen", seed=1):
        assert difference(folded, model, x) < 1e-12
        torch.testing.assert_close(model(x), first)
    with gsem.noise(folded, "off"):
        assert torch.equal(model(x), model(x))
    assert not torch.equal(model(x), model(x))
    assert not torch.equal(folded(x), folded(x))


def test_the_draws_of_model_and_twin_have_one_distribution():
    model, x = network(FAMILIES[0]), images(2)
    folded = fold_silently(model)
    with torch.no_grad():
        ours, theirs = (torch.stack([m(x) for _ in range(400)]) for m in (folded, model))
    error = (theirs.var(0) * 2 / 400).sqrt()
    assert (((ours.mean(0) - theirs.mean(0)) / error).abs() < 4).all()
    assert (theirs.std(0) > 0).all()
    assert ((ours.std(0) / theirs.std(0)).log().abs() < 0.3).all()


def test_a_deepcopy_works_and_stands_alone():
    model, x = network(FAMILIES[0]), images()
    folded = copy.deepcopy(fold_silently(model))
    with gsem.noise(model, "frozen", seed=1), gsem.noise(folded, "frozen", seed=1):
        assert difference(folded, model, x) < 1e-12
        former = folded(x)
        randomised(model)
        folded.refresh()  # its source is the copied model
        assert torch.equal(folded(x), former)
    with gsem.noise(model, "off"):
        assert not torch.equal(folded(x), folded(x))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x])[::2],
        lambda x: x[:1, :1].expand(4, 3, 8, 8),
    ],
    ids=["channels last", "transposed", "strided", "expanded"],
)
def test_any_layout_of_the_images(layout):
    model, x = network(FAMILIES[0]), layout(images())
    folded = fold_silently(model)
    with gsem.noise(model, "frozen"):
        torch.testing.assert_close(folded(x), model(x.contiguous()), rtol=1e-10, atol=1e-10)


# --- networks of others ------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """All that a network may do with convolutions and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3)  # no convolution before it
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.bn1 = nn.BatchNorm2d(8, affine=False)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.two_users = nn.Conv2d(8, 8, 1)
        self.bn3 = nn.BatchNorm2d(8)
        self.again = nn.Conv2d(8, 8, 1)  # called twice, with another BatchNorm behind it each time
        self.bn4, self.bn5 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.batch_statistics = nn.BatchNorm2d(8, track_running_stats=False)
        self.dropout = nn.Dropout2d(0.5)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("shift", torch.randn(8, 1, 1))
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.bn0(x))))
        x = F.relu(self.bn2(self.grouped(x)))
        s = self.two_users(x)
        x = self.dropout(F.relu(self.bn3(s)) + s)
        x = F.dropout(self.bn4(self.again(x)) + self.bn5(self.again(F.mish(x))), 0.5, self.training)
        x = self.norm(self.batch_statistics(x)) * self.scale - self.shift
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("after", [None, "bn1", "grouped", "dropout"])
def test_a_strangers_network(after, dtype):
    model = randomised(Odd())
    if after is not None:
        model = randomised(gsem.insert(model, after=after))
    model = model.to(dtype).eval()
    folded, x = fold_silently(model, dtype), images().to(dtype)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert left == 1, "only the BatchNorm of batch statistics is left"
    with gsem.noise(model, "frozen", seed=4):
        assert difference(folded, model, x) < TOLERANCE[dtype]
        with torch.no_grad():
            for t in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
                t.mul_(1.1)
        assert difference(folded, model, x) > 1e-3
        folded.refresh()
        assert difference(folded, model, x) < TOLERANCE[dtype]


@pytest.mark.parametrize("mode", ["fresh", "frozen", "off"])
@pytest.mark.parametrize("quantiser", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_draws_that_share_their_beginning_are_the_draws_of_repeated_images(name, quantiser, mode):
    model = network(name, **({"quantiser": quantiser} if name.startswith("gsem") else {}))
    folded, x = fold_silently(model), images()
    assert (folded.gate is not None) == name.startswith("gsem")
    found = []
    for draws in (lambda z: folded.logits_of_draws(z, 3), lambda z: folded(z.repeat(3, 1, 1, 1))):
        with gsem.noise(model, mode, seed=7):
            found.append(predict_draws(draws, x))
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-12 * other.abs().max()
    assert folded(x).shape == (4, 5)


class Around(nn.Module):
    """The images pass by the GSeM, too: nothing is shared between draws."""

    def __init__(self):
        super().__init__()
        self.stem, self.gsem_module, self.linear = nn.Conv2d(3, 4, 1), GSeM(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.linear((self.gsem_module(h) + h).mean((2, 3)))


def test_what_passes_by_the_noise_is_repeated():
    model, x = Around().double().eval(), images()
    folded = fold_silently(model)
    assert folded.gate is None
    with gsem.noise(model, "fresh", seed=1):
        found = folded.logits_of_draws(x, 3)
    with gsem.noise(model, "fresh", seed=1):
        assert torch.equal(found, folded(x.repeat(3, 1, 1, 1)))


def test_an_attribute_of_a_strangers_model_is_not_taken_for_draws():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    model.draws = 7
    x = images()
    assert torch.equal(forward_draws(model, x, 2), model(x.repeat(2, 1, 1, 1)))


class Reused(nn.Module):
    """Sums and ReLUs whose inputs are read again, are broadcast, or are the images themselves."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.one = nn.Conv2d(3, 1, 1)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        kept = self.relu(a) - a  # a is read after its ReLU
        b = self.b(F.relu(kept))
        wide = self.one(b) + kept  # [b, 1, h, w] + [b, 3, h, w]
        total = x + self.b(wide)
        again = torch.relu(total) + self.a(total)
        b2 = self.a(again)
        return self.linear(F.relu(b2 + b2).mean((2, 3)))


class Sizes(nn.Module):
    """Sums of sizes, and views of feature maps whose layout the folded model changes."""

    def __init__(self, branches: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(4 * 8 * 8, 5)
        self.register_buffer("bits", torch.full((5,), 4607182418800017408))  # 1.0 as an integer
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() > 0:  # cannot be traced
            x = 2 * x
        x = F.relu(self.conv(x))
        side = x.shape[2] + x.shape[3]
        count = side + x.shape[1]  # 20
        return self.linear(x.view(x.size(0), -1)) / count + self.bits.view(torch.float64)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.filterwarnings("ignore:fold runs")
def test_views_and_sums_of_sizes(branches):
    model, x = Sizes(branches).double().eval(), images()
    assert difference(fold(model, torch.float64), model, x) < 1e-12


@pytest.mark.parametrize("build", [PreActResNet, WideResNet])
def test_silu_networks(build):
    shape = ((1, 1, 1, 1), 4) if build is PreActResNet else (10, 1)
    model = randomised(build(*shape, activation=F.silu, gsem=GSeM, num_classes=5)).double().eval()
    assert "silu" in str(model)
    with gsem.noise(model, "frozen", seed=2):
        assert difference(fold_silently(model), model, images()) < 1e-12


def test_memory_is_reused_only_where_nobody_reads_it_again():
    model, x = Reused().double().eval(), images()
    before = x.clone()
    assert difference(fold_silently(model), model, x) < 1e-12
    assert torch.equal(x, before)


def test_two_gsems_in_one_network():
    model = gsem.insert(gsem.insert(Odd(), after="bn3"), after="bn1")
    model = randomised(model).double().eval()
    folded = fold_silently(model)
    assert sum(isinstance(m, GSeM) for m in model.modules()) == 2
    for owner in (model, folded):
        with gsem.noise(owner, "frozen", seed=4):
            assert difference(folded, model, images()) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("of_model", [torch.float64, torch.float32], ids=str)
def test_a_network_that_cannot_be_traced_runs_as_it_is(dtype, bound, of_model):
    model, x = Branching().to(of_model).eval(), images().to(of_model)
    with pytest.warns(UserWarning, match="runs Branching as it is.*torch.fx.wrap"):
        folded = fold(model, dtype)
    bound = max(bound, TOLERANCE[of_model])
    reference, exact = copy.deepcopy(model).double(), x.double()
    reference.body.gsem_module.offsets = model.body.gsem_module.offsets
    with gsem.noise(folded, "frozen", seed=4):
        for sign in (1, -1):
            logits = folded(sign * x)
            expected = reference(sign * exact)
            assert (logits - expected).abs().max() < bound * expected.abs().max()
        model.body.gsem_module.gradient = "semi-masked"
        reference.body.gsem_module.gradient = "semi-masked"
        with torch.no_grad():
            model.body.linear.bias.add_(10.0)
            reference.body.linear.bias.add_(10.0)
        folded.refresh()
        ours, theirs = predict_draws(folded, x), predict_draws(reference, exact)
    assert (ours[0] - theirs[0]).abs().max() < bound * theirs[0].abs().max()
    assert (ours[1] - theirs[1]).abs().max() < bound * theirs[1].abs().max()


class Sprinkler(nn.Module):
    """Draws noise of a fixed shape in its own forward: a tracer would keep one draw for ever."""

    def __init__(self, draw: Callable[[], Tensor | float] = lambda: torch.randn(3, 8, 8)):
        super().__init__()
        self.linear, self.draw = nn.Linear(3, 5), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x + self.draw()).mean((2, 3)))


def test_noise_drawn_in_forward_is_not_frozen_by_tracing():
    model, x = Sprinkler().eval(), images().float()
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="random"):
        folded = fold(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(folded(x), folded(x))
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(folded(x), expected)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_noise_of_python_and_numpy_is_noticed_too(draw):
    random.seed(0)
    np.random.seed(0)
    with pytest.warns(UserWarning, match="random"):
        folded = fold(Sprinkler(draw).eval())
    x = images().float()
    assert not torch.equal(folded(x), folded(x))
    random.seed(0)
    np.random.seed(0)
    expected = draw()
    random.seed(0)
    np.random.seed(0)
    with pytest.warns(UserWarning, match="random"):
        fold(Sprinkler(draw).eval())
    assert draw() == expected  # tracing took nothing from the caller's stream


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class OwnBackward(nn.Module):
    """A straight-through rounding by an autograd.Function."""

    def forward(self, x: Tensor) -> Tensor:
        return _Rounded.apply(8 * x)


class HalfWithout(nn.Module):
    """Half of the image has no gradient, by a context manager."""

    def __init__(self, without: Callable):
        super().__init__()
        self.without = without

    def forward(self, x: Tensor) -> Tensor:
        with self.without():
            half = x * 2
        return x + half


@pytest.mark.parametrize(
    "own", [OwnBackward(), HalfWithout(torch.no_grad), HalfWithout(lambda: torch.set_grad_enabled(False))]
)
@pytest.mark.parametrize("caller", [torch.no_grad, torch.enable_grad])
def test_a_gradient_of_the_models_own_is_kept(own, caller):
    torch.manual_seed(0)
    model = nn.Sequential(own, nn.Flatten(), nn.Linear(192, 5)).double().eval()
    with pytest.warns(UserWarning, match="another gradient"), caller():
        folded = fold(model, torch.float64)
    (logits, grad), (exact, right) = predict_draws(folded, images()), predict_draws(model, images())
    torch.testing.assert_close(logits, exact)
    torch.testing.assert_close(grad, right)
    assert grad.abs().max() > 0


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
        return self.conv((x - mean.to(x.dtype)[:, None, None]) / torch.tensor(0.25)).mean((2, 3))


def test_constants_made_in_forward_are_kept_and_the_model_gets_no_attribute():
    model = Constants().double().eval()
    before = state(model)
    folded = fold(model, torch.float64)
    folded.refresh()
    assert difference(folded, model, images()) < 1e-12
    assert_same_state(state(model), before)


@pytest.mark.filterwarnings("ignore:fold runs Odd")
@pytest.mark.parametrize("layer", ["conv1", "bn1", "linear", ""])
def test_hooks_that_change_an_answer_are_obeyed(layer):
    model = randomised(Odd()).double().eval()
    plain = copy.deepcopy(model)
    model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: 2 * output + 1)
    assert difference(plain, model, images()) > 0.01
    assert difference(fold(model, torch.float64), model, images()) < 1e-12


# --- compilers ---------------------------------------------------------------------------------------------------


def test_what_is_folded_is_one_graph_for_the_compiler():
    """One for each number of draws: no seed, and no pass, makes another."""
    from torch._dynamo.testing import CompileCounter  # here, since it takes a second to import

    torch._dynamo.reset()
    model, x = network(FAMILIES[0], torch.float32), images().float()
    folded, counter = fold_silently(model), CompileCounter()
    eager, compiled = folded.graph, torch.compile(folded.graph, fullgraph=True, backend=counter)
    for seed in range(2):
        for draws in (1, 3):
            found = []
            for folded.graph in (eager, compiled):
                with gsem.noise(model, "fresh", seed=seed):
                    found.append(predict_draws(lambda z, draws=draws: folded.logits_of_draws(z, draws), x))
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other)
    assert counter.frame_count == 2


# --- strength ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES[:2])
def test_bf16_directions_break_as_many_images_as_float32(name, tmp_path):
    """PGD-20 alone, each step along a direction of the bf16 folded model or of the float32 one.

    The noise is frozen, the same for search and score, so that an image is broken or not: with fresh noise the
    chance of the scoring draws alone would move a share of 500 images by two points. Three seeds, each another
    noise and another start, leave about half a point of chance between two equally strong attacks.
    """
    recipe = replace(gsem.RECIPES["gcat"], epochs=8, model=name)
    model = gsem.train(recipe, out=tmp_path / "run", device="cpu").model().eval()
    test = gsem.data.load("digits").test()
    x, y = gsem.data.to_float(test.x[:500]), test.y[:500].long()
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        folded, broken = fold(model, dtype), 0
        for seed in range(3):
            with gsem.noise(model, "frozen", seed=seed), torch.no_grad():
                how = {"eps": 0.15, "step": 0.0375, "steps": 20, "keep": "last"}
                x_adv = pgd(model, x, y, **how, seed=seed, search=folded)
                broken += int((model(x_adv).argmax(1) != y).sum())
        shares[dtype] = 100 * broken / (3 * len(x))
    print(name, shares)
    assert 5 < shares[torch.float32] < 95, "an attack that breaks nothing, or all, compares nothing"
    assert abs(shares[torch.bfloat16] - shares[torch.float32]) <= 1


@pytest.mark.parametrize("draws", [1, 3])
def test_a_confident_image_keeps_its_gradient_in_fp16(draws):
    """At a lead of 18 logits the cross-entropy's gradient is 1e-8, which fp16 rounds to 0."""
    torch.manual_seed(0)
    model = gsem.insert(
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 6, 10)),
        after="1",
        example=torch.rand(2, 1, 8, 6),
    ).eval()
    with torch.no_grad():
        model[3].weight.mul_(0.01)
        model[3].bias[0] = 18.0
    x, y = torch.rand(4, 1, 8, 6), torch.zeros(4, dtype=torch.int64)
    grads = []
    for dtype in (torch.float32, torch.float16):
        folded = fold(model, dtype)
        pixels = x.clone().requires_grad_()
        with gsem.noise(model, "fresh", seed=1):
            loss = nn.functional.cross_entropy(folded.logits_of_draws(pixels, draws), y.repeat(draws), reduction="sum")
        grads.append(torch.autograd.grad(loss, pixels)[0])
    exact, low = grads
    assert 0 < exact.abs().max() < 6e-8
    # fp16 has 11 significant bits; a few of them are lost on the way through the layers.
    assert (low - exact).norm() < 0.01 * exact.norm()
