"""What is at a path, and the errors in one line for what cannot be written there."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from ..errors import InputError
from .atomic_files import TEMPORARY

FILE_SUFFIXES = frozenset(  # of images, arrays and the other files that this program writes
    (
        *(".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
        *(".npy", ".npz", ".json", ".parquet", ".safetensors", ".html", ".pt"),
    )
)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link that leads nowhere",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_writable(folder: Path) -> None:
    """Raise InputError unless files can be written into `folder`, or into the nearest folder above it that exists."""
    try:
        existing = _nearest_existing(folder)
        if existing == folder and not os.path.isdir(folder):
            raise no_folder(folder)
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise unwritable(folder, error) from None


def unwritable(folder: Path, error: OSError) -> InputError:
    """Return the error that says why `folder` cannot be written."""
    permissions = "name another folder or change its permissions"
    return InputError(
        expected=f"a folder that can be written at {folder}",
        got=error.strerror or str(error),
        do="free space there or name another folder" if error.errno in _FULL else permissions,
    )


def no_folder(path: Path) -> InputError:
    """Return the error for something in the place of a folder that is none."""
    return InputError(
        expected=f"a folder that can be written at {path}",
        got=f"Not a directory but {kind_of(path)}",
        do="name another folder",
    )


def looks_like_file(folder: Path) -> bool:
    """Return whether there is no such folder, and its name ends like that of a file."""
    return folder.suffix.lower() in FILE_SUFFIXES and not os.path.isdir(folder)


def check_folder_name(folder: Path) -> None:
    """Raise InputError if the name of a folder that does not exist looks like that of a file."""
    if looks_like_file(folder):
        raise InputError(
            expected="a folder as --out",
            got=f"{folder}, which looks like a file",
            do=f"name a folder, such as {folder.with_suffix('')}",
        )


def check_only_files(folder: Path, names: Iterable[str]) -> None:
    """Raise InputError if one of `names`, or its temporary name, is in `folder` and is no regular file."""
    for path in (folder / f"{name}{ending}" for name in names for ending in ("", TEMPORARY)):
        mode = _mode_at(path)
        if mode is not None and not stat.S_ISREG(mode):
            raise InputError(
                expected=f"a file or nothing at {path}", got=kind_of(path), do="move it away or name another folder"
            )


def check_subfolder(folder: Path, *, may_be_link: bool) -> None:
    """Raise InputError if there is something at `folder` that is no folder, or a link to one unless that is allowed."""
    if is_taken(folder) and (not os.path.isdir(folder) or (folder.is_symlink() and not may_be_link)):
        raise InputError(
            expected=f"a folder or nothing at {folder}", got=kind_of(folder), do="move it away or name another folder"
        )


def kind_of(path: Path) -> str:
    """Return in words what is at `path`, such as "a folder" or "a link to a folder"."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode) or not os.path.exists(path):
            return _KINDS.get(stat.S_IFMT(mode), "something else")
        return f"a link to {_KINDS.get(stat.S_IFMT(path.stat().st_mode), 'something else')}"
    except FileNotFoundError:
        return "something that is gone now"


def make_folder(folder: Path) -> None:
    """Make `folder`, and those above it, unless it exists. Raise InputError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None


def missing_folders(folder: Path) -> list[Path]:
    """Return those of `folder` and the folders above it that do not exist, the lowest first."""
    return [path for path in (folder, *folder.parents) if not os.path.exists(path)]


def remove_if_empty(folders: Iterable[Path]) -> None:
    """Remove those of `folders` that are empty, in this order."""
    for folder in folders:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def names_in(folder: Path) -> list[str]:
    """Return the names of everything in `folder`, [] if it does not exist. Raise InputError if it cannot be read."""
    if not os.path.isdir(folder):
        return []
    try:
        return os.listdir(folder)
    except OSError as error:
        raise InputError(
            expected=f"a folder that can be read at {folder}",
            got=error.strerror or str(error),
            do="name another folder or change its permissions",
        ) from None


def is_taken(path: Path) -> bool:
    """Return whether there is something at `path`. Raise InputError if nothing could be written there."""
    return _mode_at(path) is not None


def is_regular(path: Path) -> bool:
    """Return whether there is a regular file at `path`; a link to one is none."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _mode_at(path: Path) -> int | None:
    """Return the mode of what is at `path`, None for nothing. Raise InputError if nothing could be written there."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # such as a name that is too long
        raise InputError(
            expected=f"a file that can be written at {path}", got=error.strerror or str(error), do="name another"
        ) from None


def _nearest_existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists. Raises OSError if that cannot be found out."""
    try:
        path.lstat()
    except FileNotFoundError:
        if path.parent == path:
            raise
        return _nearest_existing(path.parent)
    return path
