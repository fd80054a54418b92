"""What pictures are compared with: as many test and training images, chosen at random, and classes for the judge.

Whatever the images do not suffice for is said before a judge is trained.

Legend: N pictures of a kind, C channels, H W pixels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..images.image_set import ImageSet, ImageSplit
from ..models.labels import all_labelled
from ..runtime.schema import short
from .picture_numbers import FEWEST

JudgeKind = Literal["auto", "classifier", "autoencoder"]  # auto: a classifier where there are classes


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures, with what they should show."""

    images: Tensor  # uint8 [N,C,H,W]
    labels: np.ndarray | None  # int64 [N], the class that each should show; None if nobody knows


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """N test images and N training images to compare pictures with; the judge's classes."""

    images: ImageSet
    class_names: tuple[str, ...]  # that the judge tells apart; empty for an autoencoder
    train_rows: np.ndarray  # int64 [N], of the training images
    test_rows: np.ndarray  # int64 [N], of the test images

    @classmethod
    def of(cls, images: ImageSet, samples: int, seed: int, judge: JudgeKind = "auto") -> "Comparison":
        """Choose N images of both parts at random.

        Args:
            images: a set.
            samples: N.
            seed: of the choice.
            judge: the kind of judge.

        Raises:
            InputError: there are fewer than N images in a part, N is too small, or the classes cannot be told apart.
        """
        _check_count(images, samples)
        class_names = judge_classes(images, judge)
        random = np.random.default_rng(seed)
        train, test = (np.sort(random.permutation(len(split))[:samples]) for split in (images.train, images.test))
        return cls(images=images, class_names=class_names, train_rows=train, test_rows=test)

    def training_images(self) -> Pictures:
        """Return the training images that every set of pictures is compared with."""
        return self._pictures(self.images.train, self.train_rows)

    def test_images(self) -> Pictures:
        """Return the test images."""
        return self._pictures(self.images.test, self.test_rows)

    def _pictures(self, split: ImageSplit, rows: np.ndarray) -> Pictures:
        labels = split.labels[rows] if self.class_names else None
        return Pictures(images=torch.from_numpy(np.asarray(split.images[rows])), labels=labels)


def judge_classes(images: ImageSet, judge: JudgeKind) -> tuple[str, ...]:
    """Return the names of the classes that a judge of this kind tells apart, none for an autoencoder.

    Raises:
        InputError: a classifier is to be trained and there are no classes, there is one, or one has no training image.
    """
    names = images.class_names
    labelled = all_labelled(names, [split.labels for split in (images.train, images.test) if len(split)])
    if judge == "autoencoder" or (judge == "auto" and not labelled):
        return ()
    if not labelled:
        raise _unusable("two classes or more", "images without classes", images)
    if len(names) < 2:
        raise _unusable("two classes or more, or none", f"one, {short(names[0])}", images)
    counts = np.bincount(images.train.labels, minlength=len(names))
    missing = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if missing:
        raise _unusable("training images of every class", f"none of {short(', '.join(missing))}", images)
    return names


def _check_count(images: ImageSet, samples: int) -> None:
    """Raise InputError unless there are N images in both parts, and N is enough to have neighbours."""
    if samples < FEWEST:
        raise InputError(
            expected=f"--samples {FEWEST} or more, so that each has {FEWEST - 1} neighbours",
            got=f"{samples}",
            do="measure more samples; thousands tell models apart",
        )
    for name, split in (("test", images.test), ("training", images.train)):
        if samples > len(split):
            raise InputError(
                expected=f"at most as many samples as there are {name} images in {images.source}, {len(split):,}",
                got=f"--samples {samples:,}",
                do="choose fewer: the same number of each kind is compared",
            )


def _unusable(expected: str, got: str, images: ImageSet) -> InputError:
    return InputError(
        expected=f"{expected} in {images.source} for a classifier that judges samples",
        got=got,
        do="use --judge autoencoder, which needs no classes",
    )
