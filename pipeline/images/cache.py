"""Prepared images on disk, so that each is decoded once and a batch is one gather.

    $CODEGRID_CACHE/images/<first half of the SHA-256 of what was requested>/
        train.npy test.npy    uint8 [N, C, H', W'], read through a memory map
        index.json            names, labels, class names, broken files; size and SHA-256 of each .npy, and of itself

An entry is built in a temporary folder and then renamed, so that it is complete or absent. Two processes that build the
same one both succeed, and the first is kept.

Every byte of an entry is checked when it is opened. That costs 0.9 s a GiB once the file is in the memory of the system
(measured on one core of an AMD EPYC, 0.5 s of it for SHA-256), or what the disk takes to read it. An entry that is
damaged is built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from ..runtime.progress import Progress
from ..runtime.sealed_json import CHECKSUM, check_seal, sealed
from ..runtime.untrusted_files import parse_json, read_regular, sha256_of
from .building_folder import kept_alive, new_building_folder
from .cache_folder import cache_folder, cannot_write, writing_cache

FORMAT = 3  # of an entry and of every key; another number leaves older entries unused (2 had no checksums)
_INDEX = "index.json"
_LARGEST_INDEX = 2**33  # bytes
_ATTEMPTS = 3  # to put a new entry in its place, where other processes do the same
_SHOWN_FROM = 2**30  # bytes, whose check takes long enough to show how far it is

# What reading an entry raises if it is damaged, or if something else is in its place.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError, InputError)

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """What the index says about one .npy file of the entry."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Built:
    """What `build` has put into an entry."""

    index: dict[str, Any]  # JSON
    files: dict[str, StoredFile] = field(default_factory=dict)  # the .npy files, by name


def open_entry(
    requested: Mapping[str, Any], build: Callable[[Path], Built], read: Callable[[Path, dict[str, Any]], _T]
) -> _T:
    """Return what `read` makes of the entry for `requested`, which is built if it is not there or is damaged.

    Args:
        requested: everything the entry depends on, as JSON.
        build: writes the arrays into an empty folder, and returns what is in them.
        read: takes the folder of the entry and the index that `build` returned; raises ValueError, KeyError, TypeError
            or InputError if they are not what was requested.

    Raises:
        InputError: the cache cannot be written.
    """
    text = json.dumps({"format": FORMAT, **requested}, sort_keys=True)
    folder = cache_folder() / "images" / hashlib.sha256(text.encode()).hexdigest()[:32]
    if os.path.lexists(folder):
        try:
            return _open_checked(folder, read)
        except _DAMAGE as error:
            reason = str(error) or type(error).__name__
            _log.warning("Warning: %s in the image cache is damaged and is built again: %s", folder, reason)
    return _build_entry(folder, build, read)


def _build_entry(folder: Path, build: Callable[[Path], Built], read: Callable[[Path, dict[str, Any]], _T]) -> _T:
    """Build an entry; return what `read` makes of it, or of that of another process which was faster."""
    temporary = new_building_folder(folder.parent)
    try:
        with kept_alive(temporary):
            built = build(temporary)
            _write_index(temporary / _INDEX, built)
        return _move(temporary, folder, built, read)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, folder: Path, built: Built, read: Callable[[Path, dict[str, Any]], _T]) -> _T:
    """Put the new entry at `folder`, in the place of what is damaged there; an intact one is kept, and read instead."""
    for _ in range(_ATTEMPTS):
        found = _identity(folder)
        try:
            os.rename(temporary, folder)  # which replaces nothing but an empty folder
            return read(folder, built.index)
        except OSError as error:
            failure = error
        with suppress(*_DAMAGE):  # of another process, which was faster
            return _open_checked(folder, read)
        with writing_cache():
            if _identity(folder) == found:  # and is not what another process has put there during the check
                _remove(folder)
    raise cannot_write(failure) from failure


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Return what tells a file or folder from another that takes its place; None if there is nothing."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there; raise OSError if that cannot be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _open_checked(folder: Path, read: Callable[[Path, dict[str, Any]], _T]) -> _T:
    """Return what `read` makes of an entry. Raise one of _DAMAGE if not every byte of it is as it was written."""
    index = _read_index(folder / _INDEX)
    _check_files(folder, {name: StoredFile(**file) for name, file in dict(index["files"]).items()})
    return read(folder, index)


def _check_files(folder: Path, files: Mapping[str, StoredFile]) -> None:
    """Raise ValueError or OSError unless the .npy files of the entry are those in its index."""
    if {path.name for path in folder.glob("*.npy")} != set(files):  # so no name leads out of the folder, either
        raise ValueError(f"other .npy files than {', '.join(files)}")
    for name, file in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != file.size:
            raise ValueError(f"{name} is no file of {file.size:,} bytes")
    total = sum(file.size for file in files.values())
    with Progress(total, "checking the image cache", "byte", shown=total >= _SHOWN_FROM) as bar:
        for name, file in files.items():
            if sha256_of(folder / name, bar.update) != file.sha256:
                raise ValueError(f"the checksum of {name} is another one")


# The index


def _write_index(path: Path, built: Built) -> None:
    """Write the index of an entry, with its checksum."""
    data = sealed({**built.index, "files": {name: asdict(file) for name, file in built.files.items()}})
    with writing_cache(len(data)), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_index(path: Path) -> dict[str, Any]:
    """Return the index of an entry. Raise ValueError or OSError unless it is as it was written."""
    index = parse_json(read_regular(path, _LARGEST_INDEX))
    if not isinstance(index, dict) or CHECKSUM not in index:
        raise ValueError(f"{path.name} has no checksum")
    check_seal(index)
    return index
