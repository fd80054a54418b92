"""Where results go: nothing is overwritten unless asked to, and a place that cannot be written is named early."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError
from .files import COMMIT


def claim_folder(folder: Path, *, force: bool, ours: Sequence[str]) -> None:
    """Make `folder` and see that it is empty; with `force`, clear it of the files named in `ours` (glob patterns).

    Raises:
        InputError: it holds something and `force` is off, it is a file, or it cannot be written.
    """
    check_free(folder, force=force)
    clear(folder, ours)


def check_free(folder: Path, *, force: bool, hint: str = "") -> None:
    """Make `folder` and see that it is empty, unless `force`. What it holds stays.

    Raises:
        InputError: it holds something and `force` is off, it is a file, or it cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise InputError(
            expected=f"an empty or new folder as --out {folder}",
            got="a folder with files in it",
            do=f"name another folder, or use {hint}--force to replace what is there",
        )
    check_writable(folder)


def clear(folder: Path, ours: Sequence[str]) -> None:
    """Remove the files named in `ours` (glob patterns)."""
    for pattern in (*ours, *(f"{name}.new" for name in ours), COMMIT):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def claim_file(path: Path, *, force: bool, option: str = "--out") -> None:
    """See that `path` may be written: its folder is made.

    Raises:
        InputError: it exists and `force` is off, it is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise InputError(expected=f"a file as {option}", got=f"the folder {path}", do="add a file name")
    if path.exists() and not force:
        raise InputError(
            expected=f"a new file as {option} {path}", got="an existing one", do="name another, or use --force"
        )
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Make `folder` and write into it once. Raises InputError if that fails."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            expected=f"a folder that can be written at {folder}",
            got=error.strerror or str(error),
            do="name another folder or change its permissions",
        ) from None
