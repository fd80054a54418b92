"""Writing so that a kill at any moment leaves the old files or the new ones, never a mixture.

One file: write a temporary file, flush it to the disk, rename it over the old one. Several files that belong together:
write each as `NAME.new`, then one `commit.json` that names them (from then on the new files are current), then rename
each and remove `commit.json`. A reader who finds `commit.json` reads `NAME.new` where that still exists; the next
writer completes the renames. The replaced files may be kept in a subfolder: each is moved there right before its
successor takes its name.

Where the disk is full or gone, the temporary files are removed, the old files stay, and one line says what was needed.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import InputError
from .untrusted_files import parse_json, read_regular, unreadable

COMMIT = "commit.json"
TEMPORARY = ".new"  # a file that is being written has this after its name
SCRATCH = ".codegrid.new"  # or this name, which no file of a user has, where nothing yet tells what is ours
LARGEST_COMMIT = 2**16  # bytes
ATTEMPTS = 3  # to open a file that a writer renames; a save renames each twice

T = TypeVar("T")

_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # of a file inside the folder
_REMEDIES = {
    errno.ENOSPC: "free space on the disk, or name another folder",
    errno.EDQUOT: "free some of your quota, or name another folder",
    errno.EFBIG: "raise the limit for the size of a file, or name a folder on another file system",
    errno.EROFS: "name a folder on a disk that can be written",
    errno.EACCES: "change its permissions, or name another folder",
    errno.EPERM: "change its permissions, or name another folder",
    errno.EISDIR: "move the folder in the place of this file away, or name another",
    errno.ENOTDIR: "move the file in the place of a folder away, or name another folder",
    errno.EEXIST: "move the file in the place of a folder away, or name another folder",
}


@dataclass(frozen=True)
class _Commit:
    """Files whose renames may not all be done, and the subfolder that keeps those which they replace."""

    files: list[str]
    keep: str | None = None


def write_atomic(path: Path, data: bytes, *, temporary: Path | None = None) -> None:
    """Replace one file, all of it or nothing; its folder is made if it is missing.

    Args:
        path: of the file.
        data: its content.
        temporary: the file to write first, in the same folder; by default the name of the file with TEMPORARY after it.

    Raises:
        InputError: it cannot be written, and is as it was.
    """
    temporary = temporary or _temporary(path.parent, path.name)
    with _explained(path, len(data), [temporary]):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_flushed(temporary, data)
        os.replace(temporary, path)


@contextmanager
def open_atomic(path: Path, size: int) -> Iterator[BinaryIO]:
    """Yield a file to write into, which replaces `path` at the end of `with`; if that raises, `path` stays as it was.

    Args:
        path: of the file; its folder is made if it is missing.
        size: bytes that are going to be written, for the message.

    Raises:
        InputError: it cannot be written.
    """
    temporary = _temporary(path.parent, path.name)
    try:
        with _explained(path, size, []):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_together(folder: Path, files: Mapping[str, bytes], *, keep: str | None = None) -> None:
    """Replace several files of `folder`, all of them or none; the folder is made if it is missing.

    Args:
        folder: of the files.
        files: their contents, by name.
        keep: the name of a subfolder that the replaced files are moved to; None to keep none of them.

    Raises:
        InputError: they cannot be written, and the old files are unchanged; or `commit.json` is not that of a writer.
    """
    size = sum(map(len, files.values()))
    with _explained(folder, size, []):
        folder.mkdir(parents=True, exist_ok=True)
        _check_places(folder, files, keep)
        _complete(folder)
    with _explained(folder, size, [_temporary(folder, name) for name in (*files, COMMIT)]):
        if keep is not None:
            (folder / keep).mkdir(exist_ok=True)  # now, while it can still be taken back
        for name, data in files.items():
            _write_flushed(_temporary(folder, name), data)
        names = sorted(files)
        content = to_json(names if keep is None else {"files": names, "keep": keep})
        _write_flushed(_temporary(folder, COMMIT), content)
        os.replace(_temporary(folder, COMMIT), folder / COMMIT)
    with _explained(folder, size, []):  # they are committed: the next writer completes what fails here
        _complete(folder)


def current(folder: Path, name: str) -> Path:
    """Return the path that holds the committed content of `name`, also after a kill during `write_together`.

    Raises:
        InputError: `commit.json` cannot be read, or is not that of a writer.
    """
    new = _temporary(folder, name)
    return new if name in committed(folder) and new.exists() else folder / name


def read_current(folder: Path, name: str, read: Callable[[Path], T]) -> T:
    """Return what `read` returns for the path of the committed content of `name`, also while a writer renames it.

    Raises:
        InputError: `commit.json` cannot be read, or is not that of a writer.
        FileNotFoundError: there is no such file; whatever else `read` raises.
    """
    for _ in range(ATTEMPTS - 1):
        with suppress(FileNotFoundError):  # renamed since it was chosen
            return read(current(folder, name))
    return read(current(folder, name))


def committed(folder: Path) -> list[str]:
    """Return the names of the files in a commit whose renames may not all be done; [] if there is no commit.

    Raises:
        InputError: `commit.json` cannot be read, or is not that of a writer.
    """
    return _read_commit(folder).files


def cannot_write(path: Path, size: int, error: OSError) -> InputError:
    """Return the error that says what could not be written, how much of it, why, and what to do.

    Args:
        path: the file, or the folder of several.
        size: bytes that were to be written.
        error: what the system said.
    """
    found = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        found += _free_space(path, size)
    remedy = _REMEDIES.get(error.errno or 0, "see that the disk is there and can be written, or name another folder")
    return InputError(expected=f"to write {path} ({size:,} bytes)", got=found, do=remedy)


def to_json(value: Any) -> bytes:
    """Return `value` as indented JSON in UTF-8 with a newline at the end; names that are no Unicode are escaped.

    Raises:
        ValueError: it holds a number that JSON has no form for, such as NaN.
    """
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def sha256(data: bytes) -> str:
    """Return the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _check_places(folder: Path, names: Iterable[str], keep: str | None) -> None:
    """Raise OSError if a rename would fail, or leave the folder, after the commit: it could not be taken back."""
    places = [folder / name for name in (*names, COMMIT)]
    if keep is not None:
        kept = folder / keep
        if kept.is_symlink() or (kept.exists() and not kept.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, f"{keep} is no folder")
        places += [kept / name for name in names]
    for place in places:
        if place.is_dir() and not place.is_symlink():
            raise IsADirectoryError(errno.EISDIR, f"{place.relative_to(folder)} is a folder")


