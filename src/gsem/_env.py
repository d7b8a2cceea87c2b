"""Devices, the precision that each is fast in, and the version and commit of this package."""

import os
import platform
import subprocess
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

import gsem
from gsem._world import World, world

Used = Literal["float32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# oneDNN multiplies with no newer instructions than this environment variable allows. These allow bf16 on x86.
ONEDNN_BF16 = ("AVX512_CORE_BF16", "AVX10", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "ALL", "DEFAULT")

# What a device raises when it fails or its memory is full. They are RuntimeErrors, as are those of a model that cannot
# be differentiated, and must not be taken for one.
DEVICE_FAULTS: tuple[type[Exception], ...] = tuple(
    getattr(torch, name) for name in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, name)
)

FEWER = "pass fewer images at a time (--images), or compute on the CPU (--device cpu)"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Multiply float32 as float32 inside this block, or inside a function that it decorates.

    A GPU may otherwise round the factors of a convolution to TF32 (10 bits), and a CPU those of a product to bf16. The
    caller's settings are put back at the end.
    """
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # from torch 2.9 on
        owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        owners += [backends.mkldnn.matmul, backends.mkldnn.conv]
        settings: list[tuple[Any, str, Any]] = [(owner, "fp32_precision", "ieee") for owner in owners]
    else:
        settings = [(owner, "allow_tf32", False) for owner in (backends.cuda.matmul, backends.cudnn)]
    former = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, exact in settings:
            setattr(owner, name, exact)
        yield
    finally:
        for (owner, name, _), value in zip(settings, former, strict=True):
            setattr(owner, name, value)


@contextmanager
def out_of_memory_names(batch_size: int) -> Iterator[None]:
    """An out-of-memory error of the device names a smaller batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f"try batch_size={batch_size // 2} (--batch-size)" if batch_size > 1 else "even one image is too much"
        problem = f"the device's memory is full with {batch_size} images at once: {smaller}"
        raise torch.OutOfMemoryError(f"{problem}. {str(error).splitlines()[0]}") from error


def require_room(images: torch.Tensor, device: torch.device | str, instead: str) -> None:
    """Refuse to put on a CUDA device what does not fit into its free memory. Networks and activations come on top.

    Args:
        images: what is to be put there.
        instead: what to do where it does not fit.

    Raises:
        ValueError: how much memory is needed, and how much is free.
    """
    device = torch.device(device)
    if device.type != "cuda" or images.device.type == "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has reserved and does not use is free, too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = images.numel() * images.element_size()
    if needed > free:
        problem = f"{len(images)} images take {needed / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} GiB free"
        raise ValueError(f"{problem}: {instead}")


def device_named(name: str | None, place: World | None = None) -> torch.device:
    """A torch device; `None` is the GPU where there is one. Of several processes, each takes a GPU of its own.

    Args:
        place: of the process that takes it; default: of this one.

    Raises:
        ValueError: a device that torch does not know, that this machine does not have, or that several processes cannot
            share.
    """
    place = world() if place is None else place
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown: it is cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available: torch sees no GPU here: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device {name!r} is not available: torch sees {count} GPUs here: cuda:0 to cuda:{count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available: torch sees no Apple GPU here: use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is not supported: it is cpu, cuda, cuda:N or mps")
    return _of_several(device, place) if place.size > 1 else device


def _of_several(device: torch.device, place: World) -> torch.device:
    """The device of one of several processes: on GPUs, that of its number among the processes of this host."""
    if device.type == "mps" or device.index is not None:
        raise ValueError(
            f"device '{device}' is one for all {place.size} processes: --device cuda gives each a GPU of its own, "
            "--device cpu computes without"
        )
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if place.local_rank < count:
        return torch.device("cuda", place.local_rank)
    if count == 1 and "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device("cuda", 0)  # srun can let each process see its own GPU alone
    raise ValueError(
        f"at least {place.local_rank + 1} processes on this host, and torch sees {count} GPU{'s' * (count > 1)} here: "
        f"start {count}, or compute with --device cpu"
    )


def require_float64(device: torch.device, what: str) -> None:
    """Refuse what computes in float64 on a device without it.

    Raises:
        ValueError: naming `what`.
    """
    if device.type == "mps":
        raise ValueError(f"{what} computes in float64, which mps does not have: use --device cpu")


def cpu_multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware: AMX or AVX512-BF16 on x86, the bf16 extension on Arm.

    Others emulate it, several times slower than float32. `ONEDNN_MAX_CPU_ISA`, which takes instructions away from
    torch's convolutions, is respected.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return arm_multiplies_bf16()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return bool(has) and limit.startswith(ONEDNN_BF16)


def arm_multiplies_bf16() -> bool:
    """Whether an Arm processor has the bf16 extension, and torch's build uses it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_precision(asked: str, device: torch.device) -> Used:
    """The precision that `asked` (auto, float32, bf16 or fp16) means on `device`.

    A rule and not a timing, so that a run can be repeated. `auto` is bf16 where the device multiplies it in hardware
    (see `cpu_multiplies_bf16`; CUDA from compute capability 8), fp16 on older CUDA GPUs, and float32 elsewhere.
    fp16 means the same as `auto` on a CPU, which is slow in it: the published recipes ask for fp16.

    Raises:
        ValueError: bf16 or fp16 on mps, where only float32 is supported.
    """
    if device.type == "mps":
        if asked in ("bf16", "fp16"):
            raise ValueError(f"precision {asked} is not supported on mps: use float32 or auto")
        return "float32"
    if device.type == "cpu" and asked in ("auto", "fp16"):
        return "bf16" if cpu_multiplies_bf16() else "float32"
    if asked == "auto":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    assert asked in ("float32", "bf16", "fp16")
    return asked  # type: ignore[return-value]


def warn_if_emulated(used: Collection[str], device: torch.device) -> None:
    """One warning where bf16 is among the precisions used, and the processor emulates it."""
    if "bf16" in used and device.type == "cpu" and not cpu_multiplies_bf16():
        warnings.warn(
            "this processor has no bf16 instructions: passes in bf16 take 5 to 22 times as long as in float32 "
            "(precision auto chooses float32 here)",
            stacklevel=2,
        )


def release() -> str:
    """The version of this package, also where it runs from a folder and is not installed."""
    return gsem.__version__


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout that `folder` is tracked in, with `-dirty` behind it where tracked files differ.

    None outside of a checkout (also for a package installed inside somebody else's), or without git.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", ".")
        found = _git(folder, "rev-parse", "--short=12", "HEAD")
        return found + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    ran = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10, check=True)
    return ran.stdout.strip()
