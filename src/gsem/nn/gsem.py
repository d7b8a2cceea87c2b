"""The GSeM module: one pathway carries quantised, noisy features, the other carries the gradient.

Source: X. Liu et al., "Gradient semi-masking for improving adversarial robustness", Pattern Recognition 172
(2026) 112433. The paper's α is `levels`, its β is `noise`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Gradient = Literal["corrected", "semi-masked"]
NoiseMode = Literal["fresh", "off", "frozen"]

GRADIENTS = ("corrected", "semi-masked")
NOISE_MODES = ("fresh", "off", "frozen")


class _PassThrough(torch.autograd.Function):
    generate_vmap_rule = True  # for per-sample gradients by torch.func

    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def pass_through(x: Float[Tensor, "*s"], value: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Exactly `value` forward; the identity in `x` backward (dq/dx = I, the paper's gradient correction).

    The usual `x + (value - x).detach()` is not used: by rounding, 6 to 12% of its elements differ from a noisy
    `value`.
    """
    return _PassThrough.apply(x, value)


# torch.fx would trace into the Function and keep only its forward: the correction would be lost silently.
torch.fx.wrap("pass_through")


def _mix_(h: Tensor) -> Tensor:
    # A bijection of 64-bit words with full avalanche (the finaliser of SplitMix64, Steele et al. 2014). torch's
    # shift of a signed word copies the sign, so the copies are masked away. In place: a word is four times as large as
    # a feature in bf16.
    h ^= (h >> 30).bitwise_and_(0x3FFFFFFFF)
    h *= -0x40A7B892E31B1A47
    h ^= (h >> 27).bitwise_and_(0x1FFFFFFFFF)
    h *= -0x6B2FB644ECCEEE15
    h ^= (h >> 31).bitwise_and_(0x1FFFFFFFF)
    return h


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format that noise for `x` is made in: on an accelerator its own.

    Tensors of two formats are slow to add there. On a CPU it gains nothing, and the numbers would be others, because
    torch's stream fills a tensor in the order of memory.
    """
    # (Strides, because vmap knows them and no memory format but the contiguous one.)
    last = x.device.type != "cpu" and x.stride(1) == 1
    return torch.channels_last if last else torch.contiguous_format


class IntegerNoise(nn.Module):
    """Integers drawn uniformly from {-largest, …, +largest}, as `noise(model, …)` has set them.

    The seeded modes compute each integer from (seed, draw, position) by a hash in tensor operations, because a
    private `torch.Generator` breaks `torch.compile(fullgraph=True)`; the same seed gives the same integers on
    every device, in every dtype and in every memory format. The unseeded mode draws from torch's own stream.
    """

    key: Tensor

    def __init__(self, largest: int):
        super().__init__()
        self.largest = largest
        self.mode: NoiseMode = "fresh"
        self.seeded = False
        # [seed of this module, draws made]. A tensor, so that another seed is no new graph for torch.compile;
        # not persistent, so that published checkpoints load as they are.
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"], draws: int = 1) -> Float[Tensor, "n c h w"]:
        """Offsets for `x`, in its dtype and on its device: [draws · b, c, h, w], or [1, c, h, w] when frozen or off.

        On an accelerator they have the memory format of `x`.
        """
        if self.mode == "off" or self.largest == 0:
            return torch.zeros_like(x[:1])
        if self.mode == "frozen":
            return self._hashed((1, *x.shape[1:]), x)
        shape = (draws * x.shape[0], *x.shape[1:])
        if self.seeded:
            offsets = self._hashed(shape, x)
            self.key[1:] += 1
            return offsets
        if _layout(x) is torch.contiguous_format:
            return torch.randint(-self.largest, self.largest + 1, shape, dtype=x.dtype, device=x.device)
        like = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
        return torch.randint_like(like, -self.largest, self.largest + 1)

    def _hashed(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        count = 1
        for side in shape:
            count = count * side
        # Numbered by (image, channel, row, column) whatever the memory format.
        word = torch.arange(count, device=like.device).view(shape).contiguous(memory_format=_layout(like))
        seed, draw = self.key.to(like.device, copy=True)
        word += _mix_(_mix_(seed) + draw)
        # 31 bits modulo at most a few dozen values: the bias is below 1e-7.
        word = _mix_(word).bitwise_and_(0x7FFFFFFF).remainder_(2 * self.largest + 1).sub_(self.largest)
        return word.to(like.dtype)


@contextmanager
def noise(model: nn.Module, mode: NoiseMode, *, seed: int | None = None) -> Iterator[None]:
    """Set the noise of every GSeM inside `model` for the length of a `with` block.

    - `"fresh"`: new integers at every forward pass (the module's normal state). With a `seed`, the sequence of
      draws is reproducible and leaves torch's random state alone; without, it follows torch's stream.
    - `"frozen"`: one [c, h, w] draw per module and seed (default: 0), the same for every image, so that the
      logits of an image do not depend on its neighbours in the batch.
    - `"off"`: no noise; quantisation stays.

    Blocks nest; the former state returns at the end, also after an exception. A folded model of the model shares
    its noise; a deepcopy made inside the block keeps the mode for good. Seeds count modulo 2^63.

    Raises:
        ValueError: another mode, or a seed that is no integer.
    """
    if mode not in NOISE_MODES:
        raise ValueError(f"noise mode {mode!r} is unknown: it is one of {', '.join(NOISE_MODES)}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"noise seed must be an integer or None, not {seed!r}")
    sources = [m for m in model.modules() if isinstance(m, IntegerNoise)]
    former = [(m.mode, m.seeded, m.key.clone()) for m in sources]
    try:
        for number, m in enumerate(sources):
            m.mode, m.seeded = mode, seed is not None
            if mode == "frozen" or m.seeded:  # (otherwise the key is not used, and the state stays the model's own)
                # Each module has its own seed; the odd factor keeps (seed, number) pairs apart modulo 2^63.
                word = ((seed or 0) * 0x2545F4914F6CDD1D + number + 1) % 2**63
                m.key.copy_(torch.tensor([word, 0]))
        yield
    finally:
        for m, (mode_before, seeded, key) in zip(sources, former, strict=True):
            m.mode, m.seeded = mode_before, seeded
            m.key.copy_(key)


@contextmanager
def eval_flags(model: nn.Module) -> Iterator[None]:
    """Every module is flagged as in eval mode for the length of a `with` block.

    Flag by flag: a train() or eval() of the model's own may do more than set them.
    """
    training = {m: m.training for m in model.modules()}
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m, flag in training.items():
            m.training = flag


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    return value


class GSeM(nn.Module):
    """Gradient semi-masking of a feature map, [b, c, h, w] → [b, c, h, w] (paper section 3)::

        q   = (round(levels · x) + n) / levels      n ~ U{-noise, …, +noise}, for every element anew
        s   = conv1x1(q)                            the feature mapping pathway
        out = mish(BatchNorm(conv3x3([x, s])))      [x, ·] is the feature straight-through pathway

    Args:
        channels: c, of the input and of the output.
        levels: quantisation levels per unit of the feature (the paper's α).
        noise: the largest noise offset, in levels (the paper's β).
        gradient: what flows back through q. `"semi-masked"`: nothing, as in plain differentiation of `round`.
            `"corrected"`: the gradient at q is added, unchanged, to that of x (dq/dx = I). The attribute can be
            set at any time; the output does not depend on it.
        quantiser: False leaves `round` out, for ablations: q = x + n / levels, whose gradient needs no correction.

    Raises:
        ValueError: channels or levels below 1, noise below 0, any of them no integer, or an unknown gradient.
    """

    def __init__(
        self,
        channels: int,
        levels: int = 6,
        noise: int = 4,
        gradient: Gradient = "corrected",
        quantiser: bool = True,
    ):
        super().__init__()
        self.channels = _integer("channels", channels, 1)
        self.levels = _integer("levels", levels, 1)
        self.offsets = IntegerNoise(_integer("noise", noise, 0))
        self.gradient = gradient
        self.quantiser = quantiser
        # The names are those of the published checkpoints.
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    @property
    def noise(self) -> int:
        return self.offsets.largest

    @property
    def gradient(self) -> Gradient:
        return self._gradient

    @gradient.setter
    def gradient(self, value: Gradient) -> None:
        if value not in GRADIENTS:
            raise ValueError(f"gradient {value!r} is unknown: it is one of {', '.join(GRADIENTS)}")
        self._gradient: Gradient = value

    def integers(self, x: Float[Tensor, "b c h w"]) -> Int[Tensor, "b c h w"] | Float[Tensor, "b c h w"]:
        """levels · q: the quantised, noisy features in units of a level, without gradient, in x's dtype."""
        return self.levelled(x) + self.offsets(x)

    def levelled(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """`integers` before the noise."""
        scaled = self.levels * x.detach()
        return torch.round(scaled) if self.quantiser else scaled

    @property
    def masks(self) -> bool:
        """Whether the gradient at q is kept from x."""
        return self.quantiser and self._gradient == "semi-masked"

    def quantise(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """q, with the gradient that `self.gradient` names."""
        q = self.integers(x) / self.levels
        return q if self.masks else pass_through(x, q)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        s = self.conv1(self.quantise(x))
        return F.mish(self.bn(self.conv2(torch.cat([x, s.to(x.dtype)], dim=1))))

    def extra_repr(self) -> str:
        options = f"{self.channels}, levels={self.levels}, noise={self.noise}, gradient={self._gradient!r}"
        return options if self.quantiser else f"{options}, quantiser=False"
