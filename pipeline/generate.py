"""From the two trained stages to images: prior -> codes -> decoder -> images."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prior import GatedPixelCNN, sample_codes
from prior.sampling import check_choice
from tokenizer import VQVAE, Baseline

from .checkpoint import CheckpointInfo, check_same_tokenizer, load_autoencoder, load_prior, load_tokenizer, read_info
from .codes import npy_bytes
from .device import choose_device
from .errors import InputError
from .files import to_json, write_atomic
from .folders import claim_file, claim_folder
from .images import to_float, to_uint8
from .pictures import above_and_below, save_grid, save_png
from .stored_images import images_of, part_of

DECODE_BATCH = 256
SAMPLE_FILES = ("grid.png", "images/[0-9]*.png", "codes.npy", "sample.json")


class Sampled(NamedTuple):
    """New images and the codes that they were decoded from."""

    images: Tensor  # [n,C,H',W'] uint8
    codes: Tensor  # [n,H,W] int64


@dataclass(frozen=True)
class ImagePipeline:
    """A tokenizer and the prior over its codes.

    Made by `ImagePipeline.from_pretrained(tokenizer_dir, prior_dir)`.
    """

    tokenizer: VQVAE
    prior: GatedPixelCNN
    tokenizer_info: CheckpointInfo
    prior_info: CheckpointInfo

    @classmethod
    def from_pretrained(cls, tokenizer_dir: str | Path, prior_dir: str | Path, device: str = "auto") -> "ImagePipeline":
        """Load both stages.

        Raises:
            InputError: a checkpoint cannot be used, or the prior was trained on another tokenizer's codes.
        """
        where = choose_device(device)
        tokenizer_info, tokenizer = read_info(tokenizer_dir, "tokenizer"), load_tokenizer(tokenizer_dir).to(where)
        prior_info = read_info(prior_dir, "prior")
        check_same_tokenizer(
            tokenizer_info.fingerprint,
            prior_info.tokenizer_fingerprint,
            f"a prior in {prior_dir}",
            "name the tokenizer it was trained with, or train the prior again with train-prior",
        )
        return cls(tokenizer, load_prior(prior_dir).to(where), tokenizer_info, prior_info)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes the prior knows; empty if it was trained without labels."""
        return self.prior_info.class_names

    @property
    def grid(self) -> tuple[int, int]:
        """The grid (H, W) of codes of an image."""
        size = self.tokenizer_info.preprocessing
        return self.tokenizer.grid(size["height"], size["width"])

    def sample(
        self,
        n: int,
        *,
        labels: Sequence[str | int] | Tensor | str | int | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        on_row: Callable[[int], None] | None = None,
    ) -> Sampled:
        """Draw n new images: (uint8 images [n,C,H',W'], codes [n,H,W]).

        Args:
            n: at least 1.
            labels: class names or indices, taken in turn until there are n; None takes all classes in turn.
            seed: the same seed gives the same images; None takes a new one.
            temperature: 0 is greedy, 1 the prior as it is.
            top_k: keep the k most likely codes of each position.
            top_p: keep the fewest most likely codes that hold this much probability.
            on_row: called with the number of finished rows of the grid after each.

        Raises:
            InputError: a label that the prior does not know.
            ValueError: another argument out of its range.
        """
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        codes = sample_codes(
            self.prior,
            n,
            self.grid,
            labels=self.labels_for(n, labels),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            on_row=on_row,
        )
        return Sampled(self.decode(codes), codes)

    def labels_for(self, n: int, labels: Sequence[str | int] | Tensor | str | int | None) -> Tensor | None:
        """The label [n] of each of n samples: the given ones in turn, or all classes in turn; None without classes."""
        if isinstance(labels, (str, int)):
            labels = [labels]
        if not self.class_names:
            if labels is not None:
                raise InputError(
                    expected="no label, because this prior was trained without them",
                    got=", ".join(str(label) for label in labels) or "an empty list",
                    do="leave the label away, or train on a folder with one subfolder a class",
                )
            return None
        if labels is not None and len(labels) == 0:
            raise InputError(expected="at least one label", got="none", do="leave the labels away for all in turn")
        chosen = range(len(self.class_names)) if labels is None else [self._label(item) for item in labels]
        return torch.tensor([chosen[i % len(chosen)] for i in range(n)])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n,H,W] -> uint8 images [n,C,H',W']."""
        device = next(self.tokenizer.parameters()).device
        parts = [to_uint8(self.tokenizer.decode(part.to(device))).cpu() for part in codes.split(DECODE_BATCH)]
        return torch.cat(parts)

    def reconstruct(self, images: Tensor) -> Tensor:
        """What the tokenizer makes of images [n,C,H',W'], uint8 or float in [0,1]: uint8 of the same shape."""
        return reconstruct(self.tokenizer, images)

    def _label(self, label: str | int | Tensor) -> int:
        """The index of a class given by name or index; a name that looks like an index is a name first."""
        names = self.class_names
        if isinstance(label, str) and label in names:
            return names.index(label)
        try:
            index = int(label)
        except ValueError:
            index = -1
        if not 0 <= index < len(names):
            raise InputError(
                expected=f"a class name ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''}) "
                f"or an index from 0 to {len(names) - 1}",
                got=f"the label {label}",
                do="choose one of them",
            )
        return index


def reconstruct(model: VQVAE | Baseline, images: Tensor) -> Tensor:
    """Encode and decode images [n,C,H',W'], uint8 or float in [0,1]: uint8 of the same shape."""
    device = next(model.parameters()).device
    floats = to_float(images) if images.dtype == torch.uint8 else images
    parts = [to_uint8(model.decode(model.encode(part.to(device)))).cpu() for part in floats.split(DECODE_BATCH)]
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How `sample_to_folder` draws; recorded in `sample.json`."""

    n: int
    labels: tuple[str, ...] = ()  # names or indices, in turn; all classes in turn if empty
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def sample_to_folder(pipeline: ImagePipeline, options: SampleOptions, out: Path, *, force: bool = False) -> Path:
    """Draw images into `out`: grid.png, images/, codes.npy, sample.json; returns the path of grid.png.

    Raises:
        InputError: an unknown label, or a folder that cannot be used.
        ValueError: an option out of its range.
    """
    check_choice(options.temperature, options.top_k, options.top_p)
    labels = pipeline.labels_for(options.n, options.labels or None)
    claim_folder(out, force=force, ours=SAMPLE_FILES)
    with tqdm(total=pipeline.grid[0], unit="row", desc=f"drawing {options.n} grids", dynamic_ncols=True) as bar:
        images, codes = pipeline.sample(
            options.n,
            labels=labels,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            on_row=lambda row: bar.update(),
        )
    for index, image in enumerate(images):
        save_png(image, out / "images" / f"{index:05d}.png")
    write_atomic(out / "codes.npy", npy_bytes(codes.cpu().numpy()))
    names = None if labels is None else [pipeline.class_names[i] for i in labels.tolist()]
    record = {
        "labels": None if labels is None else labels.tolist(),
        "class_names": names,
        "seed": options.seed,
        "options": {k: v for k, v in vars(options).items() if k not in ("labels", "seed")},
        "fingerprints": {
            "tokenizer": pipeline.tokenizer_info.fingerprint,
            "prior": pipeline.prior_info.fingerprint,
        },
        "versions": pipeline.prior_info.versions,
    }
    write_atomic(out / "sample.json", to_json(record))
    save_grid(images, out / "grid.png")
    return out / "grid.png"


def reconstruct_to_file(
    tokenizer_folder: Path,
    out: Path,
    *,
    data: str | None = None,
    data_root: str | None = None,
    split: str = "test",
    n: int = 16,
    device: str = "auto",
    force: bool = False,
) -> Path:
    """Write a picture of the first n images of a split, each above its reconstruction.

    Raises:
        InputError: the tokenizer, the images or the file cannot be used.
    """
    info = read_info(tokenizer_folder, "tokenizer")
    model = load_autoencoder(tokenizer_folder).to(choose_device(device))
    claim_file(out, force=force)
    part = part_of(images_of(info, data=data, data_root=data_root), split)
    if n > len(part):
        print(f"note: the {split} part has {len(part)} images, fewer than --n {n}", file=sys.stderr)
    images = to_uint8(part.batch(np.arange(min(n, len(part)))))
    columns = min(8, len(images))
    save_grid(above_and_below(images, reconstruct(model, images), columns), out, columns=columns)
    return out
