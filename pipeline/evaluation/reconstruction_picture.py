"""A picture of images above their reconstructions."""

from pathlib import Path

import numpy as np

from ..images.image_set import split_of
from ..images.png import above_and_below, save_grid
from ..images.preprocessing import to_uint8
from ..models.decoders import INVENTS_DETAIL, DecoderChoice
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
    decoder: DecoderChoice = "auto",
    force: bool = False,
) -> Path:
    """Write a picture of the first n images of a split, each above its reconstruction.

    `decoder` is "plain", "sharp", or "auto", the sharp one if there is one; then a note says that it invents detail.

    Raises:
        InputError: the tokenizer, its decoder, the images or the file cannot be used, or the decoder gives NaN or
            infinity.
        ValueError: another `decoder`.
    """
    check_output_file(out, force=force, suffix=".png")
    trained = load_trained_autoencoder(tokenizer_folder, device, decoder=decoder)
    chosen = split_of(images_of(trained.info, data=data, data_root=data_root), split)
    if n > len(chosen):
        note(f"note: the {split} split has {len(chosen)} images, fewer than --n {n}")
    images = to_uint8(chosen.batch(np.arange(min(n, len(chosen)))))
    columns = min(8, len(images))
    reconstructed = reconstruct_images(trained.model, images, folder=trained.decoder_folder)
    save_grid(above_and_below(images, reconstructed, columns=columns), out, columns=columns)
    if trained.decoder == "sharp":
        note(f"note: {INVENTS_DETAIL}")
    return out
