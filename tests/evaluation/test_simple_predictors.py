"""Simple predictors against counts in dictionaries, one position at a time; and what they must be good for."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple

import numpy as np
import pytest

from pipeline.evaluation import simple_predictors
from pipeline.evaluation.neighbour_counts import STRENGTHS, Strengths
from pipeline.evaluation.simple_predictors import (
    ONE_IN,
    SimpleBits,
    SimplePredictors,
    in_words,
    share_explained,
    share_in_words,
    training_rows,
)

NAMES = ("histogram", "given_label", "above", "left", "above_and_left")
OUTSIDE = "outside"


def grids_of(
    count: int, num_codes: int, *, height: int = 3, width: int = 5, classes: int = 3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Grids whose codes depend on the label and on both neighbours: codes [n,H,W] and labels [n]."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    codes = random.integers(0, num_codes, (count, height, width))
    for row, column in np.ndindex(height, width):
        near = codes[:, row - 1, column] * (row > 0) + codes[:, row, column - 1] * (column > 0) + labels
        keep = random.random(count) < 0.7
        codes[:, row, column] = np.where(keep, near % num_codes, codes[:, row, column])
    return codes, labels


# The oracle


def contexts_of(grid: np.ndarray, label: int, row: int, column: int) -> dict[str, object]:
    above = int(grid[row - 1, column]) if row else OUTSIDE
    left = int(grid[row, column - 1]) if column else OUTSIDE
    values = [None, label, above, left, (above, left)]
    return dict(zip(NAMES, values, strict=True))


class Oracle:
    """The same predictors, from dictionaries of counts."""

    def __init__(self, codes: np.ndarray, labels: Sequence[int], num_codes: int) -> None:
        self.num_codes = num_codes
        self.pairs, self.contexts = Counter[object](), Counter[object]()
        for grid, label in zip(codes, labels, strict=True):
            for row, column in np.ndindex(grid.shape):
                for name, context in contexts_of(grid, int(label), row, column).items():
                    self.pairs[name, context, int(grid[row, column])] += 1
                    self.contexts[name, context] += 1

    def probability(self, code: int, contexts: dict[str, object], strengths: Strengths, name: str) -> float:
        def of(simpler: str) -> float:
            return self.probability(code, contexts, strengths, simpler)

        if name == "histogram":
            low = 1 / self.num_codes
        elif name == "above_and_left":
            low = (of("above") + of("left")) / 2
        else:
            low = of("histogram")
        strength = getattr(strengths, name)
        count, total = self.pairs[name, contexts[name], code], self.contexts[name, contexts[name]]
        return (count + strength * low) / (total + strength)

    def bits(self, codes: np.ndarray, labels: Sequence[int], strengths: Strengths, name: str) -> float:
        found = []
        for grid, label in zip(codes, labels, strict=True):
            for row, column in np.ndindex(grid.shape):
                contexts = contexts_of(grid, int(label), row, column)
                found.append(-math.log2(self.probability(int(grid[row, column]), contexts, strengths, name)))
        return math.fsum(found) / len(found)


@pytest.mark.parametrize("num_codes", [2, 7])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_all_bits_against_dictionaries(num_codes: int, count: int) -> None:
    """On grids of another size than those counted, of a label that does not occur in training, and of 2 batches."""
    codes, labels = grids_of(count, num_codes, classes=2)
    other, other_labels = grids_of(6, num_codes, height=4, width=2, seed=1)
    assert 2 in other_labels
    predictors = SimplePredictors.fit(codes.astype(np.uint8), labels, num_codes, 3)
    oracle = Oracle(codes, labels, num_codes)
    found = predictors.bits(other.astype(np.uint16), other_labels)
    assert found.uniform == math.log2(num_codes)
    expected = {n: oracle.bits(other, other_labels, predictors.strengths, n) for n in NAMES}
    assert found.histogram == pytest.approx(expected["histogram"], rel=1e-12)
    assert found.histogram_given_label == pytest.approx(expected["given_label"], rel=1e-12)
    assert found.above_and_left == pytest.approx(expected["above_and_left"], rel=1e-12)
    batches = [(other[:1], other_labels[:1]), (other[1:], other_labels[1:])]
    assert astuple(predictors.bits_of_batches(batches)) == pytest.approx(astuple(found), rel=1e-12)


def test_the_strengths_are_those_that_predict_every_fourth_grid_best_from_the_others() -> None:
    """One after the other, from the simplest; of all in the list."""
    codes, labels = grids_of(40, 7)
    held_out = np.arange(40) % ONE_IN == 1
    oracle, found = Oracle(codes[~held_out], labels[~held_out], 7), SimplePredictors.fit(codes, labels, 7, 3).strengths
    tried = Strengths(histogram=1.0)
    for name in NAMES:
        bits = {}
        for strength in STRENGTHS:
            setattr(tried, name, float(strength))
            bits[float(strength)] = oracle.bits(codes[held_out], labels[held_out], tried, name)
        setattr(tried, name, min(bits, key=lambda strength: bits[strength]))
    assert found == tried
    assert len(set(asdict(found).values())) > 2


def test_one_grid_adds_one_to_each_count_and_nearly_ignores_the_context() -> None:
    codes = np.array([[[0, 1, 1]]])
    found = SimplePredictors.fit(codes, np.array([0]), 4, 1).bits(np.array([[[1, 3]]]), np.array([0]))
    expected = -(math.log2(3 / 7) + math.log2(1 / 7)) / 2
    assert found.histogram == pytest.approx(expected, rel=1e-12)
    assert found.histogram_given_label == pytest.approx(expected, abs=1e-5)
    assert found.above_and_left == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("name", ["histogram", "histogram_given_label", "above_and_left"])
def test_the_probabilities_of_all_grids_sum_to_one(name: str, count: int) -> None:
    """Of all 2x2 grids of 3 codes, of which one does not occur in training: so they do at every position."""
    codes, labels = grids_of(count, 2, classes=1)
    predictors = SimplePredictors.fit(codes, labels, 3, 2)
    for label in (0, 1):
        bits = [
            getattr(predictors.bits(np.reshape(grid, (1, 2, 2)), np.array([label])), name)
            for grid in itertools.product(range(3), repeat=4)
        ]
        assert math.fsum(2 ** (-4 * each) for each in bits) == pytest.approx(1, rel=1e-12)


def test_without_labels_there_is_no_histogram_given_the_label() -> None:
    codes, labels = grids_of(5, 7)
    with_labels, without = (
        SimplePredictors.fit(codes, chosen, 7, classes).bits(codes, chosen)
        for chosen, classes in ((labels, 3), (None, 0))
    )
    assert without.histogram_given_label is None
    assert with_labels.histogram_given_label is not None
    assert astuple(without)[:2] == astuple(with_labels)[:2]
    assert without.above_and_left == with_labels.above_and_left
    ignored = SimplePredictors.fit(codes, np.full(5, -1), 7, 0).bits(codes, np.full(5, -1))
    assert ignored == without


# What they are good for


@pytest.mark.parametrize("count", [1, 2, 5, 20, 100])
def test_few_grids_are_never_much_worse_than_the_histogram(count: int) -> None:
    """Of codes without any order, where a neighbour tells nothing; Witten-Bell is .5 bits worse at 20."""
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(64))
    codes = random.choice(64, size=(count + 50, 6, 8), p=shares)
    labels = random.integers(0, 4, count + 50)
    predictors = SimplePredictors.fit(codes[:count], labels[:count], 64, 4)
    found = predictors.bits(codes[count:], labels[count:])
    entropy = -float((shares * np.log2(shares)).sum())
    assert found.above_and_left < found.histogram + 0.03
    assert found.histogram_given_label is not None
    assert found.histogram_given_label < found.histogram + 0.03
    assert found.histogram < (7 if count < 20 else entropy + 0.1)


def test_what_the_neighbours_tell_is_found() -> None:
    """Each code is the sum of both neighbours in 9 of 10 cases: one of them alone tells nothing."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (600, 6, 8))
    for row, column in itertools.product(range(1, 6), range(1, 8)):
        told = (codes[:, row - 1, column] + codes[:, row, column - 1]) % 16
        codes[:, row, column] = np.where(random.random(600) < 0.9, told, codes[:, row, column])
    found = SimplePredictors.fit(codes[:500], None, 16).bits(codes[500:], None)
    likely = 0.9 + 0.1 / 16
    inside = -(likely * math.log2(likely) + (1 - likely) * math.log2((1 - likely) / 15))
    expected = (13 * 4 + 35 * inside) / 48
    assert found.histogram == pytest.approx(4, abs=0.01)
    assert expected < found.above_and_left < expected + 0.1


