"""How well a model reconstructs images, and how it uses its codes.

Legend: n images, C channels, H' W' image, H W grid of codes, K codes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenizer import VQVAE, Baseline

from ..images.image_set import ImageSplit
from ..models.inference import run_in_blocks
from ..runtime.progress import with_progress
from .codebook_health import CodebookHealth, codebook_health


@dataclass(frozen=True, kw_only=True)
class ReconstructionNumbers:
    """The reconstruction error of a model over a set of images."""

    mse: float  # mean squared error of values in [0,1]
    psnr: float  # dB, of that mean error
    nmse: float  # mse / variance of all pixels of the training images

    @classmethod
    def of(cls, mse: float, data_variance: float) -> "ReconstructionNumbers":
        """Return the numbers of a mean squared error."""
        return cls(mse=mse, psnr=psnr_of(mse), nmse=mse / data_variance)


def measure_reconstruction(
    model: VQVAE | Baseline,
    split: ImageSplit,
    indices: np.ndarray | None = None,
    *,
    progress: bool = False,
    on_codes: Callable[[Tensor], None] | None = None,
    on_errors: Callable[[Tensor], None] | None = None,
) -> tuple[ReconstructionNumbers, CodebookHealth | None]:
    """Reconstruct the images of a split, in float32; each is encoded once.

    Args:
        model: put into `eval()` mode for the duration.
        split: the images.
        indices: the rows [n] to measure; by default all.
        progress: whether to show a progress bar.
        on_codes: called with the codes int64 [n,H,W] of each batch in order, the same codes that export-codes writes;
            never called for a model without codes.
        on_errors: called with the sum of the squared errors of each image, float32 [n], of each batch in order.

    Returns:
        The error, and the health of the codebook, None for a model without codes.
    """
    rows = np.arange(len(split)) if indices is None else indices
    squared_error, histogram = 0.0, torch.zeros(model.config.num_codes, dtype=torch.int64)
    results = run_in_blocks(model, _reconstruct(model), lambda start, stop: split.batch(rows[start:stop]), len(rows))
    shown = with_progress(results, len(rows), "evaluating", size=lambda result: len(result[0]), shown=progress)
    for errors, *codes in shown:
        squared_error += float(errors.double().sum())
        if on_errors is not None:
            on_errors(errors)
        for batch in codes:
            histogram += torch.bincount(batch.flatten(), minlength=len(histogram))
            if on_codes is not None:
                on_codes(batch)
    mse = squared_error / (len(rows) * math.prod(split.images.shape[1:]))
    numbers = ReconstructionNumbers.of(mse, model.config.data_variance)
    return numbers, codebook_health(histogram) if isinstance(model, VQVAE) else None


def psnr_of(mse: float) -> float:
    """Return the PSNR in dB of a mean squared error of values in [0,1]; at most 120."""
    return -10 * math.log10(max(mse, 1e-12))


def _reconstruct(model: VQVAE | Baseline) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function: images [n,C,H',W'] -> squared errors [n], and for a model with codes also codes [n,H,W]."""

    def compute(images: Tensor) -> tuple[Tensor, ...]:
        latents = model.encode(images)
        errors = (model.decode(latents) - images).square().sum(dim=(1, 2, 3))
        return (errors, latents) if isinstance(model, VQVAE) else (errors,)

    return compute
