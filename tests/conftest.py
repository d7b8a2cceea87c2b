"""What every test stands on: one seed, one thread, and tiny data."""

import os

# Tests run side by side; the threads of several processes would wait for each other more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from gsem.data import Dataset
from planted import small_digits

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def few_digits() -> Dataset:
    return small_digits()
