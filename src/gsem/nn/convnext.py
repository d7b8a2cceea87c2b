"""ConvNeXts with a place for a GSeM behind the stem.

Source: Z. Liu et al., "A ConvNet for the 2020s", CVPR 2022, without its stochastic depth; the weights have the
names of its published checkpoints.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gsem.nn.resnets import Stem


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [b, c, h, w]."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """7×7 convolution per channel – LayerNorm – linear – GELU – linear – scale per channel, beside a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.gamma * self.pwconv2(F.gelu(self.pwconv1(out)))
        return x + out.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """stem (patches, LayerNorm) – GSeM – stages of blocks, halved in between – average – LayerNorm – linear."""

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        patch: int,
        gsem: Stem = nn.Identity,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(in_channels, widths[0], patch, patch), LayerNorm2d(widths[0], eps=1e-6))
        halved = (
            nn.Sequential(LayerNorm2d(narrow, eps=1e-6), nn.Conv2d(narrow, wide, 2, 2))
            for narrow, wide in itertools.pairwise(widths)
        )
        self.downsample_layers = nn.ModuleList([stem, *halved])
        self.gsem_module = gsem(widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth)))
            for depth, width in zip(depths, widths, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        for number, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = downsample(x)
            x = stage(self.gsem_module(x) if number == 0 else x)
        return self.head(self.norm(x.mean((2, 3))))
