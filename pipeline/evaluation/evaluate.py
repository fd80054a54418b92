"""All metrics of a trained model: how it reconstructs, how it uses its codes, and how well a prior predicts them.

Legend: N images, H W grid of codes.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tokenizer import VQVAE

from ..codes.manifest import code_dtype
from ..errors import InputError
from ..generation.image_pipeline import ImagePipeline
from ..images.image_set import ImageSet, ImageSplit, split_of
from ..models.decoders import DecoderChoice, DecoderName
from ..models.labels import match_labels
from ..models.loading import (
    TrainedAutoencoder,
    TrainedPrior,
    TrainedTokenizer,
    images_of,
    load_pair,
    load_trained_autoencoder,
)
from ..models.shares import check_same
from ..runtime.process_group import ALONE, ProcessGroup
from .codebook_health import CodebookHealth
from .evaluation_picture import PriorInput, evaluation_picture
from .picture_metrics import PictureMetrics
from .prior_numbers import Likelihood, measure_likelihood, measure_simple_predictors
from .quality_table import quality_table
from .reconstruction import ReconstructionNumbers, measure_decoders
from .sample_quality import QualityOptions, SampleQuality


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The numbers of a trained model on one split of a set of images."""

    data: str  # the image source
    split: str  # "train" or "test"
    images: int  # their number
    reconstruction: ReconstructionNumbers  # of `decoder`
    codebook: CodebookHealth | None  # None for a model without codes
    likelihood: Likelihood | None  # None if no prior was measured
    picture: Image.Image | None = field(default=None, repr=False, compare=False)  # None if none was asked for
    quality: PictureMetrics | None = None  # None if no samples were measured
    decoder: DecoderName = "plain"  # that reconstructed the images
    sharp: ReconstructionNumbers | None = None  # of the sharp decoder, beside those of the plain one

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as one flat object, without those that were not measured."""
        numbers: dict[str, Any] = {"data": self.data, "split": self.split, "images": self.images}
        numbers |= {"decoder": self.decoder, **asdict(self.reconstruction)}
        if self.sharp is not None:
            numbers["sharp_decoder"] = asdict(self.sharp)
        if self.codebook is not None:
            health = self.codebook
            numbers |= {"codes_used": health.codes_used, "perplexity": health.perplexity, "codebook": health.verdict}
        if self.likelihood is not None:
            numbers |= self.likelihood.to_json()
        if self.quality is not None:
            numbers["picture_metrics"] = self.quality.to_json()
        return numbers

    @property
    def pictures(self) -> dict[str, Image.Image | None]:
        """The pictures, by the name of the option that asks for them."""
        return {"picture": self.picture, "nearest": None if self.quality is None else self.quality.nearest}

    def lines(self) -> list[str]:
        """Return the numbers in lines to print: by name, of the prior also in words, of samples in a table."""
        likelihood = self.likelihood
        in_words = set() if likelihood is None else likelihood.to_json().keys() - {"bits_per_code", "bits_per_dim"}
        in_words.add("picture_metrics")
        named = {name: value for name, value in self.to_json().items() if name not in in_words}
        lines = [f"{name:>14}  {_shown(value)}" for name, value in named.items()]
        lines += [] if likelihood is None else likelihood.lines()
        return lines if self.quality is None else [*lines, "", *quality_table(self.quality)]


def _shown(value: Any) -> str:
    """Return a number, a word, or numbers by name, as they are printed."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def evaluate(
    tokenizer_folder: Path,
    prior_folder: Path | None = None,
    *,
    data: str | None = None,
    data_root: str | None = None,
    split: str = "test",
    device: str = "auto",
    with_picture: bool = False,
    quality: QualityOptions | None = None,
    decoder: DecoderChoice = "auto",
    group: ProcessGroup = ALONE,
) -> Evaluation:
    """Measure a tokenizer, and a prior if one is named, on a split of `data` (by default the tokenizer's).

    The simple predictors that the prior is compared with count the codes of the training part of the same images, of
    MOST_TRAINING_CODES codes at most. With `split="train"` they are measured on codes that they have counted, so they
    look better than they are, as the prior does if it was trained on them.

    Args:
        tokenizer_folder: what train-tokenizer wrote.
        prior_folder: a prior over its codes.
        data: an image source.
        data_root: folder of a torchvision set.
        split: "train" or "test".
        device: auto, cpu, cuda, cuda:1 or mps.
        with_picture: whether to make `Evaluation.picture`, as `surprise_picture` says.
        quality: what to measure about samples of the prior, on the test split; None for nothing.
        decoder: "plain" or "sharp" measures that one alone. With "auto" the error is that of the plain one; if there is
            a sharp one, its error is beside it, and it makes the pictures that `quality` measures.
        group: processes that share the work; each must call this, and gets the numbers. The main one has the pictures.

    Raises:
        InputError: a checkpoint or the images cannot be used, the prior was trained on another tokenizer's codes, there
            is no such decoder, a number is NaN or infinite, or what `quality` asks for cannot be measured.
        ValueError: another `decoder`.
    """
    device = group.device(device)
    pair, loaded = group.run_on_all(lambda: _loaded(tokenizer_folder, prior_folder, device, decoder))
    trained = loaded.with_plain_decoder() if decoder == "auto" else loaded
    beside = loaded.model if isinstance(loaded.model, VQVAE) and loaded.decoder != trained.decoder else None
    images = group.main_first(lambda: images_of(trained.info, data=data, data_root=data_root))
    chosen = group.run_on_all(lambda: split_of(images, split))
    sizes = (images.class_names, len(images.train), len(images.test))
    check_same(group, {"images": sizes, **_fingerprints(pair, loaded)})
    labels = group.run_on_all(
        lambda: chosen.labels if pair is None else match_labels(chosen.labels, images.class_names, pair[1])
    )
    samples = None
    if quality is not None:
        samples = group.run_on_all(lambda: _prepared(pair, images, split, quality, device, group))
    found = _Collected(trained.model.config.num_codes)
    measured = measure_decoders(
        trained.model,
        beside,
        chosen,
        progress=True,
        on_codes=None if pair is None else found.append_codes,
        on_errors=found.append_errors,
        group=group,
    )
    group.run_on_all(lambda: check_finite(asdict(measured.numbers), trained.decoder_folder))
    if measured.other is not None:
        other = asdict(measured.other)
        group.run_on_all(lambda: check_finite(other, loaded.decoder_folder))
    likelihood = prior_input = None
    if pair is not None:
        tokenizer, prior = pair
        prior_input = PriorInput(prior=prior, codes=found.codes(), labels=labels)
        simple = measure_simple_predictors(tokenizer, images, split, prior_input.codes, group=group)
        likelihood = measure_likelihood(tokenizer, prior, prior_input.codes, labels, simple, group=group)
        bits = likelihood.to_json()
        group.run_on_all(lambda: check_finite(bits, prior.folder))
    title = f"{os.path.basename(images.source)}: {split} split, {len(chosen):,} image{'' if len(chosen) == 1 else 's'}"
    if loaded.decoder == "sharp":
        title += f", {trained.decoder} decoder"
    picture = None
    if with_picture:
        picture = group.run_on_all(
            lambda: _picture(title, trained, chosen, found.errors(), prior_input) if group.is_main else None
        )
    return Evaluation(
        data=images.source,
        split=split,
        images=len(chosen),
        reconstruction=measured.numbers,
        codebook=measured.codebook,
        likelihood=likelihood,
        picture=picture,
        quality=None if samples is None else samples.measure(),
        decoder=trained.decoder,
        sharp=measured.other,
    )


