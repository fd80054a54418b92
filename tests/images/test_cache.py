"""A cache entry is complete or absent, is reused, and errors name the remedy."""

import os
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.images.cache import Broken, cache_folder, open_entry, read_images, write_images

SHAPE = (1, 2, 3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CODEGRID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def build(folder: Path) -> dict[str, Any]:
    write_images(folder / "train.npy", [np.full(SHAPE, 7, np.uint8)] * 3, 3, SHAPE)
    return {"answer": 42}


def refuse(folder: Path) -> dict[str, Any]:
    raise AssertionError(f"a second build in {folder}")


def test_an_entry_is_built_once() -> None:
    folder, index = open_entry({"a": 1}, build)
    reopened, same = open_entry({"a": 1}, refuse)
    assert (reopened, index["answer"], same["answer"]) == (folder, 42, 42)
    np.testing.assert_array_equal(read_images(folder / "train.npy", 3), np.full((3, *SHAPE), 7))


def test_another_request_is_another_entry() -> None:
    assert open_entry({"a": 1}, build)[0] != open_entry({"a": 2}, build)[0]


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_entry({}, fail)
    assert list(cache.iterdir()) == []


def test_what_a_killed_build_left_is_not_used_and_removed_when_old(cache: Path) -> None:
    old, young = cache / ".building-old", cache / ".building-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        build(folder)
    os.utime(old, (0, time.time() - 48 * 3600))
    folder, _ = open_entry({}, build)
    assert sorted(cache.iterdir()) == sorted([folder, young])


@pytest.mark.parametrize("damage", ["cut", "gone", "index"])
def test_a_damaged_entry_is_built_again(damage: str) -> None:
    folder, _ = open_entry({}, build)
    array = folder / "train.npy"
    if damage == "cut":
        array.write_bytes(array.read_bytes()[:-1])
    elif damage == "gone":
        array.unlink()
    else:
        (folder / "index.json").write_text("{")
    rebuilt, index = open_entry({}, build)
    assert (rebuilt, index["answer"]) == (folder, 42)
    assert (read_images(array, 3) == 7).all()


def test_the_entry_another_process_finished_first_is_kept() -> None:
    def slow(folder: Path) -> dict[str, Any]:
        open_entry({}, build)
        return {"answer": 0}

    assert open_entry({}, slow)[1]["answer"] == 42
    assert open_entry({}, refuse)[1]["answer"] == 42


def test_broken_images_leave_no_gap(tmp_path: Path) -> None:
    images = [np.full(SHAPE, 1, np.uint8), Broken("torn"), np.full(SHAPE, 3, np.uint8)]
    kept, broken = write_images(tmp_path / "a.npy", images, 3, SHAPE)
    assert (kept, broken) == ([0, 2], {1: "torn"})
    stored = read_images(tmp_path / "a.npy", 2)
    assert isinstance(stored, np.memmap)
    assert stored[:, 0, 0, 0].tolist() == [1, 3]


def test_an_empty_split(tmp_path: Path) -> None:
    assert write_images(tmp_path / "a.npy", [], 0, SHAPE) == ([], {})
    assert read_images(tmp_path / "a.npy", 0).shape == (0, *SHAPE)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CODEGRID_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"expected an image cache that can be written.*set CODEGRID_CACHE"):
        open_entry({}, build)


def test_a_full_disk_is_refused_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(InputError, match=r"MB free for the image cache.*CODEGRID_CACHE"):
        open_entry({}, build)


def test_the_folder_is_the_users_choice_or_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("CODEGRID_CACHE")
    assert cache_folder().is_absolute()
    assert "codegrid" in str(cache_folder())
