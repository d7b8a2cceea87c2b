"""When a point of a stochastic model counts as broken: more draws confirm it, at once or along a search."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem.attacks._core import expected
from gsem.attacks._types import Images, Labels
from gsem.losses import margin
from gsem.nn.predict import is_stochastic

# One lucky draw breaks nothing: an image of a stochastic model is broken when a point of it is misclassified in all
# draws of the search and in so many more.
CONFIRM = 100
# Images of the two forward passes that show whether the model is stochastic.
PROBED = 32


def confirmation(model: nn.Module, x: Images) -> int:
    """How many more draws confirm that a point is broken: none for a deterministic model."""
    return CONFIRM if len(x) and is_stochastic(model, x[:PROBED]) else 0


def stages(confirm: int) -> list[int]:
    """The draws that confirm, in parts: 5, then 20, then the rest. After each part only some points are left."""
    parts: list[int] = []
    while (left := confirm - sum(parts)) > 0:
        parts.append(min(5 * 4 ** len(parts), left))
    return parts


def confirm_broken(
    model: nn.Module, x: Images, y: Labels, wrong: Float[Tensor, " b"], confirm: int
) -> Bool[Tensor, " b"]:
    """Which points are broken: misclassified in every draw so far (`wrong` is 1) and in `confirm` more."""
    return _in_every_draw(model, x, y, wrong == 1, stages(confirm))


def _in_every_draw(
    model: nn.Module, x: Images, y: Labels, broken: Bool[Tensor, " b"], parts: Sequence[int]
) -> Bool[Tensor, " b"]:
    """Which of the points that are `broken` so far are misclassified in these draws, too. On an accelerator the CPU
    waits at each part, for how many points are left."""
    broken = broken.clone()
    for draws in parts:
        rows = broken.nonzero()[:, 0]
        if not len(rows):
            break
        _, again = expected(model, x[rows], y[rows], margin, draws)
        broken[rows] = again == 1
    return broken


class Confirmer:
    """`confirm_broken` along a path, for many points of each image.

    Args:
        y: labels of all images of the run.
        confirm: how many draws.
        spaced: after a point that was not confirmed, the next one is tried where its loss is higher, and in any case
            after 1, 2, 4, … more points. Otherwise an image that is misclassified in 95 draws of 100 would cost more
            than all the others. False: every point is tried.
    """

    def __init__(self, model: nn.Module, x: Images, y: Labels, confirm: int, *, spaced: bool = True):
        self.model, self.y, self.confirm, self.spaced = model, y, confirm, spaced
        self.failed = x.new_full((len(x),), float("-inf"))
        self.wait = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.pause = torch.ones_like(self.wait)

    def due(self, value: Float[Tensor, " r"], wrong: Bool[Tensor, " r"], rows: Int[Tensor, " r"]) -> Bool[Tensor, " r"]:
        """Which points of the images numbered `rows` are tried, by their loss and whether every draw was wrong."""
        if not self.spaced:
            return wrong
        failed, wait, pause = (t[rows] for t in (self.failed, self.wait, self.pause))
        tried = wrong & ((value > failed) | (wait <= 0))
        self.failed[rows] = torch.where(tried, value, failed)
        self.wait[rows] = torch.where(tried, pause, wait - 1)
        self.pause[rows] = torch.where(tried, 2 * pause, pause)
        return tried

    def __call__(
        self, x: Images, value: Float[Tensor, " r"], wrong: Float[Tensor, " r"], rows: Int[Tensor, " r"]
    ) -> Bool[Tensor, " r"]:
        """Which points x of the images numbered `rows` are broken, by their loss and their share of wrong draws."""
        if not self.confirm:
            return wrong == 1
        tried = self.due(value, wrong == 1, rows)
        return _in_every_draw(self.model, x, self.y[rows], tried, stages(self.confirm))


class Counted:
    """Numbers that the device computes, on their way to the CPU: `read`, some steps later, hardly waits for them."""

    def __init__(self, value: Tensor):
        # (Only CUDA has events to wait for a copy, and mps would hand out the memory before it is written.)
        self.value = value.to("cpu", non_blocking=value.device.type != "mps")
        self.arrived = torch.cuda.Event() if value.is_cuda else None
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.value.tolist()


@dataclass
class Trial:
    """Points, one for each row of an attack's state, that more draws decide about part by part while the search goes
    on: the CPU does not wait.

    After each part the number of points that are left starts on its way to the CPU, and the next part reads it some
    steps later. That part computes so many rows, rounded up to a power of two, so that there are few shapes; they are
    filled up with rows that do not count. Their order and number follow from the points that are left, not from the
    size of the state.
    """

    point: Tensor
    value: Tensor
    broken: Tensor
    """[r] bool: is tried, and was misclassified in every draw so far."""
    parts: list[int]
    counted: Counted

    @classmethod
    def begin(cls, confirmer: Confirmer, point: Tensor, value: Tensor, tried: Bool[Tensor, " r"]) -> "Trial":
        return cls(point, value, tried, stages(confirmer.confirm), Counted(tried.sum().view(1)))

    def next_part(self, confirmer: Confirmer, rows: Int[Tensor, " r"]) -> None:
        """The next draws; the last of them, where no point is left."""
        draws, *self.parts = self.parts
        (count,) = self.counted.read()
        if not count:
            self.parts = []
            return
        at = (~self.broken).byte().argsort(stable=True)[: 1 << (count - 1).bit_length()]
        _, again = expected(confirmer.model, self.point[at], confirmer.y[rows[at]], margin, draws)
        self.broken[at] &= again == 1
        self.counted = Counted(self.broken.sum().view(1))

    def finish(self, confirmer: Confirmer, rows: Int[Tensor, " r"]) -> None:
        """All draws that are left, at once: the CPU waits for them."""
        self.broken = _in_every_draw(confirmer.model, self.point, confirmer.y[rows], self.broken, self.parts)
        self.parts = []
