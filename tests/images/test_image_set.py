"""Sets of images: layouts of folders, what is held out, the cache, and what is refused."""

import os
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import InputError
from pipeline.images import folder as folder_module
from pipeline.images import glyph_drawing, torchvision_sets
from pipeline.images.holdout import by_hash, held_out
from pipeline.images.image_set import IMAGE_SOURCES, ImageSet, ImageSplit, open_images
from pipeline.images.preprocessing import Preprocessing, read_image, to_float

from ..support import ROOT

WIDTH, HEIGHT = 6, 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CODEGRID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "images"


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def fill(folder: Path, names: list[str], mode: str = "RGB") -> None:
    for i, name in enumerate(names):
        draw(folder / name, i, mode=mode)


def names_of(images: ImageSet) -> list[str]:
    return sorted([*images.train.names, *images.test.names])


def refuse_to_read(*_: object) -> None:
    raise AssertionError("an image was read a second time")


# What a set holds


def test_a_flat_folder_has_no_labels(folder: Path) -> None:
    fill(folder, [f"{i}.png" for i in range(10)])
    images = open_images(str(folder))
    assert images.class_names == ()
    assert set(images.train.labels) | set(images.test.labels) == {-1}
    assert names_of(images) == [f"{i}.png" for i in range(10)]
    assert images.preprocessing == Preprocessing(height=HEIGHT, width=WIDTH, channels=3)
    assert (images.source, images.data_root, images.broken) == (str(folder), None, ())


def test_every_row_is_its_own_file_prepared(folder: Path) -> None:
    """One gather of the cache against the transform of each file, with its label by the name."""
    fill(folder, [f"{name}/{i}.png" for name in ("b", "a", "c") for i in range(8)])
    images = open_images(str(folder), image_size=(5, 8), channels=1)
    for split in (images.train, images.test):
        indices = np.random.default_rng(0).permutation(len(split))
        expected = [read_image(folder / split.names[i], images.preprocessing) for i in indices]
        batch = split.batch(indices)
        assert torch.equal(batch, to_float(torch.from_numpy(np.stack(expected))))
        assert torch.equal(batch, split.batch(torch.from_numpy(indices)))
        assert [images.class_names[label] for label in split.labels] == [name[0] for name in split.names]
        assert split.labels.dtype == np.int64
    assert batch.shape == (len(images.test), 1, 5, 8)
    assert isinstance(images.train.images, np.memmap)


def test_classes_are_in_code_point_order_and_hold_what_is_deeper(folder: Path) -> None:
    fill(folder, ["b/1.png", "a/deep/er/1.png", "Z/1.png", "ä b/1.png", "a/2.png"])
    images = open_images(str(folder))
    assert images.class_names == ("Z", "a", "b", "ä b")
    labels = dict(
        zip([*images.train.names, *images.test.names], [*images.train.labels, *images.test.labels], strict=True)
    )
    assert labels == {"Z/1.png": 0, "a/2.png": 1, "a/deep/er/1.png": 1, "b/1.png": 2, "ä b/1.png": 3}


@pytest.mark.parametrize("labelled", [False, True])
def test_train_and_test_folders_are_the_splits(folder: Path, labelled: bool) -> None:
    inner = ["dog/", "cat/"] if labelled else ["", ""]
    fill(folder, [f"train/{inner[i % 2]}{i}.png" for i in range(4)] + [f"test/{inner[0]}9.png"])
    images = open_images(str(folder))
    assert images.class_names == (("cat", "dog") if labelled else ())
    assert all(name.startswith("train/") for name in images.train.names)
    assert images.test.names == (f"test/{inner[0]}9.png",)
    assert images.test.labels.tolist() == ([1] if labelled else [-1])
    assert images.train.labels.tolist() == ([0, 0, 1, 1] if labelled else [-1] * 4)


def test_a_train_folder_alone_is_split_too(folder: Path) -> None:
    fill(folder, [f"train/{name}/{i}.png" for name in "ab" for i in range(5)])
    images = open_images(str(folder))
    assert images.class_names == ("a", "b")
    assert len(images.test) >= 1
    assert len(images.train) + len(images.test) == 10


def test_what_is_not_an_image_is_ignored(folder: Path) -> None:
    fill(folder, ["1.PNG", "2.jpeg"])
    fill(folder, [".hidden.png", ".git/3.png", "__MACOSX/4.png"])
    (folder / "notes.txt").write_text("no image")
    (folder / "empty").mkdir()
    (folder / "named.png").mkdir()
    assert names_of(open_images(str(folder))) == ["1.PNG", "2.jpeg"]


