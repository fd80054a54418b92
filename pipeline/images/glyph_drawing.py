"""The built-in labelled images `glyphs`, drawn by the program, the same pixels on every machine.

The 16 hexadecimal digits in Pillow's own scalable font (Aileron), each turned, slanted, sized,
thickened, moved and coloured at random over a dark background. Image i depends on (seed, i) only.

What keeps a machine's own arithmetic out of the pixels:
- the random numbers are raw 64-bit words of PCG64, whose stream numpy keeps fixed for ever [1]
  (the distributions of `Generator` may change from one release to the next);
- an outline is drawn 16 times too large and thresholded, so hinting and anti-aliasing hardly show;
- the numbers of the affine map are rounded to multiples of 2^-14, so that every product and sum of
  the bilinear filter is exact in a double: no rounding mode, fused multiply-add or `cos` matters;
- the box reduction and the blending of colours are integer arithmetic.

[1] NEP 19, https://numpy.org/neps/nep-0019-rng-policy.html
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CLASS_NAMES = tuple("0123456789ABCDEF")
NUM_CLASSES = len(CLASS_NAMES)
SIZE = 32  # height and width of the set unless another size is requested, pixels
TRAIN_COUNT = 20_000  # images 0 .. 19,999 of the seed
TEST_COUNT = 2_000  # the 2,000 that follow
SEED = 0
VERSION = 1  # add one whenever a pixel changes: it is part of the cache's key

# Ten colours told apart at a glance, all of them light enough to stay clear on a grey copy too.
FOREGROUNDS = np.array(
    [
        (246, 80, 72),  # red
        (247, 139, 38),  # orange
        (250, 211, 46),  # yellow
        (164, 224, 50),  # lime
        (52, 199, 89),  # green
        (38, 208, 188),  # teal
        (66, 184, 245),  # sky
        (100, 136, 255),  # blue
        (171, 104, 248),  # violet
        (244, 96, 184),  # pink
    ]
)
BACKGROUNDS = np.array([(28, 32, 54), (52, 28, 40), (20, 46, 48), (52, 42, 24), (42, 28, 66), (44, 44, 48)])
FOREGROUND_JITTER = 10  # levels of 255, either way
BACKGROUND_JITTER = 6

STROKES = 5  # weights of the pen, from the font's own to bold
STROKE_STEP = 1 / 64  # what one weight adds on each side, in heights of a capital letter
FILL = (0.66, 0.92)  # longer side of the turned glyph's box, in sides of the image
MARGIN = 0.04  # kept free on every side, in sides of the image
ANGLE = 20.0  # degrees, either way
SHEAR = 0.22  # sideways per height, either way
SHIFT = 0.14  # of the image's side, either way, as far as the glyph stays inside

_SUPERSAMPLE = 4  # canvas pixels per image pixel, each way
_OVERDRAW = 4  # outline pixels per pixel of a master glyph, each way
_COLUMNS = 16  # random words per image
_EXACT = 2.0**14


@dataclass(frozen=True)
class _Looks:
    """How each of n glyphs looks, chosen at random."""

    labels: np.ndarray  # int64 [n]
    strokes: np.ndarray  # int64 [n], 0 .. STROKES - 1
    fill: np.ndarray  # float64 [n], longer side of the glyph's box / side of the image
    turn: np.ndarray  # float64 [n, 2, 2], rotation times shear, not scaled
    shift: np.ndarray  # float64 [n, 2] in [-1, 1), x and y
    foreground: np.ndarray  # int64 [n, 3], RGB
    background: np.ndarray  # int64 [n, 3]


def draw_glyphs(count: int, *, seed: int = SEED, size: int = SIZE, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return images `start` .. `start + count - 1` of a seed, uint8 [count, 3, size, size], and labels, int64 [count].

    The labels index `CLASS_NAMES`; every 16 images that begin at a multiple of 16 hold each class once.
    """
    looks = _looks(seed, start, count)
    cover = np.zeros((count, size, size), np.uint8)  # 255 where the pen covers the whole pixel
    for i in range(count):
        cover[i] = _draw(looks, i, size)
    ink = looks.foreground[:, :, None, None]  # [n, 3, 1, 1]
    paper = looks.background[:, :, None, None]
    images = (paper * 255 + (ink - paper) * cover[:, None] + 127) // 255
    return images.astype(np.uint8), looks.labels


