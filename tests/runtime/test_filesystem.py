"""What is at a path, and the one line about what cannot be written there."""

import errno
import os
import re
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.runtime.filesystem import (
    check_only_files,
    check_subfolder,
    check_writable,
    kind_of,
    make_folder,
    missing_folders,
    unwritable,
)

links = pytest.mark.skipif(os.name == "nt", reason="few users make links, and there are no named pipes")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with one of each kind."""
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("nosuch")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "device").symlink_to(os.devnull)
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


KINDS = {
    "file": "a file",
    "folder": "a folder",
    "link": "a link to a file",
    "folder link": "a link to a folder",
    "dangling": "a link that leads nowhere",
    "circle": "a link that leads nowhere",
    "device": "a link to a device",
    "pipe": "a named pipe",
}


@links
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_in_words_and_in_the_place_of_a_file_or_a_folder(place: Path, name: str) -> None:
    """A kind is refused, as it is or under the temporary name, unless it is the one that is expected."""
    kind, path = KINDS[name], place / name
    assert kind_of(path) == kind
    got = f"got {kind}; move it away or name another folder"
    if name == "file":
        check_only_files(place, [name])
    else:
        with pytest.raises(InputError, match=re.escape(f"expected a file or nothing at {path}, {got}")):
            check_only_files(place, ["nosuch", name])
        path.rename(place / "other.new")
        with pytest.raises(InputError, match=re.escape(f"expected a file or nothing at {place / 'other.new'}, {got}")):
            check_only_files(place, ["nosuch", "other"])
        (place / "other.new").rename(path)
    for may_be_link in (False, True):
        if name == "folder" or (name == "folder link" and may_be_link):
            check_subfolder(path, may_be_link=may_be_link)
        else:
            with pytest.raises(InputError, match=re.escape(f"expected a folder or nothing at {path}, {got}")):
                check_subfolder(path, may_be_link=may_be_link)


def test_nothing_is_in_the_way(tmp_path: Path) -> None:
    """Also below a file, which is reported as what it is, a place that cannot be written."""
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nosuch", tmp_path / "file"):
        check_only_files(folder, ["a", "b"])
        check_subfolder(folder / "a", may_be_link=False)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b", tmp_path / ("long" * 100) / "a"):
        with pytest.raises(InputError, match="expected a folder that can be written at"):
            check_writable(folder)
        with pytest.raises(InputError, match="expected a folder that can be written at"):
            make_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (errno.ENOSPC, "free space there or name another folder"),
        (errno.EDQUOT, "free space there or name another folder"),
        (errno.EACCES, "name another folder or change its permissions"),
        (errno.EROFS, "name another folder or change its permissions"),
    ],
)
def test_the_remedy_is_that_of_the_error(tmp_path: Path, error: int, remedy: str) -> None:
    line = f"expected a folder that can be written at {tmp_path}, got {os.strerror(error)}; {remedy}"
    assert str(unwritable(tmp_path, OSError(error, os.strerror(error)))) == line


def test_the_folders_that_are_missing(tmp_path: Path) -> None:
    assert missing_folders(tmp_path) == []
    assert missing_folders(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
