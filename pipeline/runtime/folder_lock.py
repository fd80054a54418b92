"""One writer a folder: a lock that ends with its process, whatever ends it.

The lock is the system's, on the file `.codegrid.lock` in the folder (`flock`, or on Windows `msvcrt.locking`), and not
the file itself: what a killed process leaves of it locks nothing, and the next writer takes it over and removes it.

What is guaranteed: on one machine, of all processes that write into a folder one at a time goes on. Machines that share
a network folder see each other's locks where its file system carries them (NFS does, from version 4 on and earlier with
its lock daemon; SMB does, as a rule). On a file system without locks a warning says so and nothing is guaranteed.
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

LOCK = ".codegrid.lock"
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}  # what the systems say if another process has the lock
_LOCKED_BYTE = 2**20  # on Windows no other process can read what is locked, so it is not where the content is

_log = logging.getLogger(__name__)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` for the duration of `with`; make the folder, and remove it again if it stays empty.

    Raises:
        InputError: another process holds the lock, or the folder cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        file = _acquire(folder)
        try:
            yield
        finally:
            _release(folder / LOCK, file)
    finally:
        _remove_empty(made)


def _acquire(folder: Path) -> int:
    """Return the file descriptor that holds the lock."""
    path = folder / LOCK
    while True:
        file = _open(path)
        try:
            _lock(file, path)
            if _is_at(file, path):  # and not the file that another process removed as it let go
                os.ftruncate(file, 0)
                os.write(file, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _open(path: Path, attempts: int = 10) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and attempts > 1:  # another process has just removed its empty folder
            return _open(path, attempts - 1)
        raise InputError(
            expected=f"a folder that can be written at {path.parent}",
            got=error.strerror or str(error),
            do="name another folder or change its permissions",
        ) from None


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
    try:
        content = json.loads(path.read_bytes())
        return f"process {int(content['process'])} on {content['machine']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just writing this
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


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of `folders`, the innermost first, that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
