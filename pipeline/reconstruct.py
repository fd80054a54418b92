"""Images through a tokenizer and back."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenizer import VQVAE, Baseline

from .blocks import in_blocks
from .folders import claim_file
from .images import to_float, to_uint8
from .loading import load_trained_autoencoder
from .pictures import above_and_below, save_grid
from .stored_images import images_of, part_of


def reconstruct(model: VQVAE | Baseline, images: Tensor) -> Tensor:
    """Encode and decode images [n,C,H',W'], uint8 or float in [0,1]: uint8 of the same shape.

    Of an image alone or among others, the result is the same to the bit.
    """
    floats = to_float(images) if images.dtype == torch.uint8 else images
    again = in_blocks(
        model,
        lambda block: to_uint8(model.decode(model.encode(block))),
        lambda start, stop: floats[start:stop],
        len(floats),
    )
    return torch.cat([images.new_empty(0, *images.shape[1:], dtype=torch.uint8).cpu(), *again])


def decode(tokenizer: VQVAE, codes: Callable[[int, int], Tensor], count: int) -> Iterator[Tensor]:
    """The images of rows 0 .. count - 1 of codes, (start, stop) -> [n,H,W]: uint8 [n,C,H',W'], some at a time.

    What `reconstruct` makes of the images that the codes came from, to the bit.
    """
    return in_blocks(tokenizer, lambda block: to_uint8(tokenizer.decode(block)), codes, count)


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
    trained = load_trained_autoencoder(tokenizer_folder, device)
    claim_file(out, force=force)
    part = part_of(images_of(trained.info, data=data, data_root=data_root), split)
    if n > len(part):
        print(f"note: the {split} part has {len(part)} images, fewer than --n {n}", file=sys.stderr)
    images = to_uint8(part.batch(np.arange(min(n, len(part)))))
    columns = min(8, len(images))
    save_grid(above_and_below(images, reconstruct(trained.model, images), columns), out, columns=columns)
    return out
