"""The bytes of images as PNG, and as JPEG of a given PSNR.

JPEG is used at its best: its Huffman tables are optimised for each image, and RGB is stored with colours at half or at
full resolution, whichever is smaller. Its PSNR may fall as the quality rises, above all for images that were JPEGs
before; if several qualities meet a PSNR, one of them is returned.

Legend: N images, C channels, H' W' pixels.
"""

import io
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageFile

from ..evaluation.reconstruction import psnr_of
from ..images.png import to_pillow
from ..runtime.progress import with_progress

QUALITIES = range(1, 101)  # of JPEG
START_OF_SCAN = 0xDA  # the second byte of a marker in a JPEG file
END_OF_IMAGE = b"\xff\xd9"

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class JpegRate:
    """The mean bytes of a set of images as JPEG, at one quality."""

    quality: float  # 1 to 100; not an integer where interpolated
    subsampling: str  # of the colours: 4:2:0 at half resolution, 4:4:4 at full
    psnr: float  # dB, of the mean squared error over all images
    file: float  # bytes an image
    scan: float  # bytes an image, without headers and tables


def mean_png_bytes(images: np.ndarray) -> float:
    """Return the mean bytes of images uint8 [N,C,H',W'], each as an optimised PNG."""
    shown = with_progress(images, len(images), "PNG")
    return sum(len(_saved(to_pillow(image), "PNG")) for image in shown) / len(images)


def jpeg_at_psnr(psnr: float, images: np.ndarray) -> JpegRate:
    """Return the rate of uint8 images [N,C,H',W'] as JPEG of this PSNR, or of the nearest that any quality has."""
    subsamplings = ("4:4:4",) if images.shape[1] == 1 else ("4:2:0", "4:4:4")
    found = [rate_at(psnr, partial(measure_jpeg, images, subsampling=subsampling)) for subsampling in subsamplings]
    return min(found, key=lambda rate: (abs(rate.psnr - psnr), rate.file))


def rate_at(psnr: float, measure: Callable[[int], JpegRate]) -> JpegRate:
    """Return the rate at `psnr`, interpolated linearly in the PSNR between two neighbouring integer qualities.

    It is the rate of quality 1 if even that is better, and of quality 100 if even that is worse.
    """
    measured = cache(measure)
    above = bisect_left(QUALITIES, psnr, key=lambda quality: measured(quality).psnr)
    if above in (0, len(QUALITIES)):
        return measured(QUALITIES[min(above, len(QUALITIES) - 1)])
    low, high = measured(QUALITIES[above - 1]), measured(QUALITIES[above])
    share = (psnr - low.psnr) / (high.psnr - low.psnr)
    return JpegRate(
        quality=low.quality + share,
        subsampling=low.subsampling,
        psnr=psnr,
        file=low.file + share * (high.file - low.file),
        scan=low.scan + share * (high.scan - low.scan),
    )


def measure_jpeg(images: np.ndarray, quality: int, *, subsampling: str) -> JpegRate:
    """Return the rate of uint8 images [N,C,H',W'] as JPEG of one quality."""
    error, file, scan = 0, 0, 0
    with _buffer_for(images[0]):
        for image in with_progress(images, len(images), f"JPEG {subsampling}, quality {quality}"):
            picture = to_pillow(image)
            data = _saved(picture, "JPEG", quality=quality, subsampling=subsampling)
            with Image.open(io.BytesIO(data)) as reconstructed:
                error += squared_error(np.asarray(reconstructed), np.asarray(picture))
            file, scan = file + len(data), scan + scan_bytes(data)
    count = len(images)
    psnr = psnr_of_uint8(error, images.size)
    return JpegRate(quality=quality, subsampling=subsampling, psnr=psnr, file=file / count, scan=scan / count)


def scan_bytes(data: bytes) -> int:
    """Return the bytes of entropy-coded data in a baseline JPEG file: from its one scan header to the last marker."""
    position = 2  # after the marker that starts the image
    while True:  # marker of 2 bytes, length of 2 bytes that includes itself, content
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        position += 2 + length
        if marker == START_OF_SCAN:
            return data.index(END_OF_IMAGE, position) - position  # in the data itself, 0 follows each ff


@contextmanager
def _buffer_for(image: np.ndarray) -> Iterator[None]:
    """Enlarge Pillow's buffer: it must hold a complete optimised JPEG, and its default is too small for noise."""
    before = ImageFile.MAXBLOCK
    ImageFile.MAXBLOCK = max(before, 4 * image.size)
    try:
        yield
    finally:
        ImageFile.MAXBLOCK = before


def _saved(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    """Return the bytes of a picture as an optimised file."""
    buffer = io.BytesIO()
    picture.save(buffer, file_format, optimize=True, **options)
    return buffer.getvalue()


def squared_error(images: np.ndarray, reconstructed: np.ndarray) -> int:
    """Return the exact sum of the squared differences of two uint8 arrays of one shape."""
    return int(np.square(images.astype(np.int32) - reconstructed).sum(dtype=np.int64))


def psnr_of_uint8(squared_error: int, values: int) -> float:
    """Return the PSNR in dB from the sum of the squared errors of `values` values of 8 bits."""
    return psnr_of(squared_error / values / 255**2)
