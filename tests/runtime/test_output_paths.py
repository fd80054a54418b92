"""Output paths: which names belong to a run, and what a check finds and leaves."""

import errno
import itertools
import os
import re
import socket
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.runtime.folder_lock import LOCK
from pipeline.runtime.output_paths import (
    OutputFiles,
    check_output_file,
    check_output_folder,
    prepare_output,
    remove_files,
)

CHARACTERS = "019/x.-٣"


@pytest.mark.parametrize("numbered", ["{:05d}.png", "images/{:05d}.png", "a{:05d}b"])
@pytest.mark.parametrize("indices", [range(0), range(3), range(7, 12), range(99_998, 100_002)])
def test_the_names_of_a_run_are_those_it_writes_and_no_others(numbered: str, indices: range) -> None:
    """Against the list of them; the others are one character more, less or different."""
    files = OutputFiles(record="r.json", numbered=numbered, indices=indices, others=frozenset({"grid.png"}))
    names = {"r.json", "grid.png", *(numbered.format(index) for index in indices)}
    assert all(name in files for name in names)
    for name in (*names, *(numbered.format(index) for index in (indices.start - 1, indices.stop))):
        for place, character in itertools.product(range(len(name) + 1), ("", *CHARACTERS)):
            for end in (place, place + 1):
                other = name[:place] + character + name[end:]
                assert (other in files) == (other in names), other
    assert "" not in files


def test_the_files_from_a_position_on() -> None:
    files = OutputFiles(record="r", numbered="{:05d}", indices=range(5, 9))
    assert files.from_position(0) == files
    assert files.from_position(3).indices == range(8, 9)
    assert list(files.from_position(4).indices) == []


