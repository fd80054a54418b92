"""Reading a safetensors file that may be damaged, or a stranger's.

The file is: 8 bytes with the length of the header, the header in JSON, the numbers. The header is checked, and the
caller compares it with what it expects, before the rest of the file is read: what a header or a config claims costs no
memory.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..runtime.schema import from_json, short
from ..runtime.untrusted_files import parse_json, regular_size

LARGEST_HEADER = 2**22  # bytes
MOST_TENSORS = 2**12
METADATA = "__metadata__"  # the key of the header's texts
MOST_DIMENSIONS, LARGEST_DIMENSION = 8, 2**48  # of a shape; to multiply more and larger ones can take minutes
LENGTH = 8  # bytes that hold the length of the header, little-endian

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Outline:
    """What a tensor is, but for its numbers.

    Raises:
        ValueError: there is no tensor of this shape.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if len(self.shape) > MOST_DIMENSIONS or not all(0 <= side <= LARGEST_DIMENSION for side in self.shape):
            raise ValueError(f"the shape {short(list(self.shape))}")

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {short(list(self.shape))}"

    @property
    def count(self) -> int:
        """The number of its numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Entry:
    """A tensor in the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # first and last byte of its numbers, counted from the end of the header

    def outline(self) -> Outline:
        """Return what it is. Raise ValueError if its bytes are not as many as its numbers need."""
        if self.dtype not in _TYPES:
            raise ValueError(f"numbers of the type {short(self.dtype)}")
        found, (start, stop) = Outline(self.shape, _TYPES[self.dtype]), self.data_offsets
        if start < 0 or stop - start != found.count * found.dtype.itemsize:
            raise ValueError(f"{short(stop - start)} bytes for {found}")
        return found


Check = Callable[[Mapping[str, Outline]], None]  # raises ValueError unless the tensors are what is expected


def read_tensor_file(path: Path, check: Check = lambda outlines: None) -> bytes:
    """Return the content of a safetensors file, whose header passes `check`.

    Raises:
        OSError: it cannot be read; FileNotFoundError if there is none.
        ValueError: it is a folder, a device or a pipe, its header is none, or `check` raises it.
        MemoryError: it does not fit in the memory of this machine.
    """
    size = regular_size(path)
    with open(path, "rb") as file:
        start = file.read(LENGTH)
        length = header_length(start, size)
        start += file.read(length)
        outlines = parse_outlines(start)
        needed = len(start) + sum(found.count * found.dtype.itemsize for found in outlines.values())
        if needed != size:
            raise ValueError(f"{size:,} bytes, where its header needs {short(needed)}")
        check(outlines)
        if size > memory():
            raise MemoryError(f"{size:,} bytes, more than this machine has memory")
        return start + file.read(size - len(start))


def header_length(start: bytes, size: int) -> int:
    """Return the length of the header of a file of `size` bytes that begins with `start`. Raise ValueError if none."""
    length = int.from_bytes(start[:LENGTH], "little")
    if len(start) < LENGTH or length > size - LENGTH:
        raise ValueError(f"{size:,} bytes, too few for a safetensors file and its header")
    if length > LARGEST_HEADER:
        raise ValueError(f"a header of {length:,} bytes, more than {LARGEST_HEADER:,}")
    return length


def parse_outlines(data: bytes) -> dict[str, Outline]:
    """Return what the tensors of a file are, from its beginning up to the end of the header. Raise ValueError."""
    header = _parse_header(data)
    names = header.keys() - {METADATA}
    if len(names) > MOST_TENSORS:
        raise ValueError(f"{len(names):,} tensors, more than {MOST_TENSORS:,}")
    return {name: from_json(_Entry, header[name], short(name)).outline() for name in header if name != METADATA}


def parse_metadata(data: bytes) -> Any:
    """Return the texts that the header holds beside the tensors, None if there are none. Raise ValueError."""
    return _parse_header(data).get(METADATA)


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file, on the CPU. Raise ValueError if it is none."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, RuntimeError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"no safetensors file ({' '.join(str(error).split())})") from None


def outlines_of(tensors: Mapping[str, Tensor]) -> dict[str, Outline]:
    """Return what tensors are."""
    return {name: Outline(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def check_outlines(expected: Mapping[str, Outline], found: Mapping[str, Outline]) -> None:
    """Raise ValueError unless tensors have the names, shapes and types that are expected."""
    for name in (*expected, *found):
        if name not in found or name not in expected:
            raise ValueError(f"{'no' if name not in found else 'the unknown'} {short(name)}")
        if found[name] != expected[name]:
            raise ValueError(f"{found[name]} in place of {expected[name]} as {short(name)}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor holds NaN or infinity."""
    wrong = not_finite(tensors)
    if wrong is not None:
        raise ValueError(f"numbers that are not finite: {wrong}")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return in words which of the tensors holds NaN or infinity, None if none does; a CPU-GPU sync for each.

    A scalar may be infinite: so the quantizer marks the count of updates of a codebook that was set by hand.
    """
    for name, tensor in tensors.items():
        wrong = tensor.isnan() if tensor.dim() == 0 else ~tensor.isfinite()
        if bool(wrong.any()):
            return f"{short(name)} with {int(wrong.sum()):,} values that are not"
    return None


def memory() -> int:
    """Return the bytes of the memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such number on this system
        return 2**40


def _parse_header(data: bytes) -> dict[str, Any]:
    """Return the header of a file. Raise ValueError if there is none."""
    try:
        header = parse_json(data[LENGTH : LENGTH + header_length(data, len(data))])
    except ValueError as error:
        raise ValueError(f"no safetensors file ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"no safetensors file (the header {short(header)})")
    return header
