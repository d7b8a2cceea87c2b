"""The folded model: what an attack differentiates instead of the model, because it is several times faster.

In eval mode BatchNorm is an affine map: it is folded into the convolution before it, once per refresh instead of
at every pass. The folded model runs channels-last, in float32 or, for gradient *directions* only, in bf16.
"""

import copy
import operator
import pickle
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from gsem.distributed import SharedBatchNorm2d
from gsem.nn.gsem import GSeM, IntegerNoise, eval_flags

# Where the largest element of a logit gradient is brought on an fp16 folded model. As it is, the cross-entropy of a
# confident image has a gradient below fp16's smallest number, 6e-8, and all of it would be 0. Up to fp16's largest
# number, 65504, there is room for a growth of 255 on the way back to the image.
FP16_TARGET = 256.0


def _affine(bn: nn.BatchNorm2d) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """(scale, shift) of a BatchNorm in eval mode."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = torch.rsqrt(bn.running_var + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -bn.running_mean * scale
    return scale, shift if bn.bias is None else shift + bn.bias


class _Folded(nn.Module):
    """A part of the folded model that holds tensors computed from the model's."""

    def __init__(self, *source: nn.Module | None):
        super().__init__()
        # Not registered as submodules: the model's parameters are not the folded model's.
        self.__dict__["source"] = source

    def store(self, **tensors: Tensor) -> None:
        # In place after the first time: a compiled or captured folded model keeps its addresses.
        for name, value in tensors.items():
            former = self._buffers.get(name)
            if former is None:
                self.register_buffer(name, value.clone(), persistent=False)
            else:
                former.copy_(value)

    def refresh(self, dtype: torch.dtype) -> None:
        raise NotImplementedError


class _Enlarge(torch.autograd.Function):
    """The identity on logits forward. Backward, each image's gradient is multiplied by a power of two that brings its
    largest element, over the draws, near `FP16_TARGET`; the factors [images] are left in `held`."""

    @staticmethod
    def forward(ctx, logits: Tensor, images: int, held: list[Tensor]) -> Tensor:
        ctx.images, ctx.held = images, held
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        of_draws = grad.unflatten(0, (-1, ctx.images))
        largest = of_draws.abs().amax((0, 2)).clamp_min(1e-30)
        factor = torch.exp2(torch.floor(torch.log2(FP16_TARGET / largest)))
        ctx.held[:] = [factor]
        return (of_draws * factor[:, None]).flatten(0, 1), None, None


