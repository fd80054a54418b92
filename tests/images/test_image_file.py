"""A damaged file is remembered; what the system could not do at the moment is tried again, then reported."""

import builtins
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.images import folder as folder_module
from pipeline.images import image_file
from pipeline.images.image_set import open_images
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.source import Broken

from ..support import ROOT
from .test_image_set import fill, names_of

COUNT = 30  # images; with one broken file of them, a run continues with no more than a warning
VICTIM = "07.png"
ALL = [f"{i:02d}.png" for i in range(COUNT)]
PASSING = (errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EIO, errno.ENOMEM, errno.EACCES, errno.ETIMEDOUT)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CODEGRID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path / "images", ALL)
    return tmp_path / "images"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which take no time here."""
    pauses: list[float] = []
    monkeypatch.setattr(image_file.time, "sleep", pauses.append)
    return pauses


class FailingRead:
    """A file that opens, and fails when it is read."""

    def __init__(self, file: Any, error: BaseException) -> None:
        self._file, self._error = file, error

    def read(self, *_: Any) -> bytes:
        raise self._error

    def __enter__(self) -> "FailingRead":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def fail_to_read(
    patch: pytest.MonkeyPatch, error: Callable[[], BaseException], times: float, *, opened: bool = False
) -> list[int]:
    """Let the first `times` attempts at VICTIM fail, as it is opened or (`opened`) as it is read; count them."""
    attempts, real = [0], builtins.open

    def failing(file: Any, *arguments: Any, **options: Any) -> Any:
        if os.path.basename(str(file)) != VICTIM or attempts[0] >= times:
            return real(file, *arguments, **options)
        attempts[0] += 1
        if opened:
            return FailingRead(real(file, *arguments, **options), error())
        raise error()

    patch.setattr(builtins, "open", failing)
    return attempts


def entries_of(cache: Path) -> list[Path]:
    return list(cache.glob("*")) if cache.exists() else []


# Once the system can read the file, no image is missing

SIZES = [None, (4, 6)]  # without one, the headers are read too


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("number", PASSING)
def test_an_error_that_passes_is_waited_for(
    folder: Path, size: tuple[int, int] | None, number: int, opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        attempts = fail_to_read(patch, lambda: OSError(number, os.strerror(number)), 2, opened=opened)
        images = open_images(str(folder), image_size=size, channels=3)
    assert attempts == [2]
    assert (names_of(images), images.broken) == (ALL, ())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("number", PASSING)
def test_an_error_that_stays_stops_and_nothing_is_stored(
    folder: Path,
    cache: Path,
    waits: list[float],
    size: tuple[int, int] | None,
    number: int,
    opened: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the next run, when it has passed, no image is missing."""
    with monkeypatch.context() as patch:
        fail_to_read(patch, lambda: OSError(number, os.strerror(number)), float("inf"), opened=opened)
        with pytest.raises(InputError, match="run the same command again") as stopped:
            open_images(str(folder), image_size=size, channels=3)
    assert str(folder / VICTIM) in str(stopped.value)
    assert os.strerror(number) in str(stopped.value)
    assert waits == [*image_file.RETRY_DELAYS]
    assert entries_of(cache) == []
    images = open_images(str(folder), image_size=size, channels=3)
    assert (names_of(images), images.broken) == (ALL, ())


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), MemoryError(), FileNotFoundError(errno.ENOENT, "No such file")]
)
def test_other_errors_of_the_moment_stop_too(
    folder: Path, cache: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_to_read(patch, lambda: error, float("inf"))
        with pytest.raises(InputError, match=VICTIM) as stopped:
            open_images(str(folder), image_size=(4, 6))
    assert (str(error) or "MemoryError") in str(stopped.value)
    assert "remove" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert entries_of(cache) == []


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
@pytest.mark.parametrize("times", [1, 99])
def test_no_memory_to_decode_is_no_damage_to_the_file(
    folder: Path, error: Exception, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Pillow reports it itself, and as it passes it on from a library under it."""
    with monkeypatch.context() as patch:
        left, read = [times], folder_module.read_image

        def failing(*arguments: Any) -> np.ndarray:
            if left[0] > 0:
                left[0] -= 1
                raise error
            return read(*arguments)

        patch.setattr(folder_module, "read_image", failing)
        if times > 1:
            with pytest.raises(InputError, match=r"free memory"):
                open_images(str(folder), image_size=(4, 6))
    images = open_images(str(folder), image_size=(4, 6))
    assert (names_of(images), images.broken) == (ALL, ())


def test_a_file_that_vanished_after_it_was_listed(
    folder: Path, cache: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list that names the entry is no longer true, so the run stops; the next one lists anew."""
    list_files = folder_module._list_files

    def listed(path: str) -> Any:
        files = list_files(path)
        (folder / VICTIM).unlink(missing_ok=True)
        return files

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_list_files", listed)
        with pytest.raises(InputError, match=rf"{VICTIM}.*No such file.*; .*run the same command again"):
            open_images(str(folder))
    assert entries_of(cache) == []
    assert names_of(open_images(str(folder))) == [name for name in ALL if name != VICTIM]


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_no_open_file_left(folder: Path, cache: Path) -> None:
    """In a process of its own, whose limit lets it open no file while it reads one image."""
    code = """
import json, os, resource, sys, time
from concurrent.futures import ThreadPoolExecutor
from pipeline.images import folder as folder_module
from pipeline.images.image_set import open_images
from pipeline.errors import InputError

time.sleep = lambda seconds: None
folder_module.ThreadPoolExecutor = lambda: ThreadPoolExecutor(1)
folder, victim = sys.argv[1:]
limits, read = resource.getrlimit(resource.RLIMIT_NOFILE), folder_module._read
open_images(folder)  # loads what Pillow needs
os.environ["CODEGRID_CACHE"] += "-2"

def starved(file, preprocessing):
    if file.name != victim:
        return read(file, preprocessing)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        return read(file, preprocessing)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

folder_module._read = starved
try:
    open_images(folder)
    message = ""
except InputError as error:
    message = str(error)
folder_module._read = read
images = open_images(folder)
print(json.dumps([message, len(images.train) + len(images.test), images.broken]))
"""
    command = [sys.executable, "-c", code, str(folder), VICTIM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    message, count, broken = json.loads(done.stdout or f'["{done.stderr[-500:]!r}", 0, 0]')
    assert f"{folder / VICTIM}" in message
    assert os.strerror(errno.EMFILE) in message
    assert (count, broken) == (COUNT, [])


# A damaged file is not waited for


def test_damaged_files_are_skipped_at_once(folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / VICTIM).write_bytes((folder / VICTIM).read_bytes()[:-30])
    (folder / "08.png").write_bytes(b"no image")
    (folder / "09.png").write_bytes(b"")
    for size in SIZES:
        images = open_images(str(folder), image_size=size, channels=3)
        assert images.broken == (VICTIM, "08.png", "09.png")
    assert waits == []
    monkeypatch.setattr(folder_module, "read_image", lambda *_: pytest.fail("a second read"))
    assert open_images(str(folder), image_size=SIZES[1], channels=3).broken == (VICTIM, "08.png", "09.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tif", ".bmp", ".webp", ".tga", ".pcx", ".jp2", ".ico"])
def test_no_damage_to_the_bytes_counts_as_an_error_that_passes(tmp_path: Path, waits: list[float], suffix: str) -> None:
    """Cut short anywhere, or with any byte replaced: read, or broken, and never a stop."""
    path, random = tmp_path / f"a{suffix}", np.random.default_rng(0)
    file = folder_module._File(str(path), path.name, 0, 0)
    outcomes = set()
    Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    intact = path.read_bytes()
    for place in random.integers(0, len(intact), 40).tolist():
        changed = intact[:place] + random.bytes(1) + intact[place + 1 :]
        for data in (intact[:place], changed):
            path.write_bytes(data)
            outcomes.add(type(folder_module._header(file)))
            outcomes.add(type(folder_module._read(file, Preprocessing(height=4, width=6, channels=3))))
    assert outcomes == {Preprocessing, np.ndarray, Broken}
    assert waits == []


def test_the_pauses_are_short() -> None:
    assert 0.5 < sum(image_file.RETRY_DELAYS) < 5
    assert sorted(image_file.RETRY_DELAYS) == [*image_file.RETRY_DELAYS]
