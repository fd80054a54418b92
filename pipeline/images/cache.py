"""Prepared images on disk, so that each is decoded once and a batch is one gather.

    $CODEGRID_CACHE/images/<first half of the SHA-256 of what was requested>/
        train.npy test.npy    uint8 [N, C, H', W'], read through a memory map
        index.json            names, labels, class names, broken files; and the size of each .npy

An entry is built in a temporary folder and then renamed, so that it is complete or absent.
Two processes that build the same one both succeed, and the first is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_dir

from ..errors import InputError
from ..runtime.progress import with_progress

FORMAT = 2  # of an entry and of every key; another number leaves older entries unused (1 also stored passing errors)
_INDEX = "index.json"
_BUILDING = ".building-"
_STALE = 24 * 3600  # seconds after which a folder that a killed process was building is removed


@dataclass(frozen=True)
class Broken:
    """Takes the place of an image that could not be read."""

    reason: str


def cache_folder() -> Path:
    """Return $CODEGRID_CACHE, or the folder for caches of this system."""
    chosen = os.environ.get("CODEGRID_CACHE") or user_cache_dir("codegrid", appauthor=False)
    return Path(os.path.abspath(os.path.expanduser(chosen)))


def open_entry(requested: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the index of the entry for `requested`, built if it is not there.

    Args:
        requested: everything the entry depends on, as JSON.
        build: writes the arrays into an empty folder, closes them, and returns the index, as JSON.

    Raises:
        InputError: the cache cannot be written.
    """
    text = json.dumps({"format": FORMAT, **requested}, sort_keys=True)
    folder = cache_folder() / "images" / hashlib.sha256(text.encode()).hexdigest()[:32]
    index = _read_index(folder)
    if index is None:
        index = _build_entry(folder, build)
    return folder, index


def write_images(
    path: Path, images: Iterable[np.ndarray | Broken], count: int, shape: Sequence[int]
) -> tuple[list[int], dict[int, str]]:
    """Write those of `count` images of one shape [C, H', W'] that could be read, in order, into a .npy file.

    Shows progress on standard error. The array has `count` rows, of which the first ones are used.

    Returns:
        The positions in `images` of those in rows 0, 1, ..., and for the position of each broken image the reason.
    """
    kept: list[int] = []
    broken: dict[int, str] = {}
    stored = _new_array(path, (count, *shape))
    for i, image in enumerate(with_progress(images, count, f"preparing {path.stem}")):
        if isinstance(image, Broken):
            broken[i] = image.reason
        else:
            stored[len(kept)] = image
            kept.append(i)
    stored.flush()
    return kept, broken


def read_images(path: Path, count: int) -> np.ndarray:
    """Return the first `count` rows of a .npy file through a memory map, read-only."""
    return np.load(path, mmap_mode="r", allow_pickle=False)[:count]


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Return a new uint8 array of `shape` in a .npy file, zeros. Raise InputError if the disk has no room for it."""
    # A full disk under a memory map kills the process, so check first.
    free = shutil.disk_usage(path.parent).free
    needed = int(np.prod(shape))
    if free < needed:
        raise InputError(
            expected=f"{needed / 1e6:,.0f} MB free for the image cache {cache_folder()}",
            got=f"{free / 1e6:,.0f} MB",
            do="make room, or set CODEGRID_CACHE to a folder on another disk",
        )
    # `open_memmap` maps no empty file, so an empty split gets one row that is not used.
    return np.lib.format.open_memmap(path, "w+", np.uint8, (max(shape[0], 1), *shape[1:]))


def _build_entry(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Build an entry; return its index, or that of another process which finished the same one first."""
    temporary = _new_folder(folder.parent)
    try:
        index = build(temporary)
        sizes = {path.name: path.stat().st_size for path in temporary.glob("*.npy")}
        text = json.dumps({**index, "sizes": sizes})
        (temporary / _INDEX).write_text(text, encoding="utf-8")
        return _move(temporary, folder) or index
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _new_folder(parent: Path) -> Path:
    """Make an empty folder in `parent` to build an entry in. Raise InputError if that cannot be done."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent)
        folder = parent / f"{_BUILDING}{uuid.uuid4().hex}"
        folder.mkdir()
        return folder
    except OSError as error:
        raise _unwritable(error) from error


def _remove_stale(parent: Path) -> None:
    """Remove what killed processes were building."""
    for folder in parent.glob(f"{_BUILDING}*"):
        with suppress(FileNotFoundError):  # its process may finish at this moment
            if folder.stat().st_mtime > time.time() - _STALE:
                continue
            shutil.rmtree(folder, ignore_errors=True)


def _move(temporary: Path, folder: Path) -> dict[str, Any] | None:
    """Rename the new entry to `folder`; if another process was first, return the index of the existing entry."""
    existing = _read_index(folder)
    if existing is not None:
        return existing
    shutil.rmtree(folder, ignore_errors=True)  # what a cleaner of caches left of an older one
    try:
        os.rename(temporary, folder)
    except OSError as error:
        existing = _read_index(folder)
        if existing is None:
            raise _unwritable(error) from error
    return existing


def _read_index(folder: Path) -> dict[str, Any] | None:
    """Return the index of an entry, None unless the entry is complete."""
    try:
        index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        sizes: dict[str, int] = index["sizes"]
        complete = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return None
    return index if complete else None


def _unwritable(error: OSError) -> InputError:
    return InputError(
        expected=f"an image cache that can be written at {cache_folder()}",
        got=str(error),
        do="set CODEGRID_CACHE to a folder you may write to",
    )
