"""Numbers of the cells of a grid as colours over an image, and the legend that says what the colours mean.

The colours are those of viridis (van der Walt and Smith 2015): lighter means more, also for the colour-blind and in
grey. They are mixed with the image in grey, so the legend shows each colour over black to white.

Legend: C channels, H' W' image, H W grid of cells, h w any two axes.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from ..images.captions import INK, WHITE, below, text_line

VIRIDIS = np.array(  # in equal steps from the least to the most
    [
        *((68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140)),
        *((40, 174, 128), (94, 201, 98), (173, 220, 48), (253, 231, 37)),
    ]
)
COLOUR_SHARE = 0.75  # of the mixture; the rest is the grey image
GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)
BAR_HEIGHT, TICK, MOST_TICKS = 24, 5, 8  # pixels, pixels, number


def heat_map(image: np.ndarray, values: np.ndarray, top: float) -> np.ndarray:
    """Return an image in grey with each cell in the colour of its value, uint8 [3,H',W'].

    Args:
        image: uint8 [C,H',W'] of 1 or 3 channels.
        values: [H,W], of the cells of H'/H by W'/W pixels that make up the image.
        top: the value of the last colour; 0 has the first.

    Raises:
        ValueError: the cells do not make up the image, or a value is NaN or infinite.
    """
    (_, height, width), (rows, columns) = image.shape, values.shape
    if height % rows or width % columns:
        raise ValueError(f"expected cells that make up {height}x{width} pixels, got {rows}x{columns} of them")
    cells = values.repeat(height // rows, axis=0).repeat(width // columns, axis=1)
    grey = image[0].astype(float) if len(image) == 1 else np.tensordot(GREY, image, axes=1)
    return _mixed(colours(cells, top), grey).transpose(2, 0, 1)


def colours(values: np.ndarray, top: float) -> np.ndarray:
    """Return the colours of values [h,w] from 0 to `top`, [h,w,3] from 0 to 255; those outside have that of the end.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise ValueError("expected finite values, got NaN or infinity")
    at = np.clip(values / top, 0, 1) * (len(VIRIDIS) - 1)
    steps = np.arange(len(VIRIDIS))
    return np.stack([np.interp(at, steps, channel) for channel in VIRIDIS.T], axis=-1)


def legend(title: str, top: float, width: int, *, mark: float, mark_name: str) -> Image.Image:
    """Return a bar `width` pixels wide of the colours from 0 to `top` with ticks below it, and one value marked above.

    Args:
        title: what the values are, with their unit.
        top: the largest value, at the right end.
        width: of the bar.
        mark: a value from 0 to `top` that is marked.
        mark_name: what it is.
    """
    values = np.broadcast_to(np.linspace(0, top, width), (BAR_HEIGHT, width))
    greys = np.broadcast_to(np.linspace(255, 0, BAR_HEIGHT)[:, None], (BAR_HEIGHT, width))
    bar = Image.fromarray(_mixed(colours(values, top), greys))
    ticks = [(value, f"{value:g}") for value in tick_values(top)]
    return below(
        [text_line(title), _scale([(mark, mark_name)], top, width, up=True), bar, _scale(ticks, top, width)], 0
    )


def tick_values(top: float) -> list[float]:
    """Return round numbers in equal steps of 1, 2 or 5 times a power of 10 from 0 to `top`, MOST_TICKS at most."""
    power = 10.0 ** math.floor(math.log10(top / MOST_TICKS))
    step = next(times * power for times in (1, 2, 5, 10, 20) if top / (times * power) < MOST_TICKS)
    return [round(index * step, 10) for index in range(int(top / step + 1e-9) + 1)]


def _scale(marks: list[tuple[float, str]], top: float, width: int, *, up: bool = False) -> Image.Image:
    """Return a strip with a short line and a name at each of the values, the lines at its bottom if `up`."""
    names = [text_line(name) for _, name in marks]
    margin = max(name.width for name in names)  # so that the name at the end fits
    strip = Image.new("RGB", (width + margin, names[0].height + TICK), WHITE)
    draw = ImageDraw.Draw(strip)
    for (value, _), name in zip(marks, names, strict=True):
        x = min(width - 1, round(value / top * (width - 1)))
        strip.paste(name, (max(0, x - name.width // 2), 0 if up else TICK))
        y = names[0].height if up else 0
        draw.line([(x, y), (x, y + TICK - 1)], INK)
    return strip


def _mixed(colour: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Return colours [h,w,3] over a grey image [h,w], all from 0 to 255: uint8 [h,w,3]."""
    return np.rint(COLOUR_SHARE * colour + (1 - COLOUR_SHARE) * grey[..., None]).astype(np.uint8)
