"""The three columns of numbers: test images, their reconstructions and samples, each against training images.

    test images      the floor: no model can be expected to be nearer to the training images
    reconstructions  of those test images: what the tokenizer costs, with the error of exactly these images
    samples          of the classes of those test images: what the prior adds

Legend: N pictures of each kind.
"""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..models.decoders import DecoderName
from .picture_numbers import PictureNumbers

WORDS = {"test": "test images", "reconstructions": "reconstructions", "samples": "samples"}
COLUMNS = tuple(WORDS)


@dataclass(frozen=True, kw_only=True)
class PictureMetrics:
    """The three columns."""

    n: int  # N, pictures of each kind
    seed: int
    judge: str  # whose features are compared, in words
    judge_accuracy: float | None  # on all real test images; None for an autoencoder
    test: PictureNumbers
    reconstructions: PictureNumbers
    samples: PictureNumbers
    guidance: float = 1.0  # of the samples; 1 is the plain prior, 0 draws without labels
    decoder: DecoderName = "plain"  # that made the reconstructions and the samples
    keep_best: float = 1.0  # share of the candidates that the prior kept as samples, by their labels
    cas: float | None = None  # accuracy on real test images of a classifier trained on the samples
    cas_real: float | None = None  # of one trained on as many real images
    nearest: Image.Image | None = field(default=None, repr=False, compare=False)  # None if none was asked for

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as one object, without those that were not measured."""
        names = ("n", "seed", "judge", "judge_accuracy", "decoder", "guidance", "keep_best", "cas", "cas_real")
        values = {name: getattr(self, name) for name in names}
        known = {name: value for name, value in values.items() if value is not None}
        return known | {name: getattr(self, name).to_json() for name in COLUMNS}