class _Reduce(torch.autograd.Function):
    """The identity on images forward; backward, it takes the factors of `_Enlarge` out of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, held: list[Tensor]) -> Tensor:
        ctx.held = held
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.held[0][:, None, None, None], None


def _weight(value: Float[Tensor, "o i h w"], dtype: torch.dtype) -> Tensor:
    return value.to(dtype).contiguous(memory_format=torch.channels_last)


class _Conv(_Folded):
    """A convolution with the BatchNorm behind it folded in."""

    source: tuple[nn.Conv2d, nn.BatchNorm2d | None]
    weight: Tensor

    def refresh(self, dtype: torch.dtype) -> None:
        conv, bn = self.source
        weight, bias = conv.weight, conv.bias
        if bn is not None:
            scale, shift = _affine(bn)
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else shift + bias * scale
        self.store(weight=_weight(weight, dtype))
        if bias is not None:
            self.store(bias=bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        # Stride, groups and padding mode are the source's; only its weights are replaced.
        return self.source[0]._conv_forward(x, self.weight, self._buffers.get("bias"))


class _Affine(_Folded):
    """A BatchNorm with no convolution of its own before it."""

    source: tuple[nn.BatchNorm2d]
    scale: Tensor
    shift: Tensor

    def refresh(self, dtype: torch.dtype) -> None:
        scale, shift = _affine(self.source[0])
        self.store(scale=scale[:, None, None].to(dtype), shift=shift[:, None, None].to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class _Fuse(torch.autograd.Function):
    """conv3x3([x, k]) whose gradient with respect to x is one convolution with `back`."""

    @staticmethod
    def forward(ctx, x: Tensor, k: Tensor, weight: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return F.conv2d(torch.cat([x, k], dim=1), weight, padding=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return F.conv_transpose2d(grad, back, padding=1), None, None, None


def _with_noise(out: Float[Tensor, "b c h w"], noise: Float[Tensor, "n c h w"], draws: int) -> Float[Tensor, "m c h w"]:
    """`out` with the noise of each draw, or with one noise of all: [draws · b, c, h, w].

    Written in [b, h, w, c], so that the copies here and the sum over draws in the backward pass are channels-last.
    """
    if len(noise) == 1 and out.device.type == "cpu":  # (as it always was: later sums would round differently)
        return (out + noise).expand(draws, *out.shape).flatten(0, 1)
    last, noise = out.movedim(1, -1), noise.movedim(1, -1)
    total = last + (noise.unflatten(0, (draws, len(last))) if len(noise) > 1 else noise)
    return total.expand(draws, *last.shape).flatten(0, 1).movedim(-1, 1)


class _FoldedGSeM(_Folded):
    """GSeM in one convolution: mapping (1×1), fusion (3×3) and BatchNorm are linear, so their product is taken.

    It reads the integers levels · q, which bf16 holds exactly, instead of q. Backward, the two pathways of the
    corrected gradient run through the same convolution, so their weights are added first: half the work. The
    semi-masked gradient takes the straight-through pathway's weights alone.
    """

    source: tuple[GSeM]
    weight: Tensor
    own: Tensor
    """The part of `weight` that meets the noise."""
    back: Tensor
    mapped: Tensor
    bias: Tensor
    shift: Tensor

    def __init__(self, module: GSeM):
        super().__init__(module)
        self.offsets = module.offsets  # shared: gsem.noise acts on model and folded model together
        self.draws = 1
        """Draws of the noise that every image is answered with: the output has so many times the rows."""

    def refresh(self, dtype: torch.dtype) -> None:
        (module,) = self.source
        scale, shift = _affine(module.bn)
        fusion = module.conv2.weight * scale[:, None, None, None]
        straight, mapped = fusion.chunk(2, dim=1)
        mapping = module.conv1.weight[:, :, 0, 0]
        through = torch.einsum("omhw,mi->oihw", mapped, mapping)
        assert module.conv1.bias is not None
        self.store(
            weight=_weight(torch.cat([straight, through / module.levels], dim=1), dtype),
            own=_weight(through / module.levels, dtype),
            back=_weight(straight if module.masks else straight + through, dtype),
            # The mapping's bias reaches the output through a zero-padded convolution: less of it at the border.
            mapped=mapped.contiguous(),
            bias=module.conv1.bias[None, :, None, None],
            shift=shift[None, :, None, None],
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            bias = self.bias.expand(-1, -1, *x.shape[2:])
            bias = F.conv2d(bias, self.mapped, padding=1) + self.shift
            bias = bias.to(x.dtype, memory_format=torch.channels_last)
            k = self.source[0].integers(x) if self.draws == 1 else self.source[0].levelled(x)
        out = _Fuse.apply(x, k, self.weight, self.back) + bias
        if self.draws > 1:
            # The convolution is linear: what the draws share is computed once, forward and (autograd sums over the
            # draws first) backward; each draw adds the convolution of its own noise.
            with torch.no_grad():
                noise = F.conv2d(self.offsets(x, self.draws), self.own, padding=1)
            out = _with_noise(out, noise, self.draws)
        return F.mish(out)


class _Other(_Folded):
    """Any other module with parameters or buffers: a copy in eval mode, cast."""

    source: tuple[nn.Module]

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__(module)
        self.copy = copy.deepcopy(module).to(dtype).eval().requires_grad_(False)

    def refresh(self, dtype: torch.dtype) -> None:
        _copy_state(self.source[0], self.copy)

    def forward(self, *args, **kwargs):
        return self.copy(*args, **kwargs)


class _Held(_Folded):
    """Parameters and buffers that the model's own forward reads directly."""

    source: tuple[nn.Module]

    def __init__(self, model: nn.Module, targets: list[str], constants: dict[str, Tensor]):
        super().__init__(model)
        self.targets, self.constants = targets, constants

    def refresh(self, dtype: torch.dtype) -> None:
        for number, target in enumerate(self.targets):
            constant = self.constants.get(target)
            value = operator.attrgetter(target)(self.source[0]) if constant is None else constant
            self.store(**{f"t{number}": value.to(dtype) if value.is_floating_point() else value})


