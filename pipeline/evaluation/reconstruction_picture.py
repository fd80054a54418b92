"""A picture of images above their reconstructions."""

from pathlib import Path

import numpy as np

from ..images.image_set import split_of
from ..images.png import above_and_below, save_grid
from ..images.preprocessing import to_uint8
from ..models.inference import reconstruct_images
from ..models.loading import images_of, load_trained_autoencoder
from ..runtime.console import note
from ..runtime.output_paths import check_output_file


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
        InputError: the tokenizer, the images or the file cannot be used, or the decoder gives NaN or infinity.
    """
    check_output_file(out, force=force, suffix=".png")
    trained = load_trained_autoencoder(tokenizer_folder, device)
    chosen = split_of(images_of(trained.info, data=data, data_root=data_root), split)
    if n > len(chosen):
        note(f"note: the {split} split has {len(chosen)} images, fewer than --n {n}")
    images = to_uint8(chosen.batch(np.arange(min(n, len(chosen)))))
    columns = min(8, len(images))
    reconstructed = reconstruct_images(trained.model, images, folder=tokenizer_folder)
    save_grid(above_and_below(images, reconstructed, columns=columns), out, columns=columns)
    return out