# Large numbers


@pytest.mark.parametrize("num_codes", [2**16, 2**24, 2**31])
def test_the_number_of_codes_costs_neither_memory_nor_the_right_counts(num_codes: int) -> None:
    """The highest codes of many: the same as those of few, but for what is never seen."""
    codes = np.array([[[0, 1, 0, 1], [1, 0, 1, 0]]] * 8)
    high = np.where(codes == 0, num_codes - 1, num_codes - 2).astype(np.int64)
    predictors = SimplePredictors.fit(high, None, num_codes)
    found = predictors.bits(high[:1], None)
    oracle = Oracle(high, [0] * 8, num_codes)
    assert found.above_and_left == pytest.approx(oracle.bits(high[:1], [0], predictors.strengths, "above_and_left"))
    assert found.uniform == math.log2(num_codes)
    assert 0 < found.above_and_left < found.histogram < found.uniform
    unseen = predictors.bits(np.zeros((1, 2, 2), dtype=np.int64), None)
    assert math.isfinite(unseen.above_and_left)
    assert unseen.histogram > found.uniform


def test_of_many_grids_some_are_counted_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_rows(9, 6).tolist() == list(range(9))
    assert training_rows(9, 6, 30).tolist() == [0, 2, 4, 6, 8]
    assert training_rows(9, 1000, 30).tolist() == [0, 8]
    assert training_rows(1, 1000, 30).tolist() == [0]
    codes, labels = grids_of(50, 7)
    monkeypatch.setattr(simple_predictors, "training_rows", lambda count, size, most=0: training_rows(count, size, 150))
    found = SimplePredictors.fit(codes, labels, 7, 3)
    monkeypatch.undo()
    rows = training_rows(50, 15, 150)
    expected = SimplePredictors.fit(codes[rows], labels[rows], 7, 3)
    assert len(rows) == 10
    assert (
        found.bits(codes, labels)
        == expected.bits(codes, labels)
        != SimplePredictors.fit(codes, labels, 7, 3).bits(codes, labels)
    )


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, labels = grids_of(20, 7)
    predictors = SimplePredictors.fit(codes, labels, 7, 3)
    whole = predictors.bits(codes, labels)
    for block in (1, 15, 46):
        monkeypatch.setattr(simple_predictors, "BLOCK", block)
        assert astuple(predictors.bits(codes, labels)) == pytest.approx(astuple(whole), rel=1e-12)


