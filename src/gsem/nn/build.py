"""Build the network of a training: by name, by a factory or by timm, with GSeMs inserted and its input normalised.

What is built is described by a dict of plain values, which a run records and from which `rebuild_network` builds the
same network again. A network of this package as it is needs the arguments of `create_model` alone; every other one
has them and, under `own`, the rest.
"""

import copy
import functools
import hashlib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gsem._env import commit
from gsem._fingerprint import DIGITS, model_fingerprint
from gsem.nn.contract import Logits, logits_place
from gsem.nn.gsem import Gradient
from gsem.nn.insert import insert, normalization, normalized
from gsem.nn.models import canonical_name, create_model
from gsem.rng import generator

Network = nn.Module | Callable[[], nn.Module]
"""A network, or a function without arguments that returns one."""

PROBED = 4  # images of the passes that show what a network returns
TIMM = "timm:"


class PlainLogits(Logits):
    """A `Logits` that is a part of a trained network."""


class PlainLayout(nn.Module):
    """A network with a `view` that needs contiguous features: it gets images in the layout that gives them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        # (Images of one channel are contiguous in every layout, and `contiguous()` would keep their strides.)
        return self.model(x.clone(memory_format=torch.contiguous_format))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The network that a training needs: its name or the network itself, its settings, and the shape of its input."""

    name: str
    """A key of `MODELS`, `package.module:function`, or `timm:NAME`; for one that is given, what to call it."""
    given: Network | None = None
    """Passed in Python, instead of the name."""
    shape: tuple[int, int, int]
    """Shape of the images, [c, h, w]."""
    num_classes: int
    levels: int = 6
    noise: int = 4
    gradient: Gradient = "corrected"
    quantiser: bool = True
    insert_after: tuple[str, ...] = ()
    normalize: str | None = None


def named(model: str | Network) -> str:
    """The name that a run records for a network: of our own as `gsem models` has it, of a function where it is found.

    Raises:
        ValueError: a name that is unknown.
    """
    if isinstance(model, str):
        return model if ":" in model else canonical_name(model)
    return type(model).__name__ if isinstance(model, nn.Module) else _spec_of(model) or _called(model)


