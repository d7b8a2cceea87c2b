"""Put a GSeM into a network, and look at what it does to the output and to the gradient.

python 01_insert.py
"""

import torch
from torch import nn

import gsem

torch.manual_seed(0)
x = torch.rand(8, 3, 32, 32)

# Any network will do. Here the stem is layers 0 to 2.
net = nn.Sequential(
    *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
)
before = sum(p.numel() for p in net.parameters())
net = gsem.insert(net, after="2").eval()
after = sum(p.numel() for p in net.parameters())
module = net[2][1]  # the layer became Sequential(layer, GSeM)
print(f"GSeM({module.extra_repr()})")
print(f"parameters: {before:,} before, {after:,} after")

# The noise is fresh at every call, except inside a `with gsem.noise` block.
print("two calls agree:", torch.equal(net(x), net(x)))
with gsem.noise(net, "frozen", seed=1):
    print("two calls agree, noise frozen:", torch.equal(net(x), net(x)))


def gradient(kind: str) -> torch.Tensor:
    """Of the summed loss in the pixels; the noise is frozen, so that the kind is the only difference."""
    module.gradient = kind
    pixels = x.clone().requires_grad_()
    with gsem.noise(net, "frozen", seed=1):
        loss = nn.functional.cross_entropy(net(pixels), torch.zeros(8, dtype=torch.int64), reduction="sum")
    return torch.autograd.grad(loss, pixels)[0]


# The setting changes the gradient and nothing else.
masked, corrected = gradient("semi-masked"), gradient("corrected")
print(f"gradient norm: {masked.norm():.4f} semi-masked, {corrected.norm():.4f} corrected")
print(f"pixels where their signs differ: {100 * (masked.sign() != corrected.sign()).float().mean():.0f}%")
