"""A set of images that a small judge learns in seconds, and the same set damaged in known ways.

Grey, 16 high and 24 wide: on a dark ground a figure of one of three classes, anywhere, with two thin lines of noise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation import judge_network, judge_training
from pipeline.images.image_set import ImageSet, ImageSplit
from pipeline.images.preprocessing import Preprocessing

HEIGHT, WIDTH, SIDE = 16, 24, 7
CLASSES = ("bar", "cross", "ring")


@contextmanager
def quick_judges(images_seen: int = 4000) -> Iterator[None]:
    """Make judges small, and their training short, for the duration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_network, "WIDTHS", (16, 16, 32))
        patch.setattr(judge_training, "BATCH", 32)
        patch.setattr(judge_training, "FEWEST_IMAGES", images_seen)
        patch.setattr(judge_training, "MOST_IMAGES", images_seen)
        yield


def figure(label: int) -> np.ndarray:
    """Return where the figure of a class is, bool [SIDE,SIDE]."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    return [abs(x) <= 1, (x == 0) | (y == 0), np.maximum(abs(x), abs(y)) == SIDE // 2][label]


def draw(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return an image of each of the classes `labels` [N]: uint8 [N,1,HEIGHT,WIDTH]."""
    random = np.random.default_rng(seed)
    images = np.empty((len(labels), 1, HEIGHT, WIDTH), np.uint8)
    for image, label in zip(images[:, 0], labels, strict=True):
        image[:] = random.integers(0, 90)
        for row in random.choice(HEIGHT, 2, replace=False):
            image[row] = random.integers(0, 110, WIDTH)
        top, left = random.integers(HEIGHT - SIDE + 1), random.integers(WIDTH - SIDE + 1)
        image[top : top + SIDE, left : left + SIDE][figure(label)] = random.integers(150, 256)
    return images


def figures(train: int = 600, test: int = 360, class_names: tuple[str, ...] = CLASSES) -> ImageSet:
    """Return a set of images in three classes, as many of each."""
    parts = []
    for seed, (name, count) in enumerate((("train", train), ("test", test))):
        labels = np.arange(count) % 3
        images = draw(labels, seed)
        known = labels if class_names else np.full(count, -1)
        parts.append(ImageSplit(images, known.astype(np.int64), tuple(f"{name}/{i}.png" for i in range(count))))
    form = Preprocessing(height=HEIGHT, width=WIDTH, channels=1)
    return ImageSet("figures", None, form, class_names, parts[0], parts[1], ())


def blurred(images: np.ndarray, size: int, share: float = 1.0) -> np.ndarray:
    """Return images mixed with this share of the mean of size x size pixels around each."""
    reach = size // 2
    padded = np.pad(images.astype(float), ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    shifted = [padded[:, :, y : y + HEIGHT, x : x + WIDTH] for y in range(size) for x in range(size)]
    return np.rint((1 - share) * images + share * np.mean(shifted, axis=0)).astype(np.uint8)


def with_shuffled_codes(images: np.ndarray, seed: int = 0, cell: int = 4) -> np.ndarray:
    """Return images whose cells of 4x4 pixels have changed places, in each image differently."""
    random = np.random.default_rng(seed)
    count, rows, columns = len(images), HEIGHT // cell, WIDTH // cell
    cells = images.reshape(count, rows, cell, columns, cell).transpose(0, 1, 3, 2, 4).reshape(count, -1, cell, cell)
    cells = np.stack([cells[i, random.permutation(rows * columns)] for i in range(count)])
    back = cells.reshape(count, rows, columns, cell, cell).transpose(0, 1, 3, 2, 4)
    return back.reshape(images.shape)


def folder_of(images: ImageSet, folder: Path) -> Path:
    """Write the set as PNGs, train/CLASS/NUMBER.png and test/..., and return the folder."""
    from PIL import Image

    for split in (images.train, images.test):
        for image, label, name in zip(split.images, split.labels, split.names, strict=True):
            part, file = name.split("/")
            path = folder / part / (images.class_names[label] if images.class_names else ".") / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(path)
    return folder
