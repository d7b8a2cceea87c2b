"""Common to all tests: one seed, one thread, and tiny data."""

import os
import signal

# Tests run side by side; the threads of several processes would wait for each other more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from gsem.data import Dataset
from planted import small_digits

torch.set_num_threads(1)

# A shell without job control starts background processes with Ctrl-C ignored, and its children inherit that: the tests
# of Ctrl-C would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def few_digits() -> Dataset:
    return small_digits()
