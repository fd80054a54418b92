"""Prepared images on disk, so that each is decoded once and a batch is one gather.

    $CODEGRID_CACHE/images/<first half of the SHA-256 of what was asked>/
        train.npy test.npy    uint8 [N, C, H', W'], read through a memory map
        index.json            names, labels, class names, broken files; and the size of each .npy

An entry is built in a folder beside its place and renamed into it, so that it is whole or absent.
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

FORMAT = 2  # of an entry and of every key; another number leaves older entries unused (1 also held passing errors)
_INDEX = "index.json"
_BUILDING = ".building-"
_STALE = 24 * 3600  # seconds after which a folder that a killed process was building is cleared away


@dataclass(frozen=True)
class Broken:
    """In the place of an image that could not be read."""

    reason: str


def cache_folder() -> Path:
    """$CODEGRID_CACHE, or the place this system keeps caches in."""
    chosen = os.environ.get("CODEGRID_CACHE") or user_cache_dir("codegrid", appauthor=False)
    return Path(os.path.abspath(os.path.expanduser(chosen)))


def open_entry(asked: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder and the index of the entry for `asked`, built if it is not there.

    Args:
        asked: everything the entry depends on, as JSON.
        build: writes the arrays into an empty folder, closes them, and returns the index, as JSON.

    Raises:
        InputError: the cache cannot be written.
    """
    text = json.dumps({"format": FORMAT, **asked}, sort_keys=True)
    folder = cache_folder() / "images" / hashlib.sha256(text.encode()).hexdigest()[:32]
    index = _read_index(folder)
    if index is None:
        index = _build_entry(folder, build)
    return folder, index


def write_images(
    path: Path, images: Iterable[np.ndarray | Broken], count: int, shape: Sequence[int]
) -> tuple[list[int], dict[int, str]]:
    """Write what can be read of `count` images of one shape [C, H', W'], in order, into a .npy file.

    Shows progress on standard error. The array has `count` rows, of which the first ones are used.

    Returns:
        the positions in `images` that rows 0, 1, ... hold, and the reason for each that is broken.
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
    """The first `count` rows of a .npy file through a memory map, read-only."""
    return np.load(path, mmap_mode="r", allow_pickle=False)[:count]


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    # A full disk under a memory map kills the process, so look first.
    free = shutil.disk_usage(path.parent).free
    needed = int(np.prod(shape))
    if free < needed:
        raise InputError(
            expected=f"{needed / 1e6:,.0f} MB free for the image cache {cache_folder()}",
            got=f"{free / 1e6:,.0f} MB",
            do="make room, or set CODEGRID_CACHE to a folder on another disk",
        )
    # `open_memmap` maps no empty file, so an empty part gets one row that is not used.
    return np.lib.format.open_memmap(path, "w+", np.uint8, (max(shape[0], 1), *shape[1:]))


def _build_entry(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    beside = _new_folder(folder.parent)
    try:
        index = build(beside)
        sizes = {path.name: path.stat().st_size for path in beside.glob("*.npy")}
        text = json.dumps({**index, "sizes": sizes})
        (beside / _INDEX).write_text(text, encoding="utf-8")
        return _move(beside, folder) or index
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _new_folder(parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(parent)
        folder = parent / f"{_BUILDING}{uuid.uuid4().hex}"
        folder.mkdir()
        return folder
    except OSError as error:
        raise _unwritable(error) from error


def _clear_stale(parent: Path) -> None:
    for left in parent.glob(f"{_BUILDING}*"):
        with suppress(FileNotFoundError):  # its process may be done at this very moment
            if left.stat().st_mtime > time.time() - _STALE:
                continue
            shutil.rmtree(left, ignore_errors=True)


def _move(beside: Path, folder: Path) -> dict[str, Any] | None:
    """Put the new entry in place; the index of another's, if one was built meanwhile."""
    theirs = _read_index(folder)
    if theirs is not None:
        return theirs
    shutil.rmtree(folder, ignore_errors=True)  # what a cleaner of caches left of an older one
    try:
        os.rename(beside, folder)
    except OSError as error:
        theirs = _read_index(folder)
        if theirs is None:
            raise _unwritable(error) from error
    return theirs


def _read_index(folder: Path) -> dict[str, Any] | None:
    """None unless the entry is whole."""
    try:
        index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        sizes: dict[str, int] = index["sizes"]
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return None
    return index if whole else None


def _unwritable(error: OSError) -> InputError:
    return InputError(
        expected=f"an image cache that can be written at {cache_folder()}",
        got=str(error),
        do="set CODEGRID_CACHE to a folder you may write to",
    )
