"""Which images of a split the picture of an evaluation shows, with what the models make of them.

Legend: n images shown, N in the split, H W grid of codes.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tokenizer import VQVAE, Baseline

from ..images.image_set import ImageSplit
from ..images.preprocessing import to_uint8
from ..models.inference import reconstruct_images
from ..models.loading import TrainedPrior
from .likelihood import code_bits
from .surprise_picture import Section, rows_to_show, surprise_picture


@dataclass(frozen=True, kw_only=True)
class PriorInput:
    """The codes of a split and the prior over them."""

    prior: TrainedPrior
    codes: np.ndarray  # [N,H,W]
    labels: np.ndarray  # [N] in the prior's numbering


def evaluation_picture(
    title: str,
    model: VQVAE | Baseline,
    folder: Path,
    split: ImageSplit,
    errors: np.ndarray,
    measured: PriorInput | None,
) -> Image.Image:
    """Return the picture of an evaluation, RGB.

    Args:
        title: the line above all.
        model: that reconstructs the images.
        folder: of the checkpoint of its decoder, for messages.
        split: the images.
        errors: mean squared error [N] of each / variance of the training pixels.
        measured: the prior and the codes of the split; None to show no bits.

    Raises:
        InputError: the decoder gives NaN or infinity.
    """
    sections = list[Section]()
    for name, rows in rows_to_show(errors):
        images = to_uint8(split.batch(rows))
        section = Section(
            title=name,
            images=images.numpy(),
            reconstructions=reconstruct_images(model, images, folder=folder).numpy(),
            errors=errors[rows],
            bits=_bits(measured, rows) if not sections else None,
        )
        sections.append(section)
    return surprise_picture(title, sections, None if measured is None else math.log2(model.config.num_codes))


def _bits(measured: PriorInput | None, rows: np.ndarray) -> np.ndarray | None:
    """Return what each code of the images `rows` [n] costs, [n,H,W] in bits, if there is a prior."""
    if measured is None:
        return None
    return code_bits(measured.prior.model, measured.codes[rows], measured.labels[rows])
