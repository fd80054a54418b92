"""The learning rate of a step, the items of its batch and its random numbers: functions of the step and the seed.

So nothing of them is saved, and any number of processes may share a batch: each takes a slice.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from ..runtime.device import manual_seed, torch_seed

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


class StepRandomness:
    """The random numbers of each step of a run, and of each item of its batch.

    Args:
        seed: of the run.
        batch_size: items a step, of all processes.
    """

    def __init__(self, seed: int, batch_size: int) -> None:
        self.seed, self.batch_size = seed, batch_size

    def begin(self, step: int) -> None:
        """Set torch's generators to what they are in this step, in every process and whatever came before."""
        manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed}/{step}".encode()).digest()[:8], "big"))

    def keys(self, step: int) -> Tensor:
        """Return the key of each item of the batch of a step, int64 [batch_size] in [0, 2^62)."""
        return torch.from_numpy(np.random.default_rng([self.seed, step, 1]).integers(2**62, size=self.batch_size))
