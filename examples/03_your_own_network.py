"""Your own network, start to report: a vision transformer with a GSeM behind its patch embedding.

    python 03_your_own_network.py [EPOCHS] [DATA [DATA_PATH]]

EPOCHS: 30 by default. DATA: digits by default, or cifar10, cifar100, svhn. The run is kept in runs/own; a second start
does not train it again. It takes about three minutes of one core on digits. In the folder of this file, the command
line does the same:

    gsem train gcat --model 03_your_own_network:for_digits --insert-after embed --lr 0.05
    gsem evaluate runs/gcat-digits-03_your_own_network-for_digits-seed0 --images 50
    gsem audit runs/gcat-digits-03_your_own_network-for_digits-seed0 --quick
    gsem report runs/gcat-digits-03_your_own_network-for_digits-seed0

A network of timm is named in the same way, --model timm:resnet18; write a function like `for_digits` that calls
timm.create_model where it needs arguments or pretrained weights.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import gsem

HERE = Path(__file__).stem
IMAGES = 100
ATTACKS = ["clean", "pgd:steps=20:eot=5"]
CHECKS = None  # all twelve; a list of names for some of them


class VisionTransformer(nn.Module):
    """Images [b, channels, side, side] in [0, 1] → logits [b, classes]."""

    def __init__(self, channels: int, side: int, patch: int, width: int, depth: int, classes: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)  # the GSeM goes behind this layer
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def for_digits() -> nn.Module:
    return VisionTransformer(channels=1, side=8, patch=2, width=48, depth=2, classes=10)


def for_colour(classes: int = 10) -> nn.Module:
    return VisionTransformer(channels=3, side=32, patch=4, width=192, depth=6, classes=classes)


def for_100_classes() -> nn.Module:
    return for_colour(100)


def main() -> None:
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    data = sys.argv[2] if len(sys.argv) > 2 else "digits"
    folder = sys.argv[3] if len(sys.argv) > 3 else None
    source = gsem.data.load(data, folder)
    make = "for_colour" if source.shape[0] == 3 else "for_digits"
    make = "for_100_classes" if len(source.classes) == 100 else make
    recipe = replace(gsem.RECIPES["gcat"].scaled(epochs), data=data, data_path=folder, lr=0.05, insert_after=("embed",))
    run = gsem.train(recipe, model=f"{HERE}:{make}", out="runs/own", resume=True, on_progress=show)
    print(run)

    test = source.test()
    x, y = gsem.data.to_float(test.x[:IMAGES]), test.y[:IMAGES]
    model = run.model()
    print(gsem.evaluate(model, x, y, ATTACKS, eps=source.eps, save=run.path / "evaluation"))
    print(gsem.audit(model, x, y, eps=source.eps, quick=True, only=CHECKS, save=run.path / "audit"))
    (page,) = gsem.report(run.path, run.path / "report.html")
    print(f"report: {page}")


def show(p) -> None:
    if p.epoch_ended:
        print(f"epoch {p.epoch}/{p.epochs}: clean {100 * p.clean:.1f}%, robust {100 * p.robust:.1f}% (validation)")


if __name__ == "__main__":
    main()
