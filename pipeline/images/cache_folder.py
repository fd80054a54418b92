"""Where prepared images are cached, and what is said when they cannot be written there."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir

from ..errors import InputError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_ANOTHER_DISK = "set CODEGRID_CACHE to a folder on another disk"


def cache_folder() -> Path:
    """Return $CODEGRID_CACHE, or the folder for caches of this system."""
    chosen = os.environ.get("CODEGRID_CACHE") or user_cache_dir("codegrid", appauthor=False)
    return Path(os.path.abspath(os.path.expanduser(chosen)))


@contextmanager
def writing_cache(size: int = 0) -> Iterator[None]:
    """Raise errors of the system within `with` as InputError; `size` bytes are written there, 0 if hardly any."""
    try:
        yield
    except OSError as error:
        raise cannot_write(error, size) from error


@contextmanager
def within_cache() -> Iterator[None]:
    """Let errors within `with`, where they advise another folder, name what chooses it: the cache has no option."""
    try:
        yield
    except InputError as error:
        remedy = error.do.replace("name another folder", "set CODEGRID_CACHE to another folder")
        raise InputError(expected=error.expected, got=error.got, do=remedy) from error


def check_free(folder: Path, size: int) -> None:
    """Raise InputError if the disk of `folder` has less than `size` bytes free, OSError if it cannot be asked."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise _no_room(size, f"{free:,} bytes")


def cannot_write(error: OSError, size: int = 0) -> InputError:
    """Return the error for the user: what was to be written where, what the system says, and the remedy."""
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return _no_room(size, reason)
    if error.errno == errno.EFBIG:
        return InputError(
            expected=f"a file of {size:,} bytes in the image cache {cache_folder()}",
            got=reason,
            do=f"raise the limit on the size of files (ulimit -f), or {_ANOTHER_DISK}",
        )
    return InputError(
        expected=f"an image cache that can be written at {cache_folder()}",
        got=reason,
        do="set CODEGRID_CACHE to a folder you may write to",
    )


def _no_room(size: int, found: str) -> InputError:
    return InputError(
        expected=f"{f'{size:,} bytes free' if size else 'room'} for the image cache {cache_folder()}",
        got=found,
        do=f"make room, or {_ANOTHER_DISK}",
    )
