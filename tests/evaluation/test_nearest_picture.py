"""The picture of the nearest training images: which pictures it shows, and what is below each."""

import numpy as np
import torch

from pipeline.evaluation.nearest_picture import SHOWN, NearestTraining, nearest_picture
from pipeline.images.captions import MOST_COLUMNS as COLUMNS
from pipeline.images.image_set import ImageSplit


def plain(greys: np.ndarray) -> np.ndarray:
    """Return images of one grey each, uint8 [n,1,2,3]."""
    return np.broadcast_to(greys.astype(np.uint8)[:, None, None, None], (len(greys), 1, 2, 3)).copy()


def rows_of_greys(picture: np.ndarray) -> list[list[int]]:
    """Return the greys of each line of pixels from left to right, without white and repetitions; each list once."""
    found: list[list[int]] = []
    for line in picture:
        changes = line[np.flatnonzero(np.diff(line, prepend=-1))]
        greys = [int(grey) for grey in changes if grey != 255]
        if greys and (not found or found[-1] != greys):
            found.append(greys)
    return found


def test_the_nearest_come_first_each_above_its_training_image() -> None:
    """20 samples and 3 test images, whose features and those of the 30 training images have one dimension."""
    random = np.random.default_rng(0)
    train = ImageSplit(plain(120 + np.arange(30)), np.full(30, -1), ("",) * 30)
    places = 10.0 * np.arange(30)[:, None]
    rows, distances = random.permutation(30)[:20], random.permutation(20) / 10
    samples = NearestTraining.of(torch.from_numpy(plain(np.arange(20))), places[rows] + distances[:, None], places)
    assert samples.rows.tolist() == rows.tolist()
    np.testing.assert_allclose(samples.distances, distances, atol=1e-12)
    assert samples.median == np.median(samples.distances)
    test = NearestTraining.of(torch.from_numpy(plain(np.array([60, 61, 62]))), places[[4, 2, 8]] - 1, places)

    picture = nearest_picture(samples, test, train)
    assert picture.mode == "RGB"
    found = rows_of_greys(np.asarray(picture.convert("L")).astype(int))
    order = np.argsort(distances)[:SHOWN]
    assert len(order) == 2 * COLUMNS
    first, second = order[:COLUMNS], order[COLUMNS:]
    expected = [first.tolist(), (120 + rows[first]).tolist(), second.tolist(), (120 + rows[second]).tolist()]
    expected += [[60, 61, 62], [124, 122, 128]]
    places_found = [found.index(each) for each in expected]
    assert places_found == sorted(places_found)


def test_the_median_is_that_of_all_pictures() -> None:
    found = NearestTraining(images=torch.zeros(3, 1, 2, 2), rows=np.zeros(3, int), distances=np.array([9.0, 0.0, 1.0]))
    assert found.median == 1
