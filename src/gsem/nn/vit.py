"""Vision transformers with a place for a GSeM behind the patch embedding.

Sources: A. Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; L. Beyer, X. Zhai and A. Kolesnikov, "Better
plain ViT baselines for ImageNet-1k", 2022, for the fixed positions and the average over tokens in place of a class
token: so images of any size are taken. The weights have the names of timm's networks.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gsem.nn.resnets import Stem


def sincos_positions(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "1 n c"]:
    """Sines and cosines of the row and of the column of each patch, in the order of `x.flatten(2)`."""
    _, c, h, w = x.shape
    rates = 10_000 ** (-torch.arange(c // 4, dtype=torch.float64, device=x.device) / (c // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64, device=x.device)[:, None] * rates for n in (h, w))
    rows, columns = rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)
    waves = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=-1)
    return waves.reshape(1, h * w, c).to(x.dtype)


torch.fx.wrap("sincos_positions")  # the number of patches is not known while a graph is traced


class PatchEmbed(nn.Module):
    """Patches of `patch` × `patch` pixels as feature vectors: [b, in_channels, h, w] → [b, width, i, j]."""

    def __init__(self, in_channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, stride=patch)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return self.proj(x)


class Attention(nn.Module):
    """Multi-head self-attention, [b, n, width] → [b, n, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """linear – GELU – linear, four times as wide in between."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """patch embedding – GSeM – positions – transformer blocks – LayerNorm – average over tokens – linear.

    Rows and columns that fill no patch are not seen, as by any convolution with a stride.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        heads: int,
        patch: int,
        gsem: Stem = nn.Identity,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, width, patch)
        self.gsem_module = gsem(width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        features = self.gsem_module(self.patch_embed(x))
        tokens = features.flatten(2).transpose(1, 2) + sincos_positions(features)
        return self.head(self.norm(self.blocks(tokens)).mean(1))
