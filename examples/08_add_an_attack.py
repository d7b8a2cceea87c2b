"""An attack of your own, beside those of gsem: the momentum iterative method of Dong et al. (CVPR 2018).

python 08_add_an_attack.py
"""

import torch
from torch import Tensor, nn

import gsem


def momentum(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, eot: int, steps: int = 20, decay: float = 1.0
) -> Tensor:
    """Sign steps along a running sum of gradients, each divided by its L1 norm. Returns x_adv [b, c, h, w]."""
    step, total, x_adv = 2.5 * eps / steps, torch.zeros_like(x), x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        # A network with noise has another loss at every call: the gradient is averaged over eot draws.
        loss = sum(gsem.losses.cross_entropy(model(x_adv), y).sum() for _ in range(eot)) / eot
        (gradient,) = torch.autograd.grad(loss, x_adv)
        total = decay * total + gradient / gradient.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
        x_adv = (x_adv.detach() + step * total.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return x_adv


def too_far(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """A wrong attack: it does not keep to eps."""
    return (x + 2 * eps).clamp(0, 1)


def main() -> None:
    run = gsem.train(gsem.RECIPES["gcat-fast"].scaled(6), out="runs/attacked", device="cpu", resume=True)
    test = gsem.data.load("digits").test()
    x, y = gsem.data.to_float(test.x[:50]), test.y[:50]
    model = run.model()
    result = gsem.evaluate(model, x, y, ["clean", momentum, "pgd:steps=20:eot=20"], eps=0.15, frozen=False)
    print(result)
    try:
        gsem.evaluate(model, x, y, [too_far], eps=0.15, frozen=False)
    except ValueError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
