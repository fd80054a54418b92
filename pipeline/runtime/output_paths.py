"""Output paths: what cannot be written is refused before the work begins, and only a run's own files are replaced.

A command checks first where its results go (`check_output_folder`, `check_output_file`); a check leaves no trace. It
prepares the folder last, right before it writes into it (`prepare_output`). The record of a run, or the exact form of a
name, tells which files are removable; a link or a folder in the place of such a file is the user's.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile

from ..errors import InputError
from .atomic_files import TEMPORARY

Removable = Callable[[str], object]  # the name of a file relative to its folder, with "/" -> true if it may be removed


@dataclass(frozen=True, kw_only=True)
class OutputFiles:
    """Names the files that a run writes into its folder; all names are relative to it, with "/"."""

    record: str  # the file that tells which files the run wrote
    numbered: str  # the pattern of one file for each index, such as images/{:05d}.png
    indices: range
    others: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        """Return whether the run writes a file of exactly this name."""
        if name == self.record or name in self.others:
            return True
        before, after = self.numbered.split("{:05d}")
        digits = name[len(before) : len(name) - len(after)]
        if not (digits.isascii() and digits.isdecimal()):
            return False
        return int(digits) in self.indices and self.numbered.format(int(digits)) == name

    @property
    def subfolder(self) -> str:
        """The folder of the numbered files, "" if they have none of their own."""
        return "" if "/" not in self.numbered else str(PurePosixPath(self.numbered).parent)

    def from_position(self, first: int) -> "OutputFiles":
        """Return the numbered files from the position `first` of `indices` on, with the record and all others."""
        return replace(self, indices=self.indices[first:])


def check_output_folder(
    folder: Path,
    *,
    force: bool,
    hint: str = "",
    written: OutputFiles | None = None,
    earlier: Sequence[OutputFiles] = (),
) -> None:
    """Check that results may be written into `folder`, new or existing; nothing is made or removed.

    Args:
        folder: where the results go.
        force: whether it may hold files, of which those of `earlier` runs may be replaced.
        hint: another remedy than --force, for the message.
        written: the files that are going to be written; even with `force`, no file of the user may have such a name.
        earlier: what earlier runs wrote into the folder, as their records say.

    Raises:
        InputError: it holds something and `force` is off, it cannot be written, or a file of the user has a
            name that will be written.
    """
    check_writable(folder)
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            expected=f"an empty or new folder as --out {folder}",
            got="a folder with files in it",
            do=f"name another folder, or use {hint}--force to replace what is there",
        )
    if written is not None:
        _check_nothing_foreign(folder, written, earlier)


def check_output_file(path: Path, *, force: bool, option: str = "--out") -> None:
    """Check that the file `path` may be written; nothing is made or removed.

    Raises:
        InputError: it exists and `force` is off, it is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise InputError(expected=f"a file as {option}", got=f"the folder {path}", do="add a file name")
    check_writable(path.parent)
    if os.path.lexists(path) and not force:
        raise InputError(
            expected=f"a new file as {option} {path}", got="an existing one", do="name another, or use --force"
        )


def check_writable(folder: Path) -> None:
    """Raise InputError unless files can be written into `folder`, or into the nearest folder above it that exists."""
    try:
        with TemporaryFile(dir=_nearest_existing(folder)):
            pass
    except OSError as error:
        raise unwritable(folder, error) from None


def unwritable(folder: Path, error: OSError) -> InputError:
    """Return the error that says why `folder` cannot be written."""
    return InputError(
        expected=f"a folder that can be written at {folder}",
        got=error.strerror or str(error),
        do="name another folder or change its permissions",
    )


def prepare_output(folder: Path, earlier: Sequence[OutputFiles]) -> None:
    """Make `folder`, and remove from it what `earlier` runs wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    for files in earlier:
        remove_run(folder, files)


def remove_run(folder: Path, files: OutputFiles) -> None:
    """Remove what a run wrote, its record last: a kill meanwhile leaves no file that nothing names."""
    remove_files(folder, lambda name: name in files and name != files.record, subfolder=files.subfolder)
    remove_files(folder, {files.record}.__contains__, subfolder="")


def remove_files(folder: Path, removable: Removable, *, subfolder: str) -> None:
    """Remove the `removable` files of `folder` and its `subfolder`, and temporary files of them that a kill left.

    Links are neither followed nor removed, and no folder is removed.
    """
    for name in _names_in(folder, subfolder):
        if removable(name.removesuffix(TEMPORARY)) and _is_regular(folder / name):
            (folder / name).unlink(missing_ok=True)


def missing_folders(folder: Path) -> list[Path]:
    """Return those of `folder` and the folders above it that do not exist, the lowest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_if_empty(folders: Iterable[Path]) -> None:
    """Remove those of `folders` that are empty, in this order."""
    for folder in folders:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _check_nothing_foreign(folder: Path, written: OutputFiles, earlier: Sequence[OutputFiles]) -> None:
    """Raise InputError if writing would replace something that none of the `earlier` runs wrote."""
    inner = folder / written.subfolder
    if inner != folder and (inner.is_symlink() or (inner.exists() and not inner.is_dir())):
        foreign = [written.subfolder]
    else:
        taken = [name for name in _names_in(folder, written.subfolder) if name.removesuffix(TEMPORARY) in written]
        foreign = sorted(name for name in taken if not _is_of(earlier, folder, name))
    if foreign:
        raise InputError(
            expected=f"nothing in --out {folder} that this would replace and no earlier run of it wrote",
            got=foreign[0],
            do="move it away or name another folder",
        )


def _is_of(runs: Sequence[OutputFiles], folder: Path, name: str) -> bool:
    """Return whether one of the runs wrote this file."""
    return _is_regular(folder / name) and any(name.removesuffix(TEMPORARY) in files for files in runs)


def _names_in(folder: Path, subfolder: str) -> list[str]:
    """Return the names of everything in `folder` and, unless that is a link, in its `subfolder`."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    inner = folder / subfolder
    if subfolder and inner.is_dir() and not inner.is_symlink():
        names += [f"{subfolder}/{path.name}" for path in inner.iterdir()]
    return names


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _nearest_existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists. Raises OSError if that cannot be found out."""
    try:
        path.lstat()
    except FileNotFoundError:
        if path.parent == path:
            raise
        return _nearest_existing(path.parent)
    return path
