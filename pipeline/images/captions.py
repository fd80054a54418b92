"""Pictures with words: lines of text, and pictures beside and below each other, on white.

The font comes with Pillow, so no system lacks it. It has the characters of ASCII alone: accents are left out, and other
characters are drawn as question marks.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from ..errors import printable

WHITE, INK = (255, 255, 255), (40, 40, 40)
TEXT, TITLE = 14, 19  # font sizes in pixels
GAP = 4  # white pixels between two pictures
MARGIN, SPACE = 16, 18  # white pixels around a sheet, and between its parts
MOST_COLUMNS, ROW_WIDTH = 8, 1300  # pictures beside each other: at most, and in pixels, but two in any case
DOTS = "..."


def text_line(words: str, width: int | None = None, *, size: int = TEXT) -> Image.Image:
    """Return one line of text as an RGB picture as high as any other of this size.

    Args:
        words: what to write; characters that break a line are escaped.
        width: of the picture in pixels, the end of longer text left out; by default as wide as the text.
        size: of the font in pixels.
    """
    font, words = _font(size), _in_ascii(words)
    if width is not None and font.getlength(words) > width:
        while words and font.getlength(words + DOTS) > width:
            words = words[:-1]
        words += DOTS
    line = Image.new("RGB", (width or max(1, round(font.getlength(words)) + 1), round(1.5 * size)), WHITE)
    ImageDraw.Draw(line).text((0, round(0.1 * size)), words, INK, font)
    return line


def text_width(words: str, *, size: int = TEXT) -> int:
    """Return how many pixels wide a text is."""
    return round(_font(size).getlength(_in_ascii(words)))


def below(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Return RGB pictures below each other, at the left."""
    width, height = max(one.width for one in pictures), sum(one.height + gap for one in pictures) - gap
    sheet, top = Image.new("RGB", (width, height), WHITE), 0
    for one in pictures:
        sheet.paste(one, (0, top))
        top += one.height + gap
    return sheet


def beside(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Return RGB pictures beside each other, at the top."""
    width, height = sum(one.width + gap for one in pictures) - gap, max(one.height for one in pictures)
    sheet, left = Image.new("RGB", (width, height), WHITE), 0
    for one in pictures:
        sheet.paste(one, (left, 0))
        left += one.width + gap
    return sheet


def in_bands(pictures: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Return pictures of one size in the bands that they are shown in, below each other."""
    columns = max(2, min(MOST_COLUMNS, ROW_WIDTH // (pictures[0].width + GAP)))
    return [list(pictures[start : start + columns]) for start in range(0, len(pictures), columns)]


def sheet_of(parts: Sequence[Image.Image]) -> Image.Image:
    """Return the parts of a sheet below each other, with a margin."""
    return with_margin(below(parts, SPACE), MARGIN)


def with_margin(picture: Image.Image, margin: int) -> Image.Image:
    """Return a picture with `margin` white pixels around it."""
    sheet = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), WHITE)
    sheet.paste(picture, (margin, margin))
    return sheet


def _in_ascii(words: str) -> str:
    """Return a text without accents, with question marks for characters that the font lacks."""
    parts = unicodedata.normalize("NFKD", printable(words))
    return "".join(part for part in parts if not unicodedata.combining(part)).encode("ascii", "replace").decode()


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
