"""Which of many images to take where not all are needed."""

import numpy as np


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Return which of `count` rows to take: evenly spaced, `most` at most (both 1 or more), int64 and ascending.

    (The first ones would be of a few classes only, where images are in order.)
    """
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)
