"""A small trained network for attacks to work on."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsem


@pytest.fixture(scope="session")
def attacked() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained for two seconds on digits with noise, and 120 test digits that it gets right."""
    source = gsem.data.load("digits")
    train, test = source.training()[0], source.test()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 16, 3, 2), nn.Softplus(8), nn.Flatten(), nn.Linear(144, 32), nn.ReLU())
        model.append(nn.Linear(32, 10))
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(400):
            rows = torch.randint(len(train.x), (128,))
            x = gsem.data.to_float(train.x[rows])
            optimiser.zero_grad()
            F.cross_entropy(model((x + 0.15 * torch.randn_like(x)).clamp(0, 1)), train.y[rows]).backward()
            optimiser.step()
    x, y = gsem.data.to_float(test.x), test.y
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == y).nonzero()[:120, 0]
    assert len(right) == 120
    return model.requires_grad_(False), x[right], y[right]


@pytest.fixture(scope="session")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained for two seconds, and 120 test digits that it gets right."""
    source = gsem.data.load("digits")
    train, test = source.training()[0], source.test()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 32), nn.ReLU())
    model.append(nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        rows = torch.randint(len(train.x), (128,))
        optimiser.zero_grad()
        F.cross_entropy(model(train.x[rows].float() / 255), train.y[rows]).backward()
        optimiser.step()
    x, y = test.x.float() / 255, test.y
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == y).nonzero()[:120, 0]
    return model.requires_grad_(False), x[right], y[right]