def test_names_are_the_same_in_either_unicode_form(tmp_path: Path) -> None:
    """macOS may decompose what Linux and Windows keep composed."""
    found = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        fill(folder, [unicodedata.normalize(form, f"café {i}/Ö{i}.png") for i in range(12)])
        images = open_images(str(folder))
        found.append((images.class_names, images.train.names, images.test.names))
    assert found[0] == found[1]
    assert found[0][0][0] == "café 0"


def test_links_to_folders_are_followed_but_not_in_a_circle(folder: Path, tmp_path: Path) -> None:
    fill(folder, ["a/1.png"])
    draw(tmp_path / "elsewhere" / "2.png")
    try:
        os.symlink(tmp_path / "elsewhere", folder / "b", target_is_directory=True)
        os.symlink(folder, folder / "a" / "up", target_is_directory=True)
    except OSError:
        pytest.skip("this system lets no user make links")
    assert names_of(open_images(str(folder))) == ["a/1.png", "b/2.png"]


# Which images are held out


def test_the_test_split_depends_on_the_names_only(folder: Path, tmp_path: Path) -> None:
    names = [f"{i:03d}.png" for i in range(60)]
    fill(folder, names)
    before = open_images(str(folder))
    fill(tmp_path / "other", [*reversed(names), "zz.png", "aa.png"])
    after = open_images(str(tmp_path / "other"))
    assert set(before.test.names) == set(after.test.names) - {"zz.png", "aa.png"}
    assert 1 <= len(before.test) < 20


def test_held_out_names_are_about_the_fraction_and_independent_of_the_test_split() -> None:
    names = [f"train/{i:05d}" for i in range(20_000)]
    chosen = held_out(names)
    assert chosen.dtype == bool
    for tenth in np.split(chosen, 10):  # evenly over sequential names: 5 standard deviations are 2.5 %
        assert 0.025 < tenth.mean() < 0.075
    in_test = by_hash(names, 0.1, "test")
    assert abs(in_test[chosen].mean() - 0.1) < 0.05
    assert 0.19 < held_out(names, 0.2).mean() < 0.21


def test_held_out_is_the_same_for_every_order_and_system() -> None:
    names = [f"é/{i}.png" for i in range(200)]
    chosen = {name for name, out in zip(names, held_out(names), strict=True) if out}
    backwards = names[::-1]
    assert chosen == {name for name, out in zip(backwards, held_out(backwards), strict=True) if out}
    elsewhere = [unicodedata.normalize("NFD", name).replace("/", "\\") for name in names]
    np.testing.assert_array_equal(held_out(elsewhere), held_out(names))
    assert np.flatnonzero(held_out(names)).tolist() == [22, 33, 53, 109, 127, 128, 146, 164, 170, 187]  # for ever


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_a_tiny_set_holds_out_exactly_one_image(folder: Path, count: int) -> None:
    fill(folder, [f"{i}.png" for i in range(count)])
    images = open_images(str(folder))
    assert len(images.train) >= 1
    assert len(images.test) >= 1
    for fraction in (1e-9, 1 - 1e-9):
        assert held_out([f"{i}" for i in range(count)], fraction).sum() == 1


def test_a_single_image_is_trained_on(folder: Path) -> None:
    fill(folder, ["1.png"])
    images = open_images(str(folder))
    assert (len(images.train), len(images.test)) == (1, 0)
    assert held_out(images.train.names).tolist() == [False]
    assert images.test.images.shape == (0, 3, HEIGHT, WIDTH)


# Size and channels


def test_the_size_all_images_share_is_kept_and_lowered_to_the_multiple(folder: Path) -> None:
    fill(folder, ["1.png", "2.png"])
    assert open_images(str(folder), multiple_of=4).train.images.shape[1:] == (3, 4, 4)
    assert open_images(str(folder), multiple_of=16).train.images.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("sizes", [[(6, 4), (4, 6)], [(130, 4)] * 2])
def test_other_folders_become_64_by_64(folder: Path, sizes: list[tuple[int, int]]) -> None:
    for i, size in enumerate(sizes):
        draw(folder / f"{i}.png", size=size)
    assert open_images(str(folder)).train.images.shape[1:] == (3, 64, 64)


