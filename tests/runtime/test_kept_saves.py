"""Writing files together while the ones they replace are kept: kills, failures of the disk, and a stranger's commit."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.runtime import atomic_files
from pipeline.runtime.atomic_files import COMMIT, committed, current, open_atomic, write_atomic, write_together

from .kills import Killed, every_kill, failing_at, killed_at

Contents = dict[str, bytes]
KEPT = "previous"


def contents(word: str) -> Contents:
    return {name: f"{word} {name}".encode() * 3 for name in ("a.bin", "b.bin", "c.bin")}


OLDEST, OLD, NEW, NEXT = (contents(word) for word in ("oldest", "old", "new", "next"))
TOUCHES = len(NEW) + 2 + 2 * len(NEW) + 1  # a write each; the commit; two renames each; the end of the commit


def read(folder: Path) -> Contents:
    """Return what a reader sees."""
    return {name: current(folder, name).read_bytes() for name in OLD}


def kept(folder: Path) -> Contents:
    return {path.name: path.read_bytes() for path in (folder / KEPT).iterdir()}


def tree(folder: Path) -> Contents:
    """Return every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare(folder: Path) -> None:
    """OLD is the last save, and OLDEST the one before it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for place, files in ((folder / KEPT, OLDEST), (folder, OLD)):
        place.mkdir(exist_ok=True)
        for name, data in files.items():
            (place / name).write_bytes(data)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


both = pytest.mark.parametrize("halfway", [False, True], ids=["before", "halfway"])


# Kills


@both
def test_a_reader_sees_one_save_at_every_kill(tmp_path: Path, halfway: bool) -> None:
    seen: list[Contents] = []
    kills = every_kill(
        lambda: prepare(tmp_path),
        lambda: write_together(tmp_path, NEW, keep=KEPT),
        lambda: seen.append(read(tmp_path)),
        halfway=halfway,
    )
    assert kills == TOUCHES
    assert all(found in (OLD, NEW) for found in seen)
    assert seen == sorted(seen, key=lambda found: found == NEW)
    assert seen[0] == OLD
    assert seen[-1] == NEW
    assert tree(tmp_path) == NEW | {f"{KEPT}/{name}": data for name, data in OLD.items()}


@both
def test_a_reader_sees_one_save_at_every_two_kills_and_the_one_before_it_is_kept(tmp_path: Path, halfway: bool) -> None:
    """The second kill hits the next writer, which completes the first one's work; a third writer is not killed."""
    pairs = 0
    for first in range(TOUCHES):

        def killed_once(first: int = first) -> None:
            prepare(tmp_path)
            with killed_at(first, halfway=halfway), pytest.raises(Killed):
                write_together(tmp_path, NEW, keep=KEPT)

        killed_once()
        before = read(tmp_path)

        def check(before: Contents = before) -> None:
            found = read(tmp_path)
            assert found in (before, NEXT)
            write_together(tmp_path, contents("last"), keep=KEPT)
            assert read(tmp_path) == contents("last")
            assert kept(tmp_path) == found
            assert not list(tmp_path.rglob("*.new"))

        pairs += every_kill(killed_once, lambda: write_together(tmp_path, NEXT, keep=KEPT), check, halfway=halfway)
    assert pairs >= TOUCHES**2


def test_without_keep_nothing_is_moved(tmp_path: Path) -> None:
    prepare(tmp_path)
    write_together(tmp_path, NEW)
    assert (read(tmp_path), kept(tmp_path)) == (NEW, OLDEST)


def test_the_first_save_keeps_nothing(tmp_path: Path) -> None:
    write_together(tmp_path / "new", NEW, keep=KEPT)
    assert tree(tmp_path / "new") == NEW


# Failures of the disk

CODES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT]


def error_of(act: Callable[[], object]) -> InputError | None:
    try:
        act()
    except InputError as error:
        return error
    return None


def explained(error: InputError, path: Path, size: int, code: int) -> bool:
    """Return whether the one line has the path, the bytes, the reason and a remedy."""
    line = str(error)
    return (
        "\n" not in line
        and line.startswith(f"expected to write {path} ({size:,} bytes), got {os.strerror(code)}")
        and bool(error.do)
    )


@pytest.mark.parametrize("code", CODES)
def test_a_failure_at_any_moment_is_one_line_and_loses_nothing(tmp_path: Path, code: int) -> None:
    """Up to the commit the old files are all there is; from it on readers see the new ones, and the next save works."""
    size, kinds, seen = sum(map(len, NEW.values())), set(), []
    for number in itertools.count():
        prepare(tmp_path)
        before = tree(tmp_path)
        with failing_at(number, code) as touches:
            error = error_of(lambda: write_together(tmp_path, NEW, keep=KEPT))
        if error is None:
            break
        assert explained(error, tmp_path, size, code)
        kinds.add(touches[-1])
        found = read(tmp_path)
        seen.append(found)
        assert found in (OLD, NEW)
        if found == OLD:
            assert tree(tmp_path) == before
        write_together(tmp_path, NEXT, keep=KEPT)
        assert tree(tmp_path) == NEXT | {f"{KEPT}/{name}": data for name, data in found.items()}
    assert kinds == {"open", "write", "close", "flush", "rename", "mkdir"}
    assert seen == sorted(seen, key=lambda found: found == NEW)
    # both folders; four touches a file; the rename of the commit
    assert seen.count(OLD) == 2 + 4 * (len(NEW) + 1) + 1


