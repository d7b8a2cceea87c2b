"""In the place of a CUDA graph on a CPU: operations are recorded at the capture, and repeated on the same memory.

Like a CUDA graph, a replay runs no Python of the work: it reads and writes the addresses of the capture. So an input
that was not copied, or a weight that has moved, gives wrong numbers or an error. As under a capture, the work may not
read a value of a tensor. Random operations run again, from the generator's present state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

from pretend_device import READ, SHAPED


def memory(tensor: Tensor) -> int:
    """The address of the tensor's storage."""
    return tensor.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in READ or name in SHAPED:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        # Without their history: a replay differentiates nothing.
        kept = tree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (args, kwargs or {}, out))
        self.operations.append((func, *kept))
        self.read |= {memory(t) for t in tree.tree_leaves(kept[:2]) if isinstance(t, Tensor)} - self.made
        self.made |= {memory(t) for t in tree.tree_leaves(kept[2]) if isinstance(t, Tensor)} - self.read
        return out


class RecordedGraph:
    """`capture` and `replay` as of `gsem.training.cuda_graph.CudaGraph`."""

    def __init__(self, warm_ups: int = 1):
        self.warm_ups = warm_ups
        self.replays = 0

    def capture(self, work: Callable[[], Any]) -> Any:
        for _ in range(self.warm_ups):
            work()
        with _Recorder() as recorder:
            found = work()
        self.operations = recorder.operations
        self.read = recorder.read
        """Addresses of what the work reads and has not made itself."""
        return found

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, kept in self.operations:
            out = func(*args, **kwargs)
            for now, then in zip(tree.tree_leaves(out), tree.tree_leaves(kept), strict=True):
                if isinstance(then, Tensor) and memory(now) != memory(then):
                    then.copy_(now)
