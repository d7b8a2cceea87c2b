"""A torch Dataset of PIL images: described, trained on, evaluated, in cells that a notebook takes over one by one.

    python 04_dataset_object.py [EPOCHS]

EPOCHS: 6 by default, some ten seconds of one core. The network is a small PreActResNet with a GSeM.
"""

# %% A map-style dataset: an item is (PIL image, integer label). torchvision's datasets, without transforms, are such.
import sys
from dataclasses import replace

from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

import gsem


class Scans(Dataset):
    """Handwritten digits as grey images of 8 × 8 pixels."""

    classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self, rows: slice):
        digits = load_digits()
        self.arrays = (digits.images[rows] * (255 / 16)).astype("uint8")
        self.labels = digits.target[rows]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return Image.fromarray(self.arrays[row]), int(self.labels[row])


# %% The data. No random transforms in the dataset: the recipe augments. Digits are not mirrored.
source = gsem.data.from_torch(Scans(slice(1500)), test=Scans(slice(1500, None)), eps=0.15, flip=False)
print(f"{source.description}: {len(source.classes)} classes, images {source.shape}")

# %% Training. Without `out`, the run directory is runs/RECIPE-DATA-MODEL-seedN.
epochs = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 6  # (a notebook has arguments of its own)
recipe = replace(gsem.RECIPES["gcat-fast"].scaled(epochs), model="gsem-preactresnet10x16")
run = gsem.train(recipe, data=source, out="runs/scans", device="cpu", resume=True)
print(run)

# %% Evaluation on 50 test images.
test = source.test()
x, y = gsem.data.to_float(test.x[:50]), test.y[:50]
result = gsem.evaluate(run.model(), x, y, ["clean", "pgd:steps=10:eot=5"], eps=source.eps)
print(result)
print(f"robust accuracy: {100 * result.expected('pgd10-eot5').mean:.1f}%")
