"""Odd things in a folder of images: each is named or ignored, and none stops or hangs the rest."""

import errno
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.images import folder as folder_module
from pipeline.images.image_set import ImageSet, open_images
from pipeline.images.preprocessing import read_image

from ..support import ROOT
from .test_image_set import draw, fill, names_of

NAMES = [f"{i:02d}.png" for i in range(30)]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no links, pipes or names of any bytes for every user")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEGRID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path / "images", NAMES)
    return tmp_path / "images"


def opened_twice(folder: Path) -> ImageSet:
    """Return the images, checked to be the same from the cache and without reading the headers."""
    images = open_images(str(folder))
    for again in (open_images(str(folder)), open_images(str(folder), image_size=(4, 6), channels=3)):
        assert (names_of(again), again.class_names, again.broken) == (
            names_of(images),
            images.class_names,
            images.broken,
        )
    return images


# What is named like an image, and is no file


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its path may be too long for the address of a socket
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def a_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        pytest.skip("only root makes devices")


def two_links(path: Path) -> None:
    path.symlink_to("second")
    (path.parent / "second").symlink_to(path.name)


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link to itself": (lambda path: path.symlink_to(path.name), "a link in a circle"),
    "two links that name each other": (two_links, "a link in a circle"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "no such file, or a link to none"),
    "a pipe": (os.mkfifo, "a pipe in place of a file"),
    "a socket": (a_socket, "a socket in place of a file"),
    "a device": (a_device, "a device in place of a file"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "a device in place of a file"),
}