# Refusals and words


@pytest.mark.parametrize(
    ("codes", "labels", "message"),
    [
        (np.zeros((2, 3)), None, r"expected integer codes \[N,H,W\], at least one, got float64 \[2, 3\]"),
        (np.zeros((2, 3, 4)), None, "got float64"),
        (np.zeros((0, 3, 4), dtype=int), np.zeros(0, dtype=int), r"at least one, got int64 \[0, 3, 4\]"),
        (np.full((1, 1, 2), 7), np.array([0]), r"expected codes in \[0, 7\), got 7 to 7"),
        (np.full((1, 1, 2), -1), np.array([0]), r"expected codes in \[0, 7\), got -1 to -1"),
        (np.zeros((2, 1, 1), dtype=int), np.array([0]), r"expected 2 labels, got \[1\]"),
        (np.zeros((2, 1, 1), dtype=int), None, "expected 2 labels, got None"),
        (np.zeros((2, 1, 1), dtype=int), np.array([0, 3]), r"expected labels in \[0, 3\), got 0 to 3"),
        (np.zeros((2, 1, 1), dtype=int), np.array([-1, 0]), r"expected labels in \[0, 3\), got -1 to 0"),
    ],
)
def test_wrong_arguments_are_named(codes: np.ndarray, labels: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimplePredictors.fit(codes, labels, 7, 3)
    good = SimplePredictors.fit(*grids_of(3, 7), 7, 3)
    with pytest.raises(ValueError, match=message):
        good.bits(codes, labels)


def test_nothing_to_measure_and_too_many_codes() -> None:
    codes = np.zeros((1, 1, 1), dtype=int)
    with pytest.raises(ValueError, match="expected at least one code to measure, got none"):
        SimplePredictors.fit(codes, None, 2).bits_of_batches([])
    with pytest.raises(ValueError, match="different codes, got 2147483649"):
        SimplePredictors.fit(codes, None, 2**31 + 1)


def test_the_share_of_the_way_from_the_histogram_to_zero() -> None:
    assert share_explained(6.0, 8.0) == 0.25
    assert share_explained(8.0, 8.0) == 0
    assert share_explained(0.0, 8.0) == 1
    assert share_explained(9.0, 8.0) == -0.125
    assert share_explained(0.0, 0.0) == 0


def test_the_words() -> None:
    simple = SimpleBits(uniform=9.0, histogram=8.0, histogram_given_label=7.5, above_and_left=6.0)
    assert in_words(simple) == (
        "guessing 9.00 bits, histogram 8.00, given the label 7.50, code above and to the left 6.00"
    )
    no_labels = SimpleBits(uniform=9.0, histogram=8.0, histogram_given_label=None, above_and_left=6.0)
    assert in_words(no_labels) == "guessing 9.00 bits, histogram 8.00, code above and to the left 6.00"
    assert share_in_words(4.0, simple) == (
        "50 % of the way from the histogram to zero (code above and to the left: 25 %)"
    )
    assert share_in_words(8.1, simple) == "worse than the histogram, which costs 8.00 bits"
