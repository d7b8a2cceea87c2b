"""Published defences whose true robustness is known, each as a small module written from its paper."""

import copy
import math
import random
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Source = Literal["torch", "numpy", "python"]
"""Whose global random stream a random defence draws from. Published code uses all three."""


def integers(source: Source, low: int, high: int, count: int, device: torch.device) -> Tensor:
    """[count] integers, uniform in low … high − 1."""
    if source == "torch":
        return torch.randint(low, high, (count,), device=device)
    if source == "numpy":
        return torch.from_numpy(np.random.randint(low, high, count)).to(device)
    return torch.tensor([random.randrange(low, high) for _ in range(count)], device=device)


# --- in front of the network: the image is changed ----------------------------------------------------------------


class CosineRounding(nn.Module):
    """The rounding of JPEG: blocks of 8 × 8 pixels in the basis of the DCT, rounded to multiples of a step.

    C. Guo et al., "Countering adversarial images using input transformations", ICLR 2018 (its JPEG compression). The
    step of the coefficient of frequencies (u, v) is step · (1 + u + v), in the unit of the pixels. Rounding has no
    gradient. Athalye et al. (ICML 2018) break it by a straight-through gradient.
    """

    basis: Tensor
    table: Tensor

    def __init__(self, step: float):
        super().__init__()
        at = torch.arange(8, dtype=torch.float64)
        basis = torch.cos(math.pi * at[:, None] * (2 * at + 1) / 16) / 2
        basis[0] /= 2**0.5
        self.register_buffer("basis", basis.float())
        self.register_buffer("table", (step * (1 + at[:, None] + at)).float()[:, None])

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        padded = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
        blocks = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))
        coefficients = torch.einsum("bchiwj,ui,vj->bchuwv", blocks, self.basis, self.basis)
        rounded = (coefficients / self.table).round() * self.table
        blocks = torch.einsum("bchuwv,ui,vj->bchiwj", rounded, self.basis, self.basis)
        return blocks.flatten(4, 5).flatten(2, 3)[:, :, :h, :w].clamp(0, 1)


class Thermometer(nn.Module):
    """Each channel as `levels` channels of bits: bit k is 1 where the pixel is over k/levels. No gradient passes.

    J. Buckman et al., "Thermometer encoding: one hot way to resist adversarial examples", ICLR 2018. Athalye et al.
    (ICML 2018) break it with the gradient of `Ramps`.
    """

    levels: int
    thresholds: Tensor

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels
        self.register_buffer("thresholds", torch.arange(levels)[:, None, None] / levels)

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, None] > self.thresholds).to(x.dtype).flatten(1, 2)


class Ramps(Thermometer):
    """The differentiable approximation of `Thermometer` by Athalye et al.: min(max(x − k/levels, 0), 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, None] - self.thresholds).clamp(0, 1).flatten(1, 2)


class ResizedAndPadded(nn.Module):
    """Each image resized to a random size up to `largest`, and put at a random place of a black one of `largest` + 1.

    C. Xie et al., "Mitigating adversarial effects through randomization", ICLR 2018. Athalye et al. (ICML 2018)
    break it by averaging gradients over the draws (EOT).
    """

    def __init__(self, largest: int, source: Source):
        super().__init__()
        self.largest, self.source = largest, source

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sizes, tops and lefts [b] of the images."""
        n, side = len(x), self.largest + 1
        sizes = integers(self.source, x.shape[-1], side, n, x.device)
        # A place in 0 … side − size, from a large integer, since the end differs from image to image.
        top, left = (integers(self.source, 0, 2**30, n, x.device) % (side - sizes + 1) for _ in range(2))
        return sizes, top, left

    def forward(self, x: Tensor) -> Tensor:
        sizes, top, left = self.draw(x)
        rows, columns = (self._spread(x.shape[-1], sizes, first).to(x.dtype) for first in (top, left))
        return rows[:, None] @ x @ columns[:, None].mT

    def _spread(self, length: int, sizes: Tensor, first: Tensor) -> Tensor:
        """[b, side, length]: 1 where a row of the result shows a row of the image (the nearest), from `first` on."""
        at = torch.arange(self.largest + 1, device=sizes.device) - first[:, None]
        shown = torch.where((at >= 0) & (at < sizes[:, None]), at * length // sizes[:, None], -1)
        return shown[:, :, None] == torch.arange(length, device=sizes.device)


class GaussianNoise(nn.Module):
    """Gaussian noise on the image.

    X. Liu et al., "Towards robust neural networks via random self-ensemble", ECCV 2018 (its input layer). Broken by
    averaging gradients over the draws (Athalye et al., ICML 2018).
    """

    def __init__(self, std: float):
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x)


class TotalVariation(nn.Module):
    """The image u that minimises |u − x|² / 2 + weight · TV(u), by a solver that has no gradient.

    C. Guo et al., ICLR 2018 (total variance minimisation, here without dropped pixels). TV sums the Euclidean norms of
    the differences to the right and lower pixels of each channel; the solver is A. Chambolle's, "An algorithm for total
    variation minimization and applications", 2004. Athalye et al. (ICML 2018) break it by a
    straight-through gradient.
    """

    def __init__(self, weight: float, steps: int = 30):
        super().__init__()
        self.weight, self.steps = weight, steps

    def forward(self, x: Tensor) -> Tensor:
        image = x.detach()
        down, right = torch.zeros_like(image), torch.zeros_like(image)  # the dual variable, one part a difference
        for _ in range(self.steps):
            value = _divergence(down, right) - image / self.weight
            to_down, to_right = _differences(value)
            size = 1 + 0.25 * (to_down**2 + to_right**2).sqrt()
            down, right = (down + 0.25 * to_down) / size, (right + 0.25 * to_right) / size
        return image - self.weight * _divergence(down, right)


