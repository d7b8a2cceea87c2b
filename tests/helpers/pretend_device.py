"""A pretended accelerator for tests on a CPU: its tensors report another device and hold CPU data.

Under `pretended()`, mixing tensors or generators of the two devices is an error, as on a GPU. What makes the CPU wait
for a GPU is counted with the place in the package that asked for it: reading a value (`item`, `tolist`, `bool`), shapes
that depend on values (`nonzero`, indexing by a mask), and blocking copies. Numbers are those of the CPU.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")  # the one device type that torch lets a tensor without a backend report
# Operations whose result cannot be known, or whose shape cannot, before the device has computed it.
READ = ("_local_scalar_dense", "is_nonzero", "equal")
SHAPED = (
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "_linalg_check_errors",
)


class Counts:
    """What was asked of the pretended device."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        """Of the CPU for the device: by "file:line operation"."""
        self.uploads: Counter[str] = Counter()
        """Copies from the CPU to the device that did not ask for `non_blocking`."""
        self.mixed: Counter[str] = Counter()
        """Operations on feature maps, or a feature map and a kernel, of two memory formats."""
        self.operations = 0
        """Operations on the device."""

    def clear(self) -> None:
        self.waits.clear()
        self.uploads.clear()
        self.mixed.clear()
        self.operations = 0


def _place() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/gsem/" in name and "/tests/" not in name:
            return f"{name.split('/gsem/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "backward"


class _OnDevice(torch.Tensor):
    """A tensor of the pretended device; `held` has its values."""

    held: torch.Tensor
    counts: Counts

    @staticmethod
    def __new__(cls: Any, held: torch.Tensor, counts: Counts, requires_grad: bool = False) -> Any:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        made.held, made.counts = held, counts
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"on the device: {self.held}"

    def numpy(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise TypeError("can't convert a tensor of the pretended device to numpy: use Tensor.cpu()")

    def __array__(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise TypeError("can't convert a tensor of the pretended device to numpy: use Tensor.cpu()")

    def data_ptr(self) -> int:
        return self.held.data_ptr()  # by which checkpoints recognise tied weights

    def tolist(self) -> Any:
        self.counts.waits[f"{_place()} tolist"] += 1
        return self.held.tolist()

    def new_tensor(self, data: Any, **_: Any) -> torch.Tensor:
        self.counts.uploads[f"{_place()} new_tensor"] += 1
        return _OnDevice(torch.as_tensor(data, dtype=self.dtype), self.counts)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = next(t.counts for t in tree.tree_leaves((args, kwargs)) if isinstance(t, _OnDevice))
        return _run(func, args, kwargs or {}, counts)


class _Generator(torch.Generator):
    """A generator of the CPU that reports the device that was asked for.

    An operation sees a generator as the plain class, so those of the device are known by their seeds.
    """

    where: torch.device
    seeds: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls)
        made.where = torch.device(device)
        return made

    def manual_seed(self, seed: int) -> "_Generator":
        if self.where.type == DEVICE.type:
            self.seeds.add(seed)
        super().manual_seed(seed)
        return self

    device = property(lambda self: self.where)  # type: ignore[assignment]


def _run(func: Any, args: Any, kwargs: dict[str, Any], counts: Counts) -> Any:
    name = func.__name__.split(".")[0]
    tensors = [t for t in tree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, _OnDevice)]
    theirs = [t for t in tensors if not isinstance(t, _OnDevice)]
    asked = kwargs.get("device")
    here = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
    if name in ("_to_copy", "copy_"):
        source, target_here = (args[1], isinstance(args[0], _OnDevice)) if name == "copy_" else (args[0], here)
        here = target_here
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if isinstance(source, _OnDevice) and not target_here:
            counts.waits[f"{_place()} copy to the CPU"] += blocking
        elif not isinstance(source, _OnDevice) and target_here and source.dim() + source.numel() > 1:
            counts.uploads[f"{_place()} {name}"] += blocking
    elif ours and any(t.dim() for t in theirs):
        raise RuntimeError(f"tensors on two devices in {func} at {_place()}")
    if ours:
        masks = name.startswith("index") and isinstance(args[1], (list, tuple))
        masks = masks and any(isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name in READ or name in SHAPED or masks:
            counts.waits[f"{_place()} {'mask' if masks else name}"] += 1
        counts.mixed[f"{_place()} {name}"] += len(_formats(ours)) > 1 and "copy" not in name
        counts.operations += 1
    random = kwargs.get("generator")
    if random is not None and (random.initial_seed() in _Generator.seeds) != here:
        raise RuntimeError(f"a generator of the other device in {func} at {_place()}")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    call = partial(_drawn_like, func) if name == "randint_like" else func
    out = call(*tree.tree_map(_held, args), **tree.tree_map(_held, kwargs))
    if name == "_local_scalar_dense" or not here:
        return out
    if func._schema.is_mutable:
        written = [
            a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write
        ]
        if written and isinstance(written[0], _OnDevice) and out is written[0].held:
            return written[0]
    return tree.tree_map(lambda t: _OnDevice(t, counts) if type(t) is torch.Tensor else t, out)


def _formats(tensors: list[torch.Tensor]) -> set[bool]:
    """Whether each is channels-last, of those of [b, c, h, w] of which it can be known."""
    maps = [t for t in tensors if t.dim() == 4 and t.shape[1] > 1 and t.shape[2] * t.shape[3] > 1]
    return {t.stride(1) == 1 for t in maps if 0 not in t.stride()}


def _drawn_like(func: Any, like: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In the memory format of `like`, with the numbers that a contiguous tensor gets: torch fills in the order of
    memory, and tests compare with a CPU, where the noise is contiguous."""
    drawn = func(like.contiguous(), *args, **kwargs)
    return torch.empty_like(like, dtype=drawn.dtype).copy_(drawn)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _OnDevice) else value


class _Mode(TorchDispatchMode):
    """Catches the operations without a tensor argument, such as `torch.zeros(3, device=…)`."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.counts)


def _is_ours(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == DEVICE.type


class _Pretended:
    """What `pretended()` gives: `counts`, and `put`, which moves a tensor or a network to the device."""

    def __init__(self) -> None:
        self.counts = Counts()

    def put(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return thing if isinstance(thing, _OnDevice) else _OnDevice(thing.detach().clone(), self.counts)
        for module in thing.modules():
            for key, p in module._parameters.items():
                if p is not None and not isinstance(p, _OnDevice):
                    moved = _OnDevice(p.detach().clone(), self.counts)
                    module._parameters[key] = nn.Parameter(moved, requires_grad=p.requires_grad)
            for key, b in module._buffers.items():
                if b is not None and not isinstance(b, _OnDevice):
                    module._buffers[key] = _OnDevice(b.detach().clone(), self.counts)
        return thing


@contextmanager
def pretended() -> Iterator[_Pretended]:
    """`device="meta"` is the pretended accelerator inside this block."""
    device = _Pretended()
    tensor, to = torch.tensor, nn.Module.to

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        found = tensor(data, *args, **kwargs)
        if not _is_ours(device):
            return found
        counts.uploads[f"{_place()} torch.tensor"] += 1
        return _OnDevice(found, counts)

    def moved(module: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(_is_ours(a) for a in (*args, kwargs.get("device"))):
            return to(module, *args, **kwargs)
        dtype = next((a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)), None)
        if dtype is not None:
            to(module, dtype)
        return device.put(module)

    counts = device.counts
    with (
        mock.patch.object(torch, "tensor", made),
        mock.patch.object(nn.Module, "to", moved),
        mock.patch.object(torch, "Generator", _Generator),
        _Mode(counts),
    ):
        yield device
