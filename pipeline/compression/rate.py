"""The rate: the bytes of an image as codes, and as PNG or as JPEG of the same PSNR.

    raw        pixels, a byte for each colour
    png        an optimised PNG
    jpeg       a JPEG of the same PSNR
    jpeg_scan  its entropy-coded data alone, as if headers and tables cost nothing; they are most of a small image
    packed     codes of ceil(log2 K) bits each
    entropy    codes at the entropy of how often each occurs in the split (order 0)
    prior      codes at the probabilities of the prior; an arithmetic coder comes within a few bits an image of this

All are means over the images of a split. What a decoder needs once for all images is not counted: the networks, and
the frequencies for `entropy`.

The PSNR is that of the mean squared error over all images, between pixels of 8 bits, for codes and JPEG alike.
(`evaluate` does not round the pixels, so its PSNR differs a little.)

Legend: N images, C channels, H' W' pixels, H W grid of codes, K codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenizer import VQVAE

from ..codes.manifest import code_dtype
from ..codes.statistics import count_codes, entropy_bits, packed_bits
from ..errors import InputError
from ..evaluation.evaluate import check_finite
from ..evaluation.likelihood import code_batches, measure_prior
from ..images.image_set import ImageSet, ImageSplit
from ..models.decoders import INVENTS_DETAIL, DecoderChoice, DecoderName, check_choice, has_sharp_decoder
from ..models.inference import decode_codes, encode_images
from ..models.labels import match_labels
from ..models.loading import TrainedPrior, TrainedTokenizer, images_of, load_pair, load_trained_tokenizer
from ..runtime.progress import with_progress
from .image_formats import jpeg_at_psnr, mean_png_bytes, psnr_of_uint8, squared_error

SHARP_NOT_MEASURED = "the PSNR is that of the plain decoder; --decoder sharp takes the sharp one, which invents detail"
SEED = 0  # for choosing images, if not all are measured


@dataclass(frozen=True, kw_only=True)
class SplitRate:
    """The rate of one split."""

    images: int  # how many were measured
    image: tuple[int, ...]  # [C,H',W']
    grid: tuple[int, ...]  # [H,W]
    num_codes: int  # K
    decoder: DecoderName  # of the codes
    psnr: float  # dB, of the codes, decoded by that
    jpeg_psnr: float  # dB; the same, unless no quality of JPEG reaches it, which gives a warning
    jpeg_quality: float  # 1 to 100, where that PSNR is met
    jpeg_subsampling: str  # 4:2:0 or 4:4:4
    bits_per_code: dict[str, float]  # by the names at the top of this file; "prior" only if one was measured
    bytes_per_image: dict[str, float]  # by the names at the top of this file

    def to_json(self) -> dict[str, Any]:
        """Return the fields with lists in place of tuples, as JSON has them."""
        return {**asdict(self), "image": list(self.image), "grid": list(self.grid)}


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The rate of the images of a source."""

    data: str  # the source
    splits: dict[str, SplitRate]  # by name, "train" or "test"
    warnings: list[str]  # lines for a person

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, the warnings under the key "remarks"."""
        splits = {name: split.to_json() for name, split in self.splits.items()}
        return {"data": self.data, "splits": splits, "remarks": self.warnings}


def measure_rate(
    tokenizer_folder: Path,
    prior_folder: Path | None = None,
    *,
    data: str | None = None,
    data_root: str | None = None,
    splits: Sequence[str] = ("train", "test"),
    n: int | None = None,
    device: str = "auto",
    decoder: DecoderChoice = "auto",
) -> Rate:
    """Measure the bytes of an image of `data` (by default the tokenizer's) as codes, PNG and JPEG, for each split.

    Args:
        tokenizer_folder: what train-tokenizer wrote.
        prior_folder: a prior over its codes, to measure too.
        data: an image source.
        data_root: folder of a torchvision set.
        splits: "train", "test" or both; one without images is omitted if the other has some.
        n: how many images of each split, chosen at random but always the same; by default all.
        device: auto, cpu, cuda, cuda:1 or mps.
        decoder: whose PSNR a JPEG is to have, "plain" or "sharp"; "auto" is the plain one, with a warning if there is a
            sharp one, too.

    Raises:
        InputError: a checkpoint or the images cannot be used, the tokenizer has no codes or no such decoder, the prior
            was trained on another tokenizer's codes, or a number is NaN or infinite.
        ValueError: another `decoder`.
    """
    check_choice(decoder)
    tokenizer, prior = _load(tokenizer_folder, prior_folder, device, "sharp" if decoder == "sharp" else "plain")
    images = images_of(tokenizer.info, data=data, data_root=data_root)
    chosen = _splits_with_images(images, splits, n)
    if prior is not None:
        chosen = {
            name: replace(split, labels=match_labels(split.labels, images.class_names, prior))
            for name, split in chosen.items()
        }
    rates = {name: _measure_split(tokenizer, prior, split) for name, split in chosen.items()}
    warnings = [f"{name}: {line}" for name in dict.fromkeys(splits) for line in _warnings(rates.get(name))]
    if decoder == "sharp":
        warnings.append(INVENTS_DETAIL)
    elif decoder == "auto" and has_sharp_decoder(tokenizer_folder):
        warnings.append(SHARP_NOT_MEASURED)
    return Rate(data=images.source, splits=rates, warnings=warnings)


def rate_table(rate: SplitRate) -> str:
    """Return a table to print: the bytes per image and bits per code of each representation of a split."""
    shape, grid = ("x".join(map(str, size)) for size in (rate.image, rate.grid))
    lines = [
        f"{rate.images:,} images of {shape}, {grid} codes of {rate.num_codes:,}",
        f"PSNR {rate.psnr:.2f} dB ({rate.decoder} decoder), JPEG {rate.jpeg_psnr:.2f} dB"
        f" at quality {rate.jpeg_quality:.1f} ({rate.jpeg_subsampling})",
        f"{'':<9}  bytes per image  bits per code",
    ]
    for name, size in rate.bytes_per_image.items():
        bits = rate.bits_per_code.get(name)
        lines.append(f"{name:<9}  {size:>15,.1f}" + ("" if bits is None else f"  {bits:>13.3f}"))
    return "\n".join(lines)


def _load(
    tokenizer_folder: Path, prior_folder: Path | None, device: str, decoder: DecoderName
) -> tuple[TrainedTokenizer, TrainedPrior | None]:
    if prior_folder is None:
        return load_trained_tokenizer(tokenizer_folder, device, decoder=decoder), None
    return load_pair(tokenizer_folder, prior_folder, device, decoder=decoder)


def _splits_with_images(images: ImageSet, names: Sequence[str], n: int | None) -> dict[str, ImageSplit]:
    """Return those of the named splits that have images, n of each. Raise InputError if none has any."""
    splits = {"train": images.train, "test": images.test}
    found = {name: subset_of(splits[name], n) for name in names if len(splits[name])}
    if not found:
        raise InputError(
            expected=f"images in the {' or '.join(names)} split of {images.source}",
            got="none",
            do="use the other --split, or name other images with --data",
        )
    return found


def subset_of(split: ImageSplit, n: int | None) -> ImageSplit:
    """Return n images of a split, always the same, in their order; all of them if n is None or larger."""
    if n is None or n >= len(split):
        return split
    rows = np.sort(np.random.default_rng(SEED).choice(len(split), n, replace=False))
    return ImageSplit(split.images[rows], split.labels[rows], tuple(split.names[row] for row in rows))


def _measure_split(tokenizer: TrainedTokenizer, prior: TrainedPrior | None, split: ImageSplit) -> SplitRate:
    """Measure one split, whose labels are in the prior's numbering."""
    num_codes = tokenizer.model.config.num_codes
    codes = _encode(tokenizer.model, split)
    bits = {"packed": float(packed_bits(num_codes)), "entropy": entropy_bits(count_codes(codes, num_codes))}
    if prior is not None:
        bits["prior"] = measure_prior(prior.model, code_batches(codes, split.labels))
        check_finite({"bits_per_code": bits["prior"]}, prior.folder)
    psnr = _psnr_of_codes(tokenizer, codes, split.images)
    jpeg = jpeg_at_psnr(psnr, split.images)
    sizes = {
        "raw": float(split.images[0].size),
        "png": mean_png_bytes(split.images),
        "jpeg": jpeg.file,
        "jpeg_scan": jpeg.scan,
        **{name: each * codes[0].size / 8 for name, each in bits.items()},
    }
    return SplitRate(
        images=len(split),
        image=split.images.shape[1:],
        grid=codes.shape[1:],
        num_codes=num_codes,
        decoder=tokenizer.decoder,
        psnr=psnr,
        jpeg_psnr=jpeg.psnr,
        jpeg_quality=jpeg.quality,
        jpeg_subsampling=jpeg.subsampling,
        bits_per_code=bits,
        bytes_per_image=sizes,
    )


def _warnings(rate: SplitRate | None) -> Iterator[str]:
    """Yield the warnings about the rate of a split, which is None if the split has no images."""
    if rate is None:
        yield "no images"
    elif rate.jpeg_psnr > rate.psnr:
        yield (
            f"JPEG has {rate.jpeg_psnr:.2f} dB even at quality {rate.jpeg_quality}, "
            f"more than the codes with {rate.psnr:.2f} dB"
        )
    elif rate.jpeg_psnr < rate.psnr:
        yield (
            f"JPEG has only {rate.jpeg_psnr:.2f} dB at quality {rate.jpeg_quality}, "
            f"less than the codes with {rate.psnr:.2f} dB"
        )


def _encode(tokenizer: VQVAE, split: ImageSplit) -> np.ndarray:
    """Return the codes [N,H,W] of a split, in the smallest type that holds them."""
    dtype = code_dtype(tokenizer.config.num_codes)
    batches = encode_images(tokenizer, lambda start, stop: split.batch(np.arange(start, stop)), len(split))
    shown = with_progress(batches, len(split), "encoding", size=len)
    return np.concatenate([codes.numpy().astype(dtype) for codes in shown])


def _psnr_of_codes(tokenizer: TrainedTokenizer, codes: np.ndarray, images: np.ndarray) -> float:
    """Return the PSNR in dB between images uint8 [N,C,H',W'] and what their codes [N,H,W] decode to, in uint8."""
    error, start = 0, 0
    decoded = decode_codes(
        tokenizer.model,
        lambda first, last: torch.from_numpy(codes[first:last]).long(),
        len(codes),
        folder=tokenizer.decoder_folder,
    )
    for batch in with_progress(decoded, len(codes), "decoding", size=len):
        error += squared_error(batch.numpy(), images[start : start + len(batch)])
        start += len(batch)
    return psnr_of_uint8(error, images.size)
