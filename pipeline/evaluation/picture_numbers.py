"""The numbers about a set of pictures: how far it is from another, how much of it is there, whether it is recognised.

Legend: N pictures of a set, D dimensions of a feature.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .distances import frechet_distance, kernel_distance, monge_distance
from .judge import Seen, accuracy_of
from .neighbours import precision_recall_density_coverage

NEIGHBOURS = 5  # whose farthest one is the radius around a picture
FEWEST = NEIGHBOURS + 1  # pictures in a set


@dataclass(frozen=True, kw_only=True)
class Distances:
    """How far pictures are from as many training images, in one kind of features."""

    fd: float  # Frechet distance, 0 or more; its bias falls as 1 / N
    kid: float  # kernel distance, unbiased: about 0, on either side of it, for pictures of the same distribution
    mind: float  # 3 D times the squared sliced Wasserstein distance
    precision: float  # share of the pictures that are near a training image
    recall: float  # share of the training images that are near a picture
    density: float  # how many neighbourhoods of training images a picture is in; 1 for the same distribution
    coverage: float  # share of the training images with a picture in their neighbourhood


@dataclass(frozen=True, kw_only=True)
class PictureNumbers:
    """The numbers of one set of N pictures against N training images."""

    own: Distances  # in the features of the judge
    inception: Distances | None = None  # in those of Inception-v3, if the user has its weights
    class_accuracy: float | None = None  # share of the pictures whose class the judge recognises; None without classes
    nearest_train: float | None = None  # median distance to the nearest training image; None if it was not measured
    nmse: float | None = None  # of reconstructions, of pixels of 8 bits: squared error / variance of training pixels
    psnr: float | None = None  # dB, of the same error

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by their names, without those that were not measured."""
        numbers: dict[str, Any] = {_JSON.get(name, name): value for name, value in asdict(self.own).items()}
        for name in ("class_accuracy", "nearest_train", "nmse", "psnr"):
            if getattr(self, name) is not None:
                numbers[name] = getattr(self, name)
        if self.inception is not None:
            numbers |= {f"{name}_inception": value for name, value in asdict(self.inception).items()}
        return numbers


_JSON = {"fd": "fd_own", "kid": "kid_own", "mind": "mind_own"}  # "own": the features are of a judge trained here


def distances(
    reference: np.ndarray, pictures: np.ndarray, directions: tuple[np.ndarray, np.ndarray] | None = None
) -> Distances:
    """Return how far pictures are from the reference, by the features of both.

    Args:
        reference: [N,D], of training images.
        pictures: [N,D].
        directions: the features of both by which precision, density and coverage find neighbours; by default those
            above. Recall, whose neighbourhoods are those of the pictures, always takes those above: poor pictures are
            in all directions, so that their neighbourhoods would reach everything.

    Raises:
        ValueError: fewer than FEWEST rows, different dimensions, or numbers that are not finite.
    """
    plain = precision_recall_density_coverage(reference, pictures, neighbours=NEIGHBOURS)
    near = plain if directions is None else precision_recall_density_coverage(*directions, neighbours=NEIGHBOURS)
    return Distances(
        fd=frechet_distance(reference, pictures),
        kid=kernel_distance(reference, pictures),
        mind=monge_distance(reference, pictures),
        precision=near.precision,
        recall=plain.recall,
        density=near.density,
        coverage=near.coverage,
    )


def picture_numbers(reference: Seen, seen: Seen, labels: np.ndarray | None) -> PictureNumbers:
    """Return the numbers of pictures against the reference, as one judge sees both.

    Args:
        reference: the training images.
        seen: the pictures.
        labels: int64 [N], the class that each picture should show; None if nobody knows.
    """
    accuracy = None
    if seen.predicted is not None and labels is not None:
        accuracy = accuracy_of(seen.predicted, labels)
    own = distances(reference.features, seen.features, (reference.directions, seen.directions))
    return PictureNumbers(own=own, class_accuracy=accuracy)
