"""Counts of codes in their contexts, and probabilities from them.

The probabilities are smoothed towards a simpler predictor, as `simple_predictors` says. Only what occurs is stored, in
sorted arrays, so neither memory nor time depends on K.

Legend: N grids, H W positions in a grid, M positions in all, K codes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

STRENGTHS = 2.0 ** np.arange(24, -1, -1)  # the largest first, which nearly ignores the context
LARGEST = float(STRENGTHS[0])


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Holds what the predictors know of each position: arrays [M] of int64."""

    codes: np.ndarray  # in [0, K)
    labels: np.ndarray  # of the image; all 0 without labels
    above: np.ndarray  # code above, K outside the grid
    left: np.ndarray  # code to the left, K outside the grid


@dataclass(frozen=True, kw_only=True)
class Probabilities:
    """Holds the probability [M] of the code at each position."""

    histogram: np.ndarray
    given_label: np.ndarray
    above_and_left: np.ndarray


@dataclass(kw_only=True)
class Strengths:
    """Holds the strength of the smoothing of each predictor."""

    histogram: float
    given_label: float = LARGEST
    above: float = LARGEST
    left: float = LARGEST
    above_and_left: float = LARGEST

    def smooth(self, name: str, count: np.ndarray, total: np.ndarray, simpler: np.ndarray) -> np.ndarray:
        """Return the smoothed probabilities [M] of the predictor `name`."""
        return _smoothed(count, total, simpler, getattr(self, name))

    def choose(self, name: str, count: np.ndarray, total: np.ndarray, simpler: np.ndarray) -> np.ndarray:
        """Set the strength that costs the fewest bits, the largest of equals, and return the same with it."""
        bits = [-np.log2(_smoothed(count, total, simpler, strength)).sum() for strength in STRENGTHS]
        setattr(self, name, float(STRENGTHS[np.argmin(bits)]))
        return self.smooth(name, count, total, simpler)


# (name of the predictor, n(context, code), n(context), p_simpler(code)), arrays [M] -> its probabilities [M]
Smooth = Callable[[str, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Counts:
    """Holds how often each code follows each context in training."""

    def __init__(self, at: Positions, num_codes: int, num_classes: int) -> None:
        self.num_codes, self.num_classes = num_codes, num_classes
        self._histogram = _Table(np.zeros_like(at.codes), at.codes, num_codes)
        self._label = _Table(at.labels, at.codes, num_codes) if num_classes else self._histogram
        self._above, self._left = _Table(at.above, at.codes, num_codes), _Table(at.left, at.codes, num_codes)
        self._pairs, pairs = np.unique(self._pair_key(at), return_inverse=True)
        self._both = _Table(pairs, at.codes, num_codes)

    def probabilities(self, at: Positions, smooth: Smooth) -> Probabilities:
        """Return the probability of each code, from the simplest predictor to the one that knows most."""
        uniform = np.full(len(at.codes), 1 / self.num_codes)
        histogram = smooth("histogram", *self._histogram.look_up(np.zeros_like(at.codes), at.codes), uniform)
        given_label = smooth("given_label", *self._label.look_up(at.labels, at.codes), histogram)
        above = smooth("above", *self._above.look_up(at.above, at.codes), histogram)
        left = smooth("left", *self._left.look_up(at.left, at.codes), histogram)
        both = smooth("above_and_left", *self._both.look_up(self._pair_index(at), at.codes), (above + left) / 2)
        return Probabilities(histogram=histogram, given_label=given_label, above_and_left=both)

    def _pair_key(self, at: Positions) -> np.ndarray:
        return at.above * (self.num_codes + 1) + at.left

    def _pair_index(self, at: Positions) -> np.ndarray:
        """Return the index of the two neighbours among the pairs that occur in training, their number for others."""
        index, is_known = _find(self._pairs, self._pair_key(at))
        return np.where(is_known, index, len(self._pairs))


class _Table:
    """Counts contexts and codes [M], sparsely: in sorted arrays of those that occur."""

    def __init__(self, contexts: np.ndarray, codes: np.ndarray, num_codes: int) -> None:
        self._num_codes = num_codes
        self._keys, self._counts = np.unique(contexts * num_codes + codes, return_counts=True)
        self._contexts, first = np.unique(self._keys // num_codes, return_index=True)
        self._totals = np.add.reduceat(self._counts, first)

    def look_up(self, contexts: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return n(context, code) and n(context), [M] each."""
        return (
            _counts_at(self._keys, self._counts, contexts * self._num_codes + codes),
            _counts_at(self._contexts, self._totals, contexts),
        )


def _find(ascending: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each of `values` [M] is, and whether it is there at all."""
    index = np.searchsorted(ascending, values).clip(max=len(ascending) - 1)
    return index, ascending[index] == values


def _counts_at(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the counts of the `wanted` keys [M], 0 for those that do not occur."""
    index, is_known = _find(keys, wanted)
    return np.where(is_known, counts[index], 0)


def _smoothed(count: np.ndarray, total: np.ndarray, simpler: np.ndarray, strength: float) -> np.ndarray:
    return (count + strength * simpler) / (total + strength)


def positions_of(codes: np.ndarray, labels: np.ndarray | None, num_codes: int) -> Positions:
    """Return codes [N,H,W] and labels [N], position by position."""
    grids = codes.astype(np.int64)
    above, left = np.full_like(grids, num_codes), np.full_like(grids, num_codes)
    above[:, 1:], left[:, :, 1:] = grids[:, :-1], grids[:, :, :-1]
    named = np.zeros(len(grids), dtype=np.int64) if labels is None else labels.astype(np.int64)
    return Positions(codes=grids.ravel(), labels=named.repeat(grids[0].size), above=above.ravel(), left=left.ravel())
