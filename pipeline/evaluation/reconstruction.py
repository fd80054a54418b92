"""How well a model reconstructs images, and how it uses its codes.

Legend: n images, C channels, H' W' image, H W grid of codes, K codes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenizer import VQVAE, Baseline

from ..codes.manifest import code_dtype
from ..images.image_set import ImageSplit
from ..models.inference import blocks_of_all, run_in_blocks
from ..models.shares import of_process
from ..runtime.process_group import ALONE, ProcessGroup
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


@dataclass(frozen=True)
class _Batch:
    """What is known about the images of a batch, as small as it can be: it is sent to other processes."""

    error_sums: np.ndarray  # float64 [decoders], of the squared errors of all images
    errors: Tensor  # float32 [n], the sum of the squared errors of each image by the first decoder
    codes: np.ndarray | None  # [n,H,W], None for a model without codes


def measure_reconstruction(
    model: VQVAE | Baseline, split: ImageSplit, indices: np.ndarray | None = None, *, group: ProcessGroup = ALONE
) -> tuple[ReconstructionNumbers, CodebookHealth | None]:
    """Reconstruct the images of a split, by default all, in float32: `measure_decoders` of one decoder."""
    measured = measure_decoders(model, None, split, indices, group=group)
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
    group: ProcessGroup = ALONE,
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
        group: processes that share the images; each must call this, and gets the numbers, codes and errors of all.
    """
    rows = np.arange(len(split)) if indices is None else indices
    models = [model] if other is None else [model, other]
    squared_errors = np.zeros(len(models))
    histogram = torch.zeros(model.config.num_codes, dtype=torch.int64)

    def share(start: int, stop: int) -> Iterator[_Batch]:
        found = _measured(models, split, rows[start:stop])
        words = of_process("evaluating", group)
        return with_progress(found, stop - start, words, size=lambda batch: len(batch.errors), shown=progress)

    for batch in blocks_of_all(share, len(rows), group):
        squared_errors += batch.error_sums
        if on_errors is not None:
            on_errors(batch.errors)
        if batch.codes is not None:
            codes = torch.from_numpy(batch.codes.astype(np.int64))
            histogram += torch.bincount(codes.flatten(), minlength=len(histogram))
            if on_codes is not None:
                on_codes(codes)
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


def _measured(models: Sequence[VQVAE | Baseline], split: ImageSplit, rows: np.ndarray) -> Iterator[_Batch]:
    """Yield what is known about the images `rows` [n], batch by batch in order."""
    dtype = code_dtype(models[0].config.num_codes)
    results = run_in_blocks(
        models[0], _reconstruct(models), lambda start, stop: split.batch(rows[start:stop]), len(rows)
    )
    for errors, *codes in results:  # [n,decoders]
        yield _Batch(
            error_sums=errors.double().sum(dim=0).numpy(),
            errors=errors[:, 0].clone(),
            codes=codes[0].numpy().astype(dtype) if codes else None,
        )


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
