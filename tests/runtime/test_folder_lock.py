"""One writer a folder: the second is refused in one line, and a killed one locks nothing."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.runtime import folder_lock
from pipeline.runtime.folder_lock import LOCK, only_writer

from ..support import ROOT

HOLD = """
import sys, time
from pathlib import Path
from pipeline.runtime.folder_lock import only_writer

with only_writer(Path(sys.argv[1]), "training run"):
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
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        line = (
            rf"expected {tmp_path} for this export alone, got another training run that writes into it, "
            rf"process {other.pid} on {re.escape(socket.gethostname())} since {since}: -c .*{tmp_path.name}; wait until"
        )
        with pytest.raises(InputError, match=line) as refused, only_writer(tmp_path, "export"):
            pass
        assert "\n" not in str(refused.value)
        assert (tmp_path / LOCK).exists(), "the lock of the other process is still there"
        with pytest.raises(InputError), only_writer(tmp_path, "export"):
            pass
        other.communicate("")
    with only_writer(tmp_path, "export"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_what_a_killed_process_left_locks_nothing_and_is_removed(tmp_path: Path) -> None:
    with another_holder(tmp_path) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert (tmp_path / LOCK).exists()
        with only_writer(tmp_path, "export"):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_two_in_one_process_are_two_writers(tmp_path: Path) -> None:
    with only_writer(tmp_path, "export"):
        with pytest.raises(InputError, match=f"process {os.getpid()}"), only_writer(tmp_path, "export"):
            pass
        whole = json.loads((tmp_path / LOCK).read_text())
        wrong = {**whole, "process": "x"}, {**whole, "process": [1]}, {"process": 1}, [whole], "[" * 5000
        for content in ("{", "", *map(json.dumps, wrong), "[" * 100_000, "\xff\0"):
            (tmp_path / LOCK).write_text(content, "latin-1")
            with pytest.raises(InputError, match="of an unknown process"), only_writer(tmp_path, "export"):
                pass


def test_what_the_first_says_of_itself_is_shown_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command may be long, and hold what a terminal would act on; what is not UTF-8 is no reason to fail."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/codegrid", "sample", "--out", "a\nb\x1b[2J\udcff", "é" * 10_000])
    with only_writer(tmp_path, "sampling run"):
        with pytest.raises(InputError) as refused, only_writer(tmp_path, "export"):
            pass
        message = str(refused.value)
        assert "another sampling run" in message
        assert re.search(r": codegrid sample --out 'a\?b\?\[2J\?' 'é+\.\.\.; wait until", message)
        assert message.isprintable()
        assert len(message) < 500
        (tmp_path / LOCK).write_text(
            json.dumps({**json.loads((tmp_path / LOCK).read_text()), "machine": "\x1b]0;x\x07"})
        )
        with pytest.raises(InputError, match=r"on \?\]0;x\? since"), only_writer(tmp_path, "export"):
            pass


def make_folder(path: Path) -> None:
    path.mkdir()


def make_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "mine.txt")


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "nosuch")


def make_named_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.skipif(sys.platform == "win32", reason="few users make links, and there are no named pipes")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_folder, "a folder"),
        (make_link, "a link to a file"),
        (make_dangling_link, "a link that leads nowhere"),
        (make_named_pipe, "a named pipe"),
    ],
)
def test_something_else_in_the_place_of_the_lock(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    """It is refused and left as it is; above all, what a link leads to is not written."""
    (tmp_path / "mine.txt").write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / LOCK)
    line = f"expected a file or nothing at {tmp_path / 'out' / LOCK}, got {kind}; move it away or name another folder"
    with pytest.raises(InputError, match=re.escape(line)), only_writer(tmp_path / "out", "export"):
        pass
    assert os.path.lexists(tmp_path / "out" / LOCK)
    assert (tmp_path / "mine.txt").read_bytes() == b"mine"
    assert not (tmp_path / "nosuch").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="few users make links")
def test_a_link_that_appears_after_the_check_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    make_link(tmp_path / "out" / LOCK)
    monkeypatch.setattr(folder_lock, "check_only_files", lambda folder, names: None)
    with (
        pytest.raises(InputError, match="expected a file that can be read and written at"),
        only_writer(tmp_path / "out", "export"),
    ):
        pass
    assert (tmp_path / "mine.txt").read_bytes() == b"mine"


