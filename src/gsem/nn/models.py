"""The networks by name, each with a GSeM behind the stem or without one, and the reading of published state dicts.

Every model maps images in [0, 1], [b, in_channels, h, w] of any size that its patches and strides allow, to logits
[b, num_classes]; there is no input normalisation.
"""

import difflib
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsem.nn.convnext import ConvNeXt
from gsem.nn.gsem import Gradient, GSeM, _integer
from gsem.nn.resnets import BasicBlock, Bottleneck, PreActResNet, ResNet, WideResNet
from gsem.nn.vit import ViT

_SMALL = (1, 1, 1, 1)
_EIGHTEEN = (2, 2, 2, 2)

_PLAIN: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "resnet10x16": ("small ResNet-10, widths 16 to 128", partial(ResNet, BasicBlock, _SMALL, 16)),
    "resnet18": ("ResNet-18, basic blocks", partial(ResNet, BasicBlock, _EIGHTEEN)),
    "resnet34": ("ResNet-34, basic blocks", partial(ResNet, BasicBlock, (3, 4, 6, 3))),
    "resnet50": ("ResNet-50, bottleneck blocks", partial(ResNet, Bottleneck, (3, 4, 6, 3))),
    "resnet101": ("ResNet-101, bottleneck blocks", partial(ResNet, Bottleneck, (3, 4, 23, 3))),
    "resnet152": ("ResNet-152, bottleneck blocks", partial(ResNet, Bottleneck, (3, 8, 36, 3))),
    "preactresnet10x16": ("small PreActResNet-10, widths 16 to 128", partial(PreActResNet, _SMALL, 16)),
    "preactresnet18": ("PreActResNet-18", partial(PreActResNet, _EIGHTEEN)),
    "preactresnet18-silu": ("PreActResNet-18, SiLU", partial(PreActResNet, _EIGHTEEN, activation=F.silu)),
    "wideresnet10x2": ("small WideResNet-10-2, widths 32 to 128", partial(WideResNet, 10, 2, stem=16)),
    "wideresnet28x10": ("WideResNet-28-10", partial(WideResNet, 28, 10)),
    "wideresnet28x10-silu": ("WideResNet-28-10, SiLU", partial(WideResNet, 28, 10, activation=F.silu)),
    "wideresnet28x20": ("WideResNet-28-20, dropout 0.3", partial(WideResNet, 28, 20, 0.3)),
    "wideresnet40x10": ("WideResNet-40-10, dropout 0.3", partial(WideResNet, 40, 10, 0.3)),
    "wideresnet40x14": ("WideResNet-40-14, dropout 0.3", partial(WideResNet, 40, 14, 0.3)),
    "vit2x32": ("small vision transformer, 2 blocks, width 32, patches of 2", partial(ViT, 2, 32, heads=2, patch=2)),
    "vit-small": ("ViT-S, patches of 4 (images of 32)", partial(ViT, 12, 384, heads=6, patch=4)),
    "vit-small-patch16": ("ViT-S, patches of 16 (images of 224)", partial(ViT, 12, 384, heads=6, patch=16)),
    "convnext3x16": ("small ConvNeXt, 3 blocks, widths 16 to 64", partial(ConvNeXt, (1, 1, 1), (16, 32, 64), patch=2)),
    "convnext-tiny": (
        "ConvNeXt-T, patches of 2 (images of 32)",
        partial(ConvNeXt, (3, 3, 9, 3), (96, 192, 384, 768), patch=2),
    ),
    "convnext-tiny-patch4": (
        "ConvNeXt-T, patches of 4 (images of 224)",
        partial(ConvNeXt, (3, 3, 9, 3), (96, 192, 384, 768), patch=4),
    ),
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
    """A new model, initialised as its family is (by `torch.manual_seed`), in training mode.

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
    weights = read_weights(Path(path))
    check_weights(weights, model.state_dict(), f"{path} does not fit {canonical_name(name)}")
    model.load_state_dict(weights)
    return model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.pt` file, read without executing anything in it. Raises as `load_published`."""
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
            hint = {"linear": "num_classes", "head": "num_classes", "conv1": "in_channels"}.get(
                key.split(".")[0], "the model's name"
            )
            raise ValueError(
                f"{what}: {key!r} has shape {tuple(found[key].shape)}, not {tuple(value.shape)}; is {hint} right?"
            )
