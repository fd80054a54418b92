"""All metrics of a trained model: how it reconstructs, how it uses its codes, and how well a prior predicts them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from prior.objective import bits_per_dim

from ..codes.manifest import code_dtype
from ..errors import InputError
from ..images.image_set import split_of
from ..models.labels import match_labels
from ..models.loading import TrainedPrior, TrainedTokenizer, images_of, load_pair, load_trained_autoencoder
from .codebook_health import CodebookHealth
from .likelihood import code_batches, measure_prior
from .reconstruction import ReconstructionNumbers, measure_reconstruction


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How well a prior predicts the codes of a split."""

    bits_per_code: float  # mean of -log2 of each code's probability
    bits_per_dim: float  # the same per value of the image: bits_per_code x H W / (C H' W')


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The numbers of a trained model on one split of a set of images."""

    data: str  # the image source
    split: str  # "train" or "test"
    images: int  # their number
    reconstruction: ReconstructionNumbers
    codebook: CodebookHealth | None  # None for a model without codes
    likelihood: Likelihood | None  # None if no prior was measured

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as one flat object, without those that were not measured."""
        numbers: dict[str, Any] = {"data": self.data, "split": self.split, "images": self.images}
        numbers |= asdict(self.reconstruction)
        if self.codebook is not None:
            health = self.codebook
            numbers |= {"codes_used": health.codes_used, "perplexity": health.perplexity, "codebook": health.verdict}
        if self.likelihood is not None:
            numbers |= asdict(self.likelihood)
        return numbers


def evaluate(
    tokenizer_folder: Path,
    prior_folder: Path | None = None,
    *,
    data: str | None = None,
    data_root: str | None = None,
    split: str = "test",
    device: str = "auto",
) -> Evaluation:
    """Measure a tokenizer, and a prior if one is named, on a split of `data` (by default the tokenizer's).

    Args:
        tokenizer_folder: what train-tokenizer wrote.
        prior_folder: a prior over its codes.
        data: an image source.
        data_root: folder of a torchvision set.
        split: "train" or "test".
        device: auto, cpu, cuda, cuda:1 or mps.

    Raises:
        InputError: a checkpoint or the images cannot be used, the prior was trained on another tokenizer's codes, or a
            number is NaN or infinite.
    """
    pair = None if prior_folder is None else load_pair(tokenizer_folder, prior_folder, device)
    trained = load_trained_autoencoder(tokenizer_folder, device) if pair is None else pair[0]
    images = images_of(trained.info, data=data, data_root=data_root)
    chosen = split_of(images, split)
    labels = chosen.labels if pair is None else match_labels(chosen.labels, images.class_names, pair[1])
    codes = _Codes(trained.model.config.num_codes)
    numbers, health = measure_reconstruction(
        trained.model, chosen, progress=True, on_codes=None if pair is None else codes.append
    )
    check_finite(asdict(numbers), tokenizer_folder)
    likelihood = None if pair is None else _measure_likelihood(*pair, codes.all(), labels)
    return Evaluation(
        data=images.source,
        split=split,
        images=len(chosen),
        reconstruction=numbers,
        codebook=health,
        likelihood=likelihood,
    )


def check_finite(numbers: Mapping[str, float], folder: Path) -> None:
    """Raise InputError if one of the numbers of the model in `folder` is NaN or infinite.

    Args:
        numbers: by name.
        folder: of the checkpoint, for the message.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise InputError(
                expected=f"finite numbers of the model in {folder}",
                got=f"{name} = {value}",
                do="train it again, with a lower --lr if that was the cause",
            )


class _Codes:
    """Collects the codes of a split, in the smallest type that holds them, so that each image is encoded once."""

    def __init__(self, num_codes: int) -> None:
        self._dtype, self._batches = code_dtype(num_codes), list[np.ndarray]()

    def append(self, codes: Tensor) -> None:
        """Add the codes int64 [n,H,W] of a batch."""
        self._batches.append(codes.numpy().astype(self._dtype))

    def all(self) -> np.ndarray:
        """Return the codes [N,H,W] of all batches in order."""
        return np.concatenate(self._batches)


def _measure_likelihood(
    tokenizer: TrainedTokenizer, prior: TrainedPrior, codes: np.ndarray, labels: np.ndarray
) -> Likelihood:
    """Measure the prior on codes [N,H,W] and labels [N], in its numbering, of images of the tokenizer's size.

    Raise InputError if it gives NaN or infinity.
    """
    size = tokenizer.info.preprocessing
    bits = measure_prior(prior.model, code_batches(codes, labels))
    check_finite({"bits_per_code": bits}, prior.folder)
    shape = (size["channels"], size["height"], size["width"])
    return Likelihood(bits_per_code=bits, bits_per_dim=bits_per_dim(bits, tokenizer.grid, shape))