@pytest.mark.parametrize(("free", "said"), [(80, True), (81, False)])
def test_what_is_free_is_said_where_it_is_less_than_what_is_needed(
    tmp_path: Path, free: int, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk can be full for another reason: no room for one more file, or parts of blocks."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100 - free, free))  # type: ignore[attr-defined]
    with failing_at(3, errno.ENOSPC):
        error = error_of(lambda: write_together(tmp_path, NEW, keep=KEPT))
    assert (f"({free} bytes are free)" in str(error)) == said


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("streamed", [False, True])
def test_one_file_whose_write_fails_stays_as_it_was(tmp_path: Path, code: int, streamed: bool) -> None:
    path, data = tmp_path / "one.bin", b"new, and longer"

    def write() -> None:
        if not streamed:
            write_atomic(path, data)
            return
        with open_atomic(path, len(data)) as file:
            file.write(data)

    for number in itertools.count():
        path.write_bytes(b"old")
        with failing_at(number, code):
            error = error_of(write)
        if error is None:
            break
        assert explained(error, path, len(data), code)
        assert tree(tmp_path) == {"one.bin": b"old"}
    assert number == 6  # mkdir, open, write, flush, close, rename
    assert tree(tmp_path) == {"one.bin": data}


@pytest.mark.parametrize("place", ["a.bin", COMMIT, KEPT, f"{KEPT}/b.bin"])
def test_a_folder_or_a_file_in_the_way_is_found_before_anything_is_written(tmp_path: Path, place: str) -> None:
    prepare(tmp_path)
    path = tmp_path / place
    if place == KEPT:
        for name in OLDEST:
            (path / name).unlink()
        path.rmdir()
        path.write_bytes(b"a file")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    before = tree(tmp_path)
    with pytest.raises(InputError) as error:
        write_together(tmp_path, NEW, keep=KEPT)
    assert place in str(error.value)
    assert "move" in error.value.do
    assert tree(tmp_path) == before


# A stranger's commit

RUBBISH = {
    "rubbish": b"\x00\xff",
    "empty": b"",
    "null": b"null",
    "a number": b"7",
    "an absolute path": b'["/etc/passwd"]',
    "a path upwards": b'["../x"]',
    "two dots": b'[".."]',
    "a path inside": b'["previous/a.bin"]',
    "no names": b"[1, null]",
    "no list": b'{"files": "a.bin", "keep": "previous"}',
    "a folder outside": b'{"files": ["a.bin"], "keep": "../x"}',
    "an absolute folder": b'{"files": ["a.bin"], "keep": "/tmp"}',
    "no folder": b'{"files": ["a.bin"], "keep": null}',
    "brackets": b"[" * 10**5,
    "closed brackets": b"[" * 10**4 + b"]" * 10**4,
    "many digits": b"9" * 10**4,
    "a line break": b'["a.bin\\n"]',
    "large": json.dumps(["a.bin"] * 10**5).encode(),
}


def refused(folder: Path) -> None:
    """Assert that readers and writers of `folder` refuse its commit in one line, and that nothing changes."""
    before = tree(folder.parent)
    for attempt in (
        lambda: current(folder, "a.bin"),
        lambda: committed(folder),
        lambda: write_together(folder, NEW, keep=KEPT),
    ):
        with pytest.raises(InputError) as error:
            attempt()
        assert "\n" not in str(error.value)
        assert COMMIT in str(error.value)
        assert len(str(error.value)) < 1000
    assert tree(folder.parent) == before


@pytest.mark.parametrize("name", RUBBISH)
def test_a_commit_that_no_writer_wrote_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    prepare_in(folder)
    (tmp_path / "x").mkdir()
    (tmp_path / "x.new").write_bytes(b"outside")
    (folder / "a.bin.new").write_bytes(b"not committed")
    (folder / COMMIT).write_bytes(RUBBISH[name])
    refused(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_commit_that_is_a_pipe_or_a_device_is_never_opened(tmp_path: Path) -> None:
    """Opening it would wait for ever, or read without end."""
    folder = tmp_path / "run"
    prepare_in(folder)
    os.mkfifo(folder / COMMIT)
    refused(folder)
    (folder / COMMIT).unlink()
    (folder / COMMIT).symlink_to("/dev/zero")
    refused(folder)


def test_a_kept_folder_that_is_a_link_leads_nowhere(tmp_path: Path) -> None:
    """Neither a writer nor the completion of a stranger's commit moves a file out of the folder."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    prepare_in(folder)
    outside.mkdir()
    (folder / "elsewhere").symlink_to(outside, target_is_directory=True)
    (folder / "a.bin.new").write_bytes(b"new")
    (folder / COMMIT).write_bytes(b'{"files": ["a.bin"], "keep": "elsewhere"}')
    refused(folder)
    (folder / COMMIT).unlink()
    with pytest.raises(InputError, match="elsewhere is no folder"):
        write_together(folder, NEW, keep="elsewhere")
    assert not list(outside.iterdir())


def prepare_in(folder: Path) -> None:
    folder.mkdir()
    prepare(folder)


def test_what_the_tests_break_is_what_protects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of names is what keeps renames inside: without it, a file outside would be replaced."""
    folder = tmp_path / "run"
    prepare_in(folder)
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "x.new").write_bytes(b"new")
    (folder / COMMIT).write_bytes(RUBBISH["a path upwards"])
    monkeypatch.setattr(atomic_files, "_are_names", lambda values: True)
    atomic_files._complete(folder)
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.skipif(os.name == "nt", reason="has other limits, and other words for them")
def test_a_commit_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    """It may be that of a save, and there may be none: the line does not say that another program wrote one."""
    folder = tmp_path / "run"
    prepare_in(folder)
    (folder / COMMIT).symlink_to(COMMIT)
    refused(folder)
    with pytest.raises(InputError, match=r"read .*commit.json, got Too many levels of symbolic links"):
        committed(folder)
    with pytest.raises(InputError, match=r"read .*commit.json, got File name too long"):
        committed(tmp_path / ("x" * 300))