def build_network(wanted: Wanted, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """A new network in train mode on a device, and its description. It is checked by passes of a few images before.

    Raises:
        ValueError: naming what is wrong: a factory that cannot be imported, needs arguments or returns no module; lazy
            layers; a layer to insert behind that is not there; a network that does not run on the images, or has
            another number of classes than the data.
    """
    w = wanted
    described: dict[str, Any] = {
        "name": w.name,
        "num_classes": w.num_classes,
        "in_channels": w.shape[0],
        "levels": w.levels,
        "noise": w.noise,
        "gradient": w.gradient,
        "quantiser": w.quantiser,
    }
    kind = _kind(w)
    if kind == "named" and not w.insert_after and w.normalize is None:
        return _on_device(create_model(**described), device), described
    own: dict[str, Any] = {"kind": kind, "shape": list(w.shape)}
    own |= {"insert_after": list(w.insert_after), "normalize": w.normalize}
    described["own"] = own
    try:
        base, own["source"] = _base(described, w.given)
    except ImportError as error:
        raise ValueError(str(error)) from error
    with _naming(w.name):
        _check_layers(base)
        images = torch.rand((PROBED, *w.shape), generator=generator(0, "probe"))
        logits_place(base, images, w.num_classes)
        network = _assembled(base, described)
        own["logits"] = logits_place(network, images, w.num_classes)
        own["channels_last"] = _runs_in_channels_last(network, images, w.num_classes)
        network = _wrapped(network, own)
    own["structure"] = model_fingerprint(network)["structure"]
    return _on_device(network, device, own["channels_last"]).train(), described


def rebuild_network(
    described: Mapping[str, Any], given: Network | None = None, *, run: str | Path = "the run"
) -> nn.Module:
    """The network that `build_network` described, with weights that are yet to be loaded.

    Args:
        given: the network or its factory, where it cannot be found by its name; it is copied.
        run: what to call the run in messages.

    Raises:
        ValueError: the factory is not found or fails, nothing is given for a network that was passed in Python, or what
            is given has another structure than the network of the run.

    Warns:
        UserWarning: the source of the factory changed since the run began.
    """
    if "own" not in described and given is None:
        return create_model(**described)
    own = described.get("own", {"kind": "named"})
    if given is None:
        check_named(described, run)
    try:
        base, source = _base(described, given)
    except ImportError as error:
        folder = own.get("source", {}).get("folder")
        where = f" Run the command in {folder}, where it was then, or" if folder else ""
        raise ValueError(
            f"the network of {run} cannot be built: {error}.{where} give the network itself: "
            f"gsem.load_model({str(run)!r}, model=net)"
        ) from None
    with _naming(str(described["name"])):
        _check_layers(base)
        network = _wrapped(_assembled(base, described), own)
    same = own.get("structure") in (None, model_fingerprint(network)["structure"])
    if given is not None and not same:
        raise ValueError(f"the network that is given has another structure than that of {run}, {described['name']}")
    if given is None and not (same and own.get("source", {}).get("hash") == source.get("hash")):
        changed = "" if same else ", and its modules or settings differ"
        warnings.warn(
            f"the source of {described['name']!r} changed since {run} began{changed}: the network is built from the "
            f"present source, {source.get('file', 'gsem')}",
            stacklevel=3,
        )
    return network


def check_named(described: Mapping[str, Any], run: str | Path) -> None:
    """Raise a ValueError if the network of a run was passed in Python, and must be passed again."""
    if described.get("own", {}).get("kind") == "object":
        raise ValueError(
            f"{run} was trained on a network that was passed in Python ({described['name']}) and cannot be imported: "
            f"pass it again, gsem.load_model({str(run)!r}, model=net), or by model= of gsem.train to resume"
        )


def check_same_network(described: dict[str, Any], built: Mapping[str, Any], run: str | Path) -> dict[str, Any]:
    """The description of the network of a run that is resumed, compared with that of what was built now.

    Raises:
        ValueError: it has other modules or settings.

    Warns:
        UserWarning: the source of its factory changed.
    """
    then, now = described.get("own", {}), built.get("own", {})
    if then.get("structure") != now.get("structure"):
        raise ValueError(
            f"the network has other modules or settings than when {run} began: give the network of the run"
        )
    if then.get("source", {}).get("hash") != now.get("source", {}).get("hash"):
        warnings.warn(
            f"the source of the network changed since {run} began: the training resumes with the new one", stacklevel=3
        )
    return described


def import_network(spec: str) -> nn.Module:
    """The network of `package.module:function`, of a module's attribute that is one, or of a name of `RESOLVERS`.

    Raises:
        ImportError: the function, or the package of a prefix, is not found. ValueError: it needs arguments, fails or
            returns no module; timm has no such network, or no weights for it.
    """
    resolver = RESOLVERS.get(spec.partition(":")[0])
    return resolver(spec) if resolver is not None else _made(_found(spec), spec)


def _kind(w: Wanted) -> str:
    if w.given is not None:
        return "factory" if not isinstance(w.given, nn.Module) and _spec_of(w.given) == w.name else "object"
    if w.name.startswith(TIMM):
        return "timm"
    return "factory" if ":" in w.name else "named"


def _base(described: Mapping[str, Any], given: Network | None) -> tuple[nn.Module, dict[str, Any]]:
    """The network before insertions, and where its source is.

    Raises:
        ImportError: what makes it is not found. ValueError: see `build_network`.
    """
    name = described["name"]
    if isinstance(given, nn.Module):
        return copy.deepcopy(given).cpu(), {}
    if given is not None:
        network = _made(given, name)
        return network, _source(given, network)
    if name.startswith(TIMM):
        return _from_timm(name, num_classes=described["num_classes"], in_chans=described["in_channels"])
    if ":" in name:
        make = _found(name)
        network = _made(make, name)
        return network, _source(make, network)
    return create_model(**{key: value for key, value in described.items() if key != "own"}), {}


def _from_timm(spec: str, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"{spec!r} needs the package timm ({error})") from error
    name = spec.removeprefix(TIMM)
    try:
        network = timm.create_model(name, **arguments)
    except Exception as error:
        raise ValueError(f"timm.create_model({name!r}) failed: {type(error).__name__}: {error}") from error
    return network, {"hash": timm.__version__, "file": f"timm {timm.__version__}"}


def _from_robustbench(spec: str) -> nn.Module:
    words = spec.split(":")[1:]
    if len(words) != 3 or not all(words):
        raise ValueError(f"{spec!r} must be robustbench:NAME:DATA:THREAT, like robustbench:Standard:cifar10:Linf")
    try:
        utils = importlib.import_module("robustbench.utils")
    except ImportError as error:
        raise ImportError(f"{spec!r} needs the package robustbench ({error})") from error
    name, data, threat = words
    try:
        network = utils.load_model(model_name=name, dataset=data, threat_model=threat)
    except Exception as error:
        raise ValueError(f"robustbench.utils.load_model of {spec!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{spec!r} is a {type(network).__name__}, not a torch.nn.Module")
    return network


RESOLVERS: dict[str, Callable[[str], nn.Module]] = {
    "timm": lambda spec: _from_timm(spec, pretrained=True)[0],
    "robustbench": _from_robustbench,
}
"""For each prefix of a model's name that is no module of the caller: what loads the pretrained network."""


def _found(spec: str) -> Any:
    module, _, function = spec.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # the caller's own files, as `python -m` would find them
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"cannot take a model from {spec!r}: {error}") from error
    finally:
        sys.path.remove(here)