@pytest.mark.parametrize("odd", ODD)
def test_it_is_named_as_broken_and_never_opened(
    odd: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = ODD[odd]
    make(folder / "odd.png")
    read = folder_module.read_or_broken
    monkeypatch.setattr(folder_module, "read_or_broken", lambda path, decode: _not_odd(path) and read(path, decode))
    images = opened_twice(folder)
    assert (names_of(images), images.broken) == (NAMES, ("odd.png",))
    assert caplog.messages == [f"Warning: skipped the broken image odd.png: {reason}"] * 3


def _not_odd(path: str) -> bool:
    assert not path.endswith("odd.png")
    return True


@pytest.mark.parametrize("odd", ODD)
def test_without_the_name_of_an_image_it_is_ignored(odd: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ODD[odd][0](folder / "odd")
    images = opened_twice(folder)
    assert (names_of(images), images.broken, caplog.messages) == (NAMES, (), [])


def test_beside_classes_it_is_no_image_without_a_class(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    fill(folder, [f"{name}/{i}.png" for name in "ab" for i in range(10)])
    (folder / "odd.png").symlink_to("nowhere")
    images = opened_twice(folder)
    assert (images.class_names, images.broken) == (("a", "b"), ("odd.png",))


def test_it_counts_as_broken(folder: Path) -> None:
    for i in range(4):
        (folder / f"odd{i}.png").symlink_to("nowhere")
    for size in (None, (4, 6)):
        with pytest.raises(InputError, match=r"got 4 broken of 34: odd0.png, odd1.png, odd2.png, odd3.png; "):
            open_images(str(folder), image_size=size, channels=3)


def test_nothing_but_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "odd.png").symlink_to("nowhere")
    for size in (None, (4, 6)):
        with pytest.raises(InputError, match=r"got 1 broken of 1: odd.png; "):
            open_images(str(tmp_path / "images"), image_size=size, channels=3)


def test_a_link_that_is_mended_is_read(folder: Path) -> None:
    (folder / "odd.png").symlink_to("../later.png")
    assert open_images(str(folder)).broken == ("odd.png",)
    draw(folder.parent / "later.png")
    images = opened_twice(folder)
    assert (names_of(images), images.broken) == ([*NAMES, "odd.png"], ())


# Permissions; the tests may run as root, who has all of them


def test_a_file_that_may_not_be_read_is_broken_until_it_may(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: not path.endswith("07.png"))
        assert opened_twice(folder).broken == ("07.png",)
    assert opened_twice(folder).broken == ()


def test_a_folder_that_may_not_be_read_is_skipped_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw(folder / "closed" / "1.png")
    fail_to_list(monkeypatch, folder / "closed", errno.EACCES)
    assert names_of(open_images(str(folder))) == NAMES
    assert caplog.messages == [f"Warning: skipped the folder {folder / 'closed'}: no permission to read it"]


def test_a_folder_that_cannot_be_read_at_the_moment_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images would be missing for a reason that passes."""
    draw(folder / "mount" / "1.png")
    fail_to_list(monkeypatch, folder / "mount", errno.ESTALE)
    with pytest.raises(InputError, match="mount"):
        open_images(str(folder))


def fail_to_list(patch: pytest.MonkeyPatch, victim: Path, number: int) -> None:
    """Let the system be unable to list the folder `victim`."""
    real = os.scandir

    def failing(path: str) -> object:
        if os.fspath(path) == str(victim):
            raise OSError(number, os.strerror(number), str(victim))
        return real(path)

    patch.setattr(os, "scandir", failing)


# Links to folders


def test_a_link_to_a_folder_above_leads_in_a_circle(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(folder.parent / "foreign.png")
    for name, target in {"here": ".", "above": "..", "root": "/"}.items():
        (folder / name).symlink_to(target, target_is_directory=True)
    images = opened_twice(folder)
    assert (names_of(images), caplog.messages) == (NAMES, [])


def test_folders_that_link_to_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    fill(folder, ["a/1.png", "b/2.png"])
    (folder / "a" / "b").symlink_to("../b", target_is_directory=True)
    (folder / "b" / "a").symlink_to("../a", target_is_directory=True)
    assert names_of(opened_twice(folder)) == ["a/1.png", "a/b/2.png", "b/2.png", "b/a/1.png"]


def test_links_in_more_ways_than_anybody_can_list_are_refused(tmp_path: Path) -> None:
    """12 folders that link to all others: 12! paths without a circle."""
    folder = tmp_path / "images"
    for i in range(12):
        draw(folder / str(i) / "1.png")
        for j in range(12):
            (folder / str(i) / f"to{j}").symlink_to(f"../{j}", target_is_directory=True)
    with pytest.raises(InputError, match=r"more than 100 paths that lead to .*; remove some of the links"):
        open_images(str(folder))


def test_more_folders_in_each_other_than_python_has_frames(folder: Path) -> None:
    here, depth = os.getcwd(), sys.getrecursionlimit() + 100
    os.chdir(folder)
    try:
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        draw(Path("1.png"))
        with pytest.raises(InputError, match="images beside the subfolder d;"):
            open_images(str(folder))
    finally:
        os.unlink("1.png")
        for _ in range(depth):  # because `shutil.rmtree` needs a frame for each
            os.chdir("..")
            os.rmdir("d")
        os.chdir(here)


# Names


ODD_NAMES = [
    "\udcff\udcfe.png",  # bytes that are not UTF-8
    "caf\udce9.png",  # Latin-1
    "a\nb.png",
    "a\r\x1b[31m\x07.png",
    "\u202egnp.png",  # reversed by a terminal
    "\x7f\x9b.png",
    "back\\slash.png",
    '"quoted".png',
    "'; rm -rf ~.png",
    " .png",
    "%s{0}.png",
    "\U0001f600.png",
]


@pytest.mark.parametrize("as_class", [False, True])
def test_names_of_any_characters(as_class: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "images \udcff\n"
    names = [name.replace(".png", "/1.png") if as_class else name for name in ODD_NAMES]
    try:
        fill(folder, names)
    except (OSError, UnicodeError):
        pytest.skip("a file system that has no such names")
    images = opened_twice(folder)
    assert names_of(images) == sorted(names)
    assert images.class_names == (tuple(sorted(name.removesuffix(".png") for name in ODD_NAMES)) if as_class else ())
    for split in (images.train, images.test):
        for i, name in enumerate(split.names):
            np.testing.assert_array_equal(split.images[i], read_image(folder / name, images.preprocessing))
    assert caplog.messages == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_broken_image_of_such_a_name(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    try:
        (folder / name).write_bytes(b"no image")
    except (OSError, UnicodeError):
        pytest.skip("a file system that has no such names")
    assert opened_twice(folder).broken == (name,)
    assert caplog.messages == [f"Warning: skipped the broken image {name}: not an image Pillow can read"] * 3


def test_a_pipe_ends_no_command_in_silence(folder: Path) -> None:
    """In a process of its own, which a pipe that is opened would hold for ever."""
    os.mkfifo(folder / "odd.png")
    code = "import sys; from pipeline.images.image_set import open_images; print(open_images(sys.argv[1]).broken)"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "('odd.png',)\n"
