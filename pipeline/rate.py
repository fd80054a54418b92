"""The rate: how many bytes an image costs as codes, and how many as PNG or as JPEG of the same quality.

    raw        pixels, a byte for each colour
    png        an optimised PNG
    jpeg       a JPEG of the same PSNR
    jpeg_scan  its entropy-coded data alone, as if headers and tables cost nothing; they are most of a small image
    packed     codes of ceil(log2 K) bits each
    entropy    codes at the entropy of how often each occurs in the split (order 0)
    prior      codes at the probabilities of the prior; an arithmetic coder comes within a few bits an image of it

All are means over the images of a split. What a decoder has once for all images is not counted: the networks, and the
frequencies behind `entropy`.

PSNR is of the mean squared error over all images, between pixels of 8 bits, for the codes as for JPEG. (`evaluate` does
not round the pixels, so its PSNR differs a little.)

N images of C channels, H' x W' pixels, H x W codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prior import GatedPixelCNN
from tokenizer import VQVAE

from .blocks import BLOCK, in_blocks
from .checkpoint import load_tokenizer, read_info
from .code_manifest import code_dtype
from .code_statistics import count_codes, entropy_bits, packed_bits
from .device import choose_device
from .errors import InputError
from .evaluate import BATCH, labels_for, load_with_prior, measure_prior
from .picture_rate import jpeg_at_psnr, mean_png_bytes, progress, psnr_of_uint8, squared_error
from .reconstruct import decode
from .sources import ImageSet, ImageSplit
from .stored_images import images_of

SEED = 0  # of the choice of images, if not all are measured


def measure_rate(
    tokenizer_folder: Path,
    prior_folder: Path | None = None,
    *,
    data: str | None = None,
    data_root: str | None = None,
    splits: Sequence[str] = ("train", "test"),
    n: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Bytes an image of `data` (by default the tokenizer's) as codes, PNG and JPEG, for each split.

    Args:
        tokenizer_folder: what train-tokenizer wrote.
        prior_folder: a prior over its codes, to measure too.
        data: an image source.
        data_root: folder of a torchvision set.
        splits: "train", "test" or both; one without images is left out if the other has some.
        n: how many images of each split, chosen at random but always the same; by default all.
        device: where to compute.

    Returns:
        data: the source.
        splits: of each, by name,
            images: their number, image: [C,H',W'], grid: [H,W] and num_codes: K.
            psnr: of the codes, in dB; jpeg_psnr is the same unless no quality comes to it, which is remarked on.
            jpeg_quality, jpeg_subsampling: where that PSNR is met.
            bits_per_code, bytes_per_image: by the names at the top of this file; prior only if there is one.
        remarks: lines for a person.

    Raises:
        InputError: a checkpoint or the images cannot be used, the tokenizer has no codes, or the prior was trained on
            another tokenizer's codes.
    """
    where = choose_device(device)
    info = read_info(tokenizer_folder, "tokenizer")
    tokenizer, prior = load_tokenizer(tokenizer_folder).to(where), None
    if prior_folder is not None:
        _, prior, class_names = load_with_prior(tokenizer, tokenizer_folder, info, prior_folder)
    images = images_of(info, data=data, data_root=data_root)
    parts = _parts(images, splits, n)
    result: dict[str, Any] = {"data": images.source, "splits": {}, "remarks": []}
    for split in dict.fromkeys(splits):
        if split not in parts:
            result["remarks"].append(f"{split}: no images")
            continue
        part = parts[split]
        if prior is not None:
            part = replace(part, labels=labels_for(prior, class_names, images.class_names, part.labels))
        numbers = _measure_split(tokenizer, prior, part)
        result["splits"][split] = numbers
        result["remarks"] += [f"{split}: {remark}" for remark in _remarks(numbers)]
    return result


def rate_table(numbers: dict[str, Any]) -> str:
    """The numbers of one split of `measure_rate`, for a person: bytes an image and bits per code, a line each."""
    shape, grid = ("x".join(map(str, numbers[name])) for name in ("image", "grid"))
    lines = [
        f"{numbers['images']:,} images of {shape}, {grid} codes of {numbers['num_codes']:,}",
        f"PSNR {numbers['psnr']:.2f} dB, JPEG {numbers['jpeg_psnr']:.2f} dB"
        f" at quality {numbers['jpeg_quality']:.1f} ({numbers['jpeg_subsampling']})",
        f"{'':<9}  bytes per image  bits per code",
    ]
    for name, size in numbers["bytes_per_image"].items():
        bits = numbers["bits_per_code"].get(name)
        lines.append(f"{name:<9}  {size:>15,.1f}" + ("" if bits is None else f"  {bits:>13.3f}"))
    return "\n".join(lines)


