"""`--compile`: the attack of a training as a CUDA graph (auto), or torch.compile (on).

Where the CPU takes longer to launch the kernels of an attack than the GPU takes to run them, the GPU waits. A CUDA
graph records the kernels once and launches all of them at once. A replay repeats what the device did, at the same
addresses, and runs nothing in Python again. So inputs are copied to where they were at the capture, and a graph is
looked up by all that Python decided: recipe, shapes, mode of the noise, addresses of the weights.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gsem.nn.folded import FoldedModel
from gsem.nn.gsem import GSeM, IntegerNoise
from gsem.training.attack import attack_from
from gsem.training.recipe import Recipe

# From PyTorch, one kernel takes about this long to launch.
LAUNCH_SECONDS = 5e-6
# What the fastest GPUs in use (H100) reach in bf16 products, and in memory. Slower ones have less to gain than is
# computed with these: there a graph may be captured that saves nothing, which costs memory and a second.
FLOPS_PER_SECOND = 400e12
BYTES_PER_SECOND = 3e12
# Of one training: for its batches, its validation's first and last batch, and what changes on the way.
MOST_SHAPES = 8
WARM_UPS = 3  # runs before a capture, in which libraries choose their kernels and allocate their memory


class Work(TorchDispatchMode):
    """Counts what runs inside this block: launches, floating-point operations, and bytes read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = func._schema
        is_view = not schema.is_mutable and any(returned.alias_info is not None for returned in schema.returns)
        if not is_view and "empty" not in schema.name:
            self.launches += 1
            tensors = [t for t in tree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out

    @property
    def launch_seconds(self) -> float:
        return self.launches * LAUNCH_SECONDS

    @property
    def device_seconds(self) -> float:
        return self.flops / FLOPS_PER_SECOND + self.bytes / BYTES_PER_SECOND

    @property
    def waits_for_launches(self) -> bool:
        """Whether a graph pays: the GPU is done before the next kernel is launched."""
        return self.launch_seconds > self.device_seconds


@runtime_checkable
class Graph(Protocol):
    """Work that is recorded once and repeated at the same addresses."""

    def capture(self, work: Callable[[], Any]) -> Any:
        """Record `work`, which may run several times. Its result is where every replay writes."""

    def replay(self) -> None:
        """Repeat what was recorded."""


class CudaGraph:
    """A CUDA graph of whole-network work, autograd included.

    The default generator of the device is registered with every capture. A replay reads its seed and offset at that
    time and moves the offset on by as much as the recorded work did. So random numbers after a `reseed` are those of
    the same work without a graph (torch's "CUDA Graph-safe RNG states").

    Args:
        stream, pool: where work is captured, and the memory that it takes. Graphs may share both if they never run at
            the same time and their results are copied at once.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: Any):
        self.stream, self.pool = stream, pool
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], Any]) -> Any:
        with torch.cuda.device(self.stream.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # around torch's own, which a failed capture does not put back
                for _ in range(WARM_UPS):
                    work()
                try:
                    # thread_local: threads that read data, or watch other processes, may use the device meanwhile.
                    with torch.cuda.graph(self.graph, self.pool, self.stream, capture_error_mode="thread_local"):
                        found = work()
                except Exception:
                    # Up to torch 2.10, the generator's state counts as being captured for good.
                    random = torch.cuda.default_generators[torch.cuda.current_device()]
                    random.graphsafe_set_state(random.clone_state())
                    raise
            torch.cuda.current_stream().wait_stream(self.stream)
        return found

    def replay(self) -> None:
        self.graph.replay()


@dataclass
class _Captured:
    graph: Graph
    inputs: list[Tensor]
    outputs: tuple[Tensor, Tensor]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        x_adv, finite = self.outputs
        return x_adv.clone(), finite.clone()  # the next replay overwrites them


class GraphedAttack:
    """`attack_from`, replayed as a CUDA graph where that pays; called as it is.

    The first attack of each kind runs plainly and is counted. If the GPU waits for launches, it is captured. A network
    that torch.fx cannot trace runs plainly: its forward may decide or draw something in Python. After a failed capture,
    all attacks run plainly.

    Args:
        make: a new graph.
    """

    def __init__(self, make: Callable[[], Graph]):
        self.make = make
        self.known: dict[tuple[Any, ...], _Captured | None] = {}
        self.failed: Graph | None = None  # kept: torch's allocator may still refer to it

    @property
    def used(self) -> bool:
        return any(captured is not None for captured in self.known.values())

    def __call__(
        self, recipe: Recipe, folded: FoldedModel, x: Tensor, y: Tensor, start: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        plain = partial(attack_from, recipe, folded, eps=eps)
        if self.failed is not None or not folded.traced:
            return plain(x, y, start)
        key = _key(recipe, folded, (x, y, start), eps)
        captured = self.known.get(key)
        if captured is not None:
            return captured(x, y, start)
        if key in self.known or len(self.known) >= MOST_SHAPES:
            return plain(x, y, start)
        with Work() as work:
            found = plain(x, y, start)
        self.known[key] = self._capture(plain, folded, [x, y, start]) if work.waits_for_launches else None
        return found

    def _capture(
        self, plain: Callable[..., tuple[Tensor, Tensor]], folded: FoldedModel, inputs: list[Tensor]
    ) -> _Captured | None:
        held, graph = [t.clone() for t in inputs], self.make()
        try:
            with _random_state_kept(folded, held[0].device):
                return _Captured(graph, held, graph.capture(partial(plain, *held)))
        except Exception as error:  # (the attack itself has just run without one)
            self.failed = graph
            self.known.clear()
            warnings.warn(
                f"attacks run without a CUDA graph, because capturing one failed: {_reason(error)}", stacklevel=2
            )
            return None


def graphed_attack(device: torch.device) -> GraphedAttack | None:
    """A `GraphedAttack` on CUDA; None on other devices, which have no such graphs."""
    if device.type != "cuda":
        return None
    return GraphedAttack(partial(CudaGraph, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()))


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile works on `device`, tried on a sum; one warning with the reason where it does not.

    It needs a C++ compiler for a CPU and Triton for a GPU.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        warnings.warn(f"passes run without torch.compile, because it fails here: {_reason(error)}", stacklevel=3)
        return False
    return True


def _reason(error: BaseException) -> str:
    """The first line of the error that came first."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _key(recipe: Recipe, folded: FoldedModel, inputs: tuple[Tensor, ...], eps: float) -> tuple[Any, ...]:
    """All that decides what a capture records."""
    modules = [*folded.source.modules(), *folded.modules()]
    state = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    return (
        recipe,
        eps,
        folded,
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs),
        tuple((m.mode, m.seeded) for m in modules if isinstance(m, IntegerNoise)),
        tuple(m.gradient for m in modules if isinstance(m, GSeM)),
        tuple((t.data_ptr(), t.requires_grad) for t in state),
    )


@contextmanager
def _random_state_kept(folded: FoldedModel, device: torch.device) -> Iterator[None]:
    """The random numbers after this block are as if nothing had been drawn inside it."""
    keys = [(m.key, m.key.clone()) for m in folded.modules() if isinstance(m, IntegerNoise)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for key, former in keys:
                key.copy_(former)
