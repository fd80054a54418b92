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

from ..models.shares import map_on_all
from ..runtime.process_group import ALONE, ProcessGroup
from ..runtime.progress import with_progress

BATCH = 256  # grids at a time, or fewer where these would not fit memory


def measure_prior(
    prior: GatedPixelCNN, batches: Iterable[tuple[Tensor, Tensor]], *, group: ProcessGroup = ALONE
) -> float:
    """Return the mean bits per code over all batches of codes [n,H,W] and labels [n], in float32.

    Every code counts alike, however the batches are divided; one that is large is run over in parts.

    Args:
        prior: put into `eval()` mode for the duration.
        batches: the same ones in every process of the group, each of which iterates over all.
        group: processes that take turns with the batches; each must call this, and gets the number of one process.
    """
    with torch.no_grad(), evaluating(prior):
        measured = map_on_all(lambda batch: _bits_of_parts(prior, *batch), batches, group)
    bits, count = 0.0, 0
    for part in (part for batch in measured for part in batch):
        bits, count = bits + part[0], count + part[1]
    return bits / count


def _bits_of_parts(prior: GatedPixelCNN, codes: Tensor, labels: Tensor) -> list[tuple[float, int]]:
    """Return the bits of a batch and how many codes these are, for each part of it that fits memory."""
    device, found = next(prior.parameters()).device, []
    at_once = pairs_at_once(prior, codes.shape[1:].numel())
    for grids, named in zip(codes.split(at_once), labels.split(at_once), strict=True):
        grids = grids.to(device)
        logits = prior(grids, named.to(device) if prior.config.num_classes else None)
        found.append((float(grid_bits(logits, grids).sum()), grids.numel()))
    return found


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
