"""GSeM behind a layer of any model, and normalisation in front of one."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from gsem.nn.folded import fold
from gsem.nn.gsem import GSeM, noise
from gsem.nn.insert import insert, normalized
from gsem.nn.models import create_model


class Net(nn.Module):
    """A network with one of each trouble: a shared ReLU, an unused layer, a tuple, a vector, a second name."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.body = nn.Conv2d(6, 8, 3, stride=2)
        self.alias = self.body
        self.unused = nn.Conv2d(3, 3, 1)
        self.rnn = nn.GRU(8, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.drop(self.relu(self.stem(x)))
        x = self.relu(self.body(x))
        _, h = self.rnn(x.flatten(2).mT)
        return self.head(h[0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def snapshot(model: nn.Module) -> tuple:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {name: m.training for name, m in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return dict(model.named_modules(remove_duplicate=False)), flags, hooks, state, torch.get_rng_state()


def assert_untouched(model: nn.Module, before: tuple) -> None:
    *same, state, random = snapshot(model)
    assert same == list(before[:3])
    assert state.keys() == before[3].keys()
    assert all(torch.equal(state[key], before[3][key]) for key in state)
    assert torch.equal(random, before[4])


def test_the_layer_becomes_the_layer_and_a_gsem(model):
    stem = model.stem
    assert insert(model, after="stem", levels=3, noise=2, gradient="semi-masked") is model
    assert model.stem[0] is stem
    module = model.stem[1]
    assert isinstance(module, GSeM)
    assert (module.channels, module.levels, module.noise, module.gradient) == (6, 3, 2, "semi-masked")
    assert {"stem.0.0.weight", "stem.1.conv1.weight"} < set(model.state_dict())
    assert all(p.requires_grad for p in module.parameters())


def test_the_function_is_the_old_one_with_a_gsem_behind_the_layer(model):
    old = copy.deepcopy(model).eval()
    insert(model, "stem.0").eval()
    module, x = model.stem[0][1], torch.rand(2, 3, 9, 9)
    old.stem[0].register_forward_hook(lambda m, args, out: module(out))
    with noise(model, "frozen", seed=1):
        assert torch.equal(model(x), old(x))


def test_nothing_else_changes(model):
    model.eval()
    model.stem[1].train()
    model.body.weight.requires_grad_(False)
    _, flags, hooks, state, _ = snapshot(model)
    insert(model, "body")
    _, flags_after, hooks_after, state_after, _ = snapshot(model)
    assert hooks_after == hooks == 0
    assert all(flags_after[name] == flag for name, flag in flags.items())
    assert not model.body[0].weight.requires_grad
    for key, value in state.items():
        moved = key.replace("body.", "body.0.").replace("alias.", "alias.0.")
        assert torch.equal(state_after[moved], value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gsem_has_the_dtype_and_mode_of_the_layer(model, dtype, training):
    model.to(dtype).train(not training)
    model.drop.train(training)
    insert(model, "drop")  # it has no parameters of its own
    assert {p.dtype for p in model.drop[1].parameters()} == {dtype}
    assert model.drop.training == model.drop[1].training == model.drop[1].bn.training == training
    assert model(torch.rand(2, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_the_forward_pass_leaves_the_random_state_alone_and_the_weights_follow_the_seed():
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x + torch.rand_like(x)).mean((2, 3))

    model = Restless()
    torch.manual_seed(5)
    insert(model, "conv")
    after = torch.get_rng_state()
    torch.manual_seed(5)
    expected = GSeM(4)
    assert torch.equal(model.conv[1].conv2.weight, expected.conv2.weight)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_layer_under_two_names_is_replaced_under_both(model):
    insert(model, "alias")
    assert model.alias is model.body
    assert isinstance(model.body[1], GSeM)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 4)


def test_twice_in_one_model_and_twice_at_one_place(model):
    insert(insert(insert(model, "stem"), "body"), "stem")
    assert sum(isinstance(m, GSeM) for m in model.modules()) == 3
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 4)


def test_noise_of_a_gsem_that_is_there_already_is_left_as_it_was():
    model = create_model("gsem-resnet10x16")
    with noise(model, "fresh", seed=3):
        first = model.gsem_module.offsets(torch.zeros(1, 16, 4, 4))
    with noise(model, "fresh", seed=3):
        insert(model, "layer1")
        assert torch.equal(model.gsem_module.offsets(torch.zeros(1, 16, 4, 4)), first)


@pytest.mark.parametrize(("channels", "side"), [(3, 224), (1, 28), (3, 8), (2, 96)])
def test_the_input_is_guessed(channels, side):
    width = 4 * side * side
    model = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Flatten(), nn.Linear(width, 2))
    insert(model, "0")
    assert model[0][1].channels == 4


def test_an_example_is_taken_where_no_guess_runs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 5 * 7, 2)).double()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\[2, 3, 224, 224\].*pass example="):
        insert(model, "0")
    assert_untouched(model, before)
    insert(model, "0", example=torch.rand(1, 3, 5, 7))
    assert model[0][1].channels == 4


def test_a_model_without_convolution_needs_an_example():
    model = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match=r"no Conv2d.*pass example="):
        insert(model, "0")
    insert(model, "1", example=torch.rand(2, 8, 4, 4))
    assert model[1][1].channels == 8