def _parts(images: ImageSet, splits: Sequence[str], n: int | None) -> dict[str, ImageSplit]:
    """Those of the splits that have images, cut down to n of them. Raises InputError if none has."""
    parts = {"train": images.train, "test": images.test}
    found = {split: some_of(parts[split], n) for split in splits if len(parts[split])}
    if not found:
        raise InputError(
            expected=f"images in the {' or '.join(splits)} part of {images.source}",
            got="none",
            do="use the other --split, or name other images with --data",
        )
    return found


def some_of(part: ImageSplit, n: int | None) -> ImageSplit:
    """n images of a split, always the same, in its order; all for None or where there are no more."""
    if n is None or n >= len(part):
        return part
    rows = np.sort(np.random.default_rng(SEED).choice(len(part), n, replace=False))
    return ImageSplit(part.images[rows], part.labels[rows], tuple(part.names[row] for row in rows))


def _measure_split(tokenizer: VQVAE, prior: GatedPixelCNN | None, part: ImageSplit) -> dict[str, Any]:
    """What `measure_rate` says of a split; the labels are in the prior's numbering."""
    num_codes = tokenizer.config.num_codes
    codes = _encode(tokenizer, part)
    bits = {"packed": float(packed_bits(num_codes)), "entropy": entropy_bits(count_codes(codes, num_codes))}
    if prior is not None:
        bits["prior"] = measure_prior(prior, _batches(codes, part.labels))
    psnr = _psnr_of_codes(tokenizer, codes, part.images)
    jpeg = jpeg_at_psnr(psnr, part.images)
    sizes = {
        "raw": float(part.images[0].size),
        "png": mean_png_bytes(part.images),
        "jpeg": jpeg.file,
        "jpeg_scan": jpeg.scan,
        **{name: each * codes[0].size / 8 for name, each in bits.items()},
    }
    return {
        "images": len(part),
        "image": list(part.images.shape[1:]),
        "grid": list(codes.shape[1:]),
        "num_codes": num_codes,
        "psnr": psnr,
        "jpeg_psnr": jpeg.psnr,
        "jpeg_quality": jpeg.quality,
        "jpeg_subsampling": jpeg.subsampling,
        "bits_per_code": bits,
        "bytes_per_image": sizes,
    }


def _remarks(numbers: dict[str, Any]) -> Iterator[str]:
    ours, jpeg, quality = (numbers[name] for name in ("psnr", "jpeg_psnr", "jpeg_quality"))
    if jpeg > ours:
        yield f"JPEG has {jpeg:.2f} dB even at quality {quality}, more than the codes with {ours:.2f} dB"
    if jpeg < ours:
        yield f"JPEG has only {jpeg:.2f} dB at quality {quality}, less than the codes with {ours:.2f} dB"


def _encode(tokenizer: VQVAE, part: ImageSplit) -> np.ndarray:
    """[N,H,W], in the smallest type that holds them."""

    def load(start: int, stop: int) -> Tensor:
        return part.batch(np.arange(start, stop))

    batches = in_blocks(tokenizer, tokenizer.encode, load, len(part))
    dtype = code_dtype(tokenizer.config.num_codes)
    return np.concatenate([codes.numpy().astype(dtype) for codes in progress(batches, "encoding", len(part), BLOCK)])


def _psnr_of_codes(tokenizer: VQVAE, codes: np.ndarray, images: np.ndarray) -> float:
    """dB, between images uint8 [N,C,H',W'] and what their codes [N,H,W] decode to, rounded to uint8."""
    error, start = 0, 0
    decoded = decode(tokenizer, lambda first, last: torch.from_numpy(codes[first:last]).long(), len(codes))
    for again in progress(decoded, "decoding", len(codes), BLOCK):
        error += squared_error(again.numpy(), images[start : start + len(again)])
        start += len(again)
    return psnr_of_uint8(error, images.size)


def _batches(codes: np.ndarray, labels: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    starts = range(0, len(codes), BATCH)
    for start in progress(starts, "asking the prior", len(codes), BATCH):
        rows = slice(start, start + BATCH)
        yield torch.from_numpy(codes[rows]).long(), torch.from_numpy(labels[rows])
