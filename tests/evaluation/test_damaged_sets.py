"""Every number about pictures moves the right way on sets that are damaged in known ways.

The judges are of seed 0, but rounding may lead another processor to other weights: the margins are such that judges of
seeds 0 to 11 pass.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.evaluation.comparison import Comparison
from pipeline.evaluation.judge import Seen, TrainedJudge
from pipeline.evaluation.judge_cache import open_judge
from pipeline.evaluation.nearest_picture import NearestTraining
from pipeline.evaluation.picture_numbers import PictureNumbers, picture_numbers
from pipeline.images.image_set import ImageSet

from .judged_sets import blurred, draw, figures, quick_judges, with_shuffled_codes

N = 300


class World:
    """A set of images, its judge, and the numbers of any pictures against N of its training images."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.images: ImageSet = figures(class_names=class_names)
        self.comparison = Comparison.of(self.images, N, seed=0)
        self.judge: TrainedJudge = open_judge(self.images, self.comparison.class_names, "cpu")
        self.reference = self.see(self.comparison.training_images().images.numpy())
        test = self.comparison.test_images()
        self.test, self.labels = test.images.numpy(), self.images.test.labels[self.comparison.test_rows]
        self.floor = self.numbers(self.test)

    def see(self, pictures: np.ndarray) -> Seen:
        return self.judge.look(pictures)

    def numbers(self, pictures: np.ndarray, labels: np.ndarray | None = None) -> PictureNumbers:
        known = (self.labels if labels is None else labels) if self.comparison.class_names else None
        return picture_numbers(self.reference, self.see(pictures), known)

    def nearest(self, pictures: np.ndarray) -> NearestTraining:
        training = self.see(self.images.train.images).directions
        return NearestTraining.of(self.comparison.test_images().images, self.see(pictures).directions, training)


@pytest.fixture(scope="module", params=["classifier", "autoencoder"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with quick_judges(2_000):
        yield World(("bar", "cross", "ring") if request.param == "classifier" else ())


def is_farther(one: PictureNumbers, other: PictureNumbers) -> bool:
    """Return whether all three distances of `one` are clearly above those of `other`."""
    pairs = [(one.own.fd, other.own.fd), (one.own.kid, abs(other.own.kid)), (one.own.mind, other.own.mind)]
    return all(far > 1.2 * near for far, near in pairs)


def test_the_floor_is_near_what_one_distribution_has(world: World) -> None:
    own = world.floor.own
    assert own.precision > 0.85
    assert own.recall > 0.85
    assert own.density == pytest.approx(1, abs=0.25)
    assert own.coverage == pytest.approx(1 - 2**-5, abs=0.06)
    if world.comparison.class_names:
        assert world.floor.class_accuracy is not None
        assert world.floor.class_accuracy > 0.85
    else:
        assert world.floor.class_accuracy is None


def test_blur_moves_every_number_and_more_blur_moves_it_further(world: World) -> None:
    share = 0.5 if world.comparison.class_names else 1.0  # a classifier is nearly as far from all of the least blur
    little, much = world.numbers(blurred(world.test, 3, share)), world.numbers(blurred(world.test, 7))
    assert is_farther(little, world.floor)
    assert is_farther(much, little)
    assert much.own.recall < world.floor.own.recall - 0.2
    assert much.own.coverage < world.floor.own.coverage - 0.15
    if world.floor.class_accuracy is not None:  # an autoencoder may find blurred images among plain ones
        assert much.own.precision < world.floor.own.precision - 0.1
        assert much.own.density < world.floor.own.density - 0.5
        assert much.class_accuracy is not None
        assert much.class_accuracy < world.floor.class_accuracy - 0.3


def test_shuffled_codes_are_far_away_and_not_recognised(world: World) -> None:
    shuffled = world.numbers(with_shuffled_codes(world.test))
    assert is_farther(shuffled, world.floor)
    assert shuffled.own.coverage < world.floor.own.coverage - 0.05
    assert shuffled.own.precision < world.floor.own.precision - 0.02
    if world.floor.class_accuracy is not None:
        assert shuffled.own.precision < world.floor.own.precision - 0.1
        assert shuffled.class_accuracy is not None
        assert shuffled.class_accuracy < world.floor.class_accuracy - 0.2


def test_one_class_alone_is_precise_but_covers_little(world: World) -> None:
    labels = np.zeros(N, np.int64)
    alone = world.numbers(draw(labels, seed=2), labels)
    assert is_farther(alone, world.floor)
    assert alone.own.precision > world.floor.own.precision - 0.1
    assert alone.own.coverage < world.floor.own.coverage
    if world.floor.class_accuracy is not None:  # an autoencoder sees mainly where and how bright the figure is
        assert alone.own.recall < world.floor.own.recall - 0.2
        assert alone.own.coverage < world.floor.own.coverage - 0.3
        assert alone.class_accuracy is not None
        assert alone.class_accuracy > 0.8


def test_copies_of_training_images_are_nearer_than_real_test_images_can_be(world: World) -> None:
    copies = world.comparison.training_images().images.numpy()
    numbers = world.numbers(copies, world.images.train.labels[world.comparison.train_rows])
    assert numbers.own.fd == pytest.approx(0, abs=1e-6)
    assert numbers.own.fd < world.floor.own.fd
    assert numbers.own.mind == pytest.approx(0, abs=1e-9)
    assert numbers.own.kid < 0
    assert (numbers.own.precision, numbers.own.recall, numbers.own.coverage) == (1, 1, 1)
    assert world.nearest(copies).median == 0
    assert (world.nearest(copies).rows == world.comparison.train_rows).mean() > 0.99
    assert world.nearest(world.test).median > 0


def test_half_copies_show_in_the_distances_to_the_nearest_training_image(world: World) -> None:
    pictures = world.test.copy()
    pictures[::2] = world.comparison.training_images().images.numpy()[::2]
    found = world.nearest(pictures)
    assert (found.distances[::2] == 0).all()
    assert (found.distances[1::2] > 0).all()
