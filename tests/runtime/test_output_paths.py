"""Output paths: which names belong to a run, and what a check finds and leaves."""

import itertools
import os
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.runtime.output_paths import (
    OutputFiles,
    check_output_file,
    check_output_folder,
    check_writable,
    missing_folders,
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


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b", tmp_path / ("long" * 100) / "a"):
        with pytest.raises(InputError, match="expected a folder that can be written at"):
            check_writable(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
def test_links_as_destinations(tmp_path: Path) -> None:
    """A link to a folder is that folder; a dangling one is no place for a folder, and as a file it is not followed."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nosuch")
    check_output_folder(tmp_path / "link", force=False)
    with pytest.raises(InputError, match="can be written"):
        check_output_folder(tmp_path / "dangling", force=False)
    with pytest.raises(InputError, match="got an existing one"):
        check_output_file(tmp_path / "dangling", force=False)
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


def test_the_folders_that_are_missing(tmp_path: Path) -> None:
    assert missing_folders(tmp_path) == []
    assert missing_folders(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
