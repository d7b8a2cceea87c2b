"""The place of this process among those that were started together, from the environment. Needs no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The place of this process among all, from the environment."""

    rank: int
    size: int
    local_rank: int
    """Among the processes of this host."""


def world(environment: Mapping[str, str] | None = None) -> World:
    """The processes that were started together; one process where nothing in the environment names several.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. In a step of SLURM (srun) they follow from
    SLURM's own variables.

    Raises:
        ValueError: some of the variables are there and others are not, or they are no sensible numbers.
    """
    found = os.environ if environment is None else environment
    if "RANK" not in found and "WORLD_SIZE" not in found and int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return World(*(int(found[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID")))
    size = _number(found, "WORLD_SIZE", 1)
    if size < 1:
        raise ValueError(f"WORLD_SIZE must be at least 1, not {size}")
    if size == 1 and "RANK" not in found:
        return World(0, 1, 0)
    missing = [name for name in VARIABLES if name not in found]
    if missing and (size > 1 or "WORLD_SIZE" not in found):
        given = ", ".join(f"{name}={found[name]}" for name in VARIABLES if name in found)
        raise ValueError(
            f"{given} is set, but {', '.join(missing)} is not: start several processes by torchrun "
            "(torchrun --nproc-per-node N -m gsem …) or --processes N, or unset it"
        )
    rank = _number(found, "RANK", 0)
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be 0 to {size - 1} where WORLD_SIZE is {size}, not {rank}")
    return World(rank, size, _number(found, "LOCAL_RANK", rank))


def has_launcher() -> bool:
    """Whether torch's launcher watches the processes, and holds their store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _number(found: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(found.get(name, default))
    except ValueError:
        raise ValueError(f"{name} must be an integer, not {found[name]!r}") from None
