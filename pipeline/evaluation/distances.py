"""Distances between two sets of features: 0 if they come from one distribution, up to the stated bias and noise.

All are symmetric, take rows in any order, and compute in float64 in blocks. Features in other units give other numbers,
so compare values of the same features only, and of the same number of rows.

Why not torch-fidelity 0.4.0 or torchmetrics: their functions of arrays are internals, their kernel distance is a mean
over random subsets, they have no density, coverage or sliced distance, and every evaluation would depend on them; where
torch-fidelity is installed, the tests compare with it.

[1] Dowson, Landau 1982, "The Frechet distance between multivariate normal distributions"
[2] Heusel et al. 2017, arXiv:1706.08500
[3] Binkowski et al. 2018, arXiv:1801.01401
[4] Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures"
[5] Monge Inception Distance, arXiv:2605.06797

Legend: N rows of a, M rows of b, D dimensions, P projections.
"""

import torch
from torch import Tensor

from ..runtime.device import torch_seed
from .feature_sets import Features, feature_pair, rows_at_once


def frechet_distance(a: Features, b: Features) -> float:
    """Return the squared Frechet distance of the Gaussians fitted to a and b [1], [2], in squared units, 0 or more.

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the covariances S with N - 1; they may be singular. The
    mean over samples is too high by about c / N + c' / M, which is not small until N is many times D.

    Costs N D^2 for the covariances and about 10 D^3; holds a and b in float64 and a few matrices of D x D.

    Args:
        a: [N,D] of any float type, an array or a tensor on the CPU, two rows or more.
        b: [M,D] likewise.

    Raises:
        ValueError: they are not such features.
    """
    first, second = feature_pair(a, b, least=2)
    mean = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    covariance_a, covariance_b = _covariance(first), _covariance(second)
    values, vectors = torch.linalg.eigh(covariance_a)
    factor = vectors * _without_rounding(values).sqrt()  # factor factor^T = S_a
    # The eigenvalues of factor^T S_b factor are those of S_a S_b, and this matrix is symmetric.
    shared = _without_rounding(torch.linalg.eigvalsh(factor.T @ covariance_b @ factor)).sqrt().sum()
    return max(0.0, float(mean + covariance_a.trace() + covariance_b.trace() - 2 * shared))


def kernel_distance(a: Features, b: Features) -> float:
    """Return the unbiased squared MMD of a and b with the kernel k(x, y) = (x.y / D + 1)^3 [3].

    mean of k(a_i, a_j) over i != j, plus mean of k(b_i, b_j) over i != j, minus 2 mean of k(a_i, b_j), over all rows.
    It has no bias, so it is below 0 about half of the time for sets from one distribution, and always for a set and
    itself. It is not invariant to moving both sets.

    Costs (N + M)^2 D in blocks of BLOCK_BYTES.

    Args:
        a: [N,D] of any float type, an array or a tensor on the CPU, two rows or more.
        b: [M,D] likewise.

    Raises:
        ValueError: they are not such features.
    """
    first, second = feature_pair(a, b, least=2)
    return _mean_kernel_within(first) + _mean_kernel_within(second) - 2 * _mean_kernel(first, second)


def sliced_wasserstein(a: Features, b: Features, *, num_projections: int = 1000, seed: int = 0) -> float:
    """Return the mean, over random directions, of the squared 2-Wasserstein distance of a and b along each [4].

    It is in squared units, 0 or more, and exact for the directions drawn; N and M may differ. Its mean over samples is
    too high by about c / N + c' / M. Other directions give another value: if b is a moved, by a relative sqrt(2 / P).

    Costs P (N D + N log N) in blocks of BLOCK_BYTES, and holds P x D directions.

    Args:
        a: [N,D] of any float type, an array or a tensor on the CPU.
        b: [M,D] likewise.
        num_projections: P, the number of directions.
        seed: of the directions, 0 or more; the same directions for any a and b of D dimensions.

    Raises:
        ValueError: they are not such features, or num_projections is below 1.
    """
    first, second = feature_pair(a, b)
    if num_projections < 1:
        raise ValueError(f"expected num_projections of 1 or more, got {num_projections}")
    generator = torch.Generator().manual_seed(torch_seed(seed))
    directions = torch.randn(num_projections, first.shape[1], dtype=torch.float64, generator=generator)
    directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    rows_a, rows_b, weights = _quantile_pairs(len(first), len(second))
    total = 0.0
    for block in directions.split(rows_at_once(len(weights))):
        sorted_a, sorted_b = ((block @ rows.T).sort(dim=1).values for rows in (first, second))
        total += float(((sorted_a[:, rows_a] - sorted_b[:, rows_b]).square() @ weights).sum())
    return total / num_projections


def monge_distance(a: Features, b: Features, *, num_projections: int = 1000, seed: int = 0) -> float:
    """Return the Monge Inception Distance of a and b: 3 D times `sliced_wasserstein` of the same arguments [5].

    D times the mean over directions is of the size of a squared distance in all dimensions at once: 3 |t|^2 for a set
    and the same moved by t. Bias, cost, arguments and errors are those of `sliced_wasserstein`.
    """
    sliced = sliced_wasserstein(a, b, num_projections=num_projections, seed=seed)
    return 3 * a.shape[1] * sliced


def _covariance(features: Tensor) -> Tensor:
    """Return the covariance [D,D] of features [N,D]."""
    centred = features - features.mean(dim=0)
    return centred.T @ centred / (len(features) - 1)


def _without_rounding(eigenvalues: Tensor) -> Tensor:
    """Return eigenvalues [D] of a positive semidefinite matrix, with 0 in place of those that rounding alone may make.

    Some of those are negative; the square roots of the others, about 1e-8 each, would add up over a null space.
    """
    smallest = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.max()
    return torch.where(eigenvalues > smallest, eigenvalues, 0.0)


def _mean_kernel(a: Tensor, b: Tensor) -> float:
    """Return the mean of the kernel over all pairs of rows of a [N,D] and b [M,D]."""
    sums = [float(_kernel(rows, b).sum()) for rows in a.split(rows_at_once(len(b)))]
    return sum(sums) / (len(a) * len(b))


def _mean_kernel_within(a: Tensor) -> float:
    """Return the mean of the kernel over all pairs of different rows of a [N,D]."""
    rows = rows_at_once(len(a))
    upper = [_kernel(a[start : start + rows], a[start:]).triu_(1).sum() for start in range(0, len(a), rows)]
    return 2 * float(sum(upper)) / (len(a) * (len(a) - 1))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return (x.y / D + 1)^3 for all pairs of rows of a [n,D] and b [m,D]: [n,m]."""
    return torch.addmm(a.new_ones(1), a, b.T, alpha=1 / a.shape[1]).pow_(3)


def _quantile_pairs(count_a: int, count_b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which sorted rows of a [L] and b [L] optimal transport in one dimension pairs, and the weights [L].

    Row i of a covers quantiles i/N to (i+1)/N, row j of b j/M to (j+1)/M; each overlap is a pair, N + M - 1 at most.
    Quantiles are counted in units of 1 / (N M), so that those of both sets that are equal are so exactly.
    """
    ends_a, ends_b = torch.arange(1, count_a + 1) * count_b, torch.arange(1, count_b + 1) * count_a
    ends = torch.cat([ends_a, ends_b]).unique()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return starts // count_b, starts // count_a, (ends - starts).double() / (count_a * count_b)
