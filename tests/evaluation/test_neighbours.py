"""Precision, recall, density, coverage and the nearest rows against slow oracles, hard ties included."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.evaluation import exact_distances
from pipeline.evaluation.distances import kernel_distance, sliced_wasserstein
from pipeline.evaluation.neighbours import Neighbourhoods, nearest, precision_recall_density_coverage

from ..support import LargestTensor
from .feature_samples import BAD_FEATURES, normal, small_blocks, torch_fidelity


def slow_neighbourhoods(real: Tensor, samples: Tensor, k: int) -> Neighbourhoods:
    """Follow the definitions by loops; exact where all squared distances are integers."""
    points, drawn = real.tolist(), samples.tolist()

    def radius(index: int, among: list[list[float]]) -> float:
        return sorted(math.dist(among[index], other) for j, other in enumerate(among) if j != index)[k - 1]

    radii, drawn_radii = ([radius(i, among) for i in range(len(among))] for among in (points, drawn))
    balls = list(zip(points, radii, strict=True))
    drawn_balls = list(zip(drawn, drawn_radii, strict=True))

    def count(point: list[float], among: list[tuple[list[float], float]]) -> int:
        return sum(math.dist(point, centre) <= reach for centre, reach in among)

    return Neighbourhoods(
        precision=sum(count(point, balls) > 0 for point in drawn) / len(drawn),
        recall=sum(count(point, drawn_balls) > 0 for point in points) / len(points),
        density=sum(count(point, balls) for point in drawn) / (k * len(drawn)),
        coverage=sum(any(math.dist(point, c) <= reach for point in drawn) for c, reach in balls) / len(points),
    )


def lattice(rows: int, dims: int, seed: int, *, side: int = 3) -> Tensor:
    """Return rows of small integers, of which many repeat and very many distances are equal."""
    return torch.randint(side, (rows, dims), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("values", [1, 30, 100_000])
@pytest.mark.parametrize("sets", ["normal", "lattice", "far", "copies"])
def test_against_the_definitions(k: int, values: int, sets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 30 values a block has 2 rows of 14 or 15, or 3 of 9; k = 8 is all others of 9 rows."""
    small_blocks(monkeypatch, values)
    real, samples = {
        "normal": (normal(14, 3, 0), normal(9, 3, 1, scale=0.8, shift=0.3)),
        "lattice": (lattice(14, 3, 0), lattice(9, 3, 1)),
        "far": (lattice(14, 3, 0) + 2**20, lattice(9, 3, 1) + 2**20),
        "copies": (normal(14, 3, 0), torch.cat([normal(14, 3, 0)[[4, 4, 4, 2, 2]], normal(4, 3, 1)])),
    }[sets]
    assert precision_recall_density_coverage(real, samples, neighbours=k) == slow_neighbourhoods(real, samples, k)
    assert precision_recall_density_coverage(samples, real, neighbours=k) == slow_neighbourhoods(samples, real, k)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_copies_of_the_real_set(shift: float) -> None:
    """Each is in its own ball and in k others on average; the k-th neighbour is exactly on the sphere."""
    real = normal(200, 300, seed=0, shift=shift).float()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    found = precision_recall_density_coverage(real, real[order], neighbours=5)
    assert found == Neighbourhoods(precision=1, recall=1, density=6 / 5, coverage=1)


def test_samples_that_are_all_one_real_point() -> None:
    """Their balls have radius 0 and hold their copy alone; they are in its ball and those that reach it."""
    real = normal(50, 8, seed=0)
    samples = real[[7] * 20]
    found = precision_recall_density_coverage(real, samples, neighbours=3)
    assert found == slow_neighbourhoods(real, samples, 3)
    assert (found.precision, found.recall) == (1, 1 / 50)


def test_a_point_just_outside_a_ball_is_outside() -> None:
    """By less than the product of float64 rounds to: balls of radius 0, a hair away from their real point."""
    real = normal(50, 8, seed=0)
    samples = torch.cat([real[[7] * 10] + 1e-9, real[[9] * 10], normal(1, 8, seed=1, shift=50).expand(10, 8)])
    found = precision_recall_density_coverage(real, samples, neighbours=3)
    assert found == slow_neighbourhoods(real, samples, 3)
    assert found.recall == 1 / 50