def _differences(u: Tensor) -> tuple[Tensor, Tensor]:
    """To the pixel below and to the right; 0 at the edge."""
    return F.pad(u[:, :, 1:] - u[:, :, :-1], (0, 0, 0, 1)), F.pad(u[..., 1:] - u[..., :-1], (0, 1))


def _divergence(down: Tensor, right: Tensor) -> Tensor:
    """Minus the adjoint of `_differences`."""
    down, right = F.pad(down[:, :, :-1], (0, 0, 1, 1)), F.pad(right[..., :-1], (1, 1))
    return down[:, :, 1:] - down[:, :, :-1] + right[..., 1:] - right[..., :-1]


class Median(nn.Module):
    """The median of each pixel's neighbourhood of size × size (of four values the third), without a gradient.

    W. Xu, D. Evans and Y. Qi, "Feature squeezing", NDSS 2018 (median smoothing, in their code by scipy). He et al.
    (WOOT 2017) and Carlini and Wagner (AISec 2017) break such filters.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.size // 2, (self.size - 1) // 2
        padded = F.pad(x.detach(), (before, after, before, after), mode="replicate")
        around = padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)
        return around.sort(-1).values[..., self.size**2 // 2]


# --- inside the network: the features, or their gradient, are changed ----------------------------------------------


class KWinners(nn.Module):
    """Of all of an image's features the largest share stays; the others become 0.

    C. Xiao, P. Zhong and C. Zheng, "Enhancing adversarial defense by k-winners-take-all", ICLR 2020. The gradient is
    right almost everywhere, but the loss jumps wherever the winners change. Tramèr et al. (NeurIPS 2020) break it by
    gradients averaged over many points around the image.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, int(self.share * flat.shape[1])), dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, 0.0).view_as(x)


class MeanSparse(nn.Module):
    """Features within `threshold` standard deviations of their channel's mean become that mean; no gradient passes.

    S. Amini et al., "MeanSparse: post-training robustness enhancement through mean-centered feature sparsification",
    2024. Behind each normalisation of a trained network; see `sparsified`. On the public leaderboard, an attack that
    knows of it lowered the accuracy of its network from 72.08% to 68.94%.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, threshold: float):
        """mean, std: [c], of the features."""
        super().__init__()
        self.threshold = threshold
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.where((x - self.mean).abs() > self.threshold * self.std, x, self.mean)


@torch.no_grad()
def sparsified(model: nn.Module, x: Tensor, threshold: float) -> nn.Module:
    """A copy of the network with a `MeanSparse` behind each BatchNorm, its statistics those of the images x."""
    model = copy.deepcopy(model)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    outputs: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_hook(lambda m, _, out: outputs.__setitem__(m, out)) for m in norms.values()]
    model(x)
    for hook in hooks:
        hook.remove()
    for name, norm in norms.items():
        std, mean = torch.std_mean(outputs[norm], (0, 2, 3))
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, nn.Sequential(norm, MeanSparse(mean, std, threshold)))
    return model.eval()


class PartlyDetached(nn.Module):
    """Some channels are cut off from the gradient; the features stay as they are.

    As in gradient semi-masking without its correction (X. Liu et al., Pattern Recognition 172 (2026) 112433): an attack
    follows the other channels only. Broken by a straight-through gradient.
    """

    cut: Tensor

    def __init__(self, cut: Tensor):
        """cut: [c], True for the channels without a gradient."""
        super().__init__()
        self.register_buffer("cut", cut[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.cut, x.detach(), x)


class _Signed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, signs: Tensor) -> Tensor:
        ctx.save_for_backward(signs)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class WrongBackward(nn.Module):
    """The identity, whose backward pass reverses the gradient of some channels.

    A gradient that exists and is not the loss's: shattered gradients (Athalye et al., ICML 2018, section 3). Broken by
    a straight-through gradient.
    """

    signs: Tensor

    def __init__(self, signs: Tensor):
        """signs: [c], of 1 and −1."""
        super().__init__()
        self.register_buffer("signs", signs[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return _Signed.apply(x, self.signs)


# --- behind the network: its output is changed ---------------------------------------------------------------------


class Temperature(nn.Module):
    """Logits multiplied by a constant, so that the cross-entropy saturates.

    The effect of defensive distillation: N. Papernot et al., "Distillation as a defense to adversarial perturbations",
    S&P 2016. Carlini and Wagner (S&P 2017) break it by a loss of the logits' differences.
    """

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor


class OneHot(nn.Module):
    """A network that returns nothing but its decision: 1 for the class, 0 for the others. There is no gradient.

    W. Brendel, J. Rauber and M. Bethge, "Decision-based adversarial attacks", ICLR 2018, break it by its decisions.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(x.dtype)


class RandomMember(nn.Module):
    """For each image, a random one of several networks answers.

    R. Pinot et al., "Randomization matters: how to defend against strong adversarial attacks", ICML 2020 (a mixture of
    classifiers). Dbouk and Shanbhag (ICML 2022) break such mixtures by attacks on all members.
    """

    def __init__(self, networks: list[nn.Module], source: Source):
        super().__init__()
        self.networks, self.source = nn.ModuleList(networks), source

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([network(x) for network in self.networks])
        return logits[integers(self.source, 0, len(self.networks), len(x), x.device), torch.arange(len(x))]
