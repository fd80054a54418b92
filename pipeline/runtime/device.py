"""Where to compute, in what precision, and from what seed."""

import hashlib
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..errors import InputError


def choose_device(name: str) -> torch.device:
    """Return the device called `name` (auto, cpu, cuda, cuda:1, mps); auto chooses the fastest of this machine.

    Raises:
        InputError: there is no device of this name, or not on this machine.
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


def manual_seed(seed: int) -> None:
    """Seed torch's global generators, on every device, with a non-negative integer of any size."""
    torch.manual_seed(torch_seed(seed))


def torch_seed(seed: int) -> int:
    """Return a seed that torch takes: `seed` itself below 2^32, else 64 bits of its SHA-256.

    torch refuses seeds from 2^64 on, and its CPU generator keeps only the low 32 bits, so that seeds which differ above
    them alone would give the same numbers.
    """
    if seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context to run a network in: bf16 autocast where `product_dtype` is bf16, plain float32 elsewhere."""
    dtype = product_dtype(device, precision)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def product_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the type of matrix products for a `precision`: bf16, fp32, or auto, which is bf16 where that is faster."""
    in_bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    return torch.bfloat16 if in_bf16 else torch.float32


def compile_networks(*networks: nn.Module) -> None:
    """Compile forward and backward of each network, in place; the first steps take a minute, names of weights stay.

    What they compute stays the same, but for the rounding of fused operations.
    """
    for network in networks:
        network.compile()


def use_fast_layout(model: nn.Module, device: torch.device, precision: str) -> None:
    """Put the convolutions' weights into the layout that this device multiplies fastest, in place.

    That is channels_last for bf16 on CUDA, where the tensor cores work in it and every other layout is converted. On
    the CPU it saves -1 to 6 % of a step of 32 items (benchmarks/speed.py) and is left alone. Shapes, names and
    checkpoints stay as they are; results differ in rounding.

    Args:
        model: on the device.
        device: of the model.
        precision: "fp32", "bf16" or "auto", as in `product_dtype`.
    """
    if device.type == "cuda" and product_dtype(device, precision) == torch.bfloat16:
        model.to(memory_format=torch.channels_last)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished the work it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether bf16 matrix products are faster than float32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public probe before torch 2.12
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False
