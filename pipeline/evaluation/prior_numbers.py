"""The numbers of a prior on the codes of a split, beside those of simple predictors.

Legend: N images, H W grid of codes, C channels, H' W' image.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from prior.objective import bits_per_dim

from ..codes.manifest import code_dtype
from ..images.image_set import ImageSet, ImageSplit
from ..models.inference import blocks_of_all, encode_images
from ..models.labels import all_labelled
from ..models.loading import TrainedPrior, TrainedTokenizer
from ..models.shares import of_process
from ..runtime.process_group import ALONE, ProcessGroup
from ..runtime.progress import with_progress
from .likelihood import code_batches, measure_prior
from .simple_predictors import SimpleBits, SimplePredictors, share_explained, share_in_words, training_rows


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How well a prior predicts the codes of a split."""

    bits_per_code: float  # mean of -log2 of each code's probability
    bits_per_dim: float  # the same per value of the image: bits_per_code x H W / (C H' W')
    simple: SimpleBits  # what simple predictors, counted on the training images, reach on the same codes

    def to_json(self) -> dict[str, float]:
        """Return the numbers by name, without those that were not measured."""
        simple = {f"bits_{name}": value for name, value in asdict(self.simple).items() if value is not None}
        share = share_explained(self.bits_per_code, self.simple.histogram)
        own = {"bits_per_code": self.bits_per_code, "bits_per_dim": self.bits_per_dim}
        return {**own, **simple, "bits_share_explained": share}

    def lines(self) -> list[str]:
        """Return in words what a code costs, with the simple predictors and with the prior."""
        label, share = self.simple.histogram_given_label, share_in_words(self.bits_per_code, self.simple)
        rows = [
            (self.simple.uniform, "guessing: all codes equally likely"),
            (self.simple.histogram, "the histogram: how often each code occurs in the training images"),
            *([] if label is None else [(label, "the histogram of the training images with the label")]),
            (self.simple.above_and_left, "given the code above and the one to the left"),
            (self.bits_per_code, f"this prior: {share}"),
        ]
        return ["what a code costs, in bits:", *(f"{bits:>14.3f}  {words}" for bits, words in rows)]


def measure_likelihood(
    tokenizer: TrainedTokenizer,
    prior: TrainedPrior,
    codes: np.ndarray,
    labels: np.ndarray,
    simple: SimpleBits,
    *,
    group: ProcessGroup = ALONE,
) -> Likelihood:
    """Measure the prior on codes [N,H,W] and labels [N], in its numbering, of images of the tokenizer's size.

    The processes of the group share the work; each must call this.
    """
    size = tokenizer.info.preprocessing
    bits = measure_prior(prior.model, code_batches(codes, labels), group=group)
    shape = (size["channels"], size["height"], size["width"])
    return Likelihood(bits_per_code=bits, bits_per_dim=bits_per_dim(bits, tokenizer.grid, shape), simple=simple)


def measure_simple_predictors(
    tokenizer: TrainedTokenizer, images: ImageSet, split: str, codes: np.ndarray, *, group: ProcessGroup = ALONE
) -> SimpleBits:
    """Measure simple predictors on the codes [N,H,W] of a split of `images`.

    They count the codes of the training images, of which `training_rows` are encoded. If `split` is "train" they have
    counted the codes that they are measured on, and look better than they are.

    The processes of the group share the encoding, and the main process counts; each must call this.
    """
    measured = images.train if split == "train" else images.test
    rows = training_rows(len(images.train), codes[0].size)
    counted = codes[rows] if split == "train" else _encoded(tokenizer, images.train, rows, group)
    num_codes = tokenizer.model.config.num_codes
    labelled = all_labelled(images.class_names, [images.train.labels, measured.labels])
    num_classes = len(images.class_names) if labelled else 0

    def measure() -> SimpleBits:
        predictors = SimplePredictors.fit(counted, images.train.labels[rows], num_codes, num_classes)
        return predictors.bits(codes, measured.labels)

    return group.run_on_main(measure)


def _encoded(tokenizer: TrainedTokenizer, split: ImageSplit, rows: np.ndarray, group: ProcessGroup) -> np.ndarray:
    """Return the codes [n,H,W] of the images `rows` [n], in the smallest type that holds them."""
    dtype, words = code_dtype(tokenizer.model.config.num_codes), "encoding training images for simple predictors"

    def share(first: int, last: int) -> Iterator[np.ndarray]:
        own = rows[first:last]
        batches = encode_images(tokenizer.model, lambda start, stop: split.batch(own[start:stop]), len(own))
        for codes in with_progress(batches, len(own), of_process(words, group), size=len):
            yield codes.numpy().astype(dtype)

    return np.concatenate(list(blocks_of_all(share, len(rows), group)))
