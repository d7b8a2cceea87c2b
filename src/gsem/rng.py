"""Named random streams, derived from one seed. The caller's random state is not changed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """The seed of the random stream called `names`, in [0, 2^63). Streams of different names are independent.

    An evaluation has three: `derive_seed(seed, "search", …)`, `"selection"` and `"scoring"`.
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own on `device`, for the random stream called `names`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *names))


def reseed(seed: int, device: torch.device) -> None:
    """Set torch's global random state on the CPU and on `device`. Only inside `seeded`, which restores it."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@dataclass(frozen=True)
class Shard:
    """Neighbouring rows of a batch: those of one process.

    Random numbers are drawn for all rows of the batch, and a process takes those of its own rows. An image thus gets
    the same numbers on any number of processes.
    """

    start: int
    stop: int
    batch: int
    """Rows of the whole batch."""

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def stream(self) -> tuple[str | int, ...]:
        """What is added to the name of a random stream that each shard draws from for itself."""
        return () if len(self) == self.batch else ("shard", self.start)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global random state, from which a stochastic model draws, starts at `seed` for this block only."""
    cuda = [device] if device.type == "cuda" else []
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=cuda):
            reseed(seed, device)
            yield
    finally:
        if mps is not None:
            torch.mps.set_rng_state(mps)
