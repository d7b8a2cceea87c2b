"""An evaluation in a process of its own, for the test that kills it: python killed_evaluation.py OUT."""

import sys

import torch

import gsem
from planted import Flipper, halves


def question() -> dict:
    """A stochastic model that is not robust alike everywhere, a few attacks, small batches."""
    torch.manual_seed(2)
    net = gsem.create_model("gsem-resnet10x16", num_classes=3, in_channels=1).eval()
    x, y = halves(24, contrast=0.1)
    attacks = "clean,pgd:steps=4:eot=2,apgd:steps=6:eot=2,square:queries=20:eot=2"
    return {"model": net, "x": x, "y": y, "attacks": attacks, "eps": 0.1, "draws": 12, "batch_size": 8}


__all__ = ["Flipper", "question"]

if __name__ == "__main__":
    torch.set_num_threads(1)
    print("begins", flush=True)
    gsem.evaluate(**question(), save=sys.argv[1], save_adv=True)
