"""The GSeM module against its formula, written out again here by hand."""

import copy
import pickle
import shutil
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsem.nn.gsem import GSeM, IntegerNoise, noise, pass_through
from in_memory import InMemory

DEFAULTS = (6, 4)


def make(channels: int = 4, dtype: torch.dtype = torch.float32, *, seed: int = 0, **kwargs) -> GSeM:
    """A GSeM in eval mode whose BatchNorm is not the identity."""
    torch.manual_seed(seed)
    module = GSeM(channels, **kwargs)
    for tensor in (module.bn.weight, module.bn.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    for tensor in (module.bn.bias, module.bn.running_mean):
        nn.init.normal_(tensor)
    return module.to(dtype).eval()


def features(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tail(module: GSeM, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What follows the quantiser, by hand."""
    return F.mish(module.bn(module.conv2(torch.cat([x, module.conv1(q)], dim=1))))


# --- the value ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["corrected", "semi-masked"])
@pytest.mark.parametrize(("levels", "largest"), [DEFAULTS, (1, 1), (255, 8), (3, 0)])
@pytest.mark.parametrize("mode", ["fresh", "frozen", "off"])
def test_q_is_exactly_the_rounded_feature_and_an_integer_over_levels(levels, largest, mode, gradient):
    module = make(levels=levels, noise=largest, gradient=gradient)
    x = features(2, 4, 16, 16)
    with noise(module, mode, seed=3):
        integers = module.integers(x)
    with noise(module, mode, seed=3):
        q = module.quantise(x)
    n = integers - torch.round(levels * x)
    assert torch.equal(n, n.round())
    assert n.abs().max() == (0 if mode == "off" else largest)
    assert torch.equal(q, integers / levels)


@pytest.mark.parametrize("gradient", ["corrected", "semi-masked"])
def test_the_output_is_the_formula_and_does_not_depend_on_the_gradient(gradient):
    module = make(gradient=gradient)
    x = features(2, 4, 7, 5)
    with noise(module, "frozen", seed=1):
        expected = tail(module, x, module.integers(x) / module.levels)
        assert torch.equal(module(x), expected)
        module.gradient = "semi-masked" if gradient == "corrected" else "corrected"
        assert torch.equal(module(x), expected)


def test_pass_through_is_exactly_the_value_where_the_usual_helper_is_not():
    module, x = make(), features(1, 4, 100, 100)
    torch.manual_seed(0)
    value = module.integers(x) / module.levels
    assert torch.equal(pass_through(x, value), value)
    assert 0.06 < (x + (value - x) != value).double().mean() < 0.12


def draws(module: GSeM, how: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Integers by torch's stream or by the hash, with one seed."""
    torch.manual_seed(7)
    with noise(module, "frozen" if how == "frozen" else "fresh", seed=None if how == "stream" else 7):
        return module.offsets(torch.zeros(shape)).flatten().long()


# Chi-square quantiles at 0.999; the seeds are fixed, so the tests do not fluctuate.
CHI2_8, CHI2_80 = 26.12, 124.84


@pytest.mark.parametrize("how", ["stream", "seeded", "frozen"])
def test_the_noise_is_uniform_and_independent_of_its_neighbour(how):
    n = draws(make(), how, (1, 4, 300, 300)) + 4
    count = torch.bincount(n, minlength=9).double()
    assert len(count) == 9
    expected = len(n) / 9
    assert ((count - expected) ** 2 / expected).sum() < CHI2_8
    for lag in (1, 300, 90_000):
        # Disjoint pairs, so that the pairs are independent of each other.
        blocks = n[: len(n) // (2 * lag) * 2 * lag].view(-1, 2, lag)
        count = torch.bincount((9 * blocks[:, 0] + blocks[:, 1]).flatten(), minlength=81).double()
        expected = count.sum() / 81
        assert ((count - expected) ** 2 / expected).sum() < CHI2_80


def test_seeded_noise_is_independent_between_images_draws_modules_and_seeds():
    model = nn.Sequential(make(), make())
    x = torch.zeros(2, 4, 100, 100)
    samples = []
    for seed in (0, 1, -1, 2**40):
        with noise(model, "fresh", seed=seed):
            for _ in range(2):
                for m in model:
                    samples += list(m.offsets(x).flatten(1))
    correlations = torch.corrcoef(torch.stack(samples)) - torch.eye(len(samples))
    # 496 pairs of 40,000 elements each: a standard deviation is 1/200, and five of them are not reached.
    assert correlations.abs().max() < 5 / 200


@pytest.mark.parametrize(("levels", "largest"), [DEFAULTS, (3, 1)])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_noise_has_the_standard_deviation_of_the_paper(levels, largest, seed):
    module = make(levels=levels, noise=largest)
    x = torch.zeros(1, 4, 300, 300)
    torch.manual_seed(0)
    with noise(module, "fresh", seed=seed):
        q = module.quantise(x)
    expected = (largest * (largest + 1) / 3) ** 0.5 / levels
    assert q.std().item() == pytest.approx(expected, rel=0.005)
    assert q.mean().item() == pytest.approx(0, abs=5 * expected / 600)


# --- the gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [False, True])
def test_corrected_is_exactly_straight_plus_quantised_and_semi_masked_is_straight(dtype, training):
    module = make(dtype=dtype).train(training)
    x = features(2, 4, 8, 8, dtype=dtype).requires_grad_()
    weights = features(2, 4, 8, 8, dtype=dtype, seed=2)
    with noise(module, "frozen", seed=1):
        q = (module.integers(x) / module.levels).requires_grad_()
        grad_x, grad_q = torch.autograd.grad((tail(module, x, q) * weights).sum(), (x, q))
        grads = {}
        for module.gradient in ("corrected", "semi-masked"):
            (grads[module.gradient],) = torch.autograd.grad((module(x) * weights).sum(), x)
    assert grad_q.abs().max() > 0
    assert torch.equal(grads["corrected"], grad_x + grad_q)
    assert torch.equal(grads["semi-masked"], grad_x)


def test_the_gradient_of_the_parameters_does_not_depend_on_the_correction():
    module = make()
    x = features(2, 4, 8, 8).requires_grad_()
    grads = []
    with noise(module, "frozen"):
        for module.gradient in ("corrected", "semi-masked"):
            grads.append(torch.autograd.grad(module(x).square().sum(), list(module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def between_boundaries(*shape: int, levels: int = 6) -> torch.Tensor:
    """Points in float64 at least 0.05 / levels from where `round` jumps: more than any finite difference moves."""
    generator = torch.Generator().manual_seed(3)
    level = torch.randint(-8, 9, shape, generator=generator)
    part = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * 0.9
    x = (level + part) / levels
    assert ((levels * x - 0.5) - (levels * x - 0.5).round()).abs().min() / levels > 1e-3
    return x.requires_grad_()


def test_semi_masked_is_the_true_derivative_and_corrected_is_not():
    module = make(2, torch.float64)
    x = between_boundaries(1, 2, 3, 4)
    with noise(module, "off"):
        module.gradient = "semi-masked"
        assert torch.autograd.gradcheck(module, (x,))
        module.gradient = "corrected"
        assert not torch.autograd.gradcheck(module, (x,), raise_exception=False)


def test_corrected_is_the_gradient_of_the_network_whose_quantiser_is_a_constant_shift():
    module = make(2, torch.float64)
    x = between_boundaries(2, 2, 5, 5)
    weights = features(2, 2, 5, 5, dtype=torch.float64)
    with noise(module, "frozen", seed=4):
        shift = (module.integers(x) / module.levels - x).detach()
        # x + shift is q but for rounding, so the two gradients are too.
        (expected,) = torch.autograd.grad((tail(module, x, x + shift) * weights).sum(), x)
        (found,) = torch.autograd.grad((module(x) * weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_averaging_over_the_noise_does_not_unmask_the_gradient():
    # The semi-masked gradient of the quantised pathway alone is zero at every draw: nothing to average.
    module = make(gradient="semi-masked")
    x = features(1, 4, 5, 5).requires_grad_()
    assert not module.quantise(x).requires_grad
    module.gradient = "corrected"
    (grad,) = torch.autograd.grad(module.quantise(x).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


# --- noise control -----------------------------------------------------------------------------------------------


def test_fresh_noise_differs_between_calls_and_follows_torchs_stream():
    module, x = make(), features(2, 4, 8, 8)
    torch.manual_seed(3)
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    with noise(module, "fresh"):
        assert torch.equal(module(x), first)
        assert torch.equal(module(x), second)


def test_seeded_fresh_noise_is_reproducible_and_leaves_torchs_state_alone():
    module, x = make(), features(2, 4, 8, 8)
    state = torch.get_rng_state()
    runs = []
    for seed in (3, 3, 4):
        with noise(module, "fresh", seed=seed):
            runs.append((module(x), module(x)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(runs[0][0], runs[0][1])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])
    # Images of one batch have noise of their own.
    with noise(module, "fresh", seed=3):
        n = module.offsets(x)
    assert not torch.equal(n[0], n[1])


def test_seeded_noise_holds_two_words_for_each_feature():
    module, x = make(), features(2, 4, 16, 16)
    with noise(module, "fresh", seed=3), InMemory() as memory:
        module.offsets(x)
    assert 16 * x.numel() <= memory.most <= 17 * x.numel()


def mixed(word: int) -> int:
    """SplitMix64's finaliser in Python's integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("seed", [0, -7])
def test_seeded_noise_is_the_hash_of_seed_draw_and_place(seed, layout):
    source, x = IntegerNoise(4), torch.zeros(2, 3, 4, 5).to(memory_format=layout)
    key = (seed * 0x2545F4914F6CDD1D + 1) % 2**63
    with noise(source, "fresh", seed=seed):
        found = [source(x), source(x, 2)]
    for draw, n in enumerate(found):
        words = [mixed((mixed(mixed(key) + draw) + place) % 2**64) for place in range(n.numel())]
        assert n.reshape(-1).tolist() == [word % 2**31 % 9 - 4 for word in words]


def test_off_and_frozen_leave_torchs_state_alone_and_off_is_quantisation_only():
    module, x = make(), features(2, 4, 8, 8)
    state = torch.get_rng_state()
    with noise(module, "off"):
        assert torch.equal(module.quantise(x), torch.round(6 * x) / 6)
    with noise(module, "frozen"):
        module(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_offsets_are_the_same_for_every_image_call_batch_and_dtype():
    module = make()
    with noise(module, "frozen", seed=9):
        n = module.offsets(torch.zeros(1, 4, 8, 8))
        assert n.shape == (1, 4, 8, 8)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            assert torch.equal(module.offsets(torch.zeros(5, 4, 8, 8, dtype=dtype)).float(), n)
    with noise(module, "frozen", seed=10):
        assert not torch.equal(module.offsets(torch.zeros(1, 4, 8, 8)), n)
    with noise(module, "frozen", seed=0):
        zero = module.offsets(torch.zeros(1, 4, 8, 8))
    with noise(module, "frozen"):
        assert torch.equal(module.offsets(torch.zeros(1, 4, 8, 8)), zero)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_frozen_logits_of_an_image_do_not_depend_on_its_neighbours(dtype, atol):
    # Two modules, so that a second quantiser sees what the first gave. Not torch.equal: by the batch size a
    # convolution may choose another algorithm, which sums in another order. The stem keeps its products exact
    # (integer weights and sixteenths), so that no feature of the first falls on the other side of a rounding
    # boundary; the second quantiser sees sums that differ by 1e-7, and no feature of this seed is that near one.
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 3, bias=False)
    nn.init.zeros_(stem.weight)
    with torch.no_grad():
        stem.weight += torch.randint(-1, 2, stem.weight.shape)
    net = nn.Sequential(stem, make(seed=0), make(seed=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(dtype).eval()
    x = torch.randint(0, 16, (6, 3, 8, 8)).to(dtype) / 16
    with noise(net, "frozen", seed=2), torch.no_grad():
        alone = torch.cat([net(image[None]) for image in x])
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        for found, expected in (
            (net(x), alone),
            (net(x[order]), alone[order]),
            (net(x[2:4]), alone[2:4]),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def state_of(module: GSeM) -> tuple:
    return module.offsets.mode, module.offsets.seeded, module.offsets.key.tolist()


def test_blocks_nest_and_the_former_state_returns_also_after_an_exception():
    module, x = make(), features(2, 4, 8, 8)
    before = state_of(module)
    with noise(module, "fresh", seed=1):
        expected = [module(x), module(x)]
    with noise(module, "fresh", seed=1):
        assert torch.equal(module(x), expected[0])
        with noise(module, "off"):
            assert torch.equal(module(x), module(x))
            with noise(module, "fresh", seed=8):
                module(x)
            with pytest.raises(RuntimeError, match="inside"), noise(module, "frozen", seed=2):
                raise RuntimeError("inside")
            assert state_of(module)[0] == "off"
        # The sequence resumes where the inner blocks interrupted it.
        assert torch.equal(module(x), expected[1])
    assert state_of(module) == before


@pytest.mark.parametrize("mode", ["fresh", "frozen"])
def test_several_modules_of_a_model_have_different_noise(mode):
    model, x = nn.Sequential(make(), make(), nn.Sequential(make())), torch.zeros(1, 4, 8, 8)
    with noise(model, mode, seed=1):
        n = [m.offsets(x) for m in model.modules() if isinstance(m, GSeM)]
    assert not any(torch.equal(a, b) for i, a in enumerate(n) for b in n[:i])


@pytest.mark.parametrize("mode", ["fresh", "frozen"])
def test_any_integer_is_a_seed(mode):
    module, x = make(), torch.zeros(1, 4, 8, 8)
    seen = []
    for seed in (0, 1, -1, 2**62, -(2**70) - 5, 10**30):
        with noise(module, mode, seed=seed):
            n = module.offsets(x)
        assert n.abs().max() <= 4
        assert not any(torch.equal(n, other) for other in seen)
        seen.append(n)


def test_a_model_without_gsem_has_no_noise_to_set():
    layer, x = nn.Linear(2, 2), torch.rand(3, 2)
    with noise(layer, "off"):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


def test_copies_are_independent():
    module, x = make(), features(1, 4, 8, 8)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for folded in copies:
        with noise(module, "off"):
            assert state_of(folded)[0] == "fresh"
            assert torch.equal(module(x), module(x))
            assert not torch.equal(folded(x), folded(x))
        folded.gradient = "semi-masked"
        assert module.gradient == "corrected"
        with noise(module, "frozen", seed=2), noise(folded, "frozen", seed=2):
            assert torch.equal(module(x), folded(x))


def test_control_works_in_inference_mode():
    module, x = make(), features(1, 4, 8, 8)
    with noise(module, "fresh", seed=1):
        expected = [module(x), module(x)]
    with torch.inference_mode(), noise(module, "fresh", seed=1):
        assert all(torch.equal(module(x), value) for value in expected)
    with noise(module, "fresh", seed=1):
        assert torch.equal(module(x), expected[0])


# --- compilers ---------------------------------------------------------------------------------------------------

MODES = [("off", None), ("frozen", 3), ("fresh", 3)]


@pytest.mark.parametrize("training", [False, True])
def test_compiled_in_one_graph_it_equals_eager(training):
    torch._dynamo.reset()
    module = make().train(training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = features(2, 4, 8, 8).requires_grad_()
    for mode, seed in MODES:
        with noise(module, mode, seed=seed):
            eager = [module(x), module(x)]
            (grad,) = torch.autograd.grad(eager[1].square().sum(), x)
        with noise(module, mode, seed=seed):
            found = [compiled(x), compiled(x)]
            (found_grad,) = torch.autograd.grad(found[1].square().sum(), x)
        assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))
        assert torch.equal(grad, found_grad)
    assert not torch.equal(compiled(x), compiled(x))


def test_another_seed_or_draw_is_no_new_graph():
    torch._dynamo.reset()
    module = make()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in range(4):
            with noise(module, "fresh", seed=seed):
                compiled(features(2, 4, 8, 8))
                compiled(features(2, 4, 8, 8))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_compiled_to_machine_code_it_equals_eager_to_rounding():
    torch._dynamo.reset()
    module = make()
    compiled = torch.compile(module, fullgraph=True)
    x = features(2, 4, 8, 8)
    with torch.no_grad():
        for mode, seed in MODES:
            with noise(module, mode, seed=seed):
                eager = module(x)
            with noise(module, mode, seed=seed):
                torch.testing.assert_close(compiled(x), eager, rtol=0, atol=1e-5)
        assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("mode", ["off", "frozen", "fresh"])
def test_it_is_exported(mode):
    module, x = make(), features(2, 4, 8, 8)
    with noise(module, mode, seed=2 if mode == "frozen" else None), torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
        if mode == "fresh":
            assert not torch.equal(exported(x), exported(x))
        else:
            assert torch.equal(exported(x), module(x))


# --- dtypes, layouts, devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mode", "seed"), [*MODES, ("fresh", None)])
def test_every_floating_dtype(dtype, mode, seed):
    module = make(dtype=dtype)
    x = features(2, 4, 8, 8, dtype=dtype).requires_grad_()
    with noise(module, mode, seed=seed):
        out = module(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert out.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["corrected", "semi-masked"])
def test_autocast(low, gradient):
    module = make(gradient=gradient)
    stem = nn.Conv2d(3, 4, 3, padding=1)
    x = features(2, 3, 8, 8).requires_grad_()
    with noise(module, "frozen"):
        exact = module(stem(x))
        with torch.autocast("cpu", low):
            for dtype in (low, torch.float32):  # a stem inside autocast, and features from outside
                out = module(stem(x).to(dtype))
                out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    # A low-precision feature may be rounded to the neighbouring level: loose, and on the average.
    assert (out.float() - exact).abs().mean() < 0.1


@pytest.mark.parametrize(("mode", "seed"), [*MODES, ("fresh", None)])
def test_channels_last_stays_channels_last(mode, seed):
    module = make().to(memory_format=torch.channels_last)
    x = features(2, 4, 8, 6)
    with noise(module, mode, seed=seed):
        torch.manual_seed(0)
        expected = module(x)
    with noise(module, mode, seed=seed):
        torch.manual_seed(0)
        out = module(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_seeded_noise_is_the_same_on_cuda(mode, seed):
    module, x = make(), features(2, 4, 8, 8)
    with noise(module, mode, seed=seed):
        expected = module(x), module.offsets(x)
    module.cuda()
    with noise(module, mode, seed=seed):
        found = module(x.cuda()), module.offsets(x.cuda())
    assert torch.equal(found[1].cpu(), expected[1])
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=1e-2)


# --- construction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be an integer of at least 1, not 0"),
        ({"channels": 4.0}, "channels must be an integer of at least 1, not 4.0"),
        ({"levels": 0}, "levels must be an integer of at least 1, not 0"),
        ({"levels": True}, "levels must be an integer of at least 1, not True"),
        ({"levels": Fraction(8, 255)}, "levels must be an integer"),
        ({"noise": -1}, "noise must be an integer of at least 0, not -1"),
        ({"noise": "4"}, "noise must be an integer of at least 0, not '4'"),
        ({"noise": None}, "noise must be an integer of at least 0, not None"),
        ({"gradient": "masked"}, "'masked' is unknown: it is one of corrected, semi-masked"),
        ({"gradient": None}, "None is unknown: it is one of corrected, semi-masked"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GSeM(**({"channels": 4} | arguments))


def test_the_gradient_can_be_set_later_and_is_still_checked():
    module = make()
    module.gradient = "semi-masked"
    with pytest.raises(ValueError, match="it is one of corrected, semi-masked"):
        module.gradient = "corrected "
    assert module.gradient == "semi-masked"
    assert "gradient='semi-masked'" in repr(module)


@pytest.mark.parametrize(
    ("mode", "seed", "message"),
    [
        ("on", None, "'on' is unknown: it is one of fresh, off, frozen"),
        (None, None, "None is unknown: it is one of fresh, off, frozen"),
        ("fresh", 1.5, "seed must be an integer or None, not 1.5"),
        ("frozen", True, "seed must be an integer or None, not True"),
    ],
)
def test_bad_noise_control_is_refused_and_changes_nothing(mode, seed, message):
    module = make()
    before = state_of(module)
    with pytest.raises(ValueError, match=message), noise(module, mode, seed=seed):
        pass
    assert state_of(module) == before


def test_the_state_dict_and_the_parameter_count_are_the_published_ones():
    module = GSeM(64)
    norm = {f"bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(module.state_dict()) == {"conv1.weight", "conv1.bias", "conv2.weight"} | norm
    assert sum(p.numel() for p in module.parameters()) == 78_016
    assert (module.levels, module.noise, module.gradient) == (6, 4, "corrected")


def test_without_noise_every_mode_is_off():
    offsets, x = IntegerNoise(0), torch.zeros(2, 3, 4, 4)
    state = torch.get_rng_state()
    for mode in ("fresh", "off", "frozen"):
        with noise(offsets, mode):
            assert torch.equal(offsets(x), torch.zeros(1, 3, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)
