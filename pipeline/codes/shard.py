"""One shard of a code data set: written atomically, mapped into memory to be read.

Legend: n grids of H x W codes.
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
    """The arrays of a shard, mapped; nothing is read before it is used."""

    codes: np.ndarray  # [n,H,W], of the type in the manifest
    labels: np.ndarray  # [n] int64
    names_file: Path  # JSON, a list of n names


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
    files = {pattern.format(index): data for pattern, data in zip(SHARD_FILES, contents, strict=True)}
    for name, data in files.items():
        write_atomic(folder / name, data)
    return ShardEntry(start, len(codes), {name: sha256(data) for name, data in files.items()})


def open_shard(folder: Path, entry: ShardEntry, manifest: CodeManifest) -> Shard:
    """Return the shard of one entry of the manifest, mapped.

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
    """Return the names of one shard. Raise InputError if the file cannot be read."""
    try:
        names: list[str] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unusable(path, str(error)) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _unusable(path, "something else than a list of names")
    return names


def map_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return the array of a .npy file, mapped like `numpy.load(path, mmap_mode="r")`, but no file is kept open.

    numpy keeps a file open for each array, and systems allow a process 256 or 1,024 of them.

    Raises:
        InputError: the file is missing, or is not a complete array of this shape and type; or the system maps no more.
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
    complete_size = offset + int(np.prod(shape)) * dtype.itemsize
    if size != complete_size:
        raise _unusable(path, f"{size:,} bytes in place of {complete_size:,}")
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
    """Return the content of the `.npy` file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether by columns, and type of a .npy file; the numbers follow. Raise ValueError if it is none."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read(file)
    except (SyntaxError, TypeError, tokenize.TokenError) as error:  # numpy reads the header as Python
        raise ValueError(f"a damaged header ({error})") from None


def _unusable(path: Path, got: str) -> InputError:
    return InputError(expected=f"the shard {path}", got=" ".join(got.split()), do="export the codes again")
