"""Measuring: paired rounds, so that other work affects every variant alike; memory; the machine in words."""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pipeline.runtime.device import synchronize


def paired(
    steps: Mapping[str, Callable[[], object]], device: torch.device, *, burn_in: int = 5, rounds: int = 15
) -> dict[str, list[float]]:
    """Return the seconds of each step in each round, after `burn_in` rounds; a round takes every step once."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(burn_in + rounds):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if number >= burn_in:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: list[float], reference: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(seconds / other for seconds, other in zip(times, reference, strict=True))


def peak_memory() -> float:
    """Return the most memory that this process has held so far, in MiB.

    On Linux not by `ru_maxrss`: that of a new process begins at the size of the process that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        import resource  # which Windows lacks

        per_mib = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, other systems KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mib


def hardware() -> str:
    """Return the machine and the versions, in words."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def processor() -> str:
    """Return the processor's name, empty where the system does not name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
