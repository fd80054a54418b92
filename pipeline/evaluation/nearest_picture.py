"""Is the model copying? Samples above the training images nearest to them, and test images above theirs.

A sample that is a copy looks like the training image below it, and is far nearer to it than test images are to theirs.

Legend: n pictures, N training images, D dimensions of a feature, C channels, H W pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from ..images.captions import GAP, TITLE, below, beside, in_bands, sheet_of, text_line
from ..images.image_set import ImageSplit
from ..images.png import thumbnail
from .neighbours import nearest

SHOWN = 16  # pictures of each kind: those that are nearest to a training image


@dataclass(frozen=True, kw_only=True)
class NearestTraining:
    """Pictures, and the training image nearest to each in the judge's features."""

    images: Tensor  # uint8 [n,C,H,W], the pictures
    rows: np.ndarray  # int64 [n], of the training images
    distances: np.ndarray  # [n], from 0 to 2

    @classmethod
    def of(cls, images: Tensor, directions: np.ndarray, training_directions: np.ndarray) -> "NearestTraining":
        """Find the training image, of [N,D] directions of features, that is nearest to each picture, of [n,D]."""
        found = nearest(directions, training_directions)
        return cls(images=images, rows=found.rows.numpy(), distances=found.distances.numpy())

    @property
    def median(self) -> float:
        """The median of the distances."""
        return float(np.median(self.distances))


def nearest_picture(samples: NearestTraining, test: NearestTraining, train: ImageSplit) -> Image.Image:
    """Return a picture, RGB, of the SHOWN samples and the SHOWN test images that are nearest to a training image."""
    return sheet_of([_part("samples", samples, train), _part("test images", test, train)])


def _part(name: str, found: NearestTraining, train: ImageSplit) -> Image.Image:
    """Return the pictures nearest to a training image above those, with a title."""
    chosen = np.argsort(found.distances, kind="stable")[:SHOWN]
    pairs = [below([thumbnail(found.images[i].numpy()), thumbnail(train.images[found.rows[i]])], 0) for i in chosen]
    bands = [beside(band) for band in in_bands(pairs)]
    title = f"the {len(chosen)} of {len(found.rows):,} {name} nearest to a training image, each above that image"
    closest, farthest = found.distances[chosen[[0, -1]]]
    words = f"distances {closest:.2f} to {farthest:.2f}, the median of all {name} {found.median:.2f}"
    return below([text_line(title, size=TITLE), text_line(words), *bands], 3 * GAP)
