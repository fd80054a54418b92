"""Images of one shape in a .npy file of the cache: written in order and hashed meanwhile, read through a memory map.

The file gets its space before the first image is read, where the system can reserve it (`posix_fallocate`). Rows are
written with `file.write`, which reports a full disk; a write through a memory map kills the process then (SIGBUS).
"""

import errno
import hashlib
import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..runtime.progress import with_progress
from .cache_folder import check_free, writing_cache
from .source import Broken

_BUFFER = 2**20  # bytes written at a time
_LONGEST_HEADER = 10 + 2**16  # bytes, in version 1.0 of the .npy format
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}  # by this file system: to reserve space


@dataclass(frozen=True)
class Written:
    """What was written into an array."""

    kept: list[int]  # the positions of the images in rows 0, 1, ...
    broken: dict[int, str]  # the position of each image that could not be read -> why
    sha256: str  # of the file


class NewArray:
    """A new file for at most `count` uint8 images of `shape` [C, H', W'].

    Raises:
        InputError: the disk has no room for it.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, ...]) -> None:
        self.path, self.count, self.shape = path, count, shape
        self._rows = max(count, 1)  # a file without rows cannot be mapped, so an empty split gets one that is not used
        self._header = _header((self._rows, *shape))
        self.size = len(self._header) + self._rows * math.prod(shape)  # bytes
        with writing_cache(self.size):
            check_free(path.parent, self.size)
            _reserve(path, self.size)

    def write(self, images: Iterable[np.ndarray | Broken]) -> Written:
        """Write those of the `count` images that could be read into the first rows; the others are zeros.

        Shows progress on standard error. Raises InputError if the system cannot write.
        """
        kept: list[int] = []
        broken: dict[int, str] = {}
        with writing_cache(self.size), open(self.path, "r+b", buffering=_BUFFER) as file:
            hashed = _Hashed(file)
            hashed.write(self._header)
            for i, image in enumerate(with_progress(images, self.count, f"preparing {self.path.stem}")):
                if isinstance(image, Broken):
                    broken[i] = image.reason
                else:
                    hashed.write(self._row(image))
                    kept.append(i)
            for _ in range(self._rows - len(kept)):
                hashed.write(bytes(math.prod(self.shape)))
            file.flush()
            os.fsync(file.fileno())  # some file systems tell only now that the disk is full
        return Written(kept, broken, hashed.digest.hexdigest())

    def _row(self, image: np.ndarray) -> bytes:
        assert (image.shape, image.dtype) == (self.shape, np.uint8)
        return image.tobytes()


def read_images(path: Path, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the first `count` rows, uint8 [count, *shape], through a memory map, read-only.

    The header is compared with the one that `NewArray` writes, and not parsed: numpy's parser is made for files that
    are good, and fails in many ways on others.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no uint8 array of at least `count` rows of this shape; it is not mapped then.
    """
    with open(path, "rb") as file:
        head = file.read(_LONGEST_HEADER)
        size = os.fstat(file.fileno()).st_size
    start = 10 + int.from_bytes(head[8:10], "little")  # where the rows begin, by the .npy format
    rows, rest = divmod(size - start, math.prod(shape))
    if rest != 0 or rows < max(count, 1) or head[:start] != _header((rows, *shape)):
        raise ValueError(f"{path.name} is no uint8 array of {count} images {list(shape)}")
    return np.memmap(path, np.uint8, "r", start, (rows, *shape))[:count]


class _Hashed:
    """Writes into a file, and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.file.write(data)


def _header(shape: tuple[int, ...]) -> bytes:
    """Return what a .npy file with a uint8 array of `shape` begins with."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _reserve(path: Path, size: int) -> None:
    """Make a file of `size` zeros, whose space on the disk is its own where the system can do that."""
    with open(path, "xb") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
