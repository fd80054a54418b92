"""Reading files that may come from a stranger: whatever is there, it costs little memory and time.

Only regular files are opened: a named pipe would wait for its other end, and a device may have none.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError

READ_AT_ONCE = 2**20  # bytes


def read_regular(path: Path, limit: int, *, follow_links: bool = True) -> bytes:
    """Return the content of a file.

    Args:
        path: of the file.
        limit: bytes that it may have.
        follow_links: whether a link to a file is read.

    Raises:
        OSError: it cannot be read; FileNotFoundError if there is none.
        ValueError: it is a folder, a device or a pipe, or a link that is not followed, or has more than `limit` bytes.
            It is not opened then.
    """
    size = regular_size(path, follow_links=follow_links)
    if size > limit:
        raise ValueError(f"{size:,} bytes, more than the {limit:,} that are possible")
    return path.read_bytes()


def regular_size(path: Path, *, follow_links: bool = True) -> int:
    """Return the size of a file in bytes. Raises as `read_regular`, but for the limit."""
    status = os.stat(path, follow_symlinks=follow_links)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("a folder" if stat.S_ISDIR(status.st_mode) else "no regular file")
    return status.st_size


def sha256_of(path: Path, on_read: Callable[[int], object] = lambda size: None) -> str:
    """Return the SHA-256 of a file of any size, in hexadecimal digits.

    Args:
        path: of the file, which the caller knows to be a regular one.
        on_read: is told the bytes of each part that was read.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(READ_AT_ONCE):
            digest.update(part)
            on_read(len(part))
    return digest.hexdigest()


def parse_json(data: bytes) -> Any:
    """Return the content of a JSON file. Raise ValueError if it is none, or holds NaN or infinity."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def unreadable(path: Path, error: OSError) -> InputError:
    """Return the error for a file that the system does not let this process read, whatever it holds."""
    return InputError(
        expected=f"to read {path}",
        got=error.strerror or str(error),
        do="change its permissions, see that its disk is there, or name another folder",
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"the number {name}")
