"""Model families: published parameter counts and state-dict names, and the reading of published files."""

import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gsem.nn.convnext import ConvNeXtBlock
from gsem.nn.gsem import GSeM, noise
from gsem.nn.models import MODELS, canonical_name, create_model, load_published
from gsem.nn.resnets import PreActBlock
from gsem.nn.vit import Attention, sincos_positions

SMALL = [
    f"{prefix}{name}"
    for name in ("resnet10x16", "wideresnet10x2", "preactresnet10x16", "vit2x32", "convnext3x16")
    for prefix in ("gsem-", "")
]


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("gsem-resnet18", 10, 11_251_978),
        ("resnet18", 10, 11_173_962),
        ("gsem-resnet18", 100, 11_298_148),
        ("gsem-resnet34", 10, 21_360_138),
        ("gsem-resnet50", 10, 23_598_858),
        ("gsem-wideresnet28x10", 10, 36_645_546),
        ("wideresnet28x10", 10, 36_567_530),
        ("wideresnet28x10-silu", 10, 36_567_530),
        ("preactresnet18", 10, 11_172_170),  # Rice et al., whose last BatchNorm adds 1,024 to 11,171,146
        ("preactresnet18-silu", 10, 11_172_170),
        # ViT-S/16 and ConvNeXt-T for 1,000 classes: of timm's vit_small_patch16_224, 22,050,664, less its class token
        # (384) and its learned positions (197 · 384).
        ("vit-small-patch16", 1000, 22_050_664 - 384 - 197 * 384),
        ("convnext-tiny-patch4", 1000, 28_589_128),
    ],
)
def test_parameter_counts_are_the_published_ones(name, classes, count):
    model = on_meta(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == count


NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
CONV, BIASED = ["weight"], ["weight", "bias"]
GSEM = {"gsem_module.conv1": BIASED, "gsem_module.conv2": CONV, "gsem_module.bn": NORM}


def full(names: dict[str, list[str]]) -> set[str]:
    return {f"{layer}.{leaf}" for layer, leaves in names.items() for leaf in leaves}


def resnet18_names() -> set[str]:
    names = {"conv1": CONV, "bn1": NORM, "linear": BIASED} | GSEM
    for stage in range(1, 5):
        for i in range(2):
            names |= {f"layer{stage}.{i}.conv{k}": CONV for k in (1, 2)}
            names |= {f"layer{stage}.{i}.bn{k}": NORM for k in (1, 2)}
        if stage > 1:
            names |= {f"layer{stage}.0.shortcut.0": CONV, f"layer{stage}.0.shortcut.1": NORM}
    return full(names)


def wideresnet28_names() -> set[str]:
    names = {"conv1": BIASED, "bn1": NORM, "linear": BIASED} | GSEM
    for stage in range(1, 4):
        for i in range(4):
            names |= {f"layer{stage}.{i}.conv{k}": BIASED for k in (1, 2)}
            names |= {f"layer{stage}.{i}.bn{k}": NORM for k in (1, 2)}
        names |= {f"layer{stage}.0.shortcut.0": BIASED}
    return full(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", resnet18_names()), ("wideresnet28x10", wideresnet28_names())],
)
def test_state_dict_names_are_the_published_ones(name, expected):
    assert set(on_meta(f"gsem-{name}").state_dict()) == expected
    assert set(on_meta(name).state_dict()) == {key for key in expected if "gsem" not in key}
    assert isinstance(on_meta(name).gsem_module, nn.Identity)


def test_bottlenecks_have_three_convolutions_and_the_shortcut_of_each_stage_is_projected():
    keys = set(on_meta("resnet50").state_dict())
    assert {f"layer1.2.conv{k}.weight" for k in (1, 2, 3)} < keys
    projected = {key for key in keys if key.endswith("shortcut.0.weight")}
    assert projected == {f"layer{stage}.0.shortcut.0.weight" for stage in range(1, 5)}


def test_a_wide_block_is_preactivated_and_strides_in_its_second_convolution():
    torch.manual_seed(0)
    block = create_model("wideresnet10x2").double().eval().layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.shortcut[0].stride) == ((1, 1), (2, 2), (2, 2))
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    inner = block.conv2(torch.relu(block.bn2(block.conv1(torch.relu(block.bn1(x))))))
    torch.testing.assert_close(block(x), inner + block.shortcut[0](x), rtol=0, atol=1e-12)