class Reader(nn.Module):
    """It reads its layer's weight besides calling it, as some networks do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) + self.conv.weight.sum()


class Hider(nn.Module):
    """It calls its layer by a reference that is no submodule."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.hidden = [self.conv]

    def forward(self, x):
        return self.hidden[0](x).mean((2, 3))


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (Net, {"after": ""}, "layer inside the model, not ''"),
        (Net, {"after": None}, "layer inside the model, not None"),
        (Net, {"after": "sten"}, "no layer 'sten': near it are stem"),
        (Net, {"after": "zzzzzz"}, "its layers are stem, stem.0, stem.1, relu, drop, body"),
        (Net, {"after": "relu"}, "'relu' is called 2 times.*: stem, stem.0, stem.1, drop, body$"),
        (Net, {"after": "unused"}, "'unused' is not called.*: stem, stem.0, stem.1, drop, body$"),
        (Net, {"after": "head"}, r"a tensor of shape \[2, 4\].*: stem, stem.0, stem.1, drop, body$"),
        (Net, {"after": "rnn"}, "returns a tuple.*: stem, stem.0, stem.1, drop, body$"),
        (Net, {"after": "stem", "levels": 0}, "levels must be an integer of at least 1"),
        (Net, {"after": "stem", "noise": -1}, "noise must be an integer of at least 0"),
        (Net, {"after": "stem", "gradient": "x"}, "corrected, semi-masked"),
        (Net, {"after": "stem", "example": torch.rand(3, 8, 8)}, r"example must be .* shape \[3, 8, 8\]"),
        (Net, {"after": "stem", "example": "image"}, "example must be .* a str"),
        (
            Net,
            {"after": "stem", "example": torch.rand(2, 1, 8, 8)},
            r"on the example, .* \[2, 1, 8, 8\].*: give one that",
        ),
        (Reader, {"after": "conv"}, "'conv'.*fails: 'Sequential' object has no attribute 'weight'"),
        (Hider, {"after": "conv"}, "'conv'.*does not reach it"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), {"after": "0"}, "lazy layers.*run it once first"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_left_as_it_was(build, arguments, message):
    model = build()
    lazy = any(isinstance(m, nn.LazyConv2d) for m in model.modules())
    before = None if lazy else snapshot(model)
    with pytest.raises(ValueError, match=message):
        insert(model, **arguments)
    if before:
        # Where the insertion is undone, the weights of the GSeM have been drawn.
        if build in (Reader, Hider):
            torch.set_rng_state(before[-1])
        assert_untouched(model, before)


def test_the_result_is_an_ordinary_module(model):
    x = torch.rand(2, 3, 8, 8)
    insert(model, "stem")
    with noise(model.eval(), "frozen", seed=2):
        expected = model(x)
        for folded in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(folded(x), expected)
        fresh = insert(Net(), "stem").eval()
        fresh.load_state_dict(model.state_dict())
        with noise(fresh, "frozen", seed=2):
            assert torch.equal(fresh(x), expected)


