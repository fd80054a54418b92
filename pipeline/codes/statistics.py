"""How often each code occurs in a data set, and what follows from it: perplexity, entropy, packed size.

Legend: K codes in the codebook, H W grid.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COUNTED_AT_ONCE = 2**20  # codes; `numpy.bincount` takes 8 bytes for each
LARGEST_DENSE = 2**20  # K of a histogram that holds all codes, also those that do not occur


@dataclass(frozen=True)
class CodeStatistics:
    """The statistics of all codes of a data set, as its manifest holds them."""

    codes_used: int  # how many of the K codes occur
    perplexity: float  # 1 to K
    entropy_bits_per_code: float  # order 0

    @classmethod
    def of(cls, histogram: Tensor) -> "CodeStatistics":
        """Return the statistics of a histogram [K]; it may lack codes that do not occur."""
        return cls(int((histogram > 0).sum()), perplexity(histogram), entropy_bits(histogram))


class Histogram:
    """Counts codes of any arrays: all K up to LARGEST_DENSE, above that those that occur alone.

    So what it takes does not grow with a K that a manifest states, over shards that hold few codes.
    """

    def __init__(self, num_codes: int) -> None:
        self._dense = num_codes <= LARGEST_DENSE
        self._codes = np.arange(num_codes if self._dense else 0)  # ascending
        self._counts = np.zeros(len(self._codes), dtype=np.int64)  # of those codes

    @property
    def counts(self) -> Tensor:
        """How often each code occurs, in ascending order of the codes: int64 [K], or without those that do not."""
        return torch.from_numpy(self._counts)

    def add(self, codes: np.ndarray) -> None:
        """Count `codes` of any shape, each in [0, K)."""
        if self._dense:
            self._counts += count_codes(codes, len(self._counts)).numpy()
            return
        flat = codes.reshape(-1)
        for start in range(0, flat.size, COUNTED_AT_ONCE):
            found, counts = np.unique(flat[start : start + COUNTED_AT_ONCE], return_counts=True)
            self._codes, places = np.unique(np.concatenate([self._codes, found]), return_inverse=True)
            before, self._counts = self._counts, np.zeros(len(self._codes), dtype=np.int64)
            np.add.at(self._counts, places, np.concatenate([before, counts]))


def count_codes(codes: np.ndarray, num_codes: int) -> Tensor:
    """Return how often each of K codes occurs among `codes` of any shape: int64 [K].

    The memory that it takes does not grow with their number.
    """
    histogram, flat = np.zeros(num_codes, dtype=np.int64), codes.reshape(-1)
    for start in range(0, flat.size, COUNTED_AT_ONCE):
        histogram += np.bincount(flat[start : start + COUNTED_AT_ONCE], minlength=num_codes)
    return torch.from_numpy(histogram)


def perplexity(histogram: Tensor) -> float:
    """Return exp of the entropy of a histogram of codes [K]: the number of equally frequent codes that have it."""
    shares = histogram.double() / histogram.sum().clamp_min(1)
    return float(torch.special.entr(shares).sum().exp())


def entropy_bits(histogram: Tensor) -> float:
    """Return the order-0 entropy of a histogram of codes [K], in bits per code."""
    return float(np.log2(perplexity(histogram)))


def packed_bits(num_codes: int) -> int:
    """Return the bits of a code when all codes take as many: ceil(log2 K), at least 1."""
    return max(1, (num_codes - 1).bit_length())


def packed_bytes(grid: tuple[int, int], num_codes: int) -> float:
    """Return the bytes of a grid of H x W codes of `packed_bits` each."""
    return math.prod(grid) * packed_bits(num_codes) / 8
