"""Networks of a user: built, checked, described, and built again from the description."""

import importlib
import json
import sys
import types

import pytest
import torch
from torch import Tensor, nn

import gsem
import own_networks
from gsem._io import read_checkpoint, save_checkpoint
from gsem.nn.build import Wanted, build_network, named, rebuild_network
from gsem.nn.folded import fold
from gsem.nn.gsem import GSeM
from gsem.nn.insert import NORMALIZATION, Normalized


def wanted(name: str, **change) -> Wanted:
    name = f"own_networks:{name}" if hasattr(own_networks, name) else name
    return Wanted(**{"name": name, "shape": (1, 8, 8), "num_classes": 10} | change)


def images(n: int = 3) -> Tensor:
    return torch.rand((n, 1, 8, 8), generator=torch.Generator().manual_seed(0))


def same_answers(one: nn.Module, other: nn.Module) -> bool:
    one, other = one.eval(), other.eval()
    with gsem.noise(one, "off"), gsem.noise(other, "off"):
        return torch.allclose(one(images()), other(images()), atol=1e-5)  # (their layouts may differ)


CASES = {
    "a transformer": ("vit", {"insert_after": ("stem",)}),
    "two places, normalised": ("convolutional", {"insert_after": ("norm", "body.1"), "normalize": "0.5/0.25"}),
    "logits in a dict": ("holding", {"insert_after": ("stem",), "normalize": "0.5/0.25"}),
    "ours, with more": ("resnet10x16", {"insert_after": ("bn1",), "levels": 3, "noise": 1}),
}


@pytest.mark.parametrize(("name", "change"), CASES.values(), ids=CASES)
def test_a_network_is_built_again_from_its_description(name, change, tmp_path):
    w = wanted(name, **change)
    network, described = build_network(w)
    gsems = [m for m in network.modules() if isinstance(m, GSeM)]
    assert [(m.levels, m.noise) for m in gsems] == [(w.levels, w.noise)] * len(w.insert_after)
    assert network.training and network(images()).shape == (3, 10)
    again = rebuild_network(json.loads(json.dumps(described)))
    assert not same_answers(network, again)  # the weights are new
    save_checkpoint(tmp_path / "a.safetensors", network.state_dict(), {})
    again.load_state_dict(read_checkpoint(tmp_path / "a.safetensors")[0])
    assert same_answers(network, again)
    assert str(again) == str(network)


def test_the_network_of_this_package_is_described_by_its_arguments_alone():
    network, described = build_network(wanted("gsem-resnet10x16"))
    assert described == {
        **{"name": "gsem-resnet10x16", "num_classes": 10, "in_channels": 1, "levels": 6, "noise": 4},
        **{"gradient": "corrected", "quantiser": True},
    }
    assert gsem.create_model(**described).state_dict().keys() == network.state_dict().keys()