def _copy_state(source: nn.Module, target: nn.Module) -> None:
    values = [*source.parameters(), *source.buffers()]
    for former, value in zip([*target.parameters(), *target.buffers()], values, strict=True):
        former.copy_(value)


class _Eager(_Folded):
    """The model itself in eval mode, for one that cannot be traced: nothing is folded."""

    source: tuple[nn.Module]

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(model)
        self.dtype, self.low = dtype, dtype in (torch.bfloat16, torch.float16)
        self.copy = copy.deepcopy(model).to(torch.float32 if self.low else dtype).eval()
        for parameter in self.copy.parameters():  # (a TorchScript module has no requires_grad_, and its copy no leaves)
            parameter.detach_()

    def refresh(self, dtype: torch.dtype) -> None:
        _copy_state(self.source[0], self.copy)
        for ours, theirs in zip(self.copy.modules(), self.source[0].modules(), strict=True):
            if isinstance(ours, GSeM) and isinstance(theirs, GSeM):
                ours.offsets, ours.gradient = theirs.offsets, theirs.gradient

    def forward(self, x: Tensor) -> Tensor:
        # The layout that its forward was written for: a `view` may need it. (See `gsem.nn.build.PlainLayout`.)
        x = x.clone(memory_format=torch.contiguous_format)
        with torch.autocast(x.device.type, self.dtype) if self.low else nullcontext():
            return self.copy(x.float() if self.low else x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, GSeM | SharedBatchNorm2d) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # A graph holds operations alone, and all of them are differentiated. (The forward of a Function, too, runs with
        # gradients off; `_graph` switches them on before.)
        if not torch.is_grad_enabled():
            raise ValueError(
                "its forward calls an autograd.Function or switches gradients off, and a graph would have another "
                "gradient"
            )
        return super().create_node(*args, **kwargs)


def _is_foldable(module: nn.Module | None) -> bool:
    return isinstance(module, nn.BatchNorm2d | SharedBatchNorm2d) and module.running_mean is not None


def _folded(source: nn.Module, behind: nn.Module | None, dtype: torch.dtype) -> nn.Module:
    """The folded form of the module `source`; `behind` is the only module that its output goes to."""
    if isinstance(source, GSeM):
        return _FoldedGSeM(source)
    if type(source) is nn.Conv2d:
        return _Conv(source, cast(nn.BatchNorm2d, behind) if _is_foldable(behind) else None)
    if _is_foldable(source):
        return _Affine(source)
    if next(source.parameters(), None) is not None or next(source.buffers(), None) is not None:
        return _Other(source, dtype)
    return copy.deepcopy(source).eval()


def _random_states(devices: list[torch.device]) -> bytes:
    """The states of all global random streams that a forward may draw from."""
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    return pickle.dumps([[state.numpy() for state in states], random.getstate(), np.random.get_state()])


def _len(x: Any) -> Any:
    return x.tracer.create_proxy("call_function", len, (x,), {}) if isinstance(x, fx.Proxy) else len(x)