def _complete(folder: Path) -> None:
    """Finish the renames of a commit that a kill interrupted."""
    commit = _read_commit(folder)
    for name in commit.files:
        new, path = _temporary(folder, name), folder / name
        if new.exists():
            if commit.keep is not None and path.exists():
                (folder / commit.keep).mkdir(exist_ok=True)
                os.replace(path, folder / commit.keep / name)
            os.replace(new, path)
    if commit.files:
        (folder / COMMIT).unlink()


def _read_commit(folder: Path) -> _Commit:
    """Return the commit of a folder, one of no files if there is none.

    Raise InputError if it cannot be read, or no writer wrote it.
    """
    path = folder / COMMIT
    try:
        content = parse_json(read_regular(path, LARGEST_COMMIT))
    except (FileNotFoundError, NotADirectoryError):
        return _Commit([])
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError:
        content = None
    if isinstance(content, list) and _are_names(content):
        return _Commit(content)
    if isinstance(content, dict) and content.keys() == {"files", "keep"}:
        files, keep = content["files"], content["keep"]
        if isinstance(files, list) and _are_names([*files, keep]) and not (folder / keep).is_symlink():
            return _Commit(files, keep)
    raise InputError(
        expected=f"no {COMMIT} in {folder} but that of a save which was interrupted",
        got="another",
        do="move it away, or restore the folder from a copy",
    )


def _are_names(values: Iterable[object]) -> bool:
    """Return whether all `values` are names of files inside a folder."""
    return all(isinstance(value, str) and _PLAIN_NAME.fullmatch(value) for value in values)


@contextmanager
def _explained(path: Path, size: int, temporary: Iterable[Path]) -> Iterator[None]:
    """Turn an OSError into the InputError that explains it, and remove the `temporary` files."""
    try:
        yield
    except OSError as error:
        for leftover in temporary:
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
        raise cannot_write(path, size, error) from error


def _free_space(path: Path, size: int) -> str:
    """Return in words how much is free where `path` is; "" if that cannot be found out, or is not what is missing.

    A disk may have no room for another file, or only for parts of several, and yet more than `size` bytes.
    """
    for folder in (path, *path.parents):
        with suppress(OSError):
            free = shutil.disk_usage(folder).free
            return f" ({free:,} bytes are free)" if free < size else ""
    return ""


def _temporary(folder: Path, name: str) -> Path:
    return folder / f"{name}{TEMPORARY}"


def _write_flushed(path: Path, data: bytes) -> None:
    """Write a file, and return once it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
