"""Your own network and training loop: insert a GSeM, train on PGD examples, evaluate.

    python 03_your_own_network.py [EPOCHS]

EPOCHS: 15 by default. The weights are written to own_network.pt. In the folder of this file, the command line then
evaluates the same network, named by `module:function`:

    gsem evaluate 03_your_own_network:trained --data digits --images 50 --subset first \\
        --attacks clean,pgd:steps=20:eot=5
"""

import sys

import torch
from torch import nn

import gsem


def make() -> nn.Module:
    """A network of pixels in [0, 1], although its layers want them normalised: so eps stays in pixels."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 10)),
    )
    # This network takes one size of images only, so an example of them is given.
    gsem.insert(net, after="2", example=torch.rand(2, 1, 8, 8))
    return gsem.normalized(net, mean=0.3, std=0.38)


def trained() -> nn.Module:
    """What `gsem evaluate` calls."""
    net = make()
    net.load_state_dict(torch.load("own_network.pt", weights_only=True))
    return net.eval()


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor, *, eps: float, epochs: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for number, rows in enumerate(torch.randperm(len(x)).split(128)):
            net.eval()  # attacks refuse BatchNorm in training mode: each image would depend on its neighbours
            seed = 1000 * epoch + number
            how = {"eps": eps, "step": eps / 4, "steps": 5, "keep": "last"}  # the last iterate is enough to train on
            x_adv = gsem.attacks.pgd(net, x[rows], y[rows], **how, seed=seed)
            net.train()
            loss = nn.functional.cross_entropy(net(x_adv), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch:>2}/{epochs}: loss on PGD examples {total / len(x):.3f}")


def main() -> None:
    torch.manual_seed(0)
    source = gsem.data.load("digits")
    part, _ = source.training()
    net = make()
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    train(net, gsem.data.to_float(part.x), part.y, eps=source.eps, epochs=epochs)
    torch.save(net.state_dict(), "own_network.pt")

    test = source.test()
    x, y = gsem.data.to_float(test.x[:50]), test.y[:50]
    result = gsem.evaluate(net.eval(), x, y, ["clean", "pgd:steps=20:eot=5"], eps=source.eps)
    for name in result.names:
        mean, low, high = result.expected(name)
        print(f"{name:<18} {100 * mean:5.1f}%   95% interval {100 * low:.1f} to {100 * high:.1f}")


if __name__ == "__main__":
    main()
