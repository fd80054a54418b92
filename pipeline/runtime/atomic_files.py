"""Writing so that a kill at any moment leaves the old files or the new ones, never a mixture.

One file: write a temporary file, flush it to the disk, rename it over the old one. Several files that belong together:
write each as `NAME.new`, then one `commit.json` that names them (from then on the new files are current), then rename
each and remove `commit.json`. A reader who finds `commit.json` reads `NAME.new` where that still exists; the next
writer completes the renames.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMIT = "commit.json"
TEMPORARY = ".new"  # a file that is being written has this after its name


def write_atomic(path: Path, data: bytes) -> None:
    """Replace one file, all of it or nothing; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent, path.name)
    _write_flushed(temporary, data)
    os.replace(temporary, path)


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace several files of `folder`, all of them or none; the folder is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    _complete(folder)
    for name, data in files.items():
        _write_flushed(_temporary(folder, name), data)
    write_atomic(folder / COMMIT, to_json(sorted(files)))
    _complete(folder)


def current(folder: Path, name: str) -> Path:
    """Return the path that holds the committed content of `name`, also after a kill during `write_together`."""
    new = _temporary(folder, name)
    return new if name in _committed(folder) and new.exists() else folder / name


def read_current(folder: Path, name: str) -> bytes:
    """Return the content of `current`, also while a writer renames it. Raises FileNotFoundError if there is none."""
    try:
        return current(folder, name).read_bytes()
    except FileNotFoundError:  # renamed since it was chosen
        return current(folder, name).read_bytes()


def to_json(value: Any) -> bytes:
    """Return `value` as indented JSON in UTF-8 with a newline at the end; names that are no Unicode are escaped.

    Raises:
        ValueError: it holds a number that JSON has no form for, such as NaN.
    """
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def sha256(data: bytes) -> str:
    """Return the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _complete(folder: Path) -> None:
    """Finish the renames of a commit that a kill interrupted."""
    commit = folder / COMMIT
    if not commit.exists():
        return
    for name in json.loads(commit.read_bytes()):
        new = _temporary(folder, name)
        if new.exists():
            os.replace(new, folder / name)
    commit.unlink()


def _committed(folder: Path) -> list[str]:
    """Return the names in a commit whose renames may not all be done; [] if there is no such commit."""
    try:
        names: list[str] = json.loads((folder / COMMIT).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return names


def _temporary(folder: Path, name: str) -> Path:
    return folder / f"{name}{TEMPORARY}"


def _write_flushed(path: Path, data: bytes) -> None:
    """Write a file, and return once it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
