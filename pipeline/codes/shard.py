"""One shard of a code data set: written atomically, mapped into memory to be read.

Legend: n grids of H x W codes.
"""

import io
import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..runtime.atomic_files import sha256, to_json, write_atomic
from ..runtime.untrusted_files import parse_json, read_regular, regular_size
from .hashes import HashedFile
from .manifest import CodeManifest, ShardEntry, shard_files

LARGEST_HEADER = 2**10  # bytes of a .npy file before its numbers; numpy writes 128
NAME_BYTES = 6 * 2**12 + 16  # of a name in JSON, at most: each byte of the longest path as an escape of six
# As numpy writes it for numbers of one type. numpy reads it as Python, where the text of a stranger can cost any memory
# and raise almost anything.
_SIDE = rb"(?:0|[1-9]\d{0,17})"
_SHAPE = rb"%b,|%b(?:, ?%b)+,?" % (_SIDE, _SIDE, _SIDE)
_FIELDS = rb"\{ 'descr': '([^'\\]{1,16})', 'fortran_order': (True|False), 'shape': \((%b)\),? \} "
_HEADER = re.compile(_FIELDS.replace(b" ", rb"[ \n]*") % _SHAPE)
_NUMBERS = re.compile(r"[<>=|]?[biufc]\d{1,2}")  # types of one number


@dataclass(frozen=True)
class Shard:
    """The arrays of a shard, mapped; nothing is read before it is used, nor compared with its hash."""

    codes: np.ndarray  # [n,H,W], of the type in the manifest
    labels: np.ndarray  # [n] int64
    codes_file: HashedFile
    labels_file: HashedFile
    names_file: HashedFile  # JSON, a list of n names


def write_shard(
    folder: Path, index: int, codes: np.ndarray, labels: np.ndarray, names: Sequence[str], *, start: int = 0
) -> ShardEntry:
    """Write one shard, each file atomically. Return its entry in the manifest.

    Args:
        folder: created if it is missing.
        index: number of the shard, from 0.
        codes: [n,H,W], of the type that the manifest will name.
        labels: [n].
        names: of the n images.
        start: the row of its first grid in the data set.
    """
    contents = (npy_bytes(codes), npy_bytes(labels.astype(np.int64)), to_json(list(names)))
    files = dict(zip(shard_files(index), contents, strict=True))
    for name, data in files.items():
        write_atomic(folder / name, data)
    return ShardEntry(start, len(codes), {name: sha256(data) for name, data in files.items()})


def open_shard(folder: Path, entry: ShardEntry, manifest: CodeManifest) -> Shard:
    """Return the shard of one entry of the manifest, mapped.

    Raises:
        InputError: a file is missing, damaged, short, or of another type or shape than the manifest says.
    """
    codes, labels, names = (HashedFile(folder / name, digest) for name, digest in entry.files.items())
    return Shard(
        codes=map_npy(codes.path, (entry.count, *manifest.grid), np.dtype(manifest.dtype)),
        labels=map_npy(labels.path, (entry.count,), np.dtype(np.int64)),
        codes_file=codes,
        labels_file=labels,
        names_file=names,
    )


def read_names(file: HashedFile, count: int) -> list[str]:
    """Return the names of one shard of `count` grids.

    Raises:
        InputError: the file cannot be read, has another hash, or does not hold so many names.
    """
    try:
        data = read_regular(file.path, 2 + count * NAME_BYTES)
        if sha256(data) != file.sha256:
            raise ValueError(f"other bytes than when it was written ({len(data):,} bytes, another SHA-256)")
        names: Any = parse_json(data)
    except (OSError, ValueError) as error:
        raise _unusable(file.path, error) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _unusable(file.path, "something else than a list of names")
    if len(names) != count:
        raise _unusable(file.path, f"{len(names):,} names for {count:,} grids")
    return names


def map_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return the array of a .npy file, mapped like `numpy.load(path, mmap_mode="r")`, but no file is kept open.

    numpy keeps a file open for each array, and systems allow a process 256 or 1,024 of them.

    Raises:
        InputError: the file is missing, or is not a complete array of this shape and type; or the system maps no more.
    """
    try:
        size = regular_size(path)
        with open(path, "rb") as file:
            found_shape, by_columns, found_dtype, offset = _parse_header(file.read(LARGEST_HEADER))
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from None
    if found_shape != shape or found_dtype != dtype or by_columns:
        raise InputError(
            expected=f"{dtype} of the shape {list(shape)} in {path}",
            got=f"{found_dtype} {list(found_shape)}{' by columns' if by_columns else ''}",
            do="export the codes again",
        )
    complete_size = offset + math.prod(shape) * dtype.itemsize
    if size != complete_size:
        raise _unusable(path, f"{size:,} bytes in place of {complete_size:,}")
    mapped = _map(path, size)
    mapped.flags.writeable = False
    return mapped[offset:].view(dtype).reshape(shape)


def npy_bytes(array: np.ndarray) -> bytes:
    """Return the content of the `.npy` file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _map(path: Path, size: int) -> np.ndarray:
    """Return the bytes [size] of a file, mapped. Raise InputError if the system maps no more."""
    try:
        if _is_unicode(path):
            mapped: np.ndarray = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
            return mapped
        return np.asarray(np.memmap(path, mode="r", shape=(size,)))  # keeps the file open
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            expected=f"a file that can be mapped into memory at {path}",
            got=" ".join(str(error).split()),
            do="export with a larger --shard-size",
        ) from None


def _is_unicode(path: Path) -> bool:
    """Return whether torch can name this path."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, whether by columns, and type of a .npy file, and where its numbers begin.

    Args:
        data: the beginning of the file.

    Raises:
        ValueError: it is not of a .npy file of numbers of one type, as numpy writes them.
    """
    if len(data) < 12 or data[:6] != b"\x93NUMPY" or data[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("no .npy file")
    begin = 10 if data[6] == 1 else 12
    (length,) = struct.unpack("<H" if data[6] == 1 else "<I", data[8:begin])
    if begin + length > len(data):
        raise ValueError(f"a header of {length:,} bytes")
    found = _HEADER.fullmatch(data, begin, begin + length)
    if not found:
        raise ValueError("a header that numpy does not write for numbers of one type")
    descr, by_columns, sides = (part.decode("latin-1") for part in found.groups())
    shape = tuple(int(side) for side in sides.split(",") if side.strip())
    return shape, by_columns == "True", _number_type(descr), begin + length


def _number_type(descr: str) -> np.dtype[Any]:
    """Return the type that a header names. Raise ValueError if it is none of one number."""
    try:
        if _NUMBERS.fullmatch(descr):
            return np.dtype(descr)
    except TypeError:  # such as i3
        pass
    raise ValueError(f"values of the type {descr!r}")


def _unusable(path: Path, got: object) -> InputError:
    reason = getattr(got, "strerror", None) or str(got)
    return InputError(expected=f"the shard {path}", got=" ".join(reason.split()), do="export the codes again")
