"""One writer a folder: the second is refused in one line, and a killed one locks nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.runtime import folder_lock
from pipeline.runtime.folder_lock import LOCK, only_writer

from ..support import ROOT

HOLD = """
import sys, time
from pathlib import Path
from pipeline.runtime.folder_lock import only_writer

with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_holder(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Yield another process, which holds the lock until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_process_is_refused_and_told_the_first(tmp_path: Path) -> None:
    with another_holder(tmp_path) as other:
        line = rf"into {tmp_path}, got another export that writes into it, process {other.pid} on .*; wait until"
        with pytest.raises(InputError, match=line) as refused, only_writer(tmp_path):
            pass
        assert "\n" not in str(refused.value)
        assert (tmp_path / LOCK).exists(), "the lock of the other process is still there"
        with pytest.raises(InputError), only_writer(tmp_path):
            pass
        other.communicate("")
    with only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_what_a_killed_process_left_locks_nothing_and_is_removed(tmp_path: Path) -> None:
    with another_holder(tmp_path) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert (tmp_path / LOCK).exists()
        with only_writer(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_two_in_one_process_are_two_writers(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        with pytest.raises(InputError, match=f"process {os.getpid()}"), only_writer(tmp_path):
            pass
        (tmp_path / LOCK).write_text("{")
        with pytest.raises(InputError, match="of an unknown process"), only_writer(tmp_path):
            pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError(expected="a", got="b", do="c")])
def test_it_is_free_again_whatever_ends_the_work(tmp_path: Path, error: BaseException) -> None:
    for _ in range(2):
        with pytest.raises((KeyboardInterrupt, InputError)), only_writer(tmp_path):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_stays_empty_is_removed_and_what_was_there_stays(tmp_path: Path) -> None:
    with only_writer(tmp_path / "new" / "inner"):
        assert (tmp_path / "new" / "inner" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    for name in ("empty", "kept"):
        with only_writer(tmp_path / name):
            if name == "kept":
                (tmp_path / name / "codes").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "kept"]


def test_a_file_that_was_removed_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is worth nothing: the next process locks another file of that name."""
    lock, opened = folder_lock._system_lock, []

    def late(file: int) -> None:
        if not opened:
            (tmp_path / LOCK).unlink()
        opened.append(os.fstat(file).st_ino)
        lock(file)

    monkeypatch.setattr(folder_lock, "_system_lock", late)
    with only_writer(tmp_path):
        assert len(opened) == 2
        assert (tmp_path / LOCK).stat().st_ino == opened[1]


def test_of_many_at_once_never_two_hold_the_lock(tmp_path: Path) -> None:
    """They come and go at once, and each that gets the lock is alone as long as it has it."""
    folder, start = tmp_path / "codes", threading.Barrier(6)
    inside: list[int] = []
    most: list[int] = []
    refusals: set[str] = set()

    def work() -> None:
        start.wait()
        left = 12
        while left:
            try:
                with only_writer(folder):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0)
                    inside.pop()
                    left -= 1
            except InputError as error:
                refusals.add(error.expected)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6 * 12
    assert refusals == {f"one export at a time into {folder}"}
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_file_system_without_locks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_lock, "_system_lock", unsupported)
    with only_writer(tmp_path):
        assert "no lock on" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "codes"):
        refused = pytest.raises(InputError, match=r"expected a folder that can be written at .*; name another")
        with refused, only_writer(path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
