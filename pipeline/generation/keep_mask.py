"""The mask of the pixels that a completion keeps, and the codes that are known from them.

A code is known if every pixel of its cell is kept. Before the encoder sees a picture, the pixels that are not kept are
replaced by the mean colour of those that are, so that the result does not depend on them. The prior draws the other
codes, all are decoded, and the kept pixels are copied back.

Legend: n pictures, C channels, H' W' pixels, H W grid of codes.
"""

from pathlib import Path

import torch
from einops import reduce
from torch import Tensor

from prior.raster import UNKNOWN
from tokenizer import VQVAE

from ..errors import InputError
from ..images.preprocessing import IMAGE_ERRORS, Preprocessing, open_picture, prepare, upright_size, why_unreadable
from ..models.inference import encode_images

HALVES = ("top", "bottom", "left", "right")


def known_codes(tokenizer: VQVAE, images: Tensor, keep: Tensor) -> Tensor:
    """Return the codes [n,H,W] of images [n,C,H',W'] in [0,1], -1 unless `keep` [n,H',W'] is True on all its cell.

    They are on the CPU. Of images that are kept completely they are those that `export-codes` writes.
    """
    hidden = hide_pixels(images, keep)
    none = torch.empty(0, *tokenizer.grid(*keep.shape[1:]), dtype=torch.int64)
    codes = torch.cat([none, *encode_images(tokenizer, lambda start, stop: hidden[start:stop], len(hidden))])
    side = tokenizer.config.downsample
    all_kept = reduce(keep.float(), "n (h p) (w q) -> n h w", "min", p=side, q=side) > 0
    return codes.masked_fill(~all_kept.to(codes.device), UNKNOWN)


def hide_pixels(images: Tensor, keep: Tensor) -> Tensor:
    """Return images [n,C,H',W'] whose pixels outside `keep` [n,H',W'] have the mean of those inside (grey if none)."""
    kept = keep[:, None].to(images)
    count = kept.sum(dim=(2, 3), keepdim=True)
    visible = torch.where(kept > 0, images, 0)  # not a product: a hidden pixel may be nan or infinite
    mean = torch.where(count > 0, visible.sum(dim=(2, 3), keepdim=True) / count.clamp_min(1), 0.5)
    return torch.where(kept > 0, images, mean)


def keep_pixels(images: Tensor, sampled: Tensor, keep: Tensor) -> Tensor:
    """Return uint8 [n,C,H',W']: `images` where `keep` [n,H',W'] is True, `sampled` elsewhere."""
    return torch.where(keep[:, None], images, sampled)


def half_mask(half: str, size: tuple[int, int]) -> Tensor:
    """Return a mask [H',W'], True on the named half of a picture, the smaller one if the side is odd."""
    height, width = size
    mask = torch.zeros(size, dtype=torch.bool)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    mask |= {
        "top": rows < height // 2,
        "bottom": rows >= height - height // 2,
        "left": columns < width // 2,
        "right": columns >= width - width // 2,
    }[half]
    return mask


def mask_from_file(path: Path, size: tuple[int, int]) -> Tensor:
    """Return a mask [H',W'], True where the picture in a file is white (128 or more): the pixels to keep.

    Raises:
        InputError: the file is no picture, or one of another size.
    """
    try:
        with open_picture(path) as picture:
            height, width = upright_size(picture)
            pixels = prepare(picture, Preprocessing(height=height, width=width, channels=1))[0]
    except IMAGE_ERRORS as error:
        raise InputError(
            expected=f"top, bottom, left, right or a picture, white where pixels are kept, as --keep {path}",
            got=why_unreadable(error),
            do="name one of them",
        ) from None
    if pixels.shape != size:
        raise InputError(
            expected=f"a mask of {size[0]}x{size[1]} pixels, the size of the tokenizer's images",
            got=f"{pixels.shape[0]}x{pixels.shape[1]} in {path}",
            do="resize it",
        )
    return torch.from_numpy(pixels >= 128)
