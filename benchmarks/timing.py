"""What the benchmarks share: times that wait for the device, their spread, a device's product rate, a time limit."""

import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gsem._env import cpu_multiplies_bf16


def synchronize(device: torch.device) -> None:
    """Wait for all that was queued on this device, which need not be the current one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Clock:
    """Wall time; or processor time, which other work on the machine does not lengthen as it does wall time."""

    now: Callable[[], float] = staticmethod(time.perf_counter)


def taken(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = Clock.now()
    work()
    synchronize(device)
    return Clock.now() - started


def in_turns(
    device: torch.device, sides: dict[str, Callable[[], object]], repeats: int, *, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each side. The sides take turns, after `warm_ups` calls of each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_ups + repeats):
        for name, work in sides.items():
            seconds = taken(device, work)
            if turn >= warm_ups:
                times[name].append(seconds)
    return times


def spread(times: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(times):9.4f} s  ({min(times):.4f} – {max(times):.4f})"


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in this precision: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    times = in_turns(device, {"product": lambda: a @ a}, 10, warm_ups=2)
    return 2 * n**3 / min(times["product"])


def described(device: torch.device) -> str:
    """The processor or GPU, and how many threads torch uses."""
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"{torch.cuda.get_device_name(device)}, compute capability {capability}"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    kind += f", limited to {limit}" if limit else ""
    return f"{kind}, bf16 in hardware: {'yes' if cpu_multiplies_bf16() else 'no'}"


def tf32_settings() -> tuple[object, ...]:
    """Everything that decides whether products and convolutions in float32 may run in TF32."""
    found: list[object] = []
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        try:
            found.append(backend.allow_tf32)
        except RuntimeError:  # torch refuses to read it after its newer setting was used
            found.append("unreadable")
        conv = getattr(backend, "conv", backend)
        found.append(getattr(conv, "fp32_precision", None))
    return tuple(found)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside the block, products and convolutions in float32 run in TF32, or do not."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    former = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, value in zip(backends, former, strict=True):
            backend.allow_tf32 = value


class OverTime(BaseException):
    """The time limit of `what` passed. (No Exception, so that no library takes it for a failure of its own.)"""

    def __init__(self, what: str, seconds: float):
        super().__init__(f"{what}: stopped after {seconds:.0f} s")
        self.what = what


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """The block is interrupted by `OverTime` after so many seconds. Limits may be nested. Main thread only."""

    def stop(signum: int, frame: Any) -> None:
        raise OverTime(what, time.monotonic() - started)

    started = time.monotonic()
    former = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    if 0 < outer < seconds:
        signal.setitimer(signal.ITIMER_REAL, outer)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        if outer > 0:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, outer - (time.monotonic() - started)))


def kernel_launches(device: torch.device, work: Callable[[], object]) -> dict[str, int] | str:
    """Kernel launches and waits of the host in one call, as torch's profiler sees them; else why they are unknown."""
    if device.type != "cuda":
        return f"not counted on {device.type}"
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        work()
    # (Outside of the block there is one wait more, our own.)
    found = counted_launches([event.name for event in profile.events()])
    return found if found["launches"] else "torch's profiler recorded no launch (CUPTI missing?)"


def counted_launches(names: list[str]) -> dict[str, int]:
    """The launches among the CUDA runtime's and driver's calls in a profile."""
    launches = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    # An asynchronous copy is none of the waits; what waits for it is one.
    waiting = [name for name in names if name.startswith(waits) and "Async" not in name]
    return {"launches": sum(name.startswith(launches) for name in names), "waits": len(waiting)}
