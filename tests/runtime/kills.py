"""A kill at each moment of a write, and a failure of the disk at each: what the tests of writing share."""

import builtins
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime import atomic_files


class Killed(BaseException):
    """What `kill -9` looks like from inside: nothing handles it."""


@contextmanager
def killed_at(touch: int, *, halfway: bool = False) -> Iterator[list[str]]:
    """Die just before the touch of the disk of this number, counted from 0; or, a write, in the middle of it."""
    touches: list[str] = []

    def dying(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def touch_or_die(*arguments: object, **options: object) -> object:
            touches.append(name)
            if len(touches) <= touch:
                return real(*arguments, **options)
            if halfway and name == "write":
                path, data = arguments
                assert isinstance(path, Path)
                assert isinstance(data, bytes)
                path.write_bytes(data[: len(data) // 2])
            raise Killed

        return touch_or_die

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_files, "_write_flushed", dying("write", atomic_files._write_flushed))
        patch.setattr(os, "replace", dying("rename", os.replace))
        patch.setattr(Path, "unlink", dying("unlink", Path.unlink))
        yield touches


def every_kill(
    prepare: Callable[[], object], write: Callable[[], object], check: Callable[[], None], *, halfway: bool
) -> int:
    """Run `prepare`, `write` up to each possible kill, and `check`; return how many kills there were."""
    for touch in itertools.count():
        prepare()
        try:
            with killed_at(touch, halfway=halfway):
                write()
        except Killed:
            check()
        else:
            return touch
    raise AssertionError


class FullFile:
    """A file whose write, flush to the disk or close may fail; a write that fails has written half."""

    def __init__(self, file: Any, touch: Callable[[str], None]) -> None:
        self._file, self._touch = file, touch

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if error == (None, None, None):
            self._touch("close")

    def write(self, data: bytes) -> int:
        try:
            self._touch("write")
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing_at(number: int, code: int) -> Iterator[list[str]]:
    """Let the touch of the disk of this number, counted from 0, fail with the `errno` code; yield the touches.

    Touches are: open, write, close, flush (`fsync`), rename and mkdir. Removing a file never fails.
    """
    touches: list[str] = []

    def touch(name: str) -> None:
        touches.append(name)
        if len(touches) == number + 1:
            raise OSError(code, os.strerror(code))

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            touch(name)
            return real(*arguments, **options)

        return call

    def open_failing(path: Path, mode: str = "r", **options: Any) -> Any:
        if "w" not in mode:
            return builtins.open(path, mode, **options)
        touch("open")
        return FullFile(builtins.open(path, mode, **options), touch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_files, "open", open_failing, raising=False)
        patch.setattr(os, "fsync", failing("flush", lambda descriptor: None))
        patch.setattr(os, "replace", failing("rename", os.replace))
        patch.setattr(Path, "mkdir", failing("mkdir", Path.mkdir))
        yield touches
