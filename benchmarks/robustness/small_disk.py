"""A tmpfs of a chosen size, in a namespace of its own: nothing outside this process sees it, and it ends with it.

This takes root, or a system that lets users make namespaces. Linux only.
"""

import ctypes
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")

PAGE = os.sysconf("SC_PAGESIZE")  # bytes; a file on a tmpfs takes whole pages
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_REMOUNT, _RECURSIVE, _PRIVATE = 1 << 5, 1 << 14, 1 << 18
_LARGE = 2**18  # pages, and files


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs that is mounted at `folder`."""

    folder: Path

    def leave(self, *, pages: int = _LARGE, files: int = _LARGE) -> None:
        """Leave room for so many more pages and files."""
        status = os.statvfs(self.folder)
        used_pages, used_files = status.f_blocks - status.f_bfree, status.f_files - status.f_ffree
        options = f"size={(used_pages + pages) * PAGE or PAGE},nr_inodes={used_files + files}"
        _mount(b"tmpfs", self.folder, b"tmpfs", _REMOUNT, options)

    def free(self) -> tuple[int, int]:
        """Return the pages and the files that there is room for."""
        status = os.statvfs(self.folder)
        return status.f_bfree, status.f_ffree


def on_small_disk(folder: Path, action: Callable[[SmallDisk], T]) -> T:
    """Return what `action` returns in a process that sees a tmpfs at `folder`, a new folder. Raises RuntimeError."""
    folder.mkdir()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _act(folder, action, writing)
    os.close(writing)
    with open(reading, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    folder.rmdir()
    if not data:
        raise RuntimeError("no tmpfs could be mounted, or the process on it failed")
    result: T = pickle.loads(data)
    return result


def can_mount(folder: Path) -> bool:
    """Return whether this user may mount a tmpfs at a new folder."""
    try:
        return on_small_disk(folder, lambda disk: True)
    except RuntimeError:
        return False


def _act(folder: Path, action: Callable[[SmallDisk], T], writing: int) -> NoReturn:
    """Enter a namespace, mount a tmpfs, do the action, tell its result, and end this process."""
    try:
        _enter_namespace()
        _mount(b"tmpfs", folder, b"tmpfs", 0, f"size={_LARGE * PAGE},nr_inodes={_LARGE}")
        with open(writing, "wb") as file:
            file.write(pickle.dumps(action(SmallDisk(folder))))
    finally:
        os._exit(0)


def _enter_namespace() -> None:
    """Make a namespace whose mounts are its own."""
    user, group = os.geteuid(), os.getegid()
    _called(_libc().unshare(_NEW_MOUNTS | (0 if user == 0 else _NEW_USER)))
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount(b"none", Path("/"), None, _RECURSIVE | _PRIVATE, "")


def _mount(source: bytes, folder: Path, kind: bytes | None, flags: int, options: str) -> None:
    _called(_libc().mount(source, os.fsencode(folder), kind, ctypes.c_ulong(flags), options.encode()))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _called(status: int) -> None:
    """Raise OSError if a call into the C library failed."""
    if status != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
