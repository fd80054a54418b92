"""Images to PNGs: one image, or a contact sheet of many small ones, enlarged so that a person can look at them."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import InputError
from ..runtime.atomic_files import write_atomic
from ..runtime.output_paths import check_output_file

if TYPE_CHECKING:
    from torch import Tensor

GAP = 2  # white pixels between images, before enlarging
THUMBNAIL, LARGEST_THUMBNAIL = 96, 320  # pixels of the longer side; whole factors lead there
SMALLEST_SIDE = 64  # pixels; images are enlarged by a whole factor to about this width


def to_pillow(image: np.ndarray) -> Image.Image:
    """Return a uint8 array [C,H,W] as a Pillow image: of mode L for 1 channel, RGB for 3."""
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def save_png(image: Tensor, path: Path) -> None:
    """Write one uint8 image [C,H,W] with 1 or 3 channels as a PNG."""
    write_atomic(path, png_bytes(to_pillow(image.cpu().numpy())))


def thumbnail(image: np.ndarray) -> Image.Image:
    """Return an image uint8 [C,H,W] in RGB, enlarged to about THUMBNAIL or reduced to at most LARGEST_THUMBNAIL."""
    picture = to_pillow(image).convert("RGB")
    side = max(picture.size)
    if side > LARGEST_THUMBNAIL:
        return picture.reduce(-(-side // LARGEST_THUMBNAIL))
    times = max(1, round(THUMBNAIL / side))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def check_png(path: Path, *, force: bool, option: str) -> None:
    """Check that a picture may be written to `path`. Raise InputError if not, or if its name is not that of a PNG."""
    check_output_file(path, force=force, option=option, suffix=".png")
    if path.suffix.lower() != ".png":
        raise InputError(expected=f"a name that ends in .png as {option}", got=str(path), do=f"name {path}.png")


def png_bytes(picture: Image.Image) -> bytes:
    """Return a picture as the content of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def save_grid(images: Tensor, path: Path, *, columns: int | None = None) -> None:
    """Write uint8 images [n,C,H,W] as an enlarged contact sheet of `columns` columns, by default about a square."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    save_png(enlarge(tile(images, columns), images.shape[-1]), path)


def tile(images: Tensor, columns: int) -> Tensor:
    """Return uint8 images [n,C,H,W] in one on white, [C,rows*(H+GAP)+GAP,columns*(W+GAP)+GAP]."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    sheet = images.new_full((channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), 255)
    for index, image in enumerate(images):
        top = (index // columns) * (height + GAP) + GAP
        left = (index % columns) * (width + GAP) + GAP
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def enlarge(sheet: Tensor, image_width: int) -> Tensor:
    """Repeat each pixel of [C,H,W] so that images of width `image_width` become about SMALLEST_SIDE wide."""
    times = max(1, round(SMALLEST_SIDE / image_width))
    return sheet.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)


def above_and_below(*sets: Tensor, columns: int) -> Tensor:
    """Order equally long sets of images [n,...] so that rows of `columns` show each set above the next."""
    import torch  # here, so that sources of images can use `to_pillow` without it

    blank = sets[0].new_full((-len(sets[0]) % columns, *sets[0].shape[1:]), 255)
    rows = [torch.cat([images, blank]).split(columns) for images in sets]
    return torch.cat([row for above in zip(*rows, strict=True) for row in above])