def test_a_check_leaves_nothing_and_touches_nothing(tmp_path: Path) -> None:
    """Also of a folder that is not there, several levels deep, and where a probe of an earlier version has a name."""
    (tmp_path / ".writable").write_bytes(b"user")
    changed = tmp_path.stat().st_mtime_ns
    for force in (False, True):
        check_output_folder(tmp_path / "a" / "b", force=force)
        check_output_file(tmp_path / "a" / "b" / "c.png", force=force)
        check_output_file(tmp_path / "c.png", force=force)
    check_output_folder(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == [".writable"]
    assert (tmp_path / ".writable").read_bytes() == b"user"
    if sys.platform == "linux":
        assert tmp_path.stat().st_mtime_ns == changed


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
def test_links_as_destinations(tmp_path: Path) -> None:
    """A link to a folder is that folder, one to a file may be replaced, and a dangling one is no place for anything."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nosuch")
    check_output_folder(tmp_path / "link", force=False)
    with pytest.raises(InputError, match="can be written"):
        check_output_folder(tmp_path / "dangling", force=False)
    for force in (False, True):
        with pytest.raises(InputError, match="got a link that leads nowhere"):
            check_output_file(tmp_path / "dangling", force=force)
    (tmp_path / "file").touch()
    (tmp_path / "to a file").symlink_to(tmp_path / "file")
    check_output_file(tmp_path / "to a file", force=True)
    assert not (tmp_path / "nosuch").exists()


def test_files_are_removed_at_two_levels_and_no_deeper(tmp_path: Path) -> None:
    names = ["a.png", "in/a.png", "in/a.png.new", "in/in/a.png", "out/a.png", "a.png.new.new", "b.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    remove_files(tmp_path, {"a.png", "in/a.png", "out/a.png", "in/in/a.png"}.__contains__, subfolder="in")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"in/in/a.png", "out/a.png", "a.png.new.new", "b.png"}


def test_the_record_is_removed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it still names what a kill in the middle leaves."""
    files = OutputFiles(record="r.json", numbered="in/{:05d}.png", indices=range(2), others=frozenset({"a", "z"}))
    (tmp_path / "in").mkdir()
    for name in ("r.json", "a", "z", "in/00000.png", "in/00001.png", "in/00002.png"):
        (tmp_path / name).write_bytes(b"")
    removed, unlink = [], Path.unlink

    def recorded(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.relative_to(tmp_path).as_posix())
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", recorded)
    prepare_output(tmp_path, [files])
    assert sorted(removed) == ["a", "in/00000.png", "in/00001.png", "r.json", "z"]
    assert removed[-1] == "r.json"


# What is refused before the work begins

FILES = [
    *("x.jpg", "x.JPEG", "x.png", "x.gif", "x.webp", "x.bmp", "x.tif", "x.tiff", "x.npy", "x.npz", "x.json"),
    *("x.parquet", "x.safetensors", "x.html", "x.pt", "deep/in/x.png", "v1.2.png"),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_named_like_a_file_is_refused_unless_it_exists(tmp_path: Path, name: str, force: bool) -> None:
    folder = tmp_path / name
    line = f"expected a folder as --out, got {folder}, which looks like a file; name a folder, such as "
    with pytest.raises(InputError, match=re.escape(line + str(folder.with_suffix("")))):
        check_output_folder(folder, force=force)
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    check_output_folder(folder, force=force)


@pytest.mark.parametrize("name", ["x", "v1.2", "x.jpgs", ".png", "x.png.d", "jpg", "run.2024-01-01"])
def test_other_names_with_dots_are_those_of_folders(tmp_path: Path, name: str) -> None:
    check_output_folder(tmp_path / name, force=False)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_another_format_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "old.jpg").write_bytes(b"mine")
    for name in ("x.jpg", "x.json", "old.jpg"):
        expected = tmp_path / name
        line = f"a name that ends in .png as --out, got {expected}; name {expected.with_suffix('.png')}"
        with pytest.raises(InputError, match=re.escape(line)):
            check_output_file(expected, force=force, suffix=".png")
    for name in ("x.png", "x.PNG", "x", "x.2024", ".png"):
        check_output_file(tmp_path / name, force=force, suffix=".png")
    check_output_file(tmp_path / "x.jpg", force=force)


def test_the_lock_that_a_killed_process_left_is_no_content(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{}")
    check_output_folder(tmp_path, force=False)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="got a folder with files in it"):
        check_output_folder(tmp_path, force=False)


@pytest.mark.parametrize("force", [False, True])
def test_the_temporary_file_is_not_one_of_the_user(tmp_path: Path, force: bool) -> None:
    """It may also be what a kill left, which nobody can tell."""
    (tmp_path / "a.png.new").write_bytes(b"mine")
    (tmp_path / "b.png.new").mkdir()
    for name, kind in (("a.png", "a file"), ("b.png", "a folder")):
        line = (
            f"expected nothing at {tmp_path / name}.new, where --out {tmp_path / name} is written first, "
            f"got {kind} that may be yours or left by a killed run; move it away or name another file"
        )
        with pytest.raises(InputError, match=re.escape(line)):
            check_output_file(tmp_path / name, force=force)
    assert (tmp_path / "a.png.new").read_bytes() == b"mine"


@pytest.mark.skipif(os.name == "nt", reason="no named pipes, and few users make links")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["a named pipe", "a link that leads nowhere", "a link to a device", "a socket"])
def test_what_is_neither_file_nor_folder_is_refused(tmp_path: Path, kind: str, force: bool) -> None:
    path = tmp_path / "out.png"
    with socket.socket(socket.AF_UNIX) as opened:
        {
            "a named pipe": lambda: os.mkfifo(path),
            "a link that leads nowhere": lambda: path.symlink_to("nosuch"),
            "a link to a device": lambda: path.symlink_to(os.devnull),
            "a socket": lambda: opened.bind(os.path.relpath(path)),
        }[kind]()
    before = path.lstat()
    line = f"expected a file as --json {path}, got {kind}; remove it or name another file"
    with pytest.raises(InputError, match=re.escape(line)):
        check_output_file(path, force=force, option="--json")
    line = f"expected a folder that can be written at {path}, got Not a directory but {kind}; name another folder"
    with pytest.raises(InputError, match=re.escape(line)):
        check_output_folder(path, force=force)
    assert os.path.samestat(path.lstat(), before)


@pytest.mark.parametrize("length", [252, 253, 255, 256, 5000])
def test_names_that_are_too_long_with_the_ending_of_the_temporary_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match=r"expected a (file|folder) that can be written at .*File name too long"):
        check_output_file(tmp_path / ("x" * length), force=False)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed(tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> list[str]:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "listdir", unreadable)
    line = f"expected a folder that can be read at {tmp_path}, got {os.strerror(error)}; name another folder"
    with pytest.raises(InputError, match=re.escape(line)):
        check_output_folder(tmp_path, force=False)


def test_a_file_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line; and the record stays, which names it."""

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    files = OutputFiles(record="r.json", numbered="{:05d}", indices=range(2))
    for name in ("r.json", "00001"):
        (tmp_path / name).touch()
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(
        InputError, match=r"expected to remove .*00001, which codegrid wrote, got Read-only file system"
    ):
        prepare_output(tmp_path, [files])
