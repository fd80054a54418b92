"""A picture that shows where a prior is surprised, and which images the tokenizer reconstructs best and worst.

    cifar10: test split, 10,000 images
    bits per code |=========|   legend

    16 images, evenly spaced
    image            [] [] []
    reconstruction   [] [] []
    bits per code    [] [] []   what each code costs given those before it, over the image; only with a prior
    best                        the same without the bits, by reconstruction error; then median and worst

Legend: n images, N in the split, C channels, H' W' image, H W grid of codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..images.captions import GAP, MOST_COLUMNS, TITLE, WHITE, below, beside, in_bands, sheet_of, text_line, text_width
from ..images.png import THUMBNAIL, thumbnail
from ..images.rows import evenly_spaced
from .heat_map import heat_map, legend

EVENLY_SPACED = 16  # images of the split
LEGEND_WIDTH = TITLE_WIDTH = 640  # pixels
LINE = text_line("").height
HEAT = "bits per code"
NMSE = "nmse: squared error of an image, as a share of the variance of all pixels of the training images"
ROW_TITLES = ("image", "reconstruction", HEAT)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Images of one kind, to show under a title."""

    title: str
    images: np.ndarray  # uint8 [n,C,H',W'] of 1 or 3 channels
    reconstructions: np.ndarray  # the same
    errors: np.ndarray  # [n] mean squared error of each image / variance of the training pixels
    bits: np.ndarray | None = None  # [n,H,W] what each code costs; None to show none


def rows_to_show(errors: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each title and the rows [n] under it: some evenly spaced, then the best, median and worst.

    Args:
        errors: the reconstruction error [N] of each image of the split; equal ones stay in the order of the rows.

    Of three images or more, none is among two of best, median and worst.
    """
    spaced = evenly_spaced(len(errors), EVENLY_SPACED)
    yield "1 image" if len(spaced) == 1 else f"{len(spaced)} images, evenly spaced over the split", spaced
    order = np.argsort(errors, kind="stable")
    size = max(1, min(MOST_COLUMNS, len(errors) // 3))
    middle = (len(errors) - size) // 2
    yield "best: the lowest reconstruction error", order[:size]
    yield "median", order[middle : middle + size]
    yield "worst: the highest reconstruction error", order[-size:][::-1]


def surprise_picture(title: str, sections: Sequence[Section], guessing: float | None = None) -> Image.Image:
    """Return the picture, RGB.

    Args:
        title: the line above all.
        sections: one below the other; all images are of one size.
        guessing: the bits of a code if all are equally likely, log2 K; needed where a section has bits.

    Raises:
        ValueError: an error or a number of bits is NaN or infinite, or the cells of bits do not make up the images.
    """
    if not all(np.isfinite(section.errors).all() for section in sections):
        raise ValueError("expected finite errors, got NaN or infinity")
    parts, top = [below([text_line(title, TITLE_WIDTH, size=TITLE), text_line(NMSE)])], guessing or 0.0
    surprising = [section.bits for section in sections if section.bits is not None]
    if surprising and guessing is not None:
        top = max(guessing, 1.0, *(float(bits.max()) for bits in surprising))
        name = f"guessing {guessing:.2f}"
        words = f"{HEAT}: what a code costs given those before it (the rows above, and to its left)"
        parts.append(legend(words, top, LEGEND_WIDTH, mark=guessing, mark_name=name))
    return sheet_of([*parts, *(_drawn(section, top) for section in sections)])


def _drawn(section: Section, top: float) -> Image.Image:
    """Return the images of a section with its title, in as many bands as they need."""
    tiles = [_tiles(section, index, top) for index in range(len(section.images))]
    titles = _row_titles(section)
    bands = [beside([titles, *band]) for band in in_bands(tiles)]
    return below([text_line(section.title, TITLE_WIDTH, size=TITLE), *bands], 2 * GAP)


def _row_titles(section: Section) -> Image.Image:
    """Return the words at the left of the rows of tiles."""
    height, width = _tile(section.images[0]).height, max(text_width(words) for words in ROW_TITLES) + GAP
    titles = [text_line(words, width) for words in ROW_TITLES[: 2 if section.bits is None else 3]]
    cells = [Image.new("RGB", (width, height), WHITE) for _ in titles]
    for cell, words in zip(cells, titles, strict=True):
        cell.paste(words, (0, (height - LINE) // 2))
    return below(cells)


def _tiles(section: Section, index: int, top: float) -> Image.Image:
    """Return an image, its reconstruction and its bits below each other, with the numbers of it."""
    image = section.images[index]
    tiles, numbers = [image, section.reconstructions[index]], []
    if section.bits is not None:
        tiles.append(heat_map(image, section.bits[index], top))
        numbers.append(f"{section.bits[index].mean():.2f} bits")
    numbers.append(f"nmse {section.errors[index]:#.3g}")
    shown = [_tile(tile) for tile in tiles]
    width = shown[0].width
    return below([*shown, below([text_line(words, width) for words in numbers], 0)])


def _tile(image: np.ndarray) -> Image.Image:
    """Return an image uint8 [C,H',W'] in RGB and of a size to look at; a thin one on white, for words."""
    picture = thumbnail(image)
    cell = Image.new("RGB", (max(THUMBNAIL, picture.width), max(LINE, picture.height)), WHITE)
    cell.paste(picture)
    return cell
