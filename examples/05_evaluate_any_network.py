"""Evaluate a network that gsem did not train.

    python 05_evaluate_any_network.py

The network here is plain PyTorch, as you may have it from somebody else: a class, a file of weights, and the mean and
the standard deviation that its input is normalised by. So that nothing is downloaded, the script first trains it
itself, without any attack, in a few seconds. In the folder of this file and of its weights, the command line does the
same:

    gsem evaluate 05_evaluate_any_network:network --normalize 0.305/0.376 --data digits --eps 0.1 \
        --suite quick --images 100 --out plain
"""

from pathlib import Path

import torch
from torch import nn

import gsem

WEIGHTS = Path("weights.pt")
MEAN, STD = 0.305, 0.376
source = gsem.data.load("digits")


def network() -> nn.Module:
    """The network of somebody else, in eval mode."""
    net = layers()
    net.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return net.eval()


def layers() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
        *(nn.Dropout(0.2), nn.Linear(512, 10)),
    )


def train_it() -> None:
    """What somebody else did: cross-entropy on normalised images, no attack."""
    torch.manual_seed(0)
    net, (train, _) = layers(), source.training()
    x = (gsem.data.to_float(train.x) - MEAN) / STD
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(200):
        rows = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(net(x[rows]), train.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(net.state_dict(), WEIGHTS)
    print(f"trained for 200 steps, loss {loss.item():.3f}")


def main() -> None:
    if not WEIGHTS.exists():
        train_it()
    # From here on it is your network: images in [0, 1] go in, logits come out, and eps is in pixels.
    model = gsem.normalized(network(), MEAN, STD)
    test = source.test()
    x, y = gsem.data.to_float(test.x[:100]), test.y[:100]

    result = gsem.evaluate(model, x, y, "quick", eps=0.1, save="evaluation", save_adv=True)
    print(result)
    worst = result.expected("worst")
    print(f"worst case: {100 * worst.mean:.1f}%, 95% interval {100 * worst.low:.1f} to {100 * worst.high:.1f}%")
    x_adv = torch.from_numpy(result["apgd20-eot1"].x_adv)
    print(f"largest change of a pixel by APGD: {(x_adv - x).abs().max():.3f}")

    for check in gsem.verify(result, model, x, y):  # bounds, labels and accuracies once more, by other code
        print(f"{check.name}: {'; '.join(check.problems) or 'holds'}")


if __name__ == "__main__":
    main()
