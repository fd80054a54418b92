"""A cache entry is complete or absent, is checked and reused, and errors name the remedy."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.images import building_folder, cached_array
from pipeline.images import cache as cache_module
from pipeline.images.building_folder import kept_alive
from pipeline.images.cache import Built, StoredFile, open_entry
from pipeline.images.cache_folder import cache_folder
from pipeline.images.cached_array import NewArray, read_images
from pipeline.images.source import Broken
from pipeline.runtime.sealed_json import sealed

from ..support import ROOT

SHAPE = (1, 2, 3)
COUNT = 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CODEGRID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def build(folder: Path) -> Built:
    array = NewArray(folder / "train.npy", COUNT, SHAPE)
    written = array.write([np.full(SHAPE, 7, np.uint8)] * COUNT)
    return Built({"answer": 42}, {"train.npy": StoredFile(array.size, written.sha256)})


def read(folder: Path, index: dict[str, Any]) -> tuple[Path, int]:
    """Return the folder and the answer. Raise if they are not what `build` made."""
    if index["answer"] != 42:
        raise ValueError("another answer")
    assert (read_images(folder / "train.npy", COUNT, SHAPE) == 7).all()
    return folder, index["answer"]


def opened() -> Path:
    return open_entry({}, build, read)[0]


def refuse(folder: Path) -> Built:
    raise AssertionError(f"a second build in {folder}")


def test_an_entry_is_built_once() -> None:
    folder, answer = open_entry({"a": 1}, build, read)
    assert open_entry({"a": 1}, refuse, read) == (folder, answer)
    np.testing.assert_array_equal(np.load(folder / "train.npy"), np.full((COUNT, *SHAPE), 7))
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "train.npy"]


def test_another_request_is_another_entry() -> None:
    assert open_entry({"a": 1}, build, read) != open_entry({"a": 2}, build, read)


def test_an_index_is_json_with_a_checksum_that_names_those_of_the_arrays() -> None:
    folder = opened()
    index = json.loads((folder / "index.json").read_bytes())
    assert index["files"] == {"train.npy": {"size": 146, "sha256": sha256(np_file(folder)).hexdigest()}}
    del index["checksum"]
    assert sealed(index) == (folder / "index.json").read_bytes()


def np_file(folder: Path) -> bytes:
    return (folder / "train.npy").read_bytes()


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> Built:
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_entry({}, fail, read)
    assert list(cache.iterdir()) == []


def test_the_entry_another_process_finished_first_is_kept() -> None:
    def slow(folder: Path) -> Built:
        opened()
        return Built({"answer": 0})

    assert open_entry({}, slow, read)[1] == 42
    assert open_entry({}, refuse, read)[1] == 42


def test_an_entry_that_another_process_repairs_during_the_last_check_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found it damaged, and built it again; the other one may be about to read its own."""
    folder = opened()
    intact = shutil.copytree(folder, folder.with_name("intact"))
    (folder / "train.npy").write_bytes(b"rubbish")
    check, built = cache_module._open_checked, []

    def build_here(temporary: Path) -> Built:
        built.append(temporary)
        return build(temporary)

    def check_slowly(*arguments: Any) -> Any:
        try:
            return check(*arguments)
        finally:
            if built and intact.exists():
                shutil.rmtree(folder)
                intact.rename(folder)
                (folder / "of the other").touch()

    monkeypatch.setattr(cache_module, "_open_checked", check_slowly)
    assert open_entry({}, build_here, read) == (folder, 42)
    assert len(built) == 1
    assert (folder / "of the other").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_folder_is_the_users_choice_or_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("CODEGRID_CACHE")
    assert cache_folder().is_absolute()
    assert "codegrid" in str(cache_folder())


# Damage


def flip_each_bit(path: Path) -> list[bytes]:
    data = path.read_bytes()
    flipped = (data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in range(len(data)) for bit in range(8))
    return list(flipped)[:: 7 if path.suffix == ".json" else 3]


