"""What was tried on each image: how often the model gets the worst point wrong, and which attack found it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Shares:
    """How often the model gets a point of each image wrong, and what found the point."""

    selection: Float[np.ndarray, " n"]
    """Share of wrong draws by which points are chosen."""
    wrong: Float[np.ndarray, " n"]
    """Share of wrong draws that no choice has seen."""
    by: np.ndarray
    """[n] the attack, as a text that `AttackSpec.parse` reads; "clean" for the image itself."""

    def worse_of(self, other: "Shares") -> "Shares":
        """Per image that of the point that more selection draws get wrong."""
        pick = other.selection > self.selection
        return Shares(*(np.where(pick, theirs, own) for own, theirs in zip(self._values, other._values, strict=True)))

    @property
    def _values(self) -> tuple[np.ndarray, ...]:
        return self.selection, self.wrong, self.by

    def to_dict(self) -> dict[str, list]:
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}

    @classmethod
    def from_dict(cls, found: Mapping[str, list]) -> "Shares":
        return cls(**{name: np.array(values) for name, values in found.items()})


def lowest(parts: Sequence[Shares]) -> Shares:
    """Per image the first of the worst by selection draws."""
    return reduce(Shares.worse_of, parts)
