"""Reading files that may come from a stranger, and JSON that tells when it was damaged.

A sealed JSON object holds the SHA-256 of everything else in it under the key "checksum". Without that key it is read
unchecked: an older version wrote it, or somebody who changed it on purpose removed the key.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from .atomic_files import to_json

CHECKSUM = "checksum"


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: it cannot be read; FileNotFoundError if there is none.
        ValueError: it is a folder, a device or a pipe, or has more than `limit` bytes. It is not opened then.
    """
    size = regular_size(path)
    if size > limit:
        raise ValueError(f"{size:,} bytes, more than the {limit:,} that are possible")
    return path.read_bytes()


def regular_size(path: Path) -> int:
    """Return the size of a file in bytes; links are followed.

    Raises:
        OSError: it cannot be found out; FileNotFoundError if there is no such file.
        ValueError: it is a folder, a device or a pipe, all of which are better not opened.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("a folder" if stat.S_ISDIR(status.st_mode) else "no regular file")
    return status.st_size


def parse_json(data: bytes) -> Any:
    """Return the content of a JSON file. Raise ValueError if it is none, or holds NaN or infinity."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def sealed(content: Mapping[str, Any]) -> bytes:
    """Return a JSON object as the bytes of a file, with its checksum."""
    return to_json({**content, CHECKSUM: _checksum(content)})


def check_seal(content: Any) -> None:
    """Raise ValueError if `content` is an object whose checksum is not that of the rest of it."""
    if not isinstance(content, dict) or CHECKSUM not in content:
        return
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    if content[CHECKSUM] != _checksum(rest):
        raise ValueError(f"another content than its checksum says (if it was changed on purpose: remove {CHECKSUM})")


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical form of a JSON object. Raise ValueError if it is nested too deeply."""
    try:
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    return hashlib.sha256(canonical.encode()).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"the number {name}")
