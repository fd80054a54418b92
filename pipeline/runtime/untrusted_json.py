"""Reading JSON that a stranger may have written: whatever is in the file, it costs little memory and time."""

import json
import os
import stat
from pathlib import Path

MOST_DIGITS = 4300  # of an integer, such as a seed; Python takes quadratic time for very long ones
# A named pipe does not wait for its other end, and a link, which may lead anywhere, is not followed.
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def read_untrusted_json(path: Path, most_bytes: int) -> object:
    """Return the value in a file.

    Args:
        path: of a regular file; a named pipe or a device is not read, and a link is not followed.
        most_bytes: a longer file is not parsed.

    Raises:
        OSError: it cannot be read, or is a link.
        ValueError: it is no regular file, it is too long, or it is no JSON that this program writes.
    """
    file = os.open(path, _OPEN)
    with os.fdopen(file, "rb") as opened:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most_bytes:
            raise ValueError(f"{path}: expected a file of at most {most_bytes:,} bytes")
        data = opened.read(most_bytes)
    try:
        value: object = json.loads(data, parse_int=_short_int)
    except RecursionError:
        raise ValueError(f"{path}: brackets in too many brackets") from None
    return value


def _short_int(digits: str) -> int:
    """Return the integer. Raise ValueError if it is longer than any that this program writes."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)
