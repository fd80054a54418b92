"""Rows of many: all where they are few, else from the first to the last in steps that differ by one at most."""

import numpy as np
import pytest

from pipeline.images.rows import evenly_spaced


@pytest.mark.parametrize("count", [1, 2, 7, 16, 17, 1000, 49_999])
@pytest.mark.parametrize("most", [1, 2, 7, 16, 100])
def test_evenly_spaced(count: int, most: int) -> None:
    rows = evenly_spaced(count, most)
    assert rows.dtype == np.int64
    assert len(rows) == min(count, most)
    assert rows[0] == 0
    assert rows[-1] == (0 if most == 1 else count - 1)
    steps = np.diff(rows)
    assert (steps > 0).all()
    assert max(steps, default=1) - min(steps, default=1) <= 1


def test_as_many_as_there_are_is_all() -> None:
    for count in range(1, 3000):
        assert np.array_equal(evenly_spaced(count, count + 5), np.arange(count))
