"""Counts, perplexity, entropy and packed bits, against sums by hand."""

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.codes import statistics
from pipeline.codes.statistics import CodeStatistics, count_codes, entropy_bits, packed_bits, packed_bytes, perplexity


@pytest.mark.parametrize(("dtype", "num_codes"), [(np.uint8, 200), (np.uint16, 300), (np.int32, 70_000)])
@pytest.mark.parametrize("at_once", [1, 7, 2**20])
def test_every_code_is_counted_once(dtype: type, num_codes: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "COUNTED_AT_ONCE", at_once)
    codes = np.random.default_rng(0).integers(0, num_codes - 50, (3, 4, 5)).astype(dtype)
    histogram, slow = count_codes(codes, num_codes), Counter(codes.ravel().tolist())
    assert histogram.tolist() == [slow[code] for code in range(num_codes)]
    assert count_codes(codes[:0], 3).tolist() == [0, 0, 0]


def test_counting_takes_little_memory() -> None:
    """numpy counts in 8 bytes a code, of which a shard has too many."""
    codes = np.zeros((2**12, 64, 64), dtype=np.uint8)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert count_codes(codes, 2).tolist() == [codes.size, 0]
        assert tracemalloc.get_traced_memory()[1] - before < 2 * codes.size
    finally:
        tracemalloc.stop()


def test_perplexity_is_the_number_of_codes_when_all_are_used_alike() -> None:
    assert perplexity(torch.tensor([100] * 37 + [0] * 475)) == pytest.approx(37)
    assert perplexity(torch.tensor([3, 1])) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert perplexity(torch.tensor([0, 0])) == 1


@pytest.mark.parametrize(("histogram", "bits"), [([4, 2, 1, 1, 0], 1.75), ([0, 0, 24], 0), ([3] * 16, 4), ([0, 0], 0)])
def test_entropy_by_hand(histogram: list[int], bits: float) -> None:
    assert entropy_bits(torch.tensor(histogram)) == pytest.approx(bits)
    used = sum(count > 0 for count in histogram)
    found = CodeStatistics.of(torch.tensor(histogram))
    assert (found.codes_used, found.perplexity) == (used, pytest.approx(2**bits))
    assert found.entropy_bits_per_code == pytest.approx(bits)


@pytest.mark.parametrize(
    ("num_codes", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (16, 4), (256, 8), (257, 9), (512, 9), (513, 10)]
)
def test_packed_bits_by_hand(num_codes: int, bits: int) -> None:
    assert packed_bits(num_codes) == bits
    assert packed_bytes((3, 5), num_codes) == 15 * bits / 8


@pytest.mark.parametrize("at_once", [7, 2**20])
@pytest.mark.parametrize("num_codes", [5, 65_537, 2**20, 2**20 + 1, 2**31])
def test_a_histogram_counts_the_codes_that_occur(num_codes: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a loop; of a large K, those that do not occur are left out."""
    monkeypatch.setattr(statistics, "COUNTED_AT_ONCE", at_once)
    random, histogram = np.random.default_rng(0), statistics.Histogram(num_codes)
    arrays = [random.choice([0, 1, num_codes // 2, num_codes - 1], (4, 3, 5)).astype(np.int32) for _ in range(3)]
    for array in arrays:
        histogram.add(array)
    flat = [code for array in arrays for code in array.ravel().tolist()]
    expected = [flat.count(code) for code in sorted(set(flat))]
    counts = histogram.counts
    assert counts.dtype == torch.int64
    assert counts[counts > 0].tolist() == expected
    assert len(counts) == (num_codes if num_codes <= 2**20 else len(expected))
    assert statistics.CodeStatistics.of(counts).codes_used == len(expected)
    assert statistics.perplexity(counts) == pytest.approx(statistics.perplexity(torch.tensor(expected)), rel=1e-12)


def test_a_histogram_of_a_large_k_takes_the_memory_of_the_codes() -> None:
    tracemalloc.start()
    statistics.Histogram(2**31).add(np.arange(1000, dtype=np.int32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