def _made(make: Any, name: str) -> nn.Module:
    if isinstance(make, nn.Module):
        return copy.deepcopy(make)
    if not callable(make):
        raise ValueError(f"{name!r} is a {type(make).__name__}, not a function that returns a torch.nn.Module")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise ValueError(
            f"{name!r} needs arguments ({error}), but is called without any: write a function that calls it with them, "
            "like def make(): return network(num_classes=10)"
        ) from None
    except ValueError:  # what is written in C has no signature
        pass
    try:
        made = make()
    except Exception as error:
        raise ValueError(f"{name!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name!r} returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def _called(make: Any) -> str:
    return getattr(make, "__qualname__", type(make).__name__)


def _spec_of(make: Any) -> str | None:
    """`package.module:function` if `make` can be imported by it; None for lambdas, inner functions, and scripts."""
    module, name = getattr(make, "__module__", None), getattr(make, "__qualname__", "")
    if module in (None, "__main__") or getattr(sys.modules.get(module), name, None) is not make:
        return None
    return f"{module}:{name}"


def _source(make: Any, network: nn.Module) -> dict[str, Any]:
    """The file that a factory is written in, its folder and commit, and a hash of it and of the network's own file."""
    make = make.func if isinstance(make, functools.partial) else make
    make = type(make) if isinstance(make, nn.Module) else make
    digest = hashlib.sha256()
    try:
        file, of_network = (Path(inspect.getsourcefile(one) or "").resolve() for one in (make, type(network)))
        digest.update(file.read_bytes())
        if not type(network).__module__.startswith("torch."):
            digest.update(of_network.read_bytes())
    except (OSError, TypeError):
        return {}
    folder = file.parents[len(str(getattr(make, "__module__", "")).split(".")) - 1]
    return {
        "file": file.name,
        "folder": str(folder),
        "hash": digest.hexdigest()[:DIGITS],
        "commit": commit(file.parent),
    }


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors in the block name the network."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_layers(network: nn.Module) -> None:
    tensors = [*network.named_parameters(), *network.named_buffers()]
    lazy = [name for name, t in tensors if is_lazy(t)]
    if lazy:
        raise ValueError(
            f"the shape of {lazy[0]!r} is not known yet (a lazy layer): run the network once on an image where it is "
            "made, for instance in the factory"
        )
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("the network has no parameter that can be trained")


def _assembled(base: nn.Module, described: Mapping[str, Any]) -> nn.Module:
    own = described.get("own")
    if own is None:
        return base
    settings = {key: described[key] for key in ("levels", "noise", "gradient", "quantiser")}
    if len(set(own["insert_after"])) < len(own["insert_after"]):
        raise ValueError(f"insert_after names a layer twice: {', '.join(own['insert_after'])}")
    example = torch.full((2, *own["shape"]), 0.5)
    for layer in own["insert_after"]:
        insert(base, layer, **settings, example=example)
    if own["normalize"] is None:
        return base
    mean, std = normalization(own["normalize"])
    channels = own["shape"][0]
    if {len(mean), len(std)} - {1, channels}:
        raise ValueError(f"normalize {own['normalize']!r} has {len(mean)} channels, but the images have {channels}")
    return normalized(base, mean, std)


def _wrapped(network: nn.Module, own: Mapping[str, Any]) -> nn.Module:
    network = network if own.get("channels_last", True) else PlainLayout(network)
    return PlainLogits(network, own["logits"]) if own.get("logits") else network


def _on_device(network: nn.Module, device: torch.device | str, channels_last: bool = True) -> nn.Module:
    if not channels_last:
        return network.to(device)
    # (torch's stubs do not know memory_format for modules.)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _runs_in_channels_last(network: nn.Module, images: Tensor, num_classes: int) -> bool:
    """Whether a copy runs in the faster layout; a `view` of a feature map does not.

    (A copy: parameters of four dimensions would stay in the other layout.)
    """
    try:
        moved = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        logits_place(moved, images.contiguous(memory_format=torch.channels_last), num_classes)
    except (ValueError, RuntimeError):
        return False
    return True
