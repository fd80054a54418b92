"""The built-in images: the same on every machine, balanced, well inside the frame, easy to see."""

import hashlib

import numpy as np
import pytest

from pipeline.images.glyph_drawing import CLASS_NAMES, NUM_CLASSES, draw_glyphs, draw_labels

DIGEST = "6ab1762651a1ff0bc6cd3dd0f508351226ffa7ca4caa654213c8d62f2c15a399"


def test_the_pixels_are_the_same_on_every_machine() -> None:
    """If this fails after a change of the drawing, set the digest and add one to `glyph_drawing.VERSION`."""
    images, labels = draw_glyphs(48, seed=0)
    assert labels[:8].tolist() == [3, 8, 2, 6, 15, 4, 10, 9]
    assert hashlib.sha256(images.tobytes()).hexdigest() == DIGEST


def test_an_image_depends_on_its_seed_and_index_only() -> None:
    images, labels = draw_glyphs(40, seed=5)
    subset, subset_labels = draw_glyphs(7, seed=5, start=21)
    np.testing.assert_array_equal(subset, images[21:28])
    np.testing.assert_array_equal(subset_labels, labels[21:28])
    np.testing.assert_array_equal(draw_labels(7, seed=5, start=21), subset_labels)


def test_another_seed_draws_other_images() -> None:
    first, second = draw_glyphs(8, seed=1), draw_glyphs(8, seed=2)
    assert not any(np.array_equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[1].tolist() != second[1].tolist()


def test_labels_are_balanced_and_shuffled() -> None:
    labels = draw_labels(10 * NUM_CLASSES, start=3 * NUM_CLASSES).reshape(10, NUM_CLASSES)
    assert labels.dtype == np.int64
    assert (np.sort(labels, axis=1) == np.arange(NUM_CLASSES)).all()
    assert len({tuple(block) for block in labels.tolist()}) == 10
    assert NUM_CLASSES == len(CLASS_NAMES) >= 10


@pytest.mark.parametrize("size", [20, 32, 48])
def test_shape_and_type(size: int) -> None:
    images, labels = draw_glyphs(3, size=size)
    assert (images.shape, images.dtype) == ((3, 3, size, size), np.uint8)
    assert labels.shape == (3,)


def test_each_is_large_inside_the_frame_and_in_contrast() -> None:
    images, _ = draw_glyphs(320)
    levels = images.astype(np.int64)
    corner = levels[:, :, :1, :1]
    ink = np.abs(levels - corner).max(axis=1) > 60  # [n, H, W]
    height = ink.any(axis=2).sum(axis=1) / images.shape[2]
    assert (height > 0.4).all()
    assert np.median(height) > 0.6
    border = np.concatenate([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]], axis=1)
    assert not border.any()
    assert (np.abs(levels - corner).max(axis=(1, 2, 3)) > 80).all()


def test_one_class_comes_in_many_looks() -> None:
    images, labels = draw_glyphs(64 * NUM_CLASSES)
    of_one = images[labels == 11].astype(np.int64)
    paper = of_one[:, :, 0, 0]
    assert len({tuple(colour) for colour in paper.tolist()}) > 32
    ink = np.abs(of_one - paper[:, :, None, None]).max(axis=1) > 60
    sizes = {(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in ink}
    places = {(int(mask.any(1).argmax()), int(mask.any(0).argmax())) for mask in ink}
    assert len(sizes) > 16
    assert len(places) > 16


def test_a_larger_size_draws_the_same_glyphs_finer() -> None:
    small, _ = draw_glyphs(16, size=32)
    large, _ = draw_glyphs(16, size=64)
    halved = large.reshape(16, 3, 32, 2, 32, 2).mean(axis=(3, 5))
    assert np.abs(halved - small).mean() < 3
