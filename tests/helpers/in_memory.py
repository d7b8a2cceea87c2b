"""How much memory the tensors of a block take together, counted without a device that measures it."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class InMemory(TorchDispatchMode):
    """The largest number of bytes of tensors made inside this block, of `dtype` if given, that were in use together.

    What autograd alone holds is not counted.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype, self.most = dtype, 0
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor) and self.dtype in (None, made.dtype):
                self.made.append(weakref.ref(made))
        self.made = [ref for ref in self.made if ref() is not None]
        held = [tensor.untyped_storage() for ref in self.made if (tensor := ref()) is not None]
        self.most = max(self.most, sum({memory.data_ptr(): memory.nbytes() for memory in held}.values()))
        return out
