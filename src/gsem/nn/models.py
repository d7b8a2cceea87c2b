"""CIFAR ResNets and pre-activation WideResNets, each with a GSeM after the stem or without one.

Sources: K. He et al., "Deep residual learning for image recognition", CVPR 2016, in its CIFAR form (3×3 stem, no
max-pool); S. Zagoruyko and N. Komodakis, "Wide residual networks", BMVC 2016; the GSeM paper (see `gsem.nn.gsem`)
for the place of the module, and its published checkpoints for the names of the weights.

Every model maps images in [0, 1], [b, in_channels, h, w] of any size, to logits [b, num_classes]; there is no
input normalisation.
"""

import difflib
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gsem.nn.gsem import Gradient, GSeM, _integer

# Makes the module after the stem from its channel count: a GSeM, or `nn.Identity` in a plain network.
Stem = Callable[[int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, [b, inputs, h, w] → [b, width, h/stride, w/stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut, [b, inputs, h, w] → [b, 4 · width, h/stride, w/stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """stem conv – BN – ReLU – GSeM – four stages of residual blocks – global average pool – linear."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        width: int = 64,
        *,
        gsem: Stem = nn.Identity,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.gsem_module = gsem(width)
        stages, inputs = [], width
        for number, length in enumerate(blocks):
            stage_width = width * 2**number
            stage = []
            for i in range(length):
                stage.append(block(inputs, stage_width, stride=2 if number > 0 and i == 0 else 1))
                inputs = stage_width * block.expansion
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = self.gsem_module(F.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))


class PreActBlock(nn.Module):
    """BN – ReLU – conv twice, and a shortcut from the raw input; the stride is the second convolution's."""

    def __init__(self, inputs: int, width: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1)
        project = stride != 1 or inputs != width
        self.shortcut = nn.Sequential(*([nn.Conv2d(inputs, width, 1, stride)] if project else []))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)


class WideResNet(nn.Module):
    """stem conv – GSeM – three stages of pre-activation blocks – BN – ReLU – global average pool – linear.

    The stem has 64 channels, not 16 as in Zagoruyko and Komodakis, so that the GSeM has 64 too; convolutions carry
    a bias, and nothing stands between the stem and the GSeM. So are the published checkpoints.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        dropout: float = 0.0,
        stem: int = 64,
        *,
        gsem: Stem = nn.Identity,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1)
        self.gsem_module = gsem(stem)
        stages, inputs = [], stem
        for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            stage = []
            # A block has two convolutions, and there are three stages; the other four of the depth are the stem
            # and the three projections.
            for i in range((depth - 4) // 6):
                stage.append(PreActBlock(inputs, width, stride if i == 0 else 1, dropout))
                inputs = width
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn1 = nn.BatchNorm2d(inputs, momentum=0.9)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = self.layer3(self.layer2(self.layer1(self.gsem_module(self.conv1(x)))))
        return self.linear(F.relu(self.bn1(out)).mean((2, 3)))


_PLAIN: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "resnet10x16": ("small ResNet-10, widths 16 to 128", partial(ResNet, BasicBlock, (1, 1, 1, 1), 16)),
    "resnet18": ("ResNet-18, basic blocks", partial(ResNet, BasicBlock, (2, 2, 2, 2))),
    "resnet34": ("ResNet-34, basic blocks", partial(ResNet, BasicBlock, (3, 4, 6, 3))),
    "resnet50": ("ResNet-50, bottleneck blocks", partial(ResNet, Bottleneck, (3, 4, 6, 3))),
    "resnet101": ("ResNet-101, bottleneck blocks", partial(ResNet, Bottleneck, (3, 4, 23, 3))),
    "resnet152": ("ResNet-152, bottleneck blocks", partial(ResNet, Bottleneck, (3, 8, 36, 3))),
    "wideresnet10x2": ("small WideResNet-10-2, widths 32 to 128", partial(WideResNet, 10, 2, stem=16)),
    "wideresnet28x10": ("WideResNet-28-10", partial(WideResNet, 28, 10)),
    "wideresnet28x20": ("WideResNet-28-20, dropout 0.3", partial(WideResNet, 28, 20, 0.3)),
    "wideresnet40x10": ("WideResNet-40-10, dropout 0.3", partial(WideResNet, 40, 10, 0.3)),
    "wideresnet40x14": ("WideResNet-40-14, dropout 0.3", partial(WideResNet, 40, 14, 0.3)),
}

MODELS: dict[str, str] = {f"gsem-{name}": f"{line}, GSeM after the stem" for name, (line, _) in _PLAIN.items()}
MODELS |= {name: f"{line}, plain" for name, (line, _) in _PLAIN.items()}
"""Every model's name, with a line that describes it."""


def canonical_name(name: str) -> str:
    """The key of `MODELS` that `name` spells, whatever its case, hyphens and underscores.

    `GSeMResNet18`, the paper's spelling, is `gsem-resnet18`.

    Raises:
        ValueError: no such model; the message has the names that are near.
    """
    spelled = {_squashed(known): known for known in MODELS}
    wanted = _squashed(str(name))
    if wanted in spelled:
        return spelled[wanted]
    near = [spelled[s] for s in difflib.get_close_matches(wanted, spelled, n=4)]
    hint = f"near it are {', '.join(near)}" if near else f"it is one of {', '.join(MODELS)}"
    raise ValueError(f"model {name!r} is unknown: {hint}")


def _squashed(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def create_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    levels: int = 6,
    noise: int = 4,
    gradient: Gradient = "corrected",
    quantiser: bool = True,
) -> nn.Module:
    """A new model, with torch's default initialisation (it follows `torch.manual_seed`), in training mode.

    Args:
        name: a key of `MODELS`, or the paper's spelling of one.
        num_classes: the length of the logits, at least 2.
        in_channels: channels of the images, at least 1.
        levels, noise, gradient, quantiser: of the `GSeM`; a plain model has none and does not look at them.

    Raises:
        ValueError: an unknown name, or an argument outside its range.
    """
    name = canonical_name(name)
    _integer("num_classes", num_classes, 2)
    _integer("in_channels", in_channels, 1)
    plain = name.removeprefix("gsem-")
    of_gsem = partial(GSeM, levels=levels, noise=noise, gradient=gradient, quantiser=quantiser)
    gsem = nn.Identity if plain == name else of_gsem
    _, build = _PLAIN[plain]
    return build(gsem=gsem, num_classes=num_classes, in_channels=in_channels)


def load_published(
    path: str | PathLike[str],
    *,
    name: str,
    num_classes: int = 10,
    levels: int = 6,
    noise: int = 4,
    in_channels: int = 3,
) -> nn.Module:
    """A model with the weights of a published `.pt` file, on the CPU and in eval mode.

    Such a file is a bare state dict, without its architecture, levels and noise: they are arguments. State dicts
    saved from DataParallel (`module.` before every name), and those under a key `state_dict` or `model`, are accepted
    too. The file is read without executing anything in it.

    Args:
        path: the file.
        name: of its model, as `create_model` takes it.
        num_classes, levels, noise, in_channels: as `create_model` takes them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or the weights are those of another architecture.
    """
    model = create_model(name, num_classes, in_channels, levels, noise)
    weights = _read_weights(Path(path))
    check_weights(weights, model.state_dict(), f"{path} does not fit {canonical_name(name)}")
    model.load_state_dict(weights)
    return model.eval()


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Bytes that are no checkpoint end in any of a dozen exceptions of the unpickler. Its own message is not
        # repeated: it advises to load with weights_only=False, which would execute the file.
        raise ValueError(
            f"{path} is no checkpoint of plain tensors ({type(error).__name__}); nothing in it was executed"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds a {type(state).__name__}, no dict of named tensors; nothing in it was executed")
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        kind = type(state[strange[0]]).__name__
        raise ValueError(f"{path} is no state dict: {strange[0]!r} is of type {kind}, not a tensor")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def check_weights(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Raise a ValueError that begins with `what` if names or shapes differ."""
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    if missing or unexpected:
        parts = [
            f"{len(keys)} {kind}, the first {keys[0]!r}"
            for keys, kind in ((missing, "missing"), (unexpected, "unexpected"))
            if keys
        ]
        raise ValueError(f"{what}: of its names, {' and '.join(parts)}; is it another model's?")
    for key, value in wanted.items():
        if found[key].shape != value.shape:
            hint = {"linear": "num_classes", "conv1": "in_channels"}.get(key.split(".")[0], "the model's name")
            raise ValueError(
                f"{what}: {key!r} has shape {tuple(found[key].shape)}, not {tuple(value.shape)}; is {hint} right?"
            )
