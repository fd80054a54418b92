"""How well a prior predicts codes: on average, and each of them.

Legend: n grids in a batch, N in all, H W grid of codes.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from prior import GatedPixelCNN
from prior.objective import code_nats, grid_bits
from prior.posterior import pairs_at_once
from prior.sampling import evaluating

from ..runtime.progress import with_progress

BATCH = 256  # grids at a time, or fewer where these would not fit memory


def measure_prior(prior: GatedPixelCNN, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the mean bits per code over all batches of codes [n,H,W] and labels [n], in float32.

    Every code counts alike, however the batches are divided; one that is large is run over in parts.
    """
    device = next(prior.parameters()).device
    bits, count = 0.0, 0
    with torch.no_grad(), evaluating(prior):
        for batch in batches:
            at_once = pairs_at_once(prior, batch[0].shape[1:].numel())
            for codes, labels in zip(*(tensor.split(at_once) for tensor in batch), strict=True):
                codes = codes.to(device)
                logits = prior(codes, labels.to(device) if prior.config.num_classes else None)
                bits, count = bits + float(grid_bits(logits, codes).sum()), count + codes.numel()
    return bits / count


@torch.no_grad()
def code_bits(prior: GatedPixelCNN, codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return what each code costs: -log2 of its probability given those before it, float32 [N,H,W], in bits.

    Their mean is what `measure_prior` returns.

    Args:
        prior: put into `eval()` mode for the duration.
        codes: [N,H,W] of any integer type.
        labels: int64 [N] in the prior's numbering; ignored by a prior without classes.
    """
    device, bits = next(prior.parameters()).device, np.empty(codes.shape, dtype=np.float32)
    at_once = min(BATCH, pairs_at_once(prior, math.prod(codes.shape[1:])))
    with evaluating(prior):
        for start in range(0, len(codes), at_once):
            rows = slice(start, start + at_once)
            grids = torch.from_numpy(codes[rows].astype(np.int64)).to(device)
            named = torch.from_numpy(labels[rows]).to(device) if prior.config.num_classes else None
            bits[rows] = (code_nats(prior(grids, named), grids) / math.log(2)).numpy()
    return bits


def code_batches(codes: np.ndarray, labels: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the batches of codes [N,H,W] of any integer type and labels [N], as int64, with a progress bar."""
    slices = (slice(start, start + BATCH) for start in range(0, len(codes), BATCH))
    batches = ((torch.from_numpy(codes[rows].astype(np.int64)), torch.from_numpy(labels[rows])) for rows in slices)
    return with_progress(batches, len(codes), "measuring the prior", size=lambda batch: len(batch[0]))
