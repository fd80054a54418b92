"""`ImagePipeline`: new, completed and reconstructed images from a tokenizer and the prior over its codes."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prior import GatedPixelCNN, SamplingParameters, complete_codes, sample_codes
from prior.model import NO_LABEL
from prior.uniforms import draw_seed, draw_uniforms, seeded_generator
from tokenizer import VQVAE

from ..errors import InputError
from ..images.preprocessing import to_float, to_uint8
from ..models.checkpoint import CheckpointInfo
from ..models.decoders import DecoderChoice
from ..models.inference import decode_codes, reconstruct_images
from ..models.labels import Labels, resolve_labels
from ..models.loading import TrainedPrior, TrainedTokenizer, load_pair
from .guidance import check_guidance
from .keep_best import Candidates, check_kept_by_label
from .keep_mask import keep_pixels, known_codes


class Sampled(NamedTuple):
    """New images and the codes that they were decoded from."""

    images: Tensor  # [n,C,H',W'] uint8
    codes: Tensor  # [n,H,W] int64


@dataclass(frozen=True)
class ImagePipeline:
    """Holds a tokenizer and the prior over its codes; `from_pretrained(tokenizer_dir, prior_dir)` loads both."""

    trained_tokenizer: TrainedTokenizer
    trained_prior: TrainedPrior  # over the codes of this tokenizer

    @classmethod
    def from_pretrained(
        cls,
        tokenizer_dir: str | Path,
        prior_dir: str | Path,
        device: str = "auto",
        *,
        decoder: DecoderChoice = "auto",
    ) -> "ImagePipeline":
        """Load both stages.

        Args:
            tokenizer_dir: what train-tokenizer wrote.
            prior_dir: what train-prior wrote.
            device: auto, cpu, cuda, cuda:1 or mps.
            decoder: which one makes images of codes: "plain", "sharp" (what train-decoder wrote), or "auto", the sharp
                one if there is one. The codes do not depend on it.

        Raises:
            InputError: a checkpoint cannot be used, the prior was trained on another tokenizer's codes, or there is no
                such device or decoder.
            ValueError: another `decoder`.
        """
        return cls(*load_pair(tokenizer_dir, prior_dir, device, decoder=decoder))

    @property
    def tokenizer(self) -> VQVAE:
        """The tokenizer as a module."""
        return self.trained_tokenizer.model

    @property
    def prior(self) -> GatedPixelCNN:
        """The prior as a module."""
        return self.trained_prior.model

    @property
    def tokenizer_info(self) -> CheckpointInfo:
        """What the tokenizer's checkpoint says about it."""
        return self.trained_tokenizer.info

    @property
    def decoder_info(self) -> CheckpointInfo | None:
        """What the checkpoint of the sharp decoder says about it; None if the plain one is in use."""
        return self.trained_tokenizer.decoder_info

    @property
    def prior_info(self) -> CheckpointInfo:
        """What the prior's checkpoint says about it."""
        return self.trained_prior.info

    @property
    def class_names(self) -> list[str]:
        """The names of the classes that the prior knows; empty if it was trained without labels."""
        return self.prior_info.class_names

    @property
    def grid(self) -> tuple[int, int]:
        """The grid (H, W) of codes of an image."""
        return self.trained_tokenizer.grid

    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        seed: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        precision: str = "fp32",
        keep_best: float = 1.0,
        first: int = 0,
        on_row: Callable[[int], None] | None = None,
    ) -> Sampled:
        """Sample n new images uint8 [n,C,H',W'], with their codes [n,H,W].

        Args:
            n: at least 1.
            labels: class names or indices, taken in turn until there are n; None takes all classes in turn.
            seed: the same seed gives the same images; None takes a new one.
            temperature: 0 is greedy, 1 the prior as it is.
            top_k: keep the k most likely codes of each position.
            top_p: keep the fewest most likely codes that hold this much probability.
            guidance: 1 is the plain prior, more makes images more typical of their label and less varied, 0 samples
                without a label; other than 1 for a prior with label dropout alone (`prior/choosing.py`).
            precision: of the prior, fp32 or bf16 (`sample_codes`).
            keep_best: in (0, 1], the share of the candidates that are kept, by their labels (`keep_best.py`). They cost
                a sample each, and where there are several a forward pass for each class as well.
            first: the index of the first image: 4 and then 4 more with `first=4` are the 8 images of one call, if
                their labels are the same.
            on_row: called with the number of finished rows of the grid after each.

        Raises:
            InputError: a label that the prior does not know, guidance that it cannot follow, a label with guidance 0,
                `keep_best` below 1 without labels, or a decoder that gives NaN or infinity.
            ValueError: another argument out of its range.
        """
        parameters = SamplingParameters(
            temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, precision=precision
        )
        wanted, candidates = self.labels_for(n, labels, guidance), Candidates(first, n, keep_best)
        check_kept_by_label(keep_best, wanted, "samples without them")
        codes = sample_codes(
            self.prior,
            candidates.total,
            self.grid,
            labels=self._labels_of(candidates, wanted),
            generator=seeded_generator(seed),
            first=candidates.first,
            on_row=on_row,
            **asdict(parameters),
        )
        codes = candidates.choose(self.prior, codes, wanted)
        return Sampled(self.decode(codes), codes)

    def complete(
        self,
        images: Tensor,
        keep_mask: Tensor,
        *,
        labels: Labels = None,
        candidates: int = 32,
        seed: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        precision: str = "fp32",
        keep_best: float = 1.0,
        on_row: Callable[[int], None] | None = None,
    ) -> Sampled:
        """Complete images: uint8 [n,C,H',W'] whose kept pixels are unchanged, with their codes [n,H,W].

        A code is kept if every pixel of its cell is. What the prior draws is conditioned exactly on the kept codes
        before it in raster order, and approximately on those after it, by a particle filter (`prior/completion.py`).

        Args:
            images: [n,C,H',W'] uint8 or float in [0,1], of the tokenizer's size; what is not kept does not matter.
            keep_mask: [H',W'] or [n,H',W'] bool, True where a pixel is kept.
            labels: class names or indices, taken in turn; None lets what is kept choose among all classes.
            candidates: particles of each image, where kept codes follow missing ones or the class is open; with more
                the result is closer to the exact conditional distribution, and slower.
            seed: as in `sample`, as are temperature, top_k, top_p and on_row.
            temperature: see there.
            top_k: see there.
            top_p: see there.
            guidance: as in `sample`; with an open class it is that of each particle's own.
            precision: as in `sample`.
            keep_best: as in `sample`, of several completions of each image; needs labels.
            on_row: see there.

        Raises:
            InputError: images or a mask of the wrong shape, or what `sample` does not take either.
            ValueError: another argument out of its range.
        """
        parameters = SamplingParameters(
            temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, precision=precision
        )
        size, count = self.tokenizer_info.preprocessing, len(images)
        shape = (size["channels"], size["height"], size["width"])
        masks = (shape[1:], (count, *shape[1:]))
        if images.ndim != 4 or tuple(images.shape[1:]) != shape or tuple(keep_mask.shape) not in masks:
            raise InputError(
                expected=f"images [n,{shape[0]},{shape[1]},{shape[2]}] and a mask [H',W'] or [n,H',W'] of that size",
                got=f"{list(images.shape)} and {list(keep_mask.shape)}",
                do="resize them to what the tokenizer was trained on",
            )
        floats = (to_float(images) if images.dtype == torch.uint8 else images.float()).cpu()
        keep = keep_mask.bool().cpu().expand(count, *shape[1:])
        wanted, completions = self.completed_labels_for(count, labels, guidance), Candidates(0, count, keep_best)
        check_kept_by_label(keep_best, wanted, "completions without a label")
        generator = seeded_generator(seed)
        chosen = self._labels_of(completions, wanted)
        if self.class_names and wanted is None and guidance != 0:
            chosen = open_labels(count, candidates, len(self.class_names), generator)
        codes = complete_codes(
            self.prior,
            completions.spread(known_codes(self.tokenizer, floats, keep)),
            candidates=candidates,
            labels=chosen,
            generator=generator,
            on_row=on_row,
            **asdict(parameters),
        )
        codes = completions.choose(self.prior, codes, wanted)
        return Sampled(keep_pixels(to_uint8(floats), self.decode(codes), keep), codes)

    def labels_for(self, n: int, labels: Labels, guidance: float = 1.0) -> Tensor | None:
        """Return the label [n] of each of n samples: `labels` in turn, or all classes in turn.

        None without classes, and with guidance 0, which has no use for labels.

        Raises:
            InputError: a label or guidance that the prior does not know, or a label with guidance 0.
        """
        check_guidance(self.prior.config, guidance)
        if guidance != 0:
            return resolve_labels(n, labels, self.class_names)
        if labels is not None:
            raise InputError(
                expected="no label with guidance 0, which samples without", got="one", do="omit --label or --guidance 0"
            )
        return None

    def completed_labels_for(self, n: int, labels: Labels, guidance: float = 1.0) -> Tensor | None:
        """Return the label [n] of each of n completions: `labels` in turn; None if what is kept is to choose.

        Raises:
            InputError: as of `labels_for`.
        """
        found = self.labels_for(n, labels, guidance)
        return None if labels is None else found

    def _labels_of(self, candidates: Candidates, labels: Tensor | None) -> Tensor | None:
        """Return the labels of all candidates of images with these labels [n], NO_LABEL for each if they have none."""
        if labels is not None:
            return candidates.spread(labels)
        return torch.full((candidates.total,), NO_LABEL) if self.class_names else None

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [n,H,W] to uint8 images [n,C,H',W'] on the CPU, bit for bit those of `decode-codes`.

        Raises:
            InputError: the decoder gives NaN or infinity.
        """
        size, folder = self.tokenizer_info.preprocessing, self.trained_tokenizer.decoder_folder
        none = torch.empty(0, size["channels"], size["height"], size["width"], dtype=torch.uint8)
        images = decode_codes(self.tokenizer, lambda start, stop: codes[start:stop], len(codes), folder=folder)
        return torch.cat([none, *images])

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return the reconstructions, uint8 [n,C,H',W'] on the CPU, of images [n,C,H',W'], uint8 or float in [0,1].

        Raises:
            InputError: the decoder gives NaN or infinity.
        """
        return reconstruct_images(self.tokenizer, images, folder=self.trained_tokenizer.decoder_folder)


def open_labels(count: int, num_particles: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return a label for each of m particles of n images, [n,m], spread evenly over equally likely classes."""
    seed = draw_seed(generator)
    offset = draw_uniforms(range(seed, seed + count), 1)[:, 0]  # the offset of an image does not depend on the others
    labels = (torch.arange(num_particles) + offset[:, None]) * num_classes / num_particles
    return labels.long().clamp_max(num_classes - 1)
