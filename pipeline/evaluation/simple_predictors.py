"""What simple predictors of codes reach, to compare a prior with: they count, and know at most two neighbours.

Each predictor is a count of training codes, smoothed towards a simpler one (a Dirichlet prior, MacKay and Peto 1995):

    p(code | context) = (n(context, code) + s * p_simpler(code)) / (n(context) + s)

    histogram               no context, towards 1/K
    histogram given label   the label, towards the histogram
    above, left             one neighbour, towards the histogram
    above and left          both neighbours, towards the mean of the two with one

Outside the grid is a symbol of its own. The probabilities sum to 1 over the K codes, and a code that never occurred
costs finite bits. The strengths s, one for each predictor, are chosen on training grids: those that predict every
fourth grid best from the others. So with few grids a predictor keeps close to the simpler one. Witten-Bell smoothing,
which has no strength, is worse: 8.13 in place of 7.73 bits for 50,000 8x8 grids of 512 codes of CIFAR-10, and for 60 of
them half a bit worse than the histogram.

Legend: N grids, H W positions in a grid, M = N H W positions in all, K codes.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..images.rows import evenly_spaced
from .neighbour_counts import Counts, Positions, Strengths, positions_of

MOST_TRAINING_CODES = 2**21  # are counted: a few seconds, and at most some 300 MB
MOST_CODES_TO_CHOOSE = 2**19  # of them, those by which the strengths are chosen
BLOCK = 2**18  # codes measured at a time
MOST_DIFFERENT = 2**31  # K; a key of two neighbours is below (K + 1)^2 and has to fit into int64
ONE_IN = 4  # training grids, by which the strengths are chosen


@dataclass(frozen=True, kw_only=True)
class SimpleBits:
    """What a code costs on average with each simple predictor, in bits."""

    uniform: float  # guessing, log2 K
    histogram: float  # how often each code occurs in training
    histogram_given_label: float | None  # the same among images of the label; None without labels
    above_and_left: float  # given the code above and the one to the left


def share_explained(bits: float, histogram: float) -> float:
    """Return the share of the way from the bits per code of the histogram to zero that `bits` has gone.

    It is 1 - bits / histogram: 0 as good as the histogram, negative if worse; 0 if the histogram already costs nothing.
    """
    return 1 - bits / histogram if histogram > 0 else 0.0


def in_words(simple: SimpleBits) -> str:
    """Return the numbers in one line, such as `guessing 9.00 bits, histogram 8.66, ...`."""
    label = simple.histogram_given_label
    parts = [
        f"guessing {simple.uniform:.2f} bits",
        f"histogram {simple.histogram:.2f}",
        *([] if label is None else [f"given the label {label:.2f}"]),
        f"code above and to the left {simple.above_and_left:.2f}",
    ]
    return ", ".join(parts)


def share_in_words(bits: float, simple: SimpleBits) -> str:
    """Return how far `bits` per code are from the histogram to zero, beside the best of the simple predictors.

    Such as `18 % of the way from the histogram to zero (code above and to the left: 11 %)`.
    """
    if bits > simple.histogram:
        return f"worse than the histogram, which costs {simple.histogram:.2f} bits"
    own, neighbours = (100 * share_explained(each, simple.histogram) for each in (bits, simple.above_and_left))
    return f"{own:.0f} % of the way from the histogram to zero (code above and to the left: {neighbours:.0f} %)"


def training_rows(count: int, codes_in_grid: int, most_codes: int = MOST_TRAINING_CODES) -> np.ndarray:
    """Return which of `count` training grids are counted: evenly spaced, of at most `most_codes` codes, ascending.

    Two or more are counted, however large.
    """
    return evenly_spaced(count, max(2, most_codes // codes_in_grid))


class SimplePredictors:
    """The predictors of one set of training codes; `fit` makes them."""

    def __init__(self, counts: Counts, strengths: Strengths) -> None:
        self._counts, self.strengths = counts, strengths

    @classmethod
    def fit(
        cls, codes: np.ndarray, labels: np.ndarray | None, num_codes: int, num_classes: int = 0
    ) -> "SimplePredictors":
        """Count training codes. No random number is used.

        Takes some 3 s for MOST_TRAINING_CODES codes on one core, whatever K; of more codes, `training_rows` are used.

        Args:
            codes: [N,H,W] of any integer type, each in [0, num_codes); N at least 1.
            labels: [N], each in [0, num_classes); None if there are none.
            num_codes: K.
            num_classes: how many labels there are; with 0 the labels are ignored.

        Raises:
            ValueError: a code or a label is out of its range, there are none, or the shapes do not fit.
        """
        labels = labels if num_classes else None
        _check(codes, labels, num_codes, num_classes)
        rows = training_rows(len(codes), codes[0].size)
        codes, labels = codes[rows], None if labels is None else labels[rows]
        strengths = _choose_strengths(codes, labels, num_codes)
        return cls(Counts(positions_of(codes, labels, num_codes), num_codes, num_classes), strengths)

    def bits(self, codes: np.ndarray, labels: np.ndarray | None) -> SimpleBits:
        """Return the mean bits per code of each predictor on codes [N,H,W] and labels [N].

        If they are the training codes themselves, the predictors have seen each answer, and the numbers are too low.

        Raises:
            ValueError: a code or a label is out of its range, there are none, or the shapes do not fit.
        """
        return self.bits_of_batches([(codes, labels)])

    def bits_of_batches(self, batches: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> SimpleBits:
        """Return the same over batches of codes [n,H,W] and labels [n]; every code counts alike."""
        counts, total, measured = self._counts, np.zeros(3), 0
        for codes, labels in batches:
            labels = labels if counts.num_classes else None
            _check(codes, labels, counts.num_codes, counts.num_classes)
            for block in _blocks(codes, labels, counts.num_codes):
                found = counts.probabilities(block, self.strengths.smooth)
                total -= [np.log2(each).sum() for each in (found.histogram, found.given_label, found.above_and_left)]
                measured += len(block.codes)
        if measured == 0:
            raise ValueError("expected at least one code to measure, got none")
        histogram, given_label, above_and_left = (total / measured).tolist()
        return SimpleBits(
            uniform=math.log2(counts.num_codes),
            histogram=histogram,
            histogram_given_label=given_label if counts.num_classes else None,
            above_and_left=above_and_left,
        )


def _choose_strengths(codes: np.ndarray, labels: np.ndarray | None, num_codes: int) -> Strengths:
    """Return the strengths that predict every fourth grid best from the others.

    With one grid nothing can be chosen: the histogram adds one to each count, and the context is nearly ignored.
    """
    strengths = Strengths(histogram=num_codes)
    rows = training_rows(len(codes), codes[0].size, MOST_CODES_TO_CHOOSE)
    held_out = np.arange(len(rows)) % ONE_IN == 1
    if held_out.any():
        learned, other = (_of_rows(codes, labels, rows[mask], num_codes) for mask in (~held_out, held_out))
        num_classes = 0 if labels is None else 1 + int(labels.max())
        Counts(learned, num_codes, num_classes).probabilities(other, strengths.choose)
    return strengths


def _of_rows(codes: np.ndarray, labels: np.ndarray | None, rows: np.ndarray, num_codes: int) -> Positions:
    """Return the positions of some of the grids."""
    return positions_of(codes[rows], None if labels is None else labels[rows], num_codes)


def _blocks(codes: np.ndarray, labels: np.ndarray | None, num_codes: int) -> Iterator[Positions]:
    """Yield the positions of all grids, about BLOCK at a time."""
    size = max(1, BLOCK // codes[0].size)
    for start in range(0, len(codes), size):
        yield _of_rows(codes, labels, np.arange(start, min(start + size, len(codes))), num_codes)


def _check(codes: np.ndarray, labels: np.ndarray | None, num_codes: int, num_classes: int) -> None:
    """Raise ValueError unless codes [N,H,W] and labels [N] are what a predictor of these numbers takes."""
    if not 1 <= num_codes <= MOST_DIFFERENT:
        raise ValueError(f"expected 1 to {MOST_DIFFERENT} different codes, got {num_codes}")
    if codes.ndim != 3 or codes.size == 0 or codes.dtype.kind not in "iu":
        raise ValueError(f"expected integer codes [N,H,W], at least one, got {codes.dtype} {list(codes.shape)}")
    if not 0 <= int(codes.min()) <= int(codes.max()) < num_codes:
        raise ValueError(f"expected codes in [0, {num_codes}), got {codes.min()} to {codes.max()}")
    if num_classes and (labels is None or labels.shape != (len(codes),)):
        raise ValueError(f"expected {len(codes)} labels, got {None if labels is None else list(labels.shape)}")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"expected labels in [0, {num_classes}), got {labels.min()} to {labels.max()}")