def _loaded(
    tokenizer_folder: Path, prior_folder: Path | None, device: str, decoder: DecoderChoice
) -> tuple[tuple[TrainedTokenizer, TrainedPrior] | None, TrainedAutoencoder]:
    """Return the tokenizer with its prior, if one is named, and the tokenizer or baseline to measure."""
    if prior_folder is None:
        return None, load_trained_autoencoder(tokenizer_folder, device, decoder=decoder)
    pair = load_pair(tokenizer_folder, prior_folder, device, decoder=decoder)
    return pair, pair[0]


def _fingerprints(
    pair: tuple[TrainedTokenizer, TrainedPrior] | None, loaded: TrainedAutoencoder
) -> dict[str, str | None]:
    """Return the hashes of the weights of all models, by name."""
    return {
        "tokenizer": loaded.info.fingerprint,
        "decoder": None if loaded.decoder_info is None else loaded.decoder_info.fingerprint,
        "prior": None if pair is None else pair[1].info.fingerprint,
    }


def _prepared(
    pair: tuple[TrainedTokenizer, TrainedPrior] | None,
    images: ImageSet,
    split: str,
    quality: QualityOptions,
    device: str,
    group: ProcessGroup,
) -> SampleQuality:
    """Return the measurement of samples, to be made later. Raise InputError for what is wrong with it."""
    if pair is None or split != "test":
        raise InputError(
            expected="a prior and the test split, to compare its samples with the test images",
            got="no prior" if pair is None else f"the {split} split",
            do="name the prior with --prior" if pair is None else "omit --split",
        )
    return SampleQuality(ImagePipeline(*pair), images, quality, device, group=group)


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


class _Collected:
    """Collects the codes and the errors of a split, so that each image is encoded and decoded once.

    Codes are kept in the smallest type that holds them.
    """

    def __init__(self, num_codes: int) -> None:
        self._dtype, self._codes, self._errors = code_dtype(num_codes), list[np.ndarray](), list[np.ndarray]()

    def append_codes(self, codes: Tensor) -> None:
        """Add the codes int64 [n,H,W] of a batch."""
        self._codes.append(codes.numpy().astype(self._dtype))

    def append_errors(self, errors: Tensor) -> None:
        """Add the squared errors float32 [n] of a batch."""
        self._errors.append(errors.numpy())

    def codes(self) -> np.ndarray:
        """Return the codes [N,H,W] of all batches in order."""
        return np.concatenate(self._codes)

    def errors(self) -> np.ndarray:
        """Return the squared errors [N] of all batches in order."""
        return np.concatenate(self._errors)


def _picture(
    title: str,
    trained: TrainedAutoencoder,
    split: ImageSplit,
    errors: np.ndarray,
    prior_input: PriorInput | None,
) -> Image.Image:
    """Return the picture of a split whose images have these sums of squared errors [N]."""
    nmse = errors / (split.images[0].size * trained.model.config.data_variance)
    return evaluation_picture(title, trained.model, trained.decoder_folder, split, nmse, prior_input)