def refusing_open(error: int) -> Callable[..., int]:
    """Return a function for the place of `os.open`, which the system does not allow to open the lock."""
    real = os.open

    def opened(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(LOCK):
            raise OSError(error, os.strerror(error))
        return real(path, *arguments, **options)

    return opened


def test_a_lock_that_is_not_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another user, say: the line names the file, and only where there is none the folder."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / LOCK).touch()
    monkeypatch.setattr(os, "open", refusing_open(errno.EACCES))
    line = "expected a folder that can be written at"
    with pytest.raises(InputError, match=line), only_writer(tmp_path / "new", "export"):
        pass
    line = f"at {tmp_path / 'old' / LOCK}, got Permission denied; remove it, unless another run writes into this folder"
    with pytest.raises(InputError, match=re.escape(line)), only_writer(tmp_path / "old", "export"):
        pass


def test_a_full_disk_takes_no_lock_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without space for a file at all it is refused; without space for its content, only the message says less."""

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing_open(errno.ENOSPC))
        line = "got No space left on device; free space there or name another folder"
        with pytest.raises(InputError, match=line), only_writer(tmp_path / "new", "export"):
            pass
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "write", full)
    unknown = pytest.raises(InputError, match="of an unknown process")
    with only_writer(tmp_path, "export"), unknown, only_writer(tmp_path, "export"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("process", ["Infinity", "1e999", "NaN", '"x"', "[1]", "null"])
def test_a_holder_that_is_no_process_is_unknown(tmp_path: Path, process: str) -> None:
    content = f'{{"what": "export", "machine": "a", "since": "b", "command": "c", "process": {process}}}'
    with only_writer(tmp_path, "export"):
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(InputError, match="of an unknown process"), only_writer(tmp_path, "export"):
            pass


def test_a_folder_that_is_gone_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one that has become read-only."""

    def read_only(path: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def interrupted(act: Callable[[], None]) -> None:
        with only_writer(tmp_path / "out", "export"):
            act()
            raise KeyboardInterrupt

    for act in (lambda: shutil.rmtree(tmp_path / "out"), lambda: monkeypatch.setattr(os, "unlink", read_only)):
        with pytest.raises(KeyboardInterrupt):
            interrupted(act)
    monkeypatch.undo()
    with only_writer(tmp_path / "out", "export"):
        pass


@pytest.mark.parametrize("name", ["x.jpg", "x.PNG", "codes.npz", "model.safetensors"])
def test_a_name_like_that_of_a_file_is_refused_unless_the_folder_exists(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    line = f"expected a folder as --out, got {folder}, which looks like a file; name a folder, such as {tmp_path / 'x'}"
    line = line.replace(f"{tmp_path / 'x'}", str(folder.with_suffix("")))
    with pytest.raises(InputError, match=re.escape(line)), only_writer(folder, "export"):
        pass
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    with only_writer(folder, "export"):
        assert (folder / LOCK).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError(expected="a", got="b", do="c")])
def test_it_is_free_again_whatever_ends_the_work(tmp_path: Path, error: BaseException) -> None:
    for _ in range(2):
        with pytest.raises((KeyboardInterrupt, InputError)), only_writer(tmp_path, "export"):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_stays_empty_is_removed_and_what_was_there_stays(tmp_path: Path) -> None:
    with only_writer(tmp_path / "new" / "inner", "export"):
        assert (tmp_path / "new" / "inner" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    for name in ("empty", "kept"):
        with only_writer(tmp_path / name, "export"):
            if name == "kept":
                (tmp_path / name / "codes").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "kept"]


def test_a_file_that_was_removed_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is worth nothing: the next process locks another file of that name."""
    lock, opened = folder_lock.system_lock, []

    def late(file: int) -> None:
        if not opened:
            (tmp_path / LOCK).unlink()
        opened.append(os.fstat(file).st_ino)
        lock(file)

    monkeypatch.setattr(folder_lock, "system_lock", late)
    with only_writer(tmp_path, "export"):
        assert len(opened) == 2
        assert (tmp_path / LOCK).stat().st_ino == opened[1]


def test_of_many_at_once_never_two_hold_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come and go at once, and each that gets the lock is alone as long as it has it."""
    monkeypatch.setattr(folder_lock, "ATTEMPTS", 1)  # so that some are refused
    folder, start = tmp_path / "codes", threading.Barrier(6)
    inside: list[int] = []
    most: list[int] = []
    refusals: set[str] = set()

    def work() -> None:
        start.wait()
        left = 12
        while left:
            try:
                with only_writer(folder, "export"):
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
    assert refusals == {f"{folder} for this export alone"}
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_file_system_without_locks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_lock, "system_lock", unsupported)
    with only_writer(tmp_path, "export"):
        assert "no lock on" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "codes"):
        refused = pytest.raises(InputError, match=r"expected a folder that can be written at .*; name another")
        with refused, only_writer(path, "export"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_who_holds_the_lock_for_a_moment_only_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a command that checks its folder before it loads its models."""
    naps: list[float] = []
    first = only_writer(tmp_path, "check")
    first.__enter__()

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            first.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", nap)
    with only_writer(tmp_path, "run"):
        assert len(naps) == 3