@contextmanager
def _traceable_len(model: nn.Module) -> Iterator[None]:
    """`len(x)` in a forward can be traced inside the block; fx alone refuses it."""
    forwards = [getattr(type(m).forward, "__globals__", {}) for m in model.modules() if not _is_torchs(m)]
    places = [g for g in {id(g): g for g in forwards}.values() if "len" not in g]
    try:
        for names in places:
            names["len"] = _len
        yield
    finally:
        for names in places:
            del names["len"]


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _graph(model: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The model's graph and the constants that its forward makes; the model and torch's stream are as before.

    Raises:
        ValueError: the graph would not answer as the model does.
    """
    for name, m in model.named_modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            raise ValueError(f"{name or 'it'} has hooks, which a folded layer would not call")
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    attributes, python_random, numpy_random = set(vars(model)), random.getstate(), np.random.get_state()
    with eval_flags(model), torch.random.fork_rng(devices=devices):
        before = _random_states(devices)
        try:
            with _traceable_len(model), torch.enable_grad():
                graph = _Tracer().trace(model)
        finally:
            # fx hangs them on the model.
            constants = {name: model.__dict__.pop(name) for name in set(vars(model)) - attributes}
        drew = _random_states(devices) != before
    random.setstate(python_random)
    np.random.set_state(numpy_random)
    if drew:
        raise ValueError("its forward draws random numbers, and tracing would keep one draw of them for all passes")
    return graph, constants


def _relu(x: Tensor) -> Tensor:
    return x.relu_()


def _add(x: Any, other: Any) -> Any:
    tensors = isinstance(x, Tensor) and isinstance(other, Tensor)  # sums of sizes are sums too
    return x.add_(other) if tensors and x.shape == other.shape and x.dtype == other.dtype else x + other


RELUS = (F.relu, torch.relu)
ADDS = (operator.add, torch.add)


def _allow_views(graph: fx.Graph) -> None:
    """`view` becomes `reshape`, which is the same where `view` works, and works in the channels-last layout too."""
    for node in graph.find_nodes(op="call_method", target="view"):
        if not any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values())):
            node.target = "reshape"


def _reuse_memory(graph: fx.Graph, root: nn.Module) -> None:
    """Let ReLUs and residual sums overwrite what nobody else reads: an eighth of a small network's forward pass.

    Only fresh outputs that no backward pass needs are overwritten: those of convolutions, affine maps and sums.
    """
    owned = set()
    for node in graph.nodes:
        part = root.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(part, _Conv | _Affine):
            owned.add(node)
        first = node.args[0] if node.args else None
        free = isinstance(first, fx.Node) and first in owned and len(first.users) == 1
        if node.op == "call_function" and node.target in ADDS and len(node.args) == 2 and not node.kwargs:
            owned.add(node)
            other = node.args[1]
            if isinstance(other, fx.Node) and other is not first:
                if not free and other in owned and len(other.users) == 1:
                    node.args, free = (other, first), isinstance(first, fx.Node)
                node.target = _add if free else node.target
        elif (type(part) is nn.ReLU or (node.op == "call_function" and node.target in RELUS)) and free:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(_relu, (first,)))
            graph.erase_node(node)


def _traced(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, _FoldedGSeM | None]:
    """The model's graph with each module replaced by its folded part, and its gate; `model` itself is only read."""
    modules = dict(model.named_modules())
    graph, constants = _graph(model)
    root = nn.Module()
    held = [node for node in graph.nodes if node.op == "get_attr"]
    absorbed = set()  # each a BatchNorm that went into the convolution before it
    for number, node in enumerate(graph.find_nodes(op="call_module")):
        if node in absorbed:
            continue
        source = modules[node.target]
        users = list(node.users)
        behind = modules.get(users[0].target) if len(users) == 1 and users[0].op == "call_module" else None
        if type(source) is nn.Conv2d and _is_foldable(behind):
            users[0].replace_all_uses_with(node)
            graph.erase_node(users[0])
            absorbed.add(users[0])
        name = f"part{number}"
        root.add_module(name, _folded(source, behind, dtype))
        node.target = name
    _allow_views(graph)
    _reuse_memory(graph, root)
    holder = _Held(model, [node.target for node in held], constants)
    with torch.no_grad():
        holder.refresh(dtype)
    root.add_module("held", holder)
    for number, node in enumerate(held):
        node.target = f"held.t{number}"
    folded = fx.GraphModule(root, graph)
    folded.add_module("held", holder)
    return folded, _gate(graph, root)


def _gate(graph: fx.Graph, root: nn.Module) -> _FoldedGSeM | None:
    """The first GSeM, if all that comes before it reaches the rest of the network through it alone."""
    before: list[fx.Node] = []
    for node in graph.nodes:
        part = root.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(part, _FoldedGSeM):
            once = sum(other.target == node.target for other in graph.nodes) == 1
            return part if once and all(set(early.users) <= {*before, node} for early in before) else None
        if node.op != "get_attr":
            before.append(node)
    return None


class FoldedModel(nn.Module):
    """See `fold`. Images [b, c, h, w] in [0, 1] → logits [b, k] in float32 (float64 for a float64 folded model)."""

    source: nn.Module

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        # Not registered as a submodule: its parameters are not the folded model's.
        self.__dict__["source"] = model
        try:
            self.graph, self.gate = _traced(model, dtype)
        except Exception as error:  # a forward may raise anything when its input is symbolic
            warnings.warn(
                f"fold runs {type(model).__name__} as it is, correct but slower, because torch.fx cannot trace it "
                f"({type(error).__name__}: {error}). To have it folded, move what depends on values or shapes in its "
                "forward into a function that is marked by torch.fx.wrap",
                stacklevel=3,
            )
            self.graph, self.gate = _Eager(model, dtype), None
        self.requires_grad_(False)
        for part in self.modules():
            if not isinstance(part, IntegerNoise):  # the noise is the model's own, its flag too
                part.training = False
        self.refresh()

    @property
    def traced(self) -> bool:
        """Whether what runs is the model's graph, and not its own forward."""
        return not isinstance(self.graph, _Eager)

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the model's parameters, BatchNorm statistics and gradient setting again."""
        for part in self.modules():
            if isinstance(part, _Folded):
                part.refresh(self.dtype)

    @torch.no_grad()
    def exact_logits(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """What the network itself answers in eval mode. The folded model's logits differ from it by rounding."""
        like = next((p for p in self.source.parameters() if p.is_floating_point()), x)
        with eval_flags(self.source):
            return self.source(x.to(like.dtype))

    def compile_graph(self) -> None:
        """Let torch.compile run what was folded. The first pass of every shape and number of draws takes minutes."""
        self.graph = cast(nn.Module, torch.compile(self.graph))

    def train(self, mode: bool = True) -> "FoldedModel":
        return self  # a folded model is eval-time by definition

    def logits_of_draws(self, x: Float[Tensor, "b c h w"], count: int) -> Float[Tensor, "n k"]:
        """Logits [count · b, k] of `count` draws of the noise on the same images: all of the first draw, then all of
        the second, …, as `x.repeat(count, 1, 1, 1)` gives. What comes before the first noise is computed once."""
        if self.gate is None:
            return self(x.repeat(count, 1, 1, 1))
        self.gate.draws = count
        try:
            return self(x)
        finally:
            self.gate.draws = 1

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if self.dtype != torch.float16:
            logits = self.graph(x.to(dtype=self.dtype, memory_format=torch.channels_last))
            return logits if self.dtype == torch.float64 else logits.float()
        held: list[Tensor] = []
        images = _Reduce.apply(x, held).to(dtype=self.dtype, memory_format=torch.channels_last)
        return _Enlarge.apply(self.graph(images).float(), len(x), held)


def fold(model: nn.Module, dtype: torch.dtype = torch.float32) -> FoldedModel:
    """A faster copy of `model` in eval mode, for attacks to differentiate with respect to images.

    BatchNorm is folded, GSeM is one convolution, the layout is channels-last; the mode of `model` and its
    parameters are not changed, and the folded model's do not require gradients. In float32 its logits agree with the
    model's to rounding. In bf16 it gives gradient directions for PGD and APGD, nothing else: decisions belong to
    the model. It shares the noise of the model's GSeMs (`gsem.noise` on either acts on both). After the model's
    weights, statistics or `gradient` setting change, call `.refresh()`.

    Any torch model works: one that torch.fx cannot trace runs as it is, with a warning.
    """
    return FoldedModel(model, dtype)
