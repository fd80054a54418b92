"""Writing so that a kill at any moment leaves the old files or the new ones, never a mixture.

One file: write beside it, flush to the disk, rename over it. Several files that belong together: write all of them as
`NAME.new`, then one `commit.json` that names them (the moment the new files count), then rename each and remove
`commit.json`. A reader who finds `commit.json` reads `NAME.new` where it is still there; the next writer completes it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMIT = "commit.json"


def write_atomic(path: Path, data: bytes) -> None:
    """Replace one file whole; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    _write_flushed(beside, data)
    os.replace(beside, path)


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace several files of `folder` as one; the folder is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    _complete(folder)
    for name, data in files.items():
        _write_flushed(folder / f"{name}.new", data)
    write_atomic(folder / COMMIT, to_json(sorted(files)))
    _complete(folder)


def current(folder: Path, name: str) -> Path:
    """The path that holds the committed content of `name`, also after a kill in the middle of `write_together`."""
    new = folder / f"{name}.new"
    return new if name in _committed(folder) and new.exists() else folder / name


def read_current(folder: Path, name: str) -> bytes:
    """That content, also while a writer is renaming it. Raises FileNotFoundError if there is none."""
    try:
        return current(folder, name).read_bytes()
    except FileNotFoundError:  # renamed since it was chosen
        return current(folder, name).read_bytes()


def to_json(value: Any) -> bytes:
    """Readable JSON, UTF-8, one newline at the end; file names that are no Unicode are escaped."""
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _complete(folder: Path) -> None:
    """Finish the renames of a commit that a kill interrupted."""
    commit = folder / COMMIT
    if not commit.exists():
        return
    for name in json.loads(commit.read_bytes()):
        new = folder / f"{name}.new"
        if new.exists():
            os.replace(new, folder / name)
    commit.unlink()


def _committed(folder: Path) -> list[str]:
    """The names in a commit whose renames may not all be done."""
    try:
        names: list[str] = json.loads((folder / COMMIT).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return names


def _write_flushed(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