def test_grey_stays_one_channel_unless_another_number_is_requested_or_one_image_has_colour(folder: Path) -> None:
    fill(folder, ["1.png", "2.png"], mode="L")
    assert open_images(str(folder)).preprocessing.channels == 1
    assert open_images(str(folder), channels=3).preprocessing.channels == 3
    draw(folder / "3.png")
    assert open_images(str(folder)).preprocessing.channels == 3


@pytest.mark.parametrize(
    ("requested", "nearest"), [((30, 30), "32x32"), ((33, 50), "32x48"), ((1, 32), "8x32"), ((28, 27), "32x24")]
)
def test_a_size_that_is_no_multiple_is_refused_with_the_nearest(
    folder: Path, requested: tuple[int, int], nearest: str
) -> None:
    fill(folder, ["1.png", "2.png"])
    with pytest.raises(InputError, match=f"multiples of 8, got {requested[0]}x{requested[1]}; use {nearest}, "):
        open_images(str(folder), image_size=requested, multiple_of=8)


# The cache


def test_images_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder, [f"a/{i}.png" for i in range(5)])
    first = open_images(str(folder))
    size = (first.preprocessing.height, first.preprocessing.width)
    monkeypatch.setattr(folder_module, "read_image", refuse_to_read)
    monkeypatch.setattr(Image, "open", refuse_to_read)
    for reopened in (open_images(str(folder)), open_images(str(folder), image_size=size, channels=3)):
        np.testing.assert_array_equal(reopened.train.images, first.train.images)
        assert (reopened.train.names, reopened.class_names) == (first.train.names, first.class_names)
        np.testing.assert_array_equal(reopened.train.labels, first.train.labels)


def test_a_changed_file_a_new_one_and_another_size_are_read(folder: Path) -> None:
    fill(folder, [f"{i}.png" for i in range(5)])
    first = open_images(str(folder))
    row = 0
    draw(folder / first.train.names[row], seed=99)
    os.utime(folder / first.train.names[row], ns=(0, 10**18))
    changed = open_images(str(folder))
    same = [np.array_equal(a, b) for a, b in zip(first.train.images, changed.train.images, strict=True)]
    assert same == [i != row for i in range(len(same))]
    draw(folder / "new.png")
    assert "new.png" in names_of(open_images(str(folder)))
    assert open_images(str(folder), image_size=(2, 3)).train.images.shape[1:] == (3, 2, 3)


# Broken files


def test_a_broken_file_is_named_and_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(folder, [f"{i:02d}.png" for i in range(30)])
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:-30])  # cut short
    (folder / "08.png").write_bytes(b"no image")
    (folder / "09.png").write_bytes(b"")
    for _ in range(2):  # read, and from the cache
        caplog.clear()
        images = open_images(str(folder))
        assert set(images.broken) == {"07.png", "08.png", "09.png"}
        assert names_of(images) == [f"{i:02d}.png" for i in range(30) if i not in (7, 8, 9)]
        assert [record.getMessage().split(": ")[1].split()[-1] for record in caplog.records] == list(images.broken)
        assert "skipped the broken image 08.png: not an image Pillow can read" in caplog.text
    for split in (images.train, images.test):
        for i, name in enumerate(split.names):
            np.testing.assert_array_equal(split.images[i], read_image(folder / name, images.preprocessing))


def test_more_than_one_broken_file_in_ten_is_refused(folder: Path) -> None:
    fill(folder, [f"{i:02d}.png" for i in range(20)])
    for i in range(3):
        (folder / f"{i:02d}.png").write_bytes(b"no image")
    for size in (None, (4, 6)):  # found when the headers are read, and when the images are
        with pytest.raises(InputError, match=r"at most 1 broken file in 10, got 3 broken of 20: .*02.png; repair"):
            open_images(str(folder), image_size=size, channels=3)


def test_a_folder_with_nothing_but_broken_files_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 broken of 1: 1.png"):
        open_images(str(folder))


