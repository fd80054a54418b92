"""Disks that are full or fail: what `os.fsync` says to each file that the program writes."""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import InputError


@contextmanager
def failing_writes(first: int, count: int = 1) -> Iterator[list[int]]:
    """Let `count` writes from the write `first` on fail, counted from 0; yield the numbers of all writes."""
    writes: list[int] = []

    def fails(file: int) -> bool:
        writes.append(len(writes))
        return first <= writes[-1] < first + count

    with _disk(fails):
        yield writes


@contextmanager
def disk_of(folder: Path, size: int) -> Iterator[None]:
    """Let a write fail while the files below `folder` have more than `size` bytes together."""

    def fails(file: int) -> bool:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) > size

    with _disk(fails):
        yield


@contextmanager
def _disk(fails: Callable[[int], bool]) -> Iterator[None]:
    """Let the writes fail of which `fails` says so, given the open file."""

    def fsync(file: int) -> None:
        if stat.S_ISREG(os.fstat(file).st_mode) and fails(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def full_disk_line(act: Callable[[], object]) -> bool:
    """Run `act`, and return whether it was refused; assert that the line says for how many bytes there is no space."""
    try:
        act()
    except InputError as error:
        line = str(error)
    else:
        return False
    assert re.search(r"[0-9,]+ bytes.*No space left on device.*; free ", line), line
    assert "\n" not in line
    return True


@pytest.fixture(scope="module", autouse=True)
def without_waiting_for_the_disk() -> Iterator[None]:
    """Let the tests of a module that imports this write thousands of files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield
