"""The types that attacks share, and the `Step` that their observers get."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from gsem.nn.contract import ImagesLike as ImagesLike
from gsem.nn.contract import LabelsLike as LabelsLike

Images = Float[Tensor, "b c h w"]  # in [0, 1]; eps in the same unit
Labels = Int[Tensor, " b"]
Norm = Literal["Linf", "L2"]


@dataclass(frozen=True)
class Step:
    """One iterate of an attack, as its observer sees it: all averaged over the draws of the search.

    rows: [b] numbers of the images; x: [b, c, h, w] the iterate; loss: [b]; wrong: [b], the share of draws that
    misclassify it (of a targeted attack: that take it for its target), in [0, 1]; live: [b], which images are still
    worked on, or None for all (on a GPU broken images remain in the batch for a few steps).
    """

    rows: Tensor
    step: int
    x: Tensor
    loss: Tensor
    wrong: Tensor
    live: Tensor | None = None


OnStep = Callable[[Step], None]
