"""Is the model copying? Samples beside the training images nearest to them, and test images beside theirs.

A sample that copies is as good as its training image in the picture, and far nearer to it than any test image is to
one.

Legend: n pictures, N training images, D dimensions of a feature, C channels, H W pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..images.image_set import ImageSplit
from ..images.png import above_and_below, enlarge, save_png, tile
from .neighbours import nearest

SHOWN = 16  # pictures of each kind: those that are nearest to a training image


@dataclass(frozen=True, kw_only=True)
class NearestTraining:
    """Pictures, and the training image nearest to each."""

    images: Tensor  # uint8 [n,C,H,W], the pictures
    rows: np.ndarray  # int64 [n], of the training images
    distances: np.ndarray  # [n], in the judge's features

    @classmethod
    def of(cls, images: Tensor, features: np.ndarray, training_features: np.ndarray) -> "NearestTraining":
        """Find the training images [N,D] that are nearest to pictures [n,D]."""
        found = nearest(features, training_features)
        return cls(images=images, rows=found.rows, distances=found.distances)

    @property
    def median(self) -> float:
        """The median of the distances."""
        return float(np.median(self.distances))


def save_nearest(samples: NearestTraining, test: NearestTraining, train: ImageSplit, path: Path) -> None:
    """Write the SHOWN samples that are nearest to a training image, above those images, and test images likewise."""
    save_png(torch.cat([_rows(samples, train), _rows(test, train)], dim=1), path)


def _rows(found: NearestTraining, train: ImageSplit) -> Tensor:
    """Return the pictures nearest to a training image above those: uint8 [C,H',W']."""
    chosen = np.argsort(found.distances, kind="stable")[:SHOWN]
    nearest_images = torch.from_numpy(np.asarray(train.images[found.rows[chosen]]))
    columns = min(8, len(chosen))
    return enlarge(
        tile(above_and_below(found.images[chosen], nearest_images, columns), columns), train.images.shape[-1]
    )