def test_the_result_compiles_in_one_graph():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)).eval()
    insert(model, "1")
    x = torch.rand(2, 3, 8, 8)
    with noise(model, "off"):
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_inserted_behind_the_stem_a_plain_resnet_is_the_gsem_resnet():
    plain, gsem = create_model("resnet10x16").eval(), create_model("gsem-resnet10x16").eval()
    insert(plain, "gsem_module").eval()
    plain.load_state_dict({k.replace("module.", "module.1."): v for k, v in gsem.state_dict().items()})
    x = torch.rand(2, 3, 8, 8)
    with noise(plain, "frozen"), noise(gsem, "frozen"):
        assert torch.equal(plain(x), gsem(x))


# --- layouts, inputs, and models that are fixed ------------------------------------------------------------------


class Patches(nn.Module):
    """Swin's style: [b, h, w, c] from its patches on; of one size of images, by its attribute."""

    def __init__(self, side: int | None = None, width: int = 6):
        super().__init__()
        self.side = side
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        assert self.side in (None, x.shape[2])
        return self.head(self.norm(self.patch(x).permute(0, 2, 3, 1)).relu().mean((1, 2)))


@pytest.mark.parametrize(
    ("side", "example"),
    [(None, None), (None, torch.rand(2, 3, 12, 12)), (8, torch.rand(2, 3, 8, 8)), (8, torch.rand(2, 3, 8, 20))],
)
def test_behind_a_channels_last_layer_the_channels_are_the_channels(side, example):
    model = Patches(side)
    old = copy.deepcopy(model).eval()
    insert(model, "norm", example=example).eval()
    gsem = model.norm[1].gsem
    assert gsem.channels == 6 and "norm.1.gsem.conv1.weight" in model.state_dict()
    old.norm.register_forward_hook(lambda m, args, z: gsem(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    x = torch.rand(3, 3, 8, 8, requires_grad=True)
    with noise(model, "frozen", seed=1):
        expected, found = old(x), model(x)
        assert torch.equal(found, expected)
        folded = fold(model)
        torch.testing.assert_close(folded(x), expected)
        grads = [torch.autograd.grad(z.square().sum(), x)[0] for z in (expected, found, folded(x))]
    assert torch.equal(grads[0], grads[1]) and grads[0].abs().max() > 0
    torch.testing.assert_close(grads[2], grads[0])
    with noise(model, "fresh", seed=2):
        several = folded.logits_of_draws(x, 3)
    with noise(model, "fresh", seed=2):
        torch.testing.assert_close(several, model(x.repeat(3, 1, 1, 1)))
    fresh = insert(Patches(side), "norm", example=example).eval()
    fresh.load_state_dict(model.state_dict())
    with noise(fresh, "frozen", seed=1):
        assert torch.equal(fresh(x), found)


def test_channels_first_is_told_in_images_of_one_size_too():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 2))
    assert insert(model, "1", example=torch.rand(1, 3, 8, 8))[1][1].channels == 6


def test_where_nothing_tells_channels_from_height_the_choice_is_said():
    def build(width):
        return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 2))

    with pytest.warns(UserWarning, match=r"layer '1' gives \[1, 8, 8, 8\].*axis 1 is taken") as caught:
        insert(build(8), "1", example=torch.rand(1, 3, 8, 8))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        insert(build(8), "0", example=torch.rand(1, 3, 8, 8))  # a convolution's channels are known


def test_channels_between_height_and_width_are_refused():
    class Between(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2)

    model = nn.Sequential(nn.Conv2d(3, 6, 3), Between(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1))
    with pytest.raises(ValueError, match=r"layer '1' gives \[2, 30, 6, 30\].*\[b, c, h, w\] or \[b, h, w, c\]"):
        insert(model, "1")


def test_a_network_that_is_fed_uint8_takes_such_an_example():
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            if x.dtype != torch.uint8:
                raise TypeError("uint8, please")
            return self.conv(x / 255).mean((2, 3))

    with pytest.raises(ValueError, match=r"uint8, please.*pass example="):
        insert(Bytes(), "conv")
    with pytest.raises(ValueError, match=r"on the example, .*torch.float32 \(uint8, please\): give one that it takes"):
        insert(Bytes(), "conv", example=torch.rand(1, 3, 8, 8))
    assert insert(Bytes(), "conv", example=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).conv[1].channels == 4


