"""One writer a folder: a lock that ends with its process, whatever ends it.

The lock is the system's, on the file `.codegrid.lock` in the folder (`flock`, or on Windows `msvcrt.locking`), and not
the file itself: a file that a killed process leaves locks nothing, and the next writer takes it over and removes it.

What is guaranteed: on one machine, only one process at a time writes into a folder. Machines that share a network
folder see each other's locks where its file system carries them (NFS does, from version 4 on and earlier with its lock
daemon; SMB does, as a rule). On a file system without locks a warning says so and nothing is guaranteed.
"""

import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError
from .output_paths import missing_folders, remove_if_empty, unwritable

LOCK = ".codegrid.lock"
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}  # what the systems say if another process has the lock
_LOCKED_BYTE = 2**20  # on Windows no other process can read a locked byte, so it is one behind the content

_log = logging.getLogger(__name__)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` for the duration of `with`; make the folder, and remove it again if it stays empty.

    Raises:
        InputError: another process holds the lock, or the folder cannot be made or written.
    """
    made = missing_folders(folder)
    try:
        file = _acquire(folder)
        try:
            yield
        finally:
            _release(folder / LOCK, file)
    finally:
        remove_if_empty(made)


def _acquire(folder: Path) -> int:
    """Return the file descriptor that holds the lock."""
    path = folder / LOCK
    while True:
        file = _open(path)
        try:
            _lock(file, path)
            if _is_at(file, path):  # and is not a file that another process removed as it released its lock
                os.ftruncate(file, 0)
                os.write(file, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _open(path: Path, attempts: int = 10) -> int:
    """Open the lock's file, made with its folder if it is missing. Raise InputError if that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        # Opening fails with the one, `mkdir` with the other, if another process removes its empty folder meanwhile.
        may_pass = isinstance(error, (FileNotFoundError, FileExistsError))
        if may_pass and attempts > 1:
            return _open(path, attempts - 1)
        raise unwritable(path.parent, error) from None


def _lock(file: int, path: Path) -> None:
    """Take the lock, or raise InputError if another process has it."""
    try:
        _system_lock(file)
    except OSError as error:
        if error.errno not in _HELD:
            _log.warning("Warning: no lock on %s (%s): see that no other export writes there", path, error.strerror)
            return
        raise InputError(
            expected=f"one export at a time into {path.parent}",
            got=f"another export that writes into it, {_holder(path)}",
            do="wait until it has ended, or name another folder",
        ) from None


def _holder(path: Path) -> str:
    """Return in words which process wrote the lock's file."""
    try:
        content = json.loads(path.read_bytes())
        return f"process {int(content['process'])} on {content['machine']}"
    except (OSError, ValueError, KeyError, TypeError):  # that process is writing it at this moment
        return "of an unknown process"


def _is_at(file: int, path: Path) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _system_lock(file: int) -> None:
        os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)

    def _release(path: Path, file: int) -> None:
        os.close(file)  # first: an open file cannot be removed
        with suppress(OSError):  # nor can it if another process has opened it meanwhile
            os.unlink(path)
else:
    import fcntl

    def _system_lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _release(path: Path, file: int) -> None:
        try:
            with suppress(FileNotFoundError):
                os.unlink(path)  # first: once the lock is free, the file may be another's
        finally:
            os.close(file)
