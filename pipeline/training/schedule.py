"""The learning rate of a step and the items of its batch, which depend on the number of the step alone."""

import math

import numpy as np

from ..runtime.device import torch_seed

WARMUP_STEPS = 100


def learning_rate_at(step: int, *, peak: float, steps: int, decays: bool = True) -> float:
    """Return the learning rate of a step, counted from 0: linear to `peak`, then half a cosine to 0 after `steps`.

    One that does not decay stays at `peak`.
    """
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    if not decays:
        return peak
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class DataOrder:
    """The order of the training items: another permutation each epoch, joined so that a batch may span two epochs."""

    def __init__(self, num_items: int, batch_size: int, seed: int) -> None:
        self.num_items, self.batch_size, self.seed = num_items, batch_size, torch_seed(seed)
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Return the indices [batch_size] of a step, int64 in [0, num_items)."""
        position, pieces, missing = step * self.batch_size, [], self.batch_size
        while missing:
            epoch, offset = divmod(position, self.num_items)
            piece = self._permutation_of(epoch)[offset : offset + missing]
            pieces.append(piece)
            position, missing = position + len(piece), missing - len(piece)
        return np.concatenate(pieces)

    def _permutation_of(self, epoch: int) -> np.ndarray:
        """Return the order [num_items] of the items in an epoch; the last one asked for is kept."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_items)
        return self._permutation