def doubled(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, no parameter at a value that hides it."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.double().eval()


@pytest.mark.parametrize("activation", [F.relu, F.silu])
def test_a_preactivated_block_projects_what_it_activated(activation):
    torch.manual_seed(0)
    block, x = doubled(PreActBlock(4, 8, 2, activation)), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    activated = activation(block.bn1(x))
    inner = block.conv2(activation(block.bn2(block.conv1(activated))))
    assert torch.equal(block(x), inner + block.shortcut[0](activated))
    assert inner.shape == (2, 8, 3, 3)
    plain = doubled(PreActBlock(4, 4, 1, activation))
    inner = plain.conv2(activation(plain.bn2(plain.conv1(activation(plain.bn1(x))))))
    assert torch.equal(plain(x), inner + x)


def test_attention_is_torchs():
    torch.manual_seed(0)
    ours, x = doubled(Attention(8, heads=2)), torch.randn(3, 5, 8, dtype=torch.float64)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=0, atol=1e-12)


def test_the_product_of_two_positions_depends_on_their_distance_alone():
    waves = sincos_positions(torch.zeros(1, 16, 4, 5, dtype=torch.float64))[0]
    products = (waves @ waves.T).view(4, 5, 4, 5)
    torch.testing.assert_close(products[:3, :4, :3, :4], products[1:, 1:, 1:, 1:], rtol=0, atol=1e-12)
    assert len({tuple(row) for row in waves.tolist()}) == 20


def test_a_convnext_block_scales_its_branch():
    torch.manual_seed(0)
    block, x = doubled(ConvNeXtBlock(4)), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    pixels = block.dwconv(x).movedim(1, 3)
    mean, variance = pixels.mean(3, keepdim=True), pixels.var(3, keepdim=True, correction=0)
    normal = (pixels - mean) / (variance + 1e-6).sqrt() * block.norm.weight + block.norm.bias
    branch = block.pwconv2(F.gelu(block.pwconv1(normal))) * block.gamma
    torch.testing.assert_close(block(x), x + branch.movedim(3, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "p"), [("28x10", None), ("28x20", 0.3), ("40x10", 0.3), ("40x14", 0.3)])
def test_dropout_of_the_wide_resnets(name, p):
    model = on_meta(f"wideresnet{name}")
    found = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert found == ({p} if p else set())
    assert len(model.layer1) == (4 if name.startswith("28") else 6)
    assert model.bn1.momentum == 0.9


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 8, 8), (3, 2, 17, 12)])
def test_any_image_size_and_channel_count(name, shape):
    model = create_model(name, num_classes=7, in_channels=shape[1]).eval()
    assert model(torch.rand(shape)).shape == (shape[0], 7)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_is_built_and_gives_logits(name):
    model = on_meta(name, num_classes=3).eval()
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 3)
    assert any(isinstance(m, GSeM) for m in model.modules()) == name.startswith("gsem-")
    assert MODELS[name]


@pytest.mark.parametrize("name", ["resnet10x16", "resnet50", "wideresnet10x2", "wideresnet28x20"])
def test_plain_models_are_traced_by_fx_to_the_same_function(name):
    traced = torch.fx.symbolic_trace(on_meta(name))
    assert {n.op for n in traced.graph.nodes} <= {
        "placeholder",
        "call_module",
        "call_function",
        "call_method",
        "output",
    }
    if name in SMALL:
        model = create_model(name).eval()
        x = torch.rand(2, 3, 16, 16)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_the_small_resnet_costs_under_60_mflop():
    with FlopCounterMode(display=False) as counter:
        on_meta("gsem-resnet10x16")(torch.empty(1, 3, 32, 32, device="meta"))
    assert 0 < counter.get_total_flops() < 60e6


def test_gsem_arguments_reach_the_module_and_mean_nothing_to_a_plain_model():
    module = create_model("gsem-resnet10x16", levels=3, noise=2, gradient="semi-masked").gsem_module
    assert (module.channels, module.levels, module.noise, module.gradient) == (16, 3, 2, "semi-masked")
    create_model("resnet10x16", levels=0, noise=-1, gradient="none")


