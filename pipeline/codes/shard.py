"""One shard of a code data set: written whole, mapped into memory to be read.

n grids of H x W codes.
"""

import io
import json
import os
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import InputError
from ..runtime.atomic_files import sha256, to_json, write_atomic
from .manifest import SHARD_FILES, CodeManifest, ShardEntry


@dataclass(frozen=True)
class Shard:
    """The arrays of a shard, mapped and not read."""

    codes: np.ndarray  # [n,H,W], of the type in the manifest
    labels: np.ndarray  # [n] int64
    names_file: Path  # JSON, n names


def write_shard(
    folder: Path, index: int, codes: np.ndarray, labels: np.ndarray, names: Sequence[str], *, start: int = 0
) -> ShardEntry:
    """Write one shard, each file as a whole or not at all. Return its entry in the manifest.

    Args:
        folder: made if it is missing.
        index: number of the shard.
        codes: [n,H,W], of the type that the manifest will name.
        labels: [n].
        names: n of them.
        start: the row of its first grid in the whole data set.
    """
    contents = (npy_bytes(codes), npy_bytes(labels.astype(np.int64)), to_json(list(names)))
    files = {pattern.format(index): data for pattern, data in zip(SHARD_FILES, contents, strict=True)}
    for name, data in files.items():
        write_atomic(folder / name, data)
    return ShardEntry(start, len(codes), {name: sha256(data) for name, data in files.items()})


def open_shard(folder: Path, entry: ShardEntry, manifest: CodeManifest) -> Shard:
    """Map the arrays of one entry of the manifest.

    Raises:
        InputError: a file is missing, damaged, short, or of another type or shape than the manifest says.
    """
    codes_file, labels_file, names_file = (folder / name for name in entry.files)
    return Shard(
        codes=map_npy(codes_file, (entry.count, *manifest.grid), np.dtype(manifest.dtype)),
        labels=map_npy(labels_file, (entry.count,), np.dtype(np.int64)),
        names_file=names_file,
    )


def read_names(path: Path) -> list[str]:
    """The names of one shard. Raises InputError if the file cannot be read."""
    try:
        names: list[str] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unusable(path, str(error)) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _unusable(path, "something else than a list of names")
    return names


def map_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """The array of a .npy file, mapped: `numpy.load(path, mmap_mode="r")`, but no file stays open.

    numpy holds one open file for each array, and systems allow 256 or 1,024 of them to a process.

    Raises:
        InputError: no such file, or not an array of this shape and type, whole; or the system maps no more.
    """
    try:
        with open(path, "rb") as file:
            found_shape, fortran, found_dtype = _read_header(file)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise _unusable(path, str(error)) from None
    if found_shape != shape or found_dtype != dtype or fortran:
        raise InputError(
            expected=f"{dtype} of the shape {list(shape)} in {path}",
            got=f"{found_dtype} {list(found_shape)}{' by columns' if fortran else ''}",
            do="export the codes again",
        )
    if size != offset + int(np.prod(shape)) * dtype.itemsize:
        raise _unusable(path, f"{size:,} bytes, which is not its whole")
    try:
        mapped: np.ndarray = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise InputError(
            expected=f"a file that can be mapped into memory at {path}",
            got=" ".join(str(error).split()),
            do="export with a larger --shard-size, into a folder whose path is Unicode",
        ) from None
    mapped.flags.writeable = False
    return mapped[offset:].view(dtype).reshape(shape)


def npy_bytes(array: np.ndarray) -> bytes:
    """The content of the `.npy` file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether by columns, and type of a .npy file, which is left at its first number. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read(file)
    except (SyntaxError, TypeError, tokenize.TokenError) as error:  # numpy reads the header as Python
        raise ValueError(f"a damaged header ({error})") from None


def _unusable(path: Path, got: str) -> InputError:
    return InputError(expected=f"the shard {path}", got=" ".join(got.split()), do="export the codes again")