def test_a_picture_too_large_to_be_true_is_broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder, [f"{i}.png" for i in range(10)])
    draw(folder / "bomb.png", size=(60, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_images(str(folder)).broken == ("bomb.png",)


# What is refused


@pytest.mark.parametrize("source", ["no-such-source", "", "MNIST"])
def test_an_unknown_source_lists_the_known_ones(source: str) -> None:
    with pytest.raises(InputError, match=f"glyphs, mnist, fashion-mnist.*got '{source}', which is neither; "):
        open_images(source)


def test_an_empty_folder_and_a_file_are_refused(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(InputError, match=r"expected images .* got none; "):
        open_images(str(folder))
    draw(folder / "1.png")
    with pytest.raises(InputError, match="expected a folder that can be read"):
        open_images(str(folder / "1.png"))


def test_images_beside_classes_are_refused(folder: Path) -> None:
    fill(folder, ["1.png", "cats/2.png"])
    with pytest.raises(InputError, match="images beside the subfolder cats; move"):
        open_images(str(folder))


def test_a_class_in_test_only_is_refused(folder: Path) -> None:
    fill(folder, ["train/a/1.png", "test/a/2.png", "test/b/3.png"])
    with pytest.raises(InputError, match="no class in test/ that is not in train/, got b; "):
        open_images(str(folder))


def test_a_data_root_acts_or_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"expected a data root only with one of mnist.*omit --data-root"):
        open_images("glyphs", data_root=str(folder))


# Named sets


def test_glyphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyph_drawing, "TRAIN_COUNT", 48)
    monkeypatch.setattr(glyph_drawing, "TEST_COUNT", 16)
    images = open_images("glyphs")
    expected, labels = glyph_drawing.draw_glyphs(64)
    np.testing.assert_array_equal(np.concatenate([images.train.images, images.test.images]), expected)
    np.testing.assert_array_equal(np.concatenate([images.train.labels, images.test.labels]), labels)
    assert (images.source, images.class_names) == ("glyphs", tuple("0123456789ABCDEF"))
    assert images.train.names[:2] == ("train/00000", "train/00001")
    large = open_images("glyphs", image_size=(40, 48), channels=1)
    assert large.train.images.shape == (48, 1, 40, 48)
    monkeypatch.setattr(glyph_drawing, "draw_glyphs", refuse_to_read)
    assert len(open_images("glyphs").train) == 48


def write_mnist(root: Path, split: str, count: int) -> np.ndarray:
    """Write files as torchvision expects them; return the images. The label of image i is i modulo 10."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, count, 28, 28) + pixels.tobytes())
    labels = (np.arange(count) % 10).astype(np.uint8)
    (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels.tobytes())
    return pixels


def test_a_torchvision_set_that_is_there_is_read_without_a_network(tmp_path: Path) -> None:
    train, test = write_mnist(tmp_path, "train", 12), write_mnist(tmp_path, "t10k", 3)
    images = open_images("mnist", data_root=str(tmp_path))
    np.testing.assert_array_equal(images.train.images[:, 0], train)
    np.testing.assert_array_equal(images.test.images[:, 0], test)
    assert images.train.labels.tolist() == [*range(10), 0, 1]
    assert images.class_names == tuple("0123456789")
    assert (images.source, images.data_root) == ("mnist", str(tmp_path))
    assert open_images("mnist", data_root=str(tmp_path), multiple_of=8).preprocessing.height == 24


def test_a_torchvision_set_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    def unreachable(_: CIFAR10) -> None:
        raise URLError("no route\nto host")

    monkeypatch.setattr(CIFAR10, "download", unreachable)
    with pytest.raises(InputError, match=r"expected cifar10 in .* or a network .*no route to host.*; connect"):
        open_images("cifar10")


def test_svhn_without_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torchvision_sets, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"expected scipy, .*; run `pip install \"codegrid\[svhn\]\"`$"):
        open_images("svhn", data_root=str(tmp_path))


def test_the_known_names() -> None:
    assert IMAGE_SOURCES == ("glyphs", "mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100", "svhn")


def test_a_batch_takes_rows_in_any_order_and_more_than_once() -> None:
    images = np.arange(10 * 3 * 2 * 4, dtype=np.uint8).reshape(10, 3, 2, 4)
    split = ImageSplit(images, np.arange(10), tuple("abcdefghij"))
    assert torch.equal(split.batch(np.array([5, 7, 5])), torch.from_numpy(images[[5, 7, 5]] / np.float32(255)))


def test_importing_the_image_set_is_cheap() -> None:
    code = "import sys, pipeline.images.image_set; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_batch_in_8_bits_is_the_rows_and_as_floats_the_batch() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 4, 5)).astype(np.uint8)
    split = ImageSplit(images, np.zeros(9, dtype=np.int64), tuple("abcdefghi"))
    for indices in (np.array([5, 7, 5]), torch.tensor([5, 7, 5])):
        batch = split.batch_uint8(indices)
        assert batch.dtype == torch.uint8
        assert torch.equal(batch, torch.from_numpy(images[[5, 7, 5]]))
        assert torch.equal(to_float(batch), split.batch(indices))
    batch.fill_(0)
    assert images[5].any()  # a copy