@pytest.mark.parametrize("name", ["index.json", "train.npy"])
def test_every_flipped_bit_is_noticed_and_repaired(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # hundreds of entries
    path = opened() / name
    intact = path.read_bytes()
    for damaged in flip_each_bit(path):
        caplog.clear()
        path.write_bytes(damaged)
        assert opened() == path.parent
        assert path.read_bytes() == intact
        (line,) = caplog.messages
        assert line.startswith(f"Warning: {path.parent} in the image cache is damaged and is built again: ")
        assert "\n" not in line


def a_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another file": lambda path: path.write_bytes(b"{}"),
    "brackets": lambda path: path.write_bytes(b"[" * 10**5),
    "a folder": a_folder,
    "a pipe": a_pipe,
    "endless": endless,
}
INDEXES: dict[str, Any] = {  # each with its own right checksum
    "another answer": {"answer": 41},
    "no files": {"answer": 42},
    "files are a list": {"answer": 42, "files": [1]},
    "a file is a number": {"answer": 42, "files": {"train.npy": 1}},
    "a size is a text": {"answer": 42, "files": {"train.npy": {"size": "146", "sha256": ""}}},
    "a path": {"answer": 42, "files": {"../../../../etc/passwd": {"size": 1, "sha256": ""}}},
}


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes")
@pytest.mark.parametrize("name", ["index.json", "train.npy"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_noticed_and_repaired(name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGES[damage](opened() / name)
    _check_repaired(caplog)


@pytest.mark.parametrize("rubbish", INDEXES)
def test_rubbish_with_a_right_checksum_is_noticed_and_replaced(rubbish: str, caplog: pytest.LogCaptureFixture) -> None:
    (opened() / "index.json").write_bytes(sealed(INDEXES[rubbish]))
    _check_repaired(caplog)


@pytest.mark.parametrize("text", ['{"answer": 42, "files": ' + "[" * 10**5 + "]" * 10**5 + "}", '{"answer": 42}', "[]"])
def test_json_without_a_checksum_is_noticed_and_replaced(text: str, caplog: pytest.LogCaptureFixture) -> None:
    (opened() / "index.json").write_text(text)
    _check_repaired(caplog)


@pytest.mark.parametrize("place", ["a file", "an empty folder", "a dangling link"])
def test_something_else_in_the_place_of_an_entry_is_replaced(place: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = opened()
    shutil.rmtree(folder)
    if place == "a file":
        folder.write_bytes(b"rubbish")
    elif place == "an empty folder":
        folder.mkdir()
    else:
        folder.symlink_to("nowhere")
    _check_repaired(caplog)
    assert not folder.is_symlink()


def _check_repaired(caplog: pytest.LogCaptureFixture) -> None:
    folder = opened()
    (line,) = caplog.messages
    assert str(folder) in line
    assert len(line) < 600
    assert "\n" not in line
    assert open_entry({}, refuse, read) == (folder, 42)
    assert len(caplog.messages) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_cannot_be_replaced_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened()
    (folder / "index.json").write_bytes(b"")

    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else read_only(path))
    with pytest.raises(InputError, match=r"image cache that can be written at .*Read-only file system; set CODEGRID"):
        opened()


# Arrays


def test_broken_images_leave_no_gap(tmp_path: Path) -> None:
    images = [np.full(SHAPE, 1, np.uint8), Broken("torn"), np.full(SHAPE, 3, np.uint8)]
    array = NewArray(tmp_path / "a.npy", 3, SHAPE)
    written = array.write(images)
    assert (written.kept, written.broken) == ([0, 2], {1: "torn"})
    stored = read_images(tmp_path / "a.npy", 2, SHAPE)
    assert isinstance(stored, np.memmap)
    assert stored[:, 0, 0, 0].tolist() == [1, 3]
    assert np.load(tmp_path / "a.npy")[:, 0, 0, 0].tolist() == [1, 3, 0]
    data = (tmp_path / "a.npy").read_bytes()
    assert (array.size, written.sha256) == (len(data), sha256(data).hexdigest())


def test_an_empty_split(tmp_path: Path) -> None:
    written = NewArray(tmp_path / "a.npy", 0, SHAPE).write([])
    assert (written.kept, written.broken) == ([], {})
    assert read_images(tmp_path / "a.npy", 0, SHAPE).shape == (0, *SHAPE)


ARRAYS = {
    "too few rows": np.zeros((2, *SHAPE), np.uint8),
    "another shape": np.zeros((COUNT, 1, 3, 2), np.uint8),
    "fewer dimensions": np.zeros((COUNT, 6), np.uint8),
    "none": np.zeros((), np.uint8),
    "another type": np.zeros((COUNT, *SHAPE), np.int8),
    "wider": np.zeros((COUNT, *SHAPE), np.uint16),
    "empty": np.zeros(0, np.uint8),
    "columns first": np.asfortranarray(np.zeros((COUNT, *SHAPE), np.uint8)),
}


@pytest.mark.parametrize("wrong", ARRAYS)
def test_another_array_is_refused_before_it_is_mapped(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "a.npy", ARRAYS[wrong])
    monkeypatch.setattr(np, "memmap", lambda *_: pytest.fail("it was mapped"))
    with pytest.raises(ValueError, match=r"a.npy is no uint8 array of 3 images \[1, 2, 3\]"):
        read_images(tmp_path / "a.npy", COUNT, SHAPE)


HEADERS = {
    "rows that are not there": "(3, 1, 2, 3)",
    "more than any disk has": "(1000000000000, 1, 2, 3)",
    "a negative number": "(-3, 1, 2, 3)",
    "a text": "'x'",
    "brackets": "(" * 9000,
    "minus signs": "-" * 9000 + "1",
}


@pytest.mark.parametrize("header", HEADERS)
def test_another_header_is_refused_whatever_it_says(header: str, tmp_path: Path) -> None:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {HEADERS[header]}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    for rows in (0, 17, 18, 24):  # bytes
        (tmp_path / "a.npy").write_bytes(data + bytes(rows))
        if (header, rows) == ("rows that are not there", 18):
            assert read_images(tmp_path / "a.npy", COUNT, SHAPE).shape == (COUNT, *SHAPE)  # they are
        else:
            with pytest.raises(ValueError, match=r"a\.npy is no uint8 array"):
                read_images(tmp_path / "a.npy", COUNT, SHAPE)


# A disk that is full, read-only or away


class FailingFile:
    """A file whose k-th operation fails, counted over all files."""

    def __init__(self, file: Any, fail: Callable[[], None]) -> None:
        self.file, self.fail = file, fail

    def __getattr__(self, name: str) -> Any:
        if name in ("write", "flush", "truncate"):
            self.fail()
        return getattr(self.file, name)

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def fail_at(patch: pytest.MonkeyPatch, k: int, number: int) -> list[int]:
    """Let the k-th change of the disk fail, and those after it; count them."""
    done = [0]

    def fail() -> None:
        done[0] += 1
        if done[0] > k:
            raise OSError(number, os.strerror(number), "the/file")

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            fail()
            return real(*arguments, **options)

        return call

    def open_failing(path: Path, mode: str, **options: Any) -> Any:
        if mode == "rb":
            return open(path, mode, **options)
        fail()
        return FailingFile(open(path, mode, **options), fail)

    for name in ("fsync", "mkdir", "rename", "posix_fallocate"):
        if hasattr(os, name):
            patch.setattr(os, name, failing(getattr(os, name)))
    for module in (cache_module, cached_array):
        patch.setattr(module, "open", open_failing, raising=False)
    patch.setattr(shutil, "disk_usage", failing(shutil.disk_usage))
    return done


FAILURES = {
    errno.ENOSPC: r"expected ([\d,]+ bytes free|room) for the image cache .*, got No space left on device; make room",
    errno.EDQUOT: r"expected ([\d,]+ bytes free|room) for the image cache .*, got Disk quota exceeded; make room",
    errno.EFBIG: r"expected a file of [\d,]+ bytes in the image cache .*, got File too large; raise the limit",
    errno.EROFS: r"expected an image cache that can be written at .*, got Read-only file system; set CODEGRID_CACHE",
    errno.ENOENT: r"expected an image cache that can be written at .*, got No such file",
    errno.ESTALE: r"expected an image cache that can be written at .*, got Stale file handle",
    errno.EIO: r"expected an image cache that can be written at .*, got Input/output error",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the words of Linux")
@pytest.mark.parametrize("number", FAILURES)
def test_a_failure_of_the_disk_at_any_moment_is_one_line_and_leaves_nothing(
    number: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(100):
        with monkeypatch.context() as patch:
            done = fail_at(patch, k, number)
            try:
                opened()
            except InputError as error:
                message = str(error)
            else:
                break
        assert re.search(FAILURES[number], message)
        assert "CODEGRID_CACHE" in message
        assert str(cache.parent) in message
        assert not cache.exists() or list(cache.iterdir()) == []
    assert done == [k]
    assert k > 8
    assert open_entry({}, refuse, read)[1] == 42


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_real_limit_on_the_size_of_files(cache: Path) -> None:
    """In a process of its own, with the limit at every size up to that of the entry."""
    code = """
import os, resource, signal, sys
from pathlib import Path
from pipeline.errors import InputError
from tests.images.test_cache import opened

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
failed = 0
for limit in range(0, 10_000, 13):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        opened()
        break
    except InputError as error:
        line = str(error)
        assert "File too large; raise the limit on the size of files (ulimit -f), or set CODEGRID_CACHE" in line, line
        assert os.listdir(sys.argv[1]) == []
        failed += 1
print(failed, limit)
"""
    command = [sys.executable, "-c", code, str(cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failed, limit = map(int, done.stdout.split())
    assert failed == limit // 13 > 10


def test_a_full_disk_is_refused_before_an_image_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(InputError, match=r"expected 146 bytes free for the image cache .*, got 10 bytes; make room"):
        NewArray(tmp_path / "a.npy", COUNT, SHAPE)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_the_space_is_reserved_before_an_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, start, size: reserved.append((start, size)))
    array = NewArray(tmp_path / "a.npy", COUNT, SHAPE)
    assert reserved == [(0, array.size)] == [(0, (tmp_path / "a.npy").stat().st_size)]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_reserves_no_space_is_written_all_the_same(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert open_entry({}, build, read)[1] == 42


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CODEGRID_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"expected an image cache that can be written.*set CODEGRID_CACHE"):
        opened()


# What killed processes leave


def age(folder: Path, hours: float) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (0, time.time() - hours * 3600))


def test_what_a_killed_build_left_is_not_used_and_removed_when_old(cache: Path) -> None:
    old, young, busy = (cache / f".building-{name}" for name in ("old", "young", "busy"))
    for folder in (old, young, busy):
        folder.mkdir(parents=True)
        build(folder)
    age(old, 25)
    age(young, 23)
    age(busy, 25)
    os.utime(busy / "train.npy")  # a row was written
    folder = opened()
    assert sorted(cache.iterdir()) == sorted([folder, young, busy])


KILLED = """
import os, sys, time
from tests.images.test_cache import build, open_entry, read

def hold(folder):
    print(folder, flush=True)
    time.sleep(600)

open_entry({}, hold, read)
"""


def test_a_folder_whose_process_lives_is_never_removed(cache: Path) -> None:
    """And is, once that has been killed."""
    process = subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        age(folder, 1000)
        opened()
        assert folder.exists()
    finally:
        process.kill()
        process.communicate()
    open_entry({"another": 1}, build, read)
    assert not folder.exists()


def test_without_locks_the_age_alone_counts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(building_folder, "system_lock", no_locks)
    folder = building_folder.new_building_folder(cache)
    with kept_alive(folder):
        opened()
        assert folder.exists()
        age(folder, 25)
        open_entry({"another": 1}, build, read)
        assert not folder.exists()