def test_a_layer_of_two_inputs_keeps_both():
    class Sum(nn.Module):
        def forward(self, a, b, scale=1.0):
            return a + scale * b

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.sum = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), Sum()

        def forward(self, x):
            return self.sum(self.one(x), b=self.other(x), scale=2.0).mean((2, 3))

    model = insert(Two(), "sum").eval()
    x = torch.rand(2, 3, 8, 8)
    with noise(model, "off"):
        expected = model.sum[1](model.one(x) + 2 * model.other(x)).mean((2, 3))
        assert torch.equal(model(x), expected)
        torch.testing.assert_close(fold(model)(x), expected)
    assert isinstance(model.sum, nn.Sequential) and "sum.1.conv1.weight" in model.state_dict()


def test_what_was_compiled_or_scripted_is_refused_with_what_works():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    compiled = torch.compile(net)
    for model, after in ((compiled, "1"), (compiled, "_orig_mod.1"), (nn.Sequential(compiled), "0._orig_mod.1")):
        with pytest.raises(ValueError, match=r"is compiled.*insert first, and compile the result"):
            insert(model, after)
    inside = copy.deepcopy(net)
    inside.compile()
    with pytest.raises(ValueError, match="the model is compiled"):
        insert(inside, "1")
    script = torch.jit.script(net)
    for model, after in ((script, "1"), (nn.Sequential(script), "0.1"), (nn.Sequential(script), "0")):
        with pytest.raises(ValueError, match=r"TorchScript, .*insert before scripting or tracing"):
            insert(model, after)
    insert(compiled._orig_mod, "1")
    assert net[1][1].channels == 4
    # Beside a scripted part, the rest can be changed.
    both = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), script)
    assert insert(both, "1")[1][1].channels == 3


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalized_is_the_network_behind_the_affine_map(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(dtype)
    x = torch.rand(2, 3, 5, 5, dtype=dtype)
    mean, std = torch.tensor(MEAN, dtype=dtype), torch.tensor(STD, dtype=dtype)
    expected = net((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    for values in ((MEAN, STD), (list(MEAN), list(STD)), (mean, std)):
        assert torch.equal(normalized(net, *values)(x), expected)
    assert torch.equal(normalized(net, 0.5, 0.25)(x), net((x - 0.5) / 0.25))
    assert torch.equal(normalized(net, 0, STD)(x), net(x / std.view(3, 1, 1)))


def test_the_gradient_is_in_pixels():
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    model = normalized(nn.Flatten().double(), MEAN, STD)
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    expected = (1 / torch.tensor(STD)).view(1, 3, 1, 1).double().expand_as(x)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)
    model = normalized(nn.Conv2d(3, 2, 3).double(), MEAN, STD)
    assert torch.autograd.gradcheck(model, (x,))


def test_normalized_is_an_ordinary_module_and_leaves_the_network_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    net[1].eval()
    model = normalized(net, MEAN, STD)
    assert model.model is net
    assert model.training
    assert not net[1].training
    assert not normalized(net.eval(), MEAN, STD).training
    assert set(model.state_dict()) == {f"model.{key}" for key in net.state_dict()}
    x = torch.rand(2, 3, 5, 5)
    for folded in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.fx.symbolic_trace(model)):
        assert torch.equal(folded(x), model(x))
    assert model.double()(x.double()).dtype == torch.float64
    insert(model, "model.0")
    assert model(x.double()).shape == (2, 36)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (MEAN, (1.0, 1.0), "mean has 3 values and std has 2"),
        (MEAN, (0.2, 0.0, 0.2), "std must be positive"),
        (0.5, -1, "std must be positive"),
        (0.5, float("nan"), "std must be one finite number or more"),
        ((0.1, float("inf"), 0.1), STD, "mean must be one finite number or more"),
        ((), (), "mean must be one finite number or more"),
        ("grey", STD, "mean must be a number or a sequence of numbers"),
        (None, STD, "mean must be a number or a sequence of numbers"),
    ],
)
def test_normalisation_that_cannot_be_is_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        normalized(nn.Flatten(), mean, std)
