"""A folder of numbered PNGs: whatever fails while it is written, it holds what its record says, or nothing."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.images.png_folder import MOST_IMAGES, ImageFolder, is_count, read_record, written_count
from pipeline.runtime.output_paths import OutputFiles

from ..disks import disk_of, failing_writes, full_disk_line

N = 5
FILES = OutputFiles(record="r.json", numbered="images/{:05d}.png", indices=range(3, 3 + N), others=frozenset({"codes"}))


def record(finished: int) -> bytes:
    return json.dumps({"finished": finished, "labels": ["of an image"] * finished}).encode()


def images() -> list[Tensor]:
    """Pictures that no compression makes smaller."""
    return list(torch.randint(256, (N, 1, 4, 6), generator=torch.Generator().manual_seed(0)).byte())


def write(folder: Path, other_bytes: int = 0) -> None:
    """Write all images, and with the finished ones 100 bytes for each, whatever happens."""
    with ImageFolder(folder, FILES, [], record, other_bytes=other_bytes) as opened:
        try:
            opened.add(images())
        finally:
            if opened.written:
                opened.close(opened.written, {"codes": b"." * 100 * opened.written})


def check(folder: Path) -> int:
    """Assert that the folder holds what its record says, or does not exist; return how many images it holds."""
    if not folder.exists():
        return 0
    finished = json.loads((folder / "r.json").read_bytes())["finished"]
    names = {f"images/{index:05d}.png" for index in range(3, 3 + finished)} | {"r.json", "codes"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == names
    assert (folder / "codes").stat().st_size == 100 * finished
    assert finished > 0
    return int(finished)


@pytest.mark.parametrize("count", [1, 10**6], ids=["once", "from then on"])
def test_a_write_that_fails(tmp_path: Path, count: int) -> None:
    """Each of them; if only one fails, the images before it are kept."""
    kept = []
    for first in itertools.count():
        with failing_writes(first, count) as writes:
            refused = full_disk_line(lambda: write(tmp_path / "deep" / "out"))
        assert refused == (first < len(writes))
        if not refused:
            break
        kept.append(check(tmp_path / "deep" / "out"))
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)
    # the record, the reserved space, five images, the other file, the record
    assert kept == ([0, 0, 0, 1, 2, 3, 4, 0, 0] if count == 1 else [0] * 9)
    assert check(tmp_path / "deep" / "out") == N


def test_on_a_disk_of_any_size_all_images_that_fit_are_kept(tmp_path: Path) -> None:
    """What is written after them has its space reserved, so no image is lost for it."""
    write(tmp_path / "out", other_bytes=100 * N)
    largest = max(path.stat().st_size for path in (tmp_path / "out" / "images").iterdir())
    everything = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    kept = []
    for size in range(0, everything + 200, 7):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with disk_of(tmp_path, size):
            refused = full_disk_line(lambda: write(tmp_path / "out", other_bytes=100 * N))
        kept.append(check(tmp_path / "out"))
        assert refused == (kept[-1] < N)
        reserved = len(record(0)) + len(record(N)) + 100 * N
        assert kept[-1] >= min(N, (size - reserved) // largest)
    assert kept == sorted(kept)
    assert set(kept) == set(range(N + 1))


@pytest.mark.parametrize("after", range(N + 1))
@pytest.mark.parametrize("again", [False, True], ids=["gone", "another in its place"])
def test_a_folder_that_vanishes(tmp_path: Path, after: int, again: bool) -> None:
    """Such as a network mount: no second folder is begun in its place, and what is there is not touched."""
    folder = tmp_path / "out"

    def vanishing() -> None:
        with ImageFolder(folder, FILES, [], record) as opened:
            opened.add(images()[:after])
            if after:
                folder.rename(tmp_path / "moved")
                if again:
                    folder.mkdir()
                    (folder / "notes.txt").touch()
            opened.add(images()[after:])
            opened.close(N)

    if after == 0:
        vanishing()
        return
    with pytest.raises(InputError, match=rf"expected {folder} with its r.json to be there until .*, got a folder that"):
        vanishing()
    assert [path.name for path in tmp_path.rglob("notes.txt")] == (["notes.txt"] if again else [])
    assert folder.exists() == again


def test_a_folder_that_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the write, and not that of the attempt to remove what was written."""

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", read_only)
    with (
        failing_writes(1),
        pytest.raises(InputError, match=r"to write .*out \([0-9,]+ bytes\), got No space left"),
    ):
        write(tmp_path / "out")


# Records


def test_a_record_is_a_small_object(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert read_record(path) is None
    for content in ("[]", "1", '"a"', "null", "{", "[" * 100_000, '{"a":' * 100_000, '{"n": ' + "9" * 100_000 + "}"):
        path.write_text(content)
        assert read_record(path) is None
    path.write_text('{"n": 1}')
    assert read_record(path) == {"n": 1}
    with open(path, "ab") as file:
        file.truncate(2**31)
    assert read_record(path) is None


@pytest.mark.skipif(os.name == "nt", reason="no named pipes")
def test_a_record_that_is_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.json")
    assert read_record(tmp_path / "r.json") is None


@pytest.mark.parametrize(
    ("finished", "n", "expected"),
    [
        *((0, 0, 0), (0, 3, 3), (2, 3, 2), (3, 3, 3), (4, 3, None), (-1, 3, None), (0, -1, None)),
        *((0, MOST_IMAGES, MOST_IMAGES), (0, MOST_IMAGES + 1, None), (0, 10**12, None), (1, 10**400, None)),
        *(("0", 3, None), (0, "3", None), (None, 3, None), (0, None, None), (0.0, 3, None), (0, 3.0, None)),
        *((True, 3, None), (False, True, None), ([], 3, None), ({}, {}, None), (float("nan"), 3, None)),
    ],
)
def test_how_many_images_a_run_may_have_written(finished: object, n: object, expected: int | None) -> None:
    assert written_count(finished, n) == expected


def test_what_is_a_number_of_images() -> None:
    assert [is_count(value) for value in (0, 1, MOST_IMAGES)] == [True] * 3
    assert [is_count(value) for value in (-5, MOST_IMAGES + 1, "1", True, 1.0, None)] == [False] * 6
