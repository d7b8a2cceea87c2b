"""Audit a published defence: the rounding of JPEG in front of a network, whose gradient is zero.

    python 06_audit_a_defence.py

C. Guo et al., "Countering adversarial images using input transformations", ICLR 2018, compress images by JPEG before
they are classified. Athalye et al. (ICML 2018) show that this masks the gradient and adds no robustness. Here the
rounding of JPEG stands in front of a small network for digits, which is trained without any attack.
"""

import math

import torch
from torch import Tensor, nn

import gsem

EPS = 0.2


class JPEG(nn.Module):
    """The rounding of JPEG on images of 8 × 8 pixels: coefficients of the DCT as multiples of a step.

    The step of the frequencies (u, v) is `step` · (1 + u + v).
    """

    def __init__(self, step: float = 0.15):
        super().__init__()
        at = torch.arange(8.0)
        basis = torch.cos(math.pi * at[:, None] * (2 * at + 1) / 16) / 2
        basis[0] /= math.sqrt(2)
        self.register_buffer("basis", basis)
        self.register_buffer("steps", step * (1 + at[:, None] + at))

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self.basis @ x @ self.basis.T
        rounded = (coefficients / self.steps).round() * self.steps  # round: the derivative is zero
        return (self.basis.T @ rounded @ self.basis).clamp(0, 1)


def defended(steps: int = 300) -> nn.Module:
    """A network trained behind the defence, in eval mode."""
    torch.manual_seed(0)
    classifier = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )
    model = nn.Sequential()
    model.add_module("jpeg", JPEG())
    model.add_module("classifier", classifier)
    train, _ = gsem.data.load("digits").training()
    x = gsem.data.to_float(train.x)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), train.y[rows]).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    model = defended()
    test = gsem.data.load("digits").test()
    x, y = gsem.data.to_float(test.x[:128]), test.y[:128]
    audit = gsem.audit(model, x, y, "apgd:steps=50", eps=EPS, quick=True)
    print(audit)
    print(f"\nclaimed: {100 * audit.claimed.mean:.1f}%, found: {100 * audit.found.mean:.1f}%")
    print(f"by: {audit.metadata['reached_by'].replace(',', chr(10) + '    ')}")


if __name__ == "__main__":
    main()
