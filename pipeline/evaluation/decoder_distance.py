"""How far the pictures of a decoder are from real images, in the features of the tokenizer's own, frozen encoder.

The Frechet distance of the encoder's last hidden layer, of which every position of every image is a row: what is
compared is how patches look, and few images suffice. The training of a sharp decoder chooses the best of its
evaluations by this distance. A judge (judge_network.py) is another network: none chooses what it measures.

Legend: N images, C channels, H' W' image, H W grid of codes, D code dimension, F features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer import VQVAE

from ..images.image_set import ImageSplit
from ..images.rows import evenly_spaced
from ..models.inference import run_in_blocks_of_all
from ..runtime.process_group import ALONE, ProcessGroup
from .distances import frechet_distance
from .reconstruction import ReconstructionNumbers, numbers_of

MOST_POSITIONS = 2**16  # rows of features: 1,024 grids of 8x8
SMALLEST_DEVIATION = 0.01  # of a feature, in units of the mean one: what real images leave constant is not everything


@dataclass(frozen=True, kw_only=True)
class DecoderNumbers:
    """How good a decoder is."""

    distance: float  # squared Frechet distance, 0 or more; each feature in units of its deviation over real images
    error: ReconstructionNumbers


class DecoderDistance:
    """Measures decoders for the codes of one tokenizer, always on the same images.

    Args:
        tokenizer: its encoder and codebook are used; its decoder is not.
        images: a split.
        rows: [n], the images to measure on; of more than MOST_POSITIONS positions, evenly spaced ones.
        group: processes that share the work; each must make such an object, measure the same decoders, and gets the
            same numbers.
    """

    def __init__(self, tokenizer: VQVAE, images: ImageSplit, rows: np.ndarray, *, group: ProcessGroup = ALONE) -> None:
        positions = math.prod(tokenizer.grid(images.images.shape[2], images.images.shape[3]))
        self.tokenizer, self.images, self.group = tokenizer, images, group
        self.rows = rows[evenly_spaced(len(rows), max(1, MOST_POSITIONS // positions))]
        (features,) = self._over_images(lambda block: (tokenizer.encoder.features(block),))
        deviations = features.std(dim=0, correction=0)
        self.scale = deviations.clamp_min(max(1e-6, SMALLEST_DEVIATION * float(deviations.mean())))
        self.real = features / self.scale

    def measure(self, decoder: nn.Module) -> DecoderNumbers:
        """Measure a decoder, which maps vectors [B,D,H,W] to images [B,C,H',W'], on the tokenizer's device.

        Raises:
            FloatingPointError: it gives NaN.
        """
        tokenizer = self.tokenizer

        def compute(block: Tensor) -> tuple[Tensor, ...]:
            decoded = decoder(tokenizer.quantizer.lookup(tokenizer.encode(block))).clamp(0, 1)
            return tokenizer.encoder.features(decoded), (decoded - block).square().mean(dim=(1, 2, 3), keepdim=True)

        features, errors = self._over_images(compute)
        if not bool(features.isfinite().all()):
            raise FloatingPointError("pixels that are NaN from the decoder")
        # In one process, so that all decide alike: another machine may round otherwise.
        return self.group.run_on_main(lambda: self._numbers(features, errors))

    def _numbers(self, features: Tensor, errors: Tensor) -> DecoderNumbers:
        """Return the numbers of decoded images with these features [n,F] and squared errors [n,1]."""
        error = numbers_of(float(errors.double().mean()), self.tokenizer.config.data_variance)
        return DecoderNumbers(distance=frechet_distance(self.real, features / self.scale), error=error)

    def _over_images(self, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        """Return what `compute` returns for the images [n,C,H',W'], each of its tensors [n,F,H,W] as rows [n*H*W,F]."""
        batches = run_in_blocks_of_all(
            self.tokenizer,
            compute,
            lambda start, stop: self.images.batch(self.rows[start:stop]),
            len(self.rows),
            self.group,
        )
        tensors = [torch.cat(parts) for parts in zip(*batches, strict=True)]
        return [_two_rows(rearrange(tensor, "n f h w -> (n h w) f")) for tensor in tensors]


def _two_rows(rows: Tensor) -> Tensor:
    """Return rows [n,F] as they are, a single one twice: there is no covariance of one."""
    return rows if len(rows) > 1 else rows.repeat(2, 1)
