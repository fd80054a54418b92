"""The one image transform of the project: any picture Pillow reads -> uint8 [C, H', W'].

Legend: C channels (1 grey, 3 RGB); H' and W' height and width in pixels.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from .pillow_warnings import PillowWarnings

if TYPE_CHECKING:
    from torch import Tensor

# What Pillow and the libraries under it raise for a file that is cut short, damaged or too large.
IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,  # the AVIF reader
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # an error in `open_picture`
)

_PILLOW_WARNINGS = PillowWarnings()

_TURNS = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The form every image is brought into before a network sees it; `dataclasses.asdict` of it is JSON."""

    height: int  # H', pixels
    width: int  # W', pixels
    channels: int  # C: 1 grey, 3 RGB

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise InputError(
                expected="an image size of at least 1x1 pixels",
                got=f"{self.height}x{self.width}",
                do="choose a positive height and width",
            )
        if self.channels not in (1, 3):
            raise InputError(
                expected="1 channel (grey) or 3 (RGB)",
                got=str(self.channels),
                do="choose one of the two",
            )


def prepare(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Return one picture as uint8 [C, H', W'].

    The first frame is turned upright by its EXIF orientation, laid over white where it is transparent, converted to
    grey or RGB, scaled until it covers H' x W' and cropped to its centre. A picture that already has that size is not
    resampled. 16-bit grey (modes I and I;16) is scaled from 0 .. 65535; floating point (mode F) from 0 .. 1, or from
    0 .. 255 if any value is above 1; values outside are clipped.

    Raises:
        One of IMAGE_ERRORS: the file behind `image` is damaged, or Pillow cannot convert its mode.
    """
    if image.tell() != 0:
        image.seek(0)
    mode = "L" if preprocessing.channels == 1 else "RGB"
    image = _opaque(_eight_bit(_upright(image))).convert(mode)
    size = (preprocessing.width, preprocessing.height)
    if _size(image) != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(*reversed(size), preprocessing.channels)  # [H', W', C]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_image(file: str | Path | BinaryIO, preprocessing: Preprocessing) -> np.ndarray:
    """Return `prepare` of a file or of its bytes. Raise one of IMAGE_ERRORS if it cannot be read."""
    with open_picture(file) as image:
        return prepare(image, preprocessing)


@contextmanager
def open_picture(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """Open a picture for the duration of `with`, in which it should be decoded, too.

    Raises:
        One of IMAGE_ERRORS: it cannot be read, has more pixels than Image.MAX_IMAGE_PIXELS, or is PostScript, which
            Pillow has another program run.
    """
    with _PILLOW_WARNINGS, Image.open(file) as image:
        if image.format == "EPS":
            raise UnidentifiedImageError("PostScript")
        yield image


def why_unreadable(error: BaseException) -> str:
    """Return one short line for a person that says what one of IMAGE_ERRORS means."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image Pillow can read"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        pixels = re.search(r"\d+", str(error))
        return f"{int(pixels[0]) if pixels else 0:,} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS:,}"
    return " ".join(str(error).split()) or type(error).__name__


def is_grey(image: Image.Image) -> bool:
    """Return whether the header says grey; a palette counts as colour."""
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) of the upright picture; read the header, decode nothing. Raises as `prepare` does."""
    width, height = _size(image)
    # Only where the EXIF block has been read already: Pillow's PNG reader would decode to look for one.
    turned = "exif" in image.info and _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1], in the same shape and on the same device: the same bits on each."""
    values = images.float()
    return values / values.new_full((), 255)  # a tensor: by a number, CUDA multiplies with its rounded inverse


def to_uint8(images: Tensor) -> Tensor:
    """Return float images as uint8, in the same shape: clamped to [0, 1], times 255, rounded."""
    return images.clamp(0, 1).mul(255).round().byte()


def _size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height). Raise ValueError if one of them is 0."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    return image.size


def _upright(image: Image.Image) -> Image.Image:
    """Return the picture turned upright by its EXIF orientation."""
    # `ImageOps.exif_transpose` also writes the EXIF block back, which fails on blocks cameras do write.
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 .. 8; 1, upright, where there is none."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except IMAGE_ERRORS:  # the pixels are good, and a damaged EXIF block does not say which side is up
        return 1
    return value if value in _TURNS else 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Convert modes of more than 8 bits to L, LAB to RGB (from which Pillow can convert to L); others stay."""
    if image.mode == "LAB":
        return image.convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=1.0, neginf=0.0)
        top = 255 if values.max() <= 1 else 1
        return Image.fromarray(np.rint(np.clip(values * top, 0, 255)).astype(np.uint8))
    return image


def _opaque(image: Image.Image) -> Image.Image:
    """Lay a transparent image over white; others stay."""
    if not image.has_transparency_data:
        return image
    if image.mode == "La":  # premultiplied; Pillow converts it to LA only
        image = image.convert("LA")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
