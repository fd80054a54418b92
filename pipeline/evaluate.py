"""The numbers: how well a tokenizer reconstructs, how it uses its codes, and how well a prior predicts them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prior import GatedPixelCNN
from prior.objective import bits_per_dim, grid_bits
from prior.sampling import evaluating
from tokenizer import VQVAE, Baseline

from .errors import InputError
from .health import CodebookHealth, codebook_health
from .loading import TrainedPrior, load_pair, load_trained_autoencoder
from .sources import ImageSplit
from .stored_images import images_of, part_of

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class ReconstructionNumbers:
    mse: float  # mean squared error of values in [0,1]
    psnr: float  # dB, of that mean error
    nmse: float  # mse / variance of all pixels of the training images


def measure_reconstruction(
    model: VQVAE | Baseline, split: ImageSplit, indices: np.ndarray | None = None, *, progress: bool = False
) -> tuple[ReconstructionNumbers, CodebookHealth | None]:
    """Reconstruct every image of a split (or those at `indices`), in float32; a model without codes has no codebook."""
    device = next(model.parameters()).device
    squared_error, values = 0.0, 0
    histogram = torch.zeros(model.config.num_codes, dtype=torch.int64)
    with torch.no_grad(), evaluating(model):
        for rows in _batches(np.arange(len(split)) if indices is None else indices, progress):
            images = split.batch(rows).to(device)
            latents = model.encode(images)
            error = (model.decode(latents) - images).square().sum(dim=(1, 2, 3)).cpu().double().sum()
            squared_error, values = squared_error + float(error), values + images.numel()
            if isinstance(model, VQVAE):
                histogram += torch.bincount(latents.flatten().cpu(), minlength=len(histogram))
    mse = squared_error / values
    numbers = ReconstructionNumbers(mse=mse, psnr=psnr_of(mse), nmse=mse / model.config.data_variance)
    return numbers, codebook_health(histogram) if isinstance(model, VQVAE) else None


def psnr_of(mse: float) -> float:
    """dB, of a mean squared error of values in [0,1]; at most 120."""
    return -10 * math.log10(max(mse, 1e-12))


def measure_prior(prior: GatedPixelCNN, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Bits per code over all batches of codes [B,H,W] and labels [B]; float32, exact for any batch sizes."""
    device = next(prior.parameters()).device
    bits, count = 0.0, 0
    with torch.no_grad(), evaluating(prior):
        for codes, labels in batches:
            codes = codes.to(device)
            logits = prior(codes, labels.to(device) if prior.config.num_classes else None)
            bits, count = bits + float(grid_bits(logits, codes).sum()), count + codes.numel()
    return bits / count


def evaluate(
    tokenizer_folder: Path,
    prior_folder: Path | None = None,
    *,
    data: str | None = None,
    data_root: str | None = None,
    split: str = "test",
    device: str = "auto",
) -> dict[str, Any]:
    """All numbers of a tokenizer, and of a prior if one is named, on a split of `data` (by default the tokenizer's).

    Raises:
        InputError: a checkpoint or the images cannot be used, or the prior was trained on another tokenizer's codes.
    """
    pair = None if prior_folder is None else load_pair(tokenizer_folder, prior_folder, device)
    trained = load_trained_autoencoder(tokenizer_folder, device) if pair is None else pair[0]
    images = images_of(trained.info, data=data, data_root=data_root)
    part = part_of(images, split)
    numbers, health = measure_reconstruction(trained.model, part, progress=True)
    result = {"data": images.source, "split": split, "images": len(part), **vars(numbers)}
    if health is not None:
        result |= {"codes_used": health.codes_used, "perplexity": health.perplexity, "codebook": health.verdict}
    if pair is not None:
        tokenizer, prior = pair
        labels = labels_for(prior, images.class_names, part.labels)
        device_ = next(tokenizer.model.parameters()).device
        bits = measure_prior(prior.model, _encoded(tokenizer.model, part, labels, device_))
        size = tokenizer.info.preprocessing
        shape = (size["channels"], size["height"], size["width"])
        result |= {"bits_per_code": bits, "bits_per_dim": bits_per_dim(bits, tokenizer.grid, shape)}
    return result


def _encoded(
    tokenizer: VQVAE, split: ImageSplit, labels: np.ndarray, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    for rows in _batches(np.arange(len(split)), progress=True):
        yield tokenizer.encode(split.batch(rows).to(device)), torch.from_numpy(labels[rows])


def labels_for(prior: TrainedPrior, found: tuple[str, ...], labels: np.ndarray) -> np.ndarray:
    """The labels of a data set in the prior's numbering, matched by class name."""
    known = prior.info.class_names
    if prior.model.config.num_classes == 0:
        return labels
    unknown = sorted(set(found) - set(known))
    if unknown or not found or (labels < 0).any():
        raise InputError(
            expected=f"images labelled with the prior's classes ({', '.join(known)})",
            got=f"the class {unknown[0]}" if unknown else "images without labels",
            do="use images with those classes, or leave --prior away",
        )
    return np.array([known.index(name) for name in found], dtype=np.int64)[labels]


def _batches(indices: np.ndarray, progress: bool) -> Iterable[np.ndarray]:
    starts = range(0, len(indices), BATCH)
    bar = tqdm(starts, unit="batch", desc="evaluating", disable=not progress, leave=False, dynamic_ncols=True)
    return (indices[start : start + BATCH] for start in bar)
