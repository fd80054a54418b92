"""The distances of two sets of features against closed forms, slow oracles, and torch-fidelity where installed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.evaluation.distances import frechet_distance, kernel_distance, monge_distance, sliced_wasserstein

from .feature_samples import BAD_FEATURES, normal, small_blocks, torch_fidelity

Distance = Callable[[Tensor, Tensor], float]
ALL = [frechet_distance, kernel_distance, sliced_wasserstein, monge_distance]
INVARIANT = [frechet_distance, sliced_wasserstein, monge_distance]  # to moving both sets alike


def whitened(rows: int, dims: int, seed: int) -> Tensor:
    """Return rows whose mean is 0 and whose covariance is the identity, up to rounding."""
    centred = normal(rows, dims, seed)
    centred -= centred.mean(dim=0)
    return torch.linalg.qr(centred).Q * math.sqrt(rows - 1)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 40), (0.5, 40), (3.0, 57)])
def test_frechet_distance_of_gaussians_in_closed_form(scale: float, rows: int) -> None:
    """N(0, I) and N(t, s^2 I): |t|^2 + D (1 - s)^2, which the fitted Gaussians of whitened rows reach exactly."""
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    a, b = whitened(40, 5, seed=0), whitened(rows, 5, seed=1) * scale + shift
    assert frechet_distance(a, b) == pytest.approx(float(shift.square().sum()) + 5 * (1 - scale) ** 2, rel=1e-12)


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    """In two dimensions the trace of the root of P = S_a S_b is sqrt(tr P + 2 sqrt(det P))."""
    root_a = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    root_b = torch.tensor([[1.0, -3.0], [0.0, 1.0]], dtype=torch.float64)
    a, b = whitened(30, 2, seed=2) @ root_a.T, whitened(20, 2, seed=3) @ root_b.T
    covariance_a, covariance_b = root_a @ root_a.T, root_b @ root_b.T
    product = covariance_a @ covariance_b
    shared = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(covariance_a.trace() + covariance_b.trace()) - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scales", [torch.ones(60), torch.logspace(-4, 2, 60)])
def test_frechet_distance_with_fewer_rows_than_dimensions(scales: Tensor) -> None:
    """tr (S_a S_b)^(1/2) is the sum of the singular values of A B^T over the roots of N - 1 and M - 1."""
    a, b = normal(20, 60, seed=0) * scales, normal(15, 60, seed=1) * scales * 1.5 + 1
    centred_a, centred_b = a - a.mean(dim=0), b - b.mean(dim=0)
    shared = torch.linalg.svdvals(centred_a @ centred_b.T).sum() / math.sqrt(19 * 14)
    spread = centred_a.square().sum() / 19 + centred_b.square().sum() / 14
    expected = float((a.mean(dim=0) - b.mean(dim=0)).square().sum() + spread - 2 * shared)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)  # 1e-8 with the noise of the null space


def test_small_variances_beside_a_large_one_count() -> None:
    scales = torch.tensor([1.0, 1e-3, 1.0], dtype=torch.float64)
    a, b = whitened(30, 3, seed=0) * scales, whitened(20, 3, seed=1) * scales * torch.tensor([1.0, 3.0, 1.0])
    assert frechet_distance(a, b) == pytest.approx(4e-6, rel=1e-3)


def test_frechet_distance_with_constant_features() -> None:
    a, b = normal(30, 4, seed=0), normal(30, 4, seed=1)
    a[:, 1], b[:, 1] = 2, 5
    rest = [0, 2, 3]
    assert frechet_distance(a, b) == pytest.approx(9 + frechet_distance(a[:, rest], b[:, rest]), rel=1e-10)
    assert frechet_distance(a.new_full((3, 4), 1.0), a.new_full((2, 4), 3.0)) == 16


@pytest.mark.parametrize("dims", [3, 50])
def test_a_set_is_at_0_from_itself(dims: int) -> None:
    a = normal(23, dims, seed=0)
    assert 0 <= frechet_distance(a, a) < 1e-12 * float(a.square().sum())
    assert sliced_wasserstein(a, a.clone()) == monge_distance(a, a.clone()) == 0


def test_the_kernel_distance_of_a_set_and_itself_is_below_0() -> None:
    """The mean over all pairs has the diagonal, that within a set has not: 2 (mean without - mean with)."""
    a = normal(23, 3, seed=0).numpy()
    kernel = (a @ a.T / 3 + 1) ** 3
    within = (kernel.sum() - np.trace(kernel)) / (23 * 22)
    assert kernel_distance(a, a) == pytest.approx(2 * (within - kernel.mean()), rel=1e-12)
    assert kernel_distance(a, a) < 0


@pytest.mark.parametrize("distance", ALL)
def test_rows_are_in_no_order_and_sets_in_none_either(distance: Distance) -> None:
    a, b = normal(31, 4, seed=0), normal(22, 4, seed=1, shift=0.3)
    generator = torch.Generator().manual_seed(2)
    shuffled = distance(a[torch.randperm(31, generator=generator)], b[torch.randperm(22, generator=generator)])
    assert shuffled == pytest.approx(distance(a, b), rel=1e-10)
    assert distance(b, a) == pytest.approx(distance(a, b), rel=1e-10)


@pytest.mark.parametrize("distance", INVARIANT)
def test_moving_both_sets_changes_nothing(distance: Distance) -> None:
    a, b = normal(31, 4, seed=0), normal(22, 4, seed=1, scale=2)
    assert distance(a + 1e4, b + 1e4) == pytest.approx(distance(a, b), rel=1e-6)


@pytest.mark.parametrize("distance", INVARIANT)
def test_a_unit_twice_as_small_gives_four_times_as_much(distance: Distance) -> None:
    a, b = normal(31, 4, seed=0), normal(22, 4, seed=1, scale=2)
    assert distance(2 * a, 2 * b) == pytest.approx(4 * distance(a, b), rel=1e-10)


@pytest.mark.parametrize("distance", ALL)
def test_any_float_type_and_arrays_give_what_float64_tensors_give(distance: Distance) -> None:
    a, b = normal(31, 4, seed=0).half(), normal(22, 4, seed=1).half()
    expected = distance(a.double(), b.double())
    for kind in (torch.float16, torch.float32):
        assert distance(a.to(kind), b.to(kind).clone().requires_grad_()) == expected
        array = a.to(kind).numpy()
        array.flags.writeable = False  # as np.load with mmap_mode="r" gives it
        found = distance(array, b.to(kind).numpy())
        assert type(found) is float
        assert found == expected


def test_the_bias_of_the_frechet_distance_halves_with_twice_the_rows_and_the_kernel_distance_has_none() -> None:
    seeds = range(60)
    few = [(normal(100, 4, 2 * seed), normal(100, 4, 2 * seed + 1)) for seed in seeds]
    many = [(normal(200, 4, 2 * seed + 1000), normal(200, 4, 2 * seed + 1001)) for seed in seeds]
    means = [np.mean([frechet_distance(a, b) for a, b in pairs]) for pairs in (few, many)]
    assert means[0] / means[1] == pytest.approx(2, rel=0.15)
    kernel = np.array([kernel_distance(a, b) for a, b in few])
    error = kernel.std(ddof=1) / math.sqrt(len(kernel))
    assert abs(kernel.mean()) < 2.5 * error
    # The biased estimate, with the diagonals, would be above 0 by 2 (E k(x, x) - E k(x, y)) / N.
    diagonal = np.mean([((a.square().sum(dim=1) / 4 + 1) ** 3).mean() for a, _ in few])
    assert 2 * (diagonal - 2) / 100 > 10 * error


def slow_kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the unbiased estimate by two loops."""

    def mean(x: Tensor, y: Tensor, same: bool) -> float:
        values = [
            (sum(p * q for p, q in zip(row, other, strict=True)) / len(row) + 1) ** 3
            for i, row in enumerate(x.tolist())
            for j, other in enumerate(y.tolist())
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


@pytest.mark.parametrize("values", [1, 21, 40, 10_000])
def test_kernel_distance_against_two_loops_in_blocks_of_any_size(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """21 values are 3 rows of 7; neither 10 rows nor 7 are a multiple of that."""
    small_blocks(monkeypatch, values)
    a, b = normal(10, 3, seed=0), normal(7, 3, seed=1, shift=0.5)
    assert kernel_distance(a, b) == pytest.approx(slow_kernel_distance(a, b), rel=1e-12)


def slow_sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Repeat every row until both sets have as many, where transport in one dimension pairs them in order."""
    most = math.lcm(len(a), len(b))
    totals = []
    for direction in directions:
        on_a, on_b = (sorted((rows @ direction).tolist() * (most // len(rows))) for rows in (a, b))
        totals.append(sum((p - q) ** 2 for p, q in zip(on_a, on_b, strict=True)) / most)
    return sum(totals) / len(totals)


@pytest.mark.parametrize(("rows_a", "rows_b"), [(6, 6), (6, 9), (9, 6), (7, 5), (1, 4), (12, 4), (1, 1)])
@pytest.mark.parametrize("values", [1, 40, 10_000])
def test_sliced_wasserstein_against_a_slow_oracle(
    rows_a: int, rows_b: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, values)
    a, b = normal(rows_a, 3, seed=0), normal(rows_b, 3, seed=1, shift=0.5)
    directions = torch.randn(7, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    directions = directions / directions.square().sum(dim=1, keepdim=True).sqrt()
    expected = slow_sliced_wasserstein(a, b, directions)
    assert sliced_wasserstein(a, b, num_projections=7, seed=5) == pytest.approx(expected, rel=1e-12)


def test_sliced_wasserstein_in_one_dimension_has_one_direction() -> None:
    a, b = torch.tensor([[3.0], [0.0], [1.0]]), torch.tensor([[5.0], [0.0], [2.0]])
    assert sliced_wasserstein(a, b, num_projections=1) == pytest.approx((0 + 1 + 4) / 3)
    assert sliced_wasserstein(a, b[:1], num_projections=9, seed=3) == pytest.approx((4 + 25 + 16) / 3)


def test_sliced_wasserstein_of_gaussians_in_closed_form() -> None:
    """On a direction they are N(0, 1) and N(t.u, s^2): the mean of (t.u)^2 + (1 - s)^2 is |t|^2 / D + (1 - s)^2."""
    a, b = whitened(1000, 4, seed=0), whitened(1000, 4, seed=1) * 1.5 + 0.7
    assert sliced_wasserstein(a, b, num_projections=2000) == pytest.approx(0.7**2 + 0.25, rel=0.04)
    assert monge_distance(a, b, num_projections=2000) == pytest.approx(3 * 4 * (0.7**2 + 0.25), rel=0.04)


def test_a_moved_set_is_at_the_square_of_the_way_on_each_direction() -> None:
    """Of many directions the mean is |t|^2 / D, within the noise that the docstring states."""
    a, way = normal(10, 6, seed=0), torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert sliced_wasserstein(a, a + way, num_projections=10_000) == pytest.approx(
        25 / 6, rel=3 * math.sqrt(2 / 10_000)
    )


def test_the_seed_chooses_the_directions_and_nothing_else_does() -> None:
    a, b = normal(10, 6, seed=0), normal(10, 6, seed=1)
    torch.manual_seed(1)
    first = sliced_wasserstein(a, b, num_projections=5, seed=4)
    state = torch.get_rng_state()
    assert sliced_wasserstein(a, b, num_projections=5, seed=4) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sliced_wasserstein(a, b, num_projections=5, seed=2**70) != first


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize(("bad", "message"), BAD_FEATURES)
def test_what_is_no_pair_of_features_is_refused(distance: Distance, bad: Tensor, message: str) -> None:
    good = normal(9, 2, seed=0)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=r"expected .*, got") as error:
            distance(*pair)
        assert message in str(error.value)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("kind", [">f4", ">f8", "<f8", np.longdouble])
def test_arrays_in_any_byte_order_give_what_tensors_give(distance: Distance, kind: Any) -> None:
    a, b = normal(31, 4, seed=0).float(), normal(22, 4, seed=1)
    assert distance(a.numpy().astype(kind), b) == distance(a, b)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize(
    ("bad", "got"),
    [
        ([[0.0, 1.0]] * 9, "a list"),
        (None, "a NoneType"),
        (np.zeros((9, 2), object), "object [9, 2]"),
        (np.zeros((9, 2), complex), "complex128 [9, 2]"),
        (np.zeros((9, 2), np.uint8), "uint8 [9, 2]"),
        (np.zeros(9), "torch.float64 [9] on cpu"),
    ],
)
def test_what_is_neither_an_array_of_floats_nor_a_tensor_is_refused(distance: Any, bad: object, got: str) -> None:
    with pytest.raises(ValueError, match=r"expected features \[N,D\] of a float type, an array or a tensor") as error:
        distance(normal(9, 2, seed=0), bad)
    assert f"got {got}" in str(error.value)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_one_row_has_no_covariance_and_no_pairs(distance: Distance) -> None:
    with pytest.raises(ValueError, match="at least 2 rows of features, got 1"):
        distance(normal(9, 2, seed=0), normal(1, 2, seed=0))


def test_no_projections_are_refused() -> None:
    with pytest.raises(ValueError, match="num_projections of 1 or more, got 0"):
        sliced_wasserstein(normal(9, 2, seed=0), normal(9, 2, seed=1), num_projections=0)


@pytest.mark.parametrize(("dims", "shift"), [(8, 0.2), (40, 0.0)])
def test_frechet_distance_is_that_of_torch_fidelity(dims: int, shift: float) -> None:
    fid = torch_fidelity("metric_fid")
    a, b = normal(60, dims, seed=0), normal(45, dims, seed=1, scale=1.2, shift=shift)
    statistics = [fid.fid_features_to_statistics(rows) for rows in (a, b)]
    (expected,) = fid.fid_statistics_to_metric(*statistics, verbose=False).values()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_kernel_distance_is_that_of_torch_fidelity_on_the_subset_of_all() -> None:
    kid = torch_fidelity("metric_kid")
    a, b = normal(60, 8, seed=0), normal(60, 8, seed=1, shift=0.2)
    found = kid.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kernel_distance(a, b) == pytest.approx(found[kid.KEY_METRIC_KID_MEAN], rel=1e-10)
