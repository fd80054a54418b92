"""Output paths: what cannot be written is refused before the work begins, and only a run's own files are replaced.

A command checks first where its results go (`check_output_folder`, `check_output_file`); a check leaves no trace. It
prepares the folder last, right before it writes into it (`prepare_output`). The record of a run, or the exact form of a
name, tells which files are removable; a link or a folder in the place of such a file is the user's.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..errors import InputError
from .atomic_files import SCRATCH, TEMPORARY
from .filesystem import (
    FILE_SUFFIXES,
    check_folder_name,
    check_only_files,
    check_writable,
    is_regular,
    is_taken,
    kind_of,
    make_folder,
    names_in,
)
from .folder_lock import LOCK

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
        InputError: it holds something and `force` is off, it cannot be written, its name looks like that of a file, or
            a file of the user has a name that will be written.
    """
    check_writable(folder)
    check_folder_name(folder)
    check_only_files(folder, [SCRATCH])  # what is written there would go through a link
    if not force and set(names_in(folder)) - {LOCK, SCRATCH}:
        raise InputError(
            expected=f"an empty or new folder as --out {folder}",
            got="a folder with files in it",
            do=f"name another folder, or use {hint}--force to replace what is there",
        )
    if written is not None:
        _check_nothing_foreign(folder, written, earlier)


def check_output_file(path: Path, *, force: bool, option: str = "--out", suffix: str | None = None) -> None:
    """Check that the file `path` may be written; nothing is made or removed.

    Args:
        path: of the file.
        force: whether it may exist already.
        option: which option names it, for the message.
        suffix: of its format, such as ".png"; a name that ends like a file of another format is refused.

    Raises:
        InputError: it exists and `force` is off, something other than a file is there, its temporary file exists, its
            name is that of another format, or its folder cannot be written.
    """
    if os.path.isdir(path):
        raise InputError(expected=f"a file as {option}", got=f"the folder {path}", do="add a file name")
    check_writable(path.parent)
    if suffix is not None and path.suffix.lower() in FILE_SUFFIXES - {suffix}:
        raise InputError(
            expected=f"a name that ends in {suffix} as {option}", got=str(path), do=f"name {path.with_suffix(suffix)}"
        )
    if is_taken(path) and not os.path.isfile(path):
        raise InputError(expected=f"a file as {option} {path}", got=kind_of(path), do="remove it or name another file")
    if is_taken(path) and not force:
        raise InputError(
            expected=f"a new file as {option} {path}", got="an existing one", do="name another, or use --force"
        )
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    if is_taken(temporary):
        raise InputError(
            expected=f"nothing at {temporary}, where {option} {path} is written first",
            got=f"{kind_of(temporary)} that may be yours or left by a killed run",
            do="move it away or name another file",
        )


def prepare_output(folder: Path, earlier: Sequence[OutputFiles]) -> None:
    """Make `folder`, and remove from it what `earlier` runs wrote."""
    make_folder(folder)
    for files in earlier:
        remove_run(folder, files)


def remove_run(folder: Path, files: OutputFiles) -> None:
    """Remove what a run wrote, its record last: a kill meanwhile leaves no file that nothing names."""
    remove_files(folder, lambda name: name in files and name != files.record, subfolder=files.subfolder)
    remove_files(folder, {files.record}.__contains__, subfolder="")


def remove_files(folder: Path, removable: Removable, *, subfolder: str) -> None:
    """Remove the `removable` files of `folder` and its `subfolder`, and temporary files of them that a kill left.

    Links are neither followed nor removed, and no folder is removed. Raise InputError for a file that stays.
    """
    for name in _names_at_two_levels(folder, subfolder):
        if removable(name.removesuffix(TEMPORARY)) and is_regular(folder / name):
            remove_file(folder / name)


def remove_file(path: Path) -> None:
    """Remove a file, which may be gone already. Raise InputError if it stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            expected=f"to remove {path}, which codegrid wrote",
            got=error.strerror or str(error),
            do="name another folder or change its permissions",
        ) from None


def _check_nothing_foreign(folder: Path, written: OutputFiles, earlier: Sequence[OutputFiles]) -> None:
    """Raise InputError if writing would replace something that none of the `earlier` runs wrote."""
    inner = folder / written.subfolder
    if inner != folder and is_taken(inner) and (inner.is_symlink() or not os.path.isdir(inner)):
        foreign = [written.subfolder]
    else:
        names = _names_at_two_levels(folder, written.subfolder)
        taken = [name for name in names if name.removesuffix(TEMPORARY) in written]
        foreign = sorted(name for name in taken if not _is_of(earlier, folder, name))
    if foreign:
        raise InputError(
            expected=f"nothing in --out {folder} that this would replace and no earlier run of it wrote",
            got=foreign[0],
            do="move it away or name another folder",
        )


def _is_of(runs: Sequence[OutputFiles], folder: Path, name: str) -> bool:
    """Return whether one of the runs wrote this file."""
    return is_regular(folder / name) and any(name.removesuffix(TEMPORARY) in files for files in runs)


def _names_at_two_levels(folder: Path, subfolder: str) -> list[str]:
    """Return the names of everything in `folder` and, unless that is a link, in its `subfolder`."""
    names, inner = names_in(folder), folder / subfolder
    if subfolder and not inner.is_symlink():
        names += [f"{subfolder}/{name}" for name in names_in(inner)]
    return names
