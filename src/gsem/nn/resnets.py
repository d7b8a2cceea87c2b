"""ResNets, pre-activation ResNets and WideResNets, with a place for a GSeM behind the stem.

Sources: K. He et al., "Deep residual learning for image recognition", CVPR 2016, in its CIFAR form (3×3 stem, no
max-pool), and "Identity mappings in deep residual networks", ECCV 2016; S. Zagoruyko and N. Komodakis, "Wide residual
networks", BMVC 2016; the GSeM paper (see `gsem.nn.gsem`) for the place of the module, and its published checkpoints
for the names of the weights.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Makes the module behind the stem from its channel count: a GSeM, or `nn.Identity` in the plain network.
Stem = Callable[[int], nn.Module]
Activation = Callable[[Tensor], Tensor]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, [b, inputs, h, w] → [b, width, h/stride, w/stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut, [b, inputs, h, w] → [b, 4 · width, h/stride, w/stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """stem conv – BN – ReLU – GSeM – four stages of residual blocks – global average pool – linear."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        width: int = 64,
        *,
        gsem: Stem = nn.Identity,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.gsem_module = gsem(width)
        stages, inputs = [], width
        for number, length in enumerate(blocks):
            stage_width = width * 2**number
            stage = []
            for i in range(length):
                stage.append(block(inputs, stage_width, stride=2 if number > 0 and i == 0 else 1))
                inputs = stage_width * block.expansion
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = self.gsem_module(F.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))


class _Activated(nn.Module):
    """A module with a choice of activation: ReLU, or another that `print` shows."""

    def __init__(self, activation: Activation):
        super().__init__()
        self.activation = activation

    def extra_repr(self) -> str:
        # Nothing for ReLU, so that the fingerprints of the published networks stay what they are.
        return "" if self.activation is F.relu else f"activation={getattr(self.activation, '__name__', '?')}"


class WideBlock(_Activated):
    """BN – ReLU – conv twice, and a shortcut from the raw input; the stride is the second convolution's."""

    def __init__(self, inputs: int, width: int, stride: int, dropout: float, activation: Activation = F.relu):
        super().__init__(activation)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1)
        project = stride != 1 or inputs != width
        self.shortcut = nn.Sequential(*([nn.Conv2d(inputs, width, 1, stride)] if project else []))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = self.dropout(self.conv1(self.activation(self.bn1(x))))
        out = self.conv2(self.activation(self.bn2(out)))
        return out + self.shortcut(x)


class WideResNet(_Activated):
    """stem conv – GSeM – three stages of pre-activation blocks – BN – ReLU – global average pool – linear.

    The stem has 64 channels, not 16 as in Zagoruyko and Komodakis, so that the GSeM has 64 too; convolutions have
    a bias, and the GSeM follows the stem directly, as in the published checkpoints.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        dropout: float = 0.0,
        stem: int = 64,
        activation: Activation = F.relu,
        *,
        gsem: Stem = nn.Identity,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__(activation)
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1)
        self.gsem_module = gsem(stem)
        stages, inputs = [], stem
        for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            stage = []
            # A block has two convolutions, and there are three stages; the other four of the depth are the stem
            # and the three projections.
            for i in range((depth - 4) // 6):
                stage.append(WideBlock(inputs, width, stride if i == 0 else 1, dropout, activation))
                inputs = width
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn1 = nn.BatchNorm2d(inputs, momentum=0.9)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = self.layer3(self.layer2(self.layer1(self.gsem_module(self.conv1(x)))))
        return self.linear(self.activation(self.bn1(out)).mean((2, 3)))


class PreActBlock(_Activated):
    """BN – ReLU – conv twice; the first convolution strides, and the shortcut is projected from the activated input."""

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation):
        super().__init__(activation)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.projects = stride != 1 or inputs != width
        if self.projects:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        activated = self.activation(self.bn1(x))
        out = self.conv2(self.activation(self.bn2(self.conv1(activated))))
        return out + (self.shortcut(activated) if self.projects else x)


class PreActResNet(_Activated):
    """stem conv – GSeM – four stages of pre-activation blocks – BN – ReLU – global average pool – linear.

    With the BatchNorm behind the last stage, as Rice et al. ("Overfitting in adversarially robust deep learning",
    ICML 2020) and most work on adversarial training after them use PreActResNet-18.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        width: int = 64,
        activation: Activation = F.relu,
        *,
        gsem: Stem = nn.Identity,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__(activation)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.gsem_module = gsem(width)
        stages, inputs = [], width
        for number, length in enumerate(blocks):
            stage = []
            for i in range(length):
                stage.append(PreActBlock(inputs, width * 2**number, 2 if number > 0 and i == 0 else 1, activation))
                inputs = width * 2**number
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = self.gsem_module(self.conv1(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(self.activation(self.bn(out)).mean((2, 3)))
