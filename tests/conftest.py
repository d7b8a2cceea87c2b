"""What every test stands on: one seed, one thread, and tiny data."""

import os
from dataclasses import replace

# Tests run side by side; the threads of several processes would wait for each other more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import gsem
from gsem.data import Source, Split

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def few_digits() -> Source:
    return small_digits()


def small_digits() -> Source:
    """120 training digits, twelve of each class, and 40 test digits."""
    source = gsem.data.load("digits")
    train, test = source.read_train(), source.read_test()
    order = torch.argsort(train.y, stable=True)
    first = torch.cat([order[train.y[order] == k][:12] for k in range(10)])
    few = Split(train.x[first], train.y[first])
    return replace(source, read_train=lambda: few, read_test=lambda: Split(test.x[:40], test.y[:40]))
