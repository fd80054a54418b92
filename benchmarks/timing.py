"""Measuring: paired rounds, so that what else the machine does meets every variant alike, and the machine in words."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def paired(
    steps: Mapping[str, Callable[[], object]], device: torch.device, *, burn_in: int = 5, rounds: int = 15
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after `burn_in` rounds; a round takes all steps, one after another."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(burn_in + rounds):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if turn >= burn_in:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: list[float], reference: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(mine / other for mine, other in zip(times, reference, strict=True))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware() -> str:
    """The machine, in words."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