def test_initialisation_follows_the_seed():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(create_model("gsem-resnet10x16").linear.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("GSeMResNet18", "gsem-resnet18"),
        ("GSeMWideResNet28x10", "gsem-wideresnet28x10"),
        ("ResNet18", "resnet18"),
        ("gsem_resnet_18", "gsem-resnet18"),
        ("WIDERESNET-40x14", "wideresnet40x14"),
        *((name, name) for name in MODELS),
    ],
)
def test_names_are_known_by_every_spelling(spelling, name):
    assert canonical_name(spelling) == name


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(ValueError, match=r"'GSeMResNet19' is unknown.*gsem-resnet18"):
        canonical_name("GSeMResNet19")
    with pytest.raises(ValueError, match=r"'zzz' is unknown.*gsem-resnet18"):
        create_model("zzz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be an integer of at least 2"),
        ({"num_classes": 10.0}, "num_classes must be an integer"),
        ({"in_channels": 0}, "in_channels must be an integer of at least 1"),
        ({"levels": 0}, "levels must be an integer of at least 1"),
        ({"noise": -1}, "noise must be an integer of at least 0"),
        ({"gradient": "half"}, "corrected, semi-masked"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model("gsem-resnet10x16", **arguments)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("gsem-resnet10x16", num_classes=7)


@pytest.mark.parametrize("spelling", ["gsem-resnet10x16", "GSeMResNet10x16"])
@pytest.mark.parametrize("wrap", ["bare", "parallel", "state_dict", "model"])
def test_saved_weights_come_back(model, tmp_path, spelling, wrap):
    state = model.state_dict()
    if wrap != "bare":
        state = {f"module.{key}": value for key, value in state.items()}
    if wrap in ("state_dict", "model"):
        state = {wrap: state, "epoch": 3}
    torch.save(state, tmp_path / "a.pt")
    loaded = load_published(tmp_path / "a.pt", name=spelling, num_classes=7, levels=5, noise=3)
    assert not any(m.training for m in loaded.modules())
    assert (loaded.gsem_module.levels, loaded.gsem_module.noise) == (5, 3)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    # A string is a path too, and with the same levels and noise the function is the same.
    loaded = load_published(str(tmp_path / "a.pt"), name=spelling, num_classes=7)
    x = torch.rand(2, 3, 8, 8)
    with noise(loaded, "frozen"), noise(model.eval(), "frozen"):
        assert torch.equal(loaded(x), model(x))


def refusal(path, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        load_published(path, **({"name": "gsem-resnet10x16", "num_classes": 7} | kwargs))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_another_architecture_is_refused_with_the_names_that_differ(model, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(model.state_dict(), path)
    message = refusal(path, name="resnet10x16")
    assert "8 unexpected, the first 'gsem_module.conv1.weight'" in message
    assert "missing" not in message
    message = refusal(path, name="gsem-resnet18")
    assert "missing, the first 'layer1.1.conv1.weight'" in message
    message = refusal(path, name="wideresnet10x2")
    assert "missing, the first 'conv1.bias'" in message
    assert "unexpected, the first 'bn1." in message or "unexpected, the first 'gsem_module." in message


def test_a_wrong_shape_is_refused_with_both_shapes_and_a_hint(model, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(model.state_dict(), path)
    message = refusal(path, num_classes=10)
    assert "'linear.weight' has shape (7, 128), not (10, 128)" in message
    assert "num_classes" in message
    message = refusal(path, in_channels=1)
    assert "'conv1.weight' has shape (16, 3, 3, 3), not (16, 1, 3, 3)" in message
    assert "in_channels" in message


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_malicious_file_is_refused_and_not_executed(tmp_path, save):
    path, mark = tmp_path / "evil.pt", tmp_path / "executed"
    if save == "torch":
        torch.save({"conv1.weight": Malicious(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(mark), protocol=2))
    assert "nothing in it was executed" in refusal(path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n", b"PK\x03\x04 broken", bytes(range(256)) * 9])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "text.pt"
    path.write_bytes(content)
    assert "nothing in it was executed" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "a list"),
        ({}, "a dict"),
        (torch.zeros(3), "a Tensor"),
        ({0: torch.zeros(3)}, "a dict"),
        ({"conv1.weight": 3}, "'conv1.weight' is of type int, not a tensor"),
    ],
)
def test_a_checkpoint_that_is_no_state_dict_is_refused(tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert message in refusal(path)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_published(tmp_path / "absent.pt", name="resnet10x16")
    assert "no file" in refusal(tmp_path)