@pytest.mark.parametrize("shift", [0.0, 2.0**25])
def test_equal_rows_are_measured_once_and_far_pairs_not_at_all(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prior that draws one image gives M x M pairs of equal distance; to measure each would take hours."""
    measured = []
    distances = exact_distances._distances
    monkeypatch.setattr(exact_distances, "_distances", lambda x, y: measured.append(len(x)) or distances(x, y))
    real, samples = normal(40, 3, seed=0) + shift, (normal(1, 3, seed=1) + shift).expand(60, 3)
    found = precision_recall_density_coverage(real, samples, neighbours=5)
    assert found == slow_neighbourhoods(real, samples, 5)
    assert sum(measured) < 40 * 6 + 40 + 2


def test_one_distribution_has_density_1_and_coverage_of_its_closed_form() -> None:
    """Coverage is 1 - the product over i = 1 .. k of (N - i) / (2 N - i), after Naeem et al."""
    found = [
        precision_recall_density_coverage(normal(100, 4, 2 * seed), normal(100, 4, 2 * seed + 1), neighbours=3)
        for seed in range(30)
    ]
    expected = 1 - math.prod((100 - i) / (200 - i) for i in range(1, 4))
    assert sum(each.density for each in found) / 30 == pytest.approx(1, abs=0.03)
    assert sum(each.coverage for each in found) / 30 == pytest.approx(expected, abs=0.02)


def test_a_dropped_mode_lowers_recall_and_coverage_and_leaves_precision() -> None:
    real = torch.cat([normal(150, 4, seed=0), normal(150, 4, seed=1, shift=20)])
    both = torch.cat([normal(150, 4, seed=2), normal(150, 4, seed=3, shift=20)])
    complete = precision_recall_density_coverage(real, both)
    dropped = precision_recall_density_coverage(real, normal(300, 4, seed=4))
    assert complete.precision > 0.85
    assert dropped.precision > 0.85
    assert complete.recall > 0.85
    assert dropped.recall <= 0.5
    assert complete.coverage > 0.85
    assert dropped.coverage <= 0.5


def test_samples_elsewhere_are_neither_precise_nor_recalled() -> None:
    found = precision_recall_density_coverage(normal(30, 4, seed=0), normal(20, 4, seed=1, shift=100))
    assert found == Neighbourhoods(precision=0, recall=0, density=0, coverage=0)


def test_the_order_of_rows_the_place_and_the_type_change_nothing() -> None:
    real, samples = normal(40, 6, seed=0).float(), normal(30, 6, seed=1, scale=0.9).float()
    generator = torch.Generator().manual_seed(2)
    expected = precision_recall_density_coverage(real, samples)
    order, other = torch.randperm(40, generator=generator), torch.randperm(30, generator=generator)
    assert precision_recall_density_coverage(real[order], samples[other].double().numpy()) == expected
    assert precision_recall_density_coverage(real.double() + 512, samples.double() + 512) == expected
    assert all(type(value) is float for value in vars(expected).values())


@pytest.mark.parametrize("k", [1, 4])
def test_precision_and_recall_are_those_of_torch_fidelity(k: int) -> None:
    prc = torch_fidelity("metric_prc")
    real, samples = normal(60, 8, seed=0), normal(45, 8, seed=1, scale=0.8)
    expected = prc.prc_features_to_metric(
        *(real, samples), prc_neighborhood=k, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    found = precision_recall_density_coverage(real, samples, neighbours=k)
    # Its first set is the generated one: "precision" is the share of that set in the balls of the second.
    swapped = precision_recall_density_coverage(samples, real, neighbours=k)
    assert (swapped.precision, swapped.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert (found.recall, found.precision) == (swapped.precision, swapped.recall)


@pytest.mark.parametrize("values", [1, 30, 100_000])
def test_nearest_is_the_first_of_the_least_distances(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, values)
    for queries, references in (
        (normal(11, 3, 0), normal(14, 3, 1)),
        (lattice(30, 3, 0), lattice(14, 3, 1)),
        (lattice(30, 2, 0) + 2**20, lattice(14, 2, 1) + 2**20),
    ):
        distances = [[math.dist(query, row) for row in references.tolist()] for query in queries.tolist()]
        found = nearest(queries, references)
        assert found.rows.dtype == torch.int64
        assert found.rows.tolist() == [row.index(min(row)) for row in distances]
        assert found.distances.tolist() == pytest.approx([min(row) for row in distances], rel=1e-14)


def test_copies_are_found_at_0_and_what_is_nearly_one_is_not() -> None:
    """At 300 dimensions and far from 0 the product of float64 rounds to more than the difference of these rows."""
    references = normal(50, 300, seed=0, shift=1e3).float()
    queries = references[[3, 30, 3]].clone()
    queries[2, 5] = torch.nextafter(queries[2, 5], torch.tensor(torch.inf))
    found = nearest(queries, references)
    assert found.rows.tolist() == [3, 30, 3]
    assert found.distances[:2].tolist() == [0, 0]
    assert float(found.distances[2]) == float(queries[2, 5].double() - references[3, 5].double())


def test_an_outlier_does_not_blur_the_others() -> None:
    references = torch.cat([normal(20, 5, seed=0), torch.full((1, 5), 1e12, dtype=torch.float64)])
    queries = references[:20] + 1e-3 * normal(20, 5, seed=1)
    assert nearest(queries, references).rows.tolist() == list(range(20))
    assert nearest(references, queries).rows.tolist()[:20] == list(range(20))


def test_the_lower_bound_is_one_and_is_within_twice_the_slack() -> None:
    """Against the same distances in exact integers: rows are multiples of 2^-20, of very different length."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-(2**20), 2**20, (rows, 40), generator=generator) for rows in (12, 9))
    x[3], y[4] = x[3] * 100, y[2]
    exact = torch.tensor(
        [[sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) for b in y.tolist()] for a in x.tolist()]
    )
    scale = 2.0**-20
    for block in exact_distances.DistanceBlocks(x * torch.tensor(scale).double(), y * torch.tensor(scale).double()):
        squares = exact.double() * scale**2
        assert (block.lower <= squares).all()
        assert (squares <= block.lower + 2 * (block.slack_x + block.slack_y)).all()
        assert (block.slack_x + block.slack_y < 1e-12 * (squares.amax(dim=1, keepdim=True) + squares.amax())).all()


