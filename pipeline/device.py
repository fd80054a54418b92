"""Where to compute, and in what precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from .errors import InputError


def choose_device(name: str) -> torch.device:
    """The device called `name` (auto, cpu, cuda, cuda:1, mps); auto takes the fastest there is.

    Raises:
        InputError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(expected="auto, cpu, cuda, cuda:1 or mps as device", got=name, do="choose one of them")
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise InputError(expected=f"the device {name}", got="none on this machine", do="use --device cpu")
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context to run a network in: bf16 autocast for `precision` bf16, plain float32 for fp32.

    auto is bf16 where the processor multiplies in bf16, and fp32 elsewhere.
    """
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def compile_networks(*networks: nn.Module) -> None:
    """Compile the forward and backward of each, in place; the first steps take a minute, the names of weights stay.

    What they compute stays the same, but for the rounding of fused operations.
    """
    for network in networks:
        network.compile()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than float32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public probe before torch 2.12
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False
