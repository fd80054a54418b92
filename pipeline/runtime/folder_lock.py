"""One writer a folder: a lock that ends with its process, whatever ends it.

The lock is the system's, on the file `.codegrid.lock` in the folder (`flock`, or on Windows `msvcrt.locking`), and not
the file itself: a file that a killed process leaves locks nothing, and the next writer takes it over and removes it.
The file says who holds the lock, for the message to the next.

What is guaranteed: on one machine, only one process at a time writes into a folder. Machines that share a network
folder see each other's locks where its file system carries them (NFS does, from version 4 on and earlier with its lock
daemon; SMB does, as a rule). On a file system without locks a warning says so and nothing is guaranteed.
"""

import errno
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError
from .filesystem import check_folder_name, check_only_files, missing_folders, no_folder, remove_if_empty, unwritable

LOCK = ".codegrid.lock"
MOST_BYTES = 4096  # of the file; a longer one is not ours
LONGEST_COMMAND = 200  # characters of the command that holds the lock, as the message shows it
HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}  # what the systems say if another process has the lock
ATTEMPTS, BETWEEN_ATTEMPTS = 4, 0.01  # seconds; another command may hold the lock for the moment of its own check
_LOCKED_BYTE = 2**20  # on Windows no other process can read a locked byte, so it is one behind the content
# A link is not followed, so that no other file is written; a named pipe does not wait for its other end.
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

_log = logging.getLogger(__name__)


@contextmanager
def only_writer(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of `folder` for the duration of `with`; make the folder, and remove it again if it stays empty.

    Args:
        folder: that is written into.
        what: what writes into it, for messages: "training run", "export", "sampling run".

    Raises:
        InputError: another process holds the lock, or the folder or the file of its lock cannot be made or written.
    """
    check_folder_name(folder)
    made = missing_folders(folder)
    try:
        file = _acquire(folder, what)
        try:
            yield
        finally:
            _release(folder / LOCK, file)
    finally:
        remove_if_empty(made)


def _acquire(folder: Path, what: str) -> int:
    """Return the file descriptor that holds the lock."""
    path = folder / LOCK
    while True:
        file = _open(path)
        try:
            _lock(file, path, what)
            if _is_at(file, path):  # and is not a file that another process removed as it released its lock
                _introduce(file, what)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _open(path: Path, attempts: int = 10) -> int:
    """Open the lock's file, made with its folder if it is missing. Raise InputError if that cannot be done."""
    check_only_files(path.parent, [path.name])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, _OPEN, 0o666)
    except OSError as error:
        # Opening fails with the one, `mkdir` with the other, if another process removes its empty folder meanwhile.
        may_pass = isinstance(error, (FileNotFoundError, FileExistsError))
        if may_pass and attempts > 1:
            return _open(path, attempts - 1)
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> InputError:
    """Return the error that says why the lock's file cannot be opened, or its folder cannot be made."""
    folder = path.parent
    if os.path.lexists(folder) and not os.path.isdir(folder):
        return no_folder(folder)
    if not os.path.lexists(path):
        return unwritable(folder, error)
    return InputError(
        expected=f"a file that can be read and written at {path}",
        got=error.strerror or str(error),
        do="remove it, unless another run writes into this folder",
    )


def _lock(file: int, path: Path, what: str) -> None:
    """Take the lock, or raise InputError if another process has it, and keeps it for longer than a check takes."""
    for _ in range(ATTEMPTS):
        try:
            system_lock(file)
        except OSError as error:
            if error.errno not in HELD:
                _log.warning("Warning: no lock on %s (%s): see that no other run writes there", path, error.strerror)
                return
            time.sleep(BETWEEN_ATTEMPTS)
        else:
            return
    raise InputError(
        expected=f"{path.parent} for this {what} alone",
        got=_holder(file),
        do="wait until it has ended, or name another folder",
    )


def _introduce(file: int, what: str) -> None:
    """Write into the lock's file who holds the lock."""
    command = shlex.join([os.path.basename(word) for word in sys.argv[:1]] + sys.argv[1:])
    content = {
        "what": what,
        "process": os.getpid(),
        "machine": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": _in_one_line(command),
    }
    with suppress(OSError):  # the lock holds on a full disk, too
        os.ftruncate(file, 0)
        os.write(file, json.dumps(content).encode())


def _holder(file: int) -> str:
    """Return in words who wrote the lock's file."""
    try:
        os.lseek(file, 0, os.SEEK_SET)
        content = json.loads(os.read(file, MOST_BYTES))
        words = {name: _in_one_line(str(content[name])) for name in ("what", "machine", "since", "command")}
        process = int(content["process"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):  # it is being written just now
        return "another run that writes into it, of an unknown process"
    return (
        f"another {words['what']} that writes into it, process {process} on {words['machine']} "
        f"since {words['since']}: {words['command']}"
    )


def _in_one_line(text: str) -> str:
    """Return the text without characters that a terminal does not show, cut to LONGEST_COMMAND of them."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= LONGEST_COMMAND else f"{shown[: LONGEST_COMMAND - 3]}..."


def _is_at(file: int, path: Path) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except OSError:
        return False


if sys.platform == "win32":
    import msvcrt

    def system_lock(file: int) -> None:
        """Take the system's lock on an open file. Raise OSError, with a number of HELD if another process has it."""
        os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)

    def _release(path: Path, file: int) -> None:
        os.close(file)  # first: an open file cannot be removed
        with suppress(OSError):  # nor can it if another process has opened it meanwhile
            os.unlink(path)
else:
    import fcntl

    def system_lock(file: int) -> None:
        """Take the system's lock on an open file. Raise OSError, with a number of HELD if another process has it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _release(path: Path, file: int) -> None:
        try:
            with suppress(OSError):  # its folder is gone, or has become read-only: the file alone locks nothing
                os.unlink(path)  # first: once the lock is free, the file may be another's
        finally:
            os.close(file)