def test_a_pair_has_one_distance_in_any_company_and_either_order() -> None:
    x, y = normal(300, 700, seed=0), normal(300, 700, seed=1)
    together = exact_distances._distances(x, y)
    assert torch.equal(exact_distances._distances(y, x), together)
    for row in (0, 123, 299):
        assert torch.equal(exact_distances._distances(x[row : row + 1], y[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize(("bad", "message"), BAD_FEATURES)
def test_what_is_no_pair_of_features_is_refused(bad: Tensor, message: str) -> None:
    good = normal(9, 2, seed=0)
    for measure in (nearest, precision_recall_density_coverage):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match=r"expected .*, got") as error:
                measure(*pair)
            assert message in str(error.value)


@pytest.mark.parametrize(("rows", "k"), [((9, 5), 5), ((5, 9), 5), ((9, 9), 9), ((9, 9), 0), ((9, 9), -1)])
def test_a_number_of_neighbours_that_is_not_there_is_refused(rows: tuple[int, int], k: int) -> None:
    with pytest.raises(ValueError, match=f"expected neighbours .*, got {k} of {rows[0]} real and {rows[1]} samples"):
        precision_recall_density_coverage(normal(rows[0], 2, 0), normal(rows[1], 2, 1), neighbours=k)


@pytest.mark.parametrize(
    "metric",
    [kernel_distance, sliced_wasserstein, precision_recall_density_coverage, nearest],
    ids=lambda m: m.__name__,
)
def test_no_tensor_is_as_large_as_the_matrix_of_all_pairs(
    metric: Callable[[Tensor, Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, values = 1500, 60_000
    small_blocks(monkeypatch, values)
    with LargestTensor() as largest:
        metric(normal(rows, 2, 0), normal(rows + 1, 2, 1))
    assert 8 * values / 2 <= largest.nbytes <= 8 * values < 8 * rows**2 / 30
