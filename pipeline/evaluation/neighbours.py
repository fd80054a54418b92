"""Which points of one set of features have neighbours in another: are samples realistic, varied, or copies?

Distances are Euclidean. A point at exactly the radius is inside, so copies and repeated rows count as the definitions
say; that some distances are equal is decided exactly (exact_distances.py).

[1] Kynkaanniemi et al. 2019, arXiv:1904.06991
[2] Naeem et al. 2020, arXiv:2002.09797

Legend: N rows of real, M rows of samples, D dimensions, k neighbours, n queries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .exact_distances import DistanceBlocks
from .feature_sets import Features, feature_pair


@dataclass(frozen=True, kw_only=True)
class Neighbourhoods:
    """How far samples and real points are among each other's neighbours; for one distribution all are near 1."""

    precision: float  # 0 to 1, the share of samples that are near a real point [1]
    recall: float  # 0 to 1, the share of real points that are near a sample [1]
    density: float  # 0 or more, over k the mean number of real points that a sample is near [2]
    coverage: float  # 0 to 1, the share of real points that have a sample near them [2]


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The nearest reference of each query."""

    rows: Tensor  # int64 [n], of the reference; the first of those equally near
    distances: Tensor  # float64 [n], Euclidean


def precision_recall_density_coverage(real: Features, samples: Features, *, neighbours: int = 5) -> Neighbourhoods:
    """Return precision and recall [1], density and coverage [2] of samples against real points.

    The ball of a point reaches to the k-th nearest other point of its own set. Precision is the share of samples in the
    ball of any real point, recall the share of real points in the ball of any sample, density the mean number of balls
    of real points that a sample is in, over k, and coverage the share of balls of real points that hold a sample.
    (The authors' code for [2] excludes the sphere itself, which differs for copies and repeated rows alone.)

    For one distribution the expected density is 1, and with N = M the expected coverage about 1 - 2^-k (k = 5: 0.97).
    Precision and recall depend on N, M and D even then, and one outlier with a large ball raises them, so compare with
    a floor, as of two parts of the real set.

    Costs N^2 + M^2 + N M products of D values, in blocks of BLOCK_BYTES, and more where very many distances of
    different rows are equal; holds each set about five times in float64.

    Args:
        real: [N,D] of any float type, an array or a tensor on the CPU.
        samples: [M,D] likewise.
        neighbours: k, at least 1 and less than N and M.

    Raises:
        ValueError: they are not such features, or too few for `neighbours`.
    """
    real, samples = feature_pair(real, samples)
    if not 1 <= neighbours < min(len(real), len(samples)):
        rows = f"{len(real)} real and {len(samples)} samples"
        raise ValueError(f"expected neighbours from 1 to less than the rows of either set, got {neighbours} of {rows}")
    real_radii, sample_radii = _radii(real, neighbours), _radii(samples, neighbours)
    balls = torch.zeros(len(samples), dtype=torch.int64)  # of real points, that a sample is in
    recalled = covered = 0
    distances = DistanceBlocks(real, samples)
    for block in distances:
        radii = real_radii[block.start : block.start + len(block.lower), None]
        in_real_balls, in_sample_balls = distances.within(block, radii), distances.within(block, sample_radii)
        balls += in_real_balls.sum(dim=0)
        covered += int(in_real_balls.any(dim=1).sum())
        recalled += int(in_sample_balls.any(dim=1).sum())
    return Neighbourhoods(
        precision=int((balls > 0).sum()) / len(samples),
        recall=recalled / len(real),
        density=int(balls.sum()) / (neighbours * len(samples)),
        coverage=covered / len(real),
    )


def nearest(queries: Features, references: Features) -> Nearest:
    """Return the nearest row of references for each query; of those equally near the first.

    Costs n N products of D values, in blocks of BLOCK_BYTES; holds each set about five times in float64.

    Args:
        queries: [n,D] of any float type, an array or a tensor on the CPU.
        references: [N,D] likewise.

    Raises:
        ValueError: they are not such features.
    """
    distances = DistanceBlocks(*feature_pair(queries, references))
    found = [distances.nearest(block, 1).min(dim=1) for block in distances]
    return Nearest(
        rows=torch.cat([each.indices for each in found]), distances=torch.cat([each.values for each in found])
    )


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Return the distance [N] of each of the points [N,D] to the `neighbours`-th nearest other point."""
    distances = DistanceBlocks(points, points)
    # A point is at 0 from itself, which nothing is nearer than, so it takes one place of the least ones.
    found = [distances.nearest(block, neighbours + 1).topk(neighbours + 1, dim=1, largest=False) for block in distances]
    return torch.cat([each.values[:, -1] for each in found])
