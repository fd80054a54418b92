"""Reading the file of an image, and telling a damaged file from a system that cannot read it at the moment.

A file is damaged where all its bytes could be read and Pillow makes no image of them. That is final and may be cached.
Every other error may pass: too many open files, a network mount that is away, no memory, missing permissions, a
file that was removed after it was listed. It is tried again after a short while, and then it stops the run, so that no
image is missing from the cache for a reason that has passed.

Lack of memory counts as such a passing error even where a damaged header asks for it: Pillow refuses absurd sizes
before it allocates them (`DecompressionBombError`, an error of the file), and below those nobody can tell.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from ..errors import InputError
from .preprocessing import IMAGE_ERRORS, why_unreadable
from .source import Broken

RETRY_DELAYS = (0.1, 0.4, 1.6)  # seconds before each further attempt
_PASSING = (OSError, MemoryError)

_T = TypeVar("_T")


def read_or_broken(path: str, decode: Callable[[BinaryIO], _T]) -> _T | Broken:
    """Return what `decode` makes of the bytes of the file at `path`, or why the file is damaged.

    Args:
        path: of the file.
        decode: raises one of IMAGE_ERRORS if the bytes are no image.

    Raises:
        InputError: the file could not be read in any of the attempts, or there was no memory to decode it.
    """
    for delay in RETRY_DELAYS:
        try:
            return _read_once(path, decode)
        except _PASSING:
            time.sleep(delay)
    try:
        return _read_once(path, decode)
    except _PASSING as error:
        raise _stopped(path, error) from error


def _read_once(path: str, decode: Callable[[BinaryIO], _T]) -> _T | Broken:
    """Try once. Raise OSError if the system could not read the bytes, MemoryError if there is no memory for them."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        return decode(io.BytesIO(data))
    except MemoryError:
        raise
    except IMAGE_ERRORS as error:  # all bytes are here, so they are at fault
        if "out of memory" in str(error):  # how Pillow reports the same in a library under it
            raise MemoryError(str(error)) from error
        return Broken(why_unreadable(error))


def _stopped(path: str, error: BaseException) -> InputError:
    """Return the error that stops the run."""
    remedy = "make it readable or remove it, and run the same command again: nothing was stored"
    if isinstance(error, MemoryError):
        remedy = "free memory, or remove the file if it is damaged, and run the same command again: nothing was stored"
    return InputError(expected=f"to read the image {path}", got=why_unreadable(error), do=remedy)