def draw_labels(count: int, *, seed: int = SEED, start: int = 0) -> np.ndarray:
    """Return the labels of `draw_glyphs` without drawing the images: int64 [count].

    Every block of 16 images holds each class once, in a random order of its own.
    """
    first = start - start % NUM_CLASSES
    stop = -(-(start + count) // NUM_CLASSES) * NUM_CLASSES
    keys = _random_words(seed, first, stop - first)[:, 0].reshape(-1, NUM_CLASSES)
    return np.argsort(keys, axis=1, kind="stable").reshape(-1)[start - first :][:count]


def _looks(seed: int, start: int, count: int) -> _Looks:
    """Choose how images `start` .. `start + count - 1` of a seed look."""
    words = _random_words(seed, start, count)
    uniforms = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
    either_way = 2 * uniforms - 1
    one, zero = np.ones(count), np.zeros(count)
    shear = _matrices(one, either_way[:, 4] * SHEAR, zero, one)
    return _Looks(
        labels=draw_labels(count, seed=seed, start=start),
        strokes=(uniforms[:, 1] * STROKES).astype(np.int64),
        fill=FILL[0] + uniforms[:, 2] * (FILL[1] - FILL[0]),
        turn=_rotation(either_way[:, 3] * ANGLE) @ shear,
        shift=either_way[:, 5:7],
        foreground=_colour(FOREGROUNDS, uniforms[:, 7], either_way[:, 8:11] * FOREGROUND_JITTER),
        background=_colour(BACKGROUNDS, uniforms[:, 11], either_way[:, 12:15] * BACKGROUND_JITTER),
    )


def _random_words(seed: int, start: int, count: int) -> np.ndarray:
    """Return uint64 [count, _COLUMNS]: row i depends on the seed and on `start + i`, the image's index, alone."""
    stream = np.random.PCG64(seed).advance(start * _COLUMNS)
    return np.asarray(stream.random_raw(count * _COLUMNS)).reshape(count, _COLUMNS)


def _rotation(degrees: np.ndarray) -> np.ndarray:
    """Return rotations by `degrees` [n], float64 [n, 2, 2], rounded so that a machine's `cos` does not show."""
    radians = degrees * (np.pi / 180)
    cos, sin = _exact(np.cos(radians)), _exact(np.sin(radians))
    return _matrices(cos, -sin, sin, cos)


def _matrices(*entries: np.ndarray) -> np.ndarray:
    """Return four arrays [n], the entries row by row, as matrices [n, 2, 2]."""
    return np.stack(entries, axis=1).reshape(-1, 2, 2)


def _exact(values: np.ndarray) -> np.ndarray:
    """Round to multiples of 1 / _EXACT."""
    return np.rint(values * _EXACT) / _EXACT


def _colour(palette: np.ndarray, choice: np.ndarray, jitter: np.ndarray) -> np.ndarray:
    """Return colours [n, 3] of the palette, chosen by `choice` [n] in [0, 1), plus `jitter` [n, 3]."""
    chosen = palette[(choice * len(palette)).astype(np.int64)]
    return np.clip(chosen + np.rint(jitter).astype(np.int64), 0, 255)


def _draw(looks: _Looks, i: int, size: int) -> np.ndarray:
    """Draw glyph i: return how much of each pixel the pen covers, uint8 [size, size]."""
    master = _masters(size)[looks.labels[i]][looks.strokes[i]]
    canvas = size * _SUPERSAMPLE
    box = np.abs(looks.turn[i]) @ master.size  # width and height of the turned glyph, unscaled
    scale = looks.fill[i] * canvas / box.max()
    room = np.minimum((canvas - box * scale) / 2 - MARGIN * canvas, SHIFT * canvas)
    centre = canvas / 2 + looks.shift[i] * room
    back = _exact(np.linalg.inv(looks.turn[i] * scale))  # canvas -> master, as Pillow wants it
    origin = _exact(np.array(master.size) / 2 - back @ centre)
    coefficients = (*back[0], origin[0], *back[1], origin[1])
    placed = master.transform((canvas, canvas), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(placed.reduce(_SUPERSAMPLE))


@lru_cache(maxsize=2)
def _masters(size: int) -> list[list[Image.Image]]:
    """Return as [class][stroke] a large upright glyph, white on black, cut to its box."""
    height = size * _SUPERSAMPLE * _OVERDRAW  # of a capital letter, outline pixels
    font = _font(height)
    return [[_master(name, stroke, height, font) for stroke in range(STROKES)] for name in CLASS_NAMES]


def _font(height: int) -> ImageFont.FreeTypeFont:
    """Return the built-in font, its capitals about `height` pixels tall."""
    font = ImageFont.load_default(size=round(height / 0.7))
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType, so it has no scalable font")
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def _master(name: str, stroke: int, height: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    width = round(stroke * STROKE_STEP * height)
    page = Image.new("L", (2 * height, 2 * height), 0)
    ImageDraw.Draw(page).text((height // 2, height // 4), name, fill=255, font=font, stroke_width=width)
    page = page.point(lambda level: 255 if level >= 128 else 0)
    return page.crop(page.getbbox()).reduce(_OVERDRAW)
