"""Networks of a user, found as `package.module:function`, with every kind of problem."""

from collections import namedtuple

import torch
from torch import Tensor, nn


class TinyViT(nn.Module):
    """A vision transformer of images [1, 8, 8] with dropout, a class token, tied weights, and a `view`."""

    def __init__(self, classes: int = 10, dropout: float = 0.1):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.again = self.encoder.layers[0].linear2  # the same layer under a second name
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        patches = self.stem(x)
        patches = patches.view(patches.shape[0], 8, 16).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


class Convolutional(nn.Module):
    """Without BatchNorm: GroupNorm and ReLU, and a `view`."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(self.norm(self.stem(x)))
        return self.head(features.view(len(x), -1))


class Holding(Convolutional):
    """Logits in a dict, as Hugging Face's networks have them in an object."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x, "logits": super().forward(x)}


Outputs = namedtuple("Outputs", ["logits", "extra"])


class TwoFaced(Convolutional):
    """Another kind of output in train mode, as of networks with auxiliary heads."""

    def forward(self, x: Tensor) -> Tensor | Outputs:
        logits = super().forward(x)
        return Outputs(logits, logits) if self.training else logits


def vit() -> nn.Module:
    return TinyViT()


def convolutional() -> nn.Module:
    return Convolutional()


def holding() -> nn.Module:
    return Holding()


def two_faced() -> nn.Module:
    return TwoFaced()


def of_five_classes() -> nn.Module:
    return Convolutional(5)


def of_one_logit() -> nn.Module:
    return Convolutional(1)


def with_arguments(classes: int) -> nn.Module:
    return Convolutional(classes)


def failing() -> nn.Module:
    raise FileNotFoundError("there is no file 'weights.pt'")


def no_module() -> str:
    return "resnet18"


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def frozen() -> nn.Module:
    return Convolutional().requires_grad_(False)


def colour() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(10))


colour_network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
