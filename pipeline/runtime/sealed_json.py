"""JSON that tells when it was damaged.

A sealed object holds the SHA-256 of everything else in it under the key "checksum". Without that key it is read
unchecked: an older version wrote it, or somebody who changed it on purpose removed the key.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .atomic_files import to_json

CHECKSUM = "checksum"


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