def test_the_normalised_network_sees_normalised_pixels():
    network, _ = build_network(wanted("resnet10x16", normalize="0.5/0.25"))
    assert isinstance(network, Normalized)
    assert torch.equal(network.eval()(images()), network.model((images() - 0.5) / 0.25))
    _, described = build_network(Wanted(name="resnet10x16", shape=(3, 8, 8), num_classes=4, normalize="cifar10"))
    again = rebuild_network(described)
    assert again.mean.flatten().tolist() == pytest.approx(NORMALIZATION["cifar10"][0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_works_whatever_the_layout_of_the_images(channels, layout):
    net = nn.Sequential(nn.Conv2d(channels, 1, 1), own_networks.Convolutional())
    network, described = build_network(Wanted(name="net", given=net, shape=(channels, 8, 8), num_classes=10))
    assert not described["own"]["channels_last"]
    x = torch.rand(3, channels, 8, 8).to(memory_format=layout)
    assert torch.equal(network(x), network(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.filterwarnings("error:fold runs")
@pytest.mark.parametrize("name", ["vit", "convolutional", "holding"])
def test_the_folded_model_answers_as_the_network_does(name):
    network, _ = build_network(wanted(name, insert_after=("stem",)))
    network = network.double().eval()
    folded, x = fold(network, torch.float64), images().double()
    found = []
    for model in (network, folded):
        pixels = x.clone().requires_grad_()
        with gsem.noise(network, "frozen", seed=1):
            logits = model(pixels)
        grad = torch.autograd.grad((logits * torch.arange(10)).sum(), pixels)[0]
        found.append(torch.cat([logits.detach().flatten(), grad.flatten()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("with_arguments", {}, r"needs arguments \(missing a required argument: 'classes'\).*def make\(\)"),
        ("failing", {}, "failing' failed: FileNotFoundError: .*'weights.pt'"),
        ("no_module", {}, "returned a str, not a torch.nn.Module"),
        ("of_five_classes", {}, "returns 5 logits, but the data have 10 classes"),
        ("of_one_logit", {}, r"one logit .*torch.cat\(\[-z, z\], 1\)"),
        ("two_faced", {}, "returns a Tensor in eval mode, a Outputs in train mode"),
        ("lazy", {}, r"shape of '1.weight' is not known yet \(a lazy layer\)"),
        ("frozen", {}, "no parameter that can be trained"),
        ("colour_network", {}, r"does not run on images \[4, 1, 8, 8\]"),
        ("Outputs", {}, "needs arguments"),
        ("own_networks:torch", {}, "is a module, not a function"),
        ("convolutional", {"insert_after": ("stemm",)}, "no layer 'stemm': near it are stem"),
        ("convolutional", {"insert_after": ("head",)}, "layers with such an output are: stem"),
        ("convolutional", {"insert_after": ("stem", "stem")}, "names a layer twice"),
        ("convolutional", {"normalize": "cifar10"}, "has 3 channels, but the images have 1"),
        ("convolutional", {"normalize": "cifar"}, "none of cifar10"),
        ("convolutional", {"normalize": "0.5/0"}, "std must be positive"),
    ],
)
def test_what_cannot_be_trained_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        build_network(wanted(name, **change))


@pytest.mark.parametrize("spec", ["own_networks:gone", "no_such_package.module:make"])
def test_a_factory_that_is_not_found(spec):
    with pytest.raises(ValueError, match=spec):
        build_network(wanted(spec))
    with pytest.raises(ValueError, match=spec):
        gsem.load_model(spec)


def test_names():
    assert named("GSeMResNet18") == "gsem-resnet18"
    assert named("own_networks:vit") == named(own_networks.vit) == "own_networks:vit"
    assert named(own_networks.TinyViT) == "own_networks:TinyViT"
    assert named(own_networks.TinyViT()) == "TinyViT"
    assert ":" not in named(lambda: own_networks.TinyViT())
    with pytest.raises(ValueError, match="unknown"):
        named("resnet19")


def test_a_given_network_is_copied_with_its_weights_and_asked_for_again():
    net = own_networks.convolutional()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    w = Wanted(name=named(net), given=net, insert_after=("stem",), shape=(1, 8, 8), num_classes=10)
    network, described = build_network(w)
    ours = network.get_submodule("model.stem.0")  # inside of a PlainLayout, for its view
    assert torch.equal(ours.weight, net.stem.weight) and ours is not net.stem
    assert net.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match=r"passed in Python \(Convolutional\).*model=net"):
        rebuild_network(described, run="runs/mine")
    again = rebuild_network(described, net)
    again.load_state_dict(network.state_dict())
    assert same_answers(network, again)
    with pytest.raises(ValueError, match="another structure"):
        rebuild_network(described, own_networks.TinyViT())


def test_a_change_of_the_factorys_source_is_noticed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "my_changing_net.py"
    text = "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    file.write_text(text)
    _, described = build_network(wanted("my_changing_net:make"))
    assert described["own"]["source"]["folder"] == str(tmp_path)
    for changed, message in (
        (f"{text}# a comment\n", "changed since runs/a began: the network"),
        (text.replace("nn.Flatten()", "nn.Flatten(), nn.ReLU()"), "and its modules or settings differ"),
    ):
        file.write_text(changed)
        sys.modules.pop("my_changing_net")
        with pytest.warns(UserWarning, match=message):
            rebuild_network(described, run="runs/a")
    sys.modules.pop("my_changing_net")
    file.unlink()
    with pytest.raises(ValueError, match=rf"cannot be built.*my_changing_net.*Run the command in {tmp_path}"):
        rebuild_network(described, run="runs/a")


@pytest.fixture
def timm(monkeypatch):
    """A stand-in with timm's `create_model`."""

    def create_model(name, num_classes=10, in_chans=1, pretrained=False):
        if name != "small":
            raise RuntimeError(f"Unknown model ({name})")
        net = nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, num_classes))
        if pretrained:
            nn.init.constant_(net[3].bias, 7.0)
        return net

    module = types.SimpleNamespace(create_model=create_model, __version__="1.2.3")
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_a_network_of_timm(timm):
    _, described = build_network(wanted("timm:small", insert_after=("1",), num_classes=7))
    assert described["own"]["source"]["hash"] == "1.2.3"
    assert rebuild_network(described)(images()).shape == (3, 7)
    with pytest.raises(ValueError, match=r"timm.create_model\('huge'\) failed.*Unknown model"):
        build_network(wanted("timm:huge"))
    timm.__version__ = "1.3"
    with pytest.warns(UserWarning, match=r"'timm:small' changed since"):
        rebuild_network(described)


def test_a_pretrained_network_of_timm_is_loaded_to_be_evaluated(timm):
    model, metadata = gsem.load_model("timm:small")
    assert (model[3].bias == 7).all() and not model.training and metadata == {}
    with pytest.raises(ValueError, match=r"timm.create_model\('huge'\) failed"):
        gsem.load_model("timm:huge")


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for load in (lambda: build_network(wanted("timm:small")), lambda: gsem.load_model("timm:small")):
        with pytest.raises(ValueError, match="'timm:small' needs the package timm"):
            load()


def test_tied_tensors_are_stored_once_and_overlapping_ones_apart(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"a": whole, "again": whole, "rows": whole[:2], "none": torch.zeros(0), "nothing": torch.zeros(0)}
    save_checkpoint(tmp_path / "c.safetensors", tensors, {})
    back, _ = read_checkpoint(tmp_path / "c.safetensors")
    assert all(torch.equal(back[name], t) for name, t in tensors.items())
    assert back["again"] is back["a"]
    assert (tmp_path / "c.safetensors").stat().st_size < 4 * (12 + 8) + 500


def test_tracing_leaves_no_name_in_the_modules_of_the_network():
    fold(own_networks.convolutional())
    assert "len" not in vars(own_networks)


def test_timm_itself():
    try:
        importlib.import_module("timm")
    except Exception as error:
        pytest.skip(f"timm does not import here: {error}")
    network, described = build_network(
        Wanted(name="timm:resnet18", shape=(3, 32, 32), num_classes=5, insert_after=("act1",), normalize="imagenet")
    )
    assert network.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    assert str(rebuild_network(described)) == str(network)
