"""The folder in which an entry of the cache is built, and what is done about those that killed processes leave.

While its process lives, that holds a lock of the system on the file `.alive` in the folder; whatever ends the process
ends the lock. A folder is removed if its lock is free and nothing in it was changed for a day. The lock alone would not
do where the file system has none, nor the day alone for a process that is suspended for longer.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..runtime.folder_lock import HELD, system_lock
from .cache_folder import writing_cache

BUILDING = ".building-"  # what the names of these folders begin with
ALIVE = ".alive"
_STALE = 24 * 3600  # seconds


def new_building_folder(parent: Path) -> Path:
    """Make an empty folder in `parent`, which is made if it is missing, and remove those of dead processes there.

    Raises:
        InputError: the cache cannot be written.
    """
    with writing_cache():
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent)
        folder = parent / f"{BUILDING}{uuid.uuid4().hex}"
        folder.mkdir()
    return folder


@contextmanager
def kept_alive(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` within `with`, and remove its file afterwards. Raise InputError as above."""
    with writing_cache():
        file = os.open(folder / ALIVE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            system_lock(file)
        yield
    finally:
        os.close(file)
        with suppress(OSError):
            os.unlink(folder / ALIVE)


def _remove_stale(parent: Path) -> None:
    """Remove the folders of dead processes."""
    for folder in parent.glob(f"{BUILDING}*"):
        with suppress(OSError):  # it is finished at this moment, or another user's
            if _is_old(folder) and not _is_locked(folder / ALIVE):
                shutil.rmtree(folder, ignore_errors=True)


def _is_old(folder: Path) -> bool:
    """Return whether the last change of the folder and of what it holds was more than _STALE seconds ago."""
    last_change = max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    return last_change < time.time() - _STALE


def _is_locked(path: Path) -> bool:
    """Return whether a process holds the lock on a file; False if there is no such file."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        system_lock(file)
    except OSError as error:
        return error.errno in HELD
    finally:
        os.close(file)
    return False
