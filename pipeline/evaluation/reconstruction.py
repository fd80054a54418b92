"""How well a model reconstructs images, and how it uses its codes.

Legend: n images, C channels, H' W' image, H W grid of codes, K codes.
"""

import math
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, kw_only=True)
class MeasuredDecoders:
    """What is known once the images of a split are encoded once, and decoded by one decoder or by two."""

    numbers: ReconstructionNumbers  # of the first decoder
    other: ReconstructionNumbers | None  # of the second decoder, None if there is one alone
    codebook: CodebookHealth | None  # None for a model without codes


def measure_reconstruction(
    model: VQVAE | Baseline, split: ImageSplit, indices: np.ndarray | None = None
) -> tuple[ReconstructionNumbers, CodebookHealth | None]:
    """Reconstruct the images of a split, by default all, in float32: `measure_decoders` of one decoder."""
    measured = measure_decoders(model, None, split, indices)
    return measured.numbers, measured.codebook


def measure_decoders(
    model: VQVAE | Baseline,
    other: VQVAE | None,
    split: ImageSplit,
    indices: np.ndarray | None = None,
    *,
    progress: bool = False,
    on_codes: Callable[[Tensor], None] | None = None,
    on_errors: Callable[[Tensor], None] | None = None,
) -> MeasuredDecoders:
    """Reconstruct the images of a split, in float32; each is encoded once.

    Args:
        model: put into `eval()` mode for the duration.
        other: the same encoder and codebook with another decoder (`VQVAE.with_decoder`), in `eval()` mode, which
            decodes the same codes; None to measure `model` alone.
        split: the images.
        indices: the rows [n] to measure; by default all.
        progress: whether to show a progress bar.
        on_codes: called with the codes int64 [n,H,W] of each batch in order, the same codes that export-codes writes;
            never called for a model without codes.
        on_errors: called with the sum of the squared errors of each image by `model`, float32 [n], of each batch in
            order.
    """
    rows = np.arange(len(split)) if indices is None else indices
    models = [model] if other is None else [model, other]
    squared_errors = np.zeros(len(models))
    histogram = torch.zeros(model.config.num_codes, dtype=torch.int64)
    results = run_in_blocks(model, _reconstruct(models), lambda start, stop: split.batch(rows[start:stop]), len(rows))
    shown = with_progress(results, len(rows), "evaluating", size=lambda result: len(result[0]), shown=progress)
    for errors, *codes in shown:  # [n,decoders]
        squared_errors += errors.double().sum(dim=0).numpy()
        if on_errors is not None:
            on_errors(errors[:, 0])
        for batch in codes:
            histogram += torch.bincount(batch.flatten(), minlength=len(histogram))
            if on_codes is not None:
                on_codes(batch)
    values = len(rows) * math.prod(split.images.shape[1:])
    first, *others = (numbers_of(float(error) / values, model.config.data_variance) for error in squared_errors)
    health = codebook_health(histogram) if isinstance(model, VQVAE) else None
    return MeasuredDecoders(numbers=first, other=others[0] if others else None, codebook=health)


def numbers_of(mse: float, data_variance: float) -> ReconstructionNumbers:
    """Return the numbers of a mean squared error, for a model whose training images have this variance."""
    return ReconstructionNumbers(mse=mse, psnr=psnr_of(mse), nmse=mse / data_variance)


def psnr_of(mse: float) -> float:
    """Return the PSNR in dB of a mean squared error of values in [0,1]; at most 120."""
    return -10 * math.log10(max(mse, 1e-12))


def _reconstruct(models: Sequence[VQVAE | Baseline]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function: images [n,C,H',W'] -> squared errors [n,models], and of models with codes also codes [n,H,W].

    All models have the encoder of the first.
    """

    def compute(images: Tensor) -> tuple[Tensor, ...]:
        latents = models[0].encode(images)
        decoded = (model.decode(latents) for model in models)
        errors = torch.stack([(each - images).square().sum(dim=(1, 2, 3)) for each in decoded], dim=1)
        return (errors, latents) if isinstance(models[0], VQVAE) else (errors,)

    return compute
