"""The source `glyphs`: the images `glyph_drawing.py` draws, drawn once into the cache.

H W height and width in pixels.
"""

from collections.abc import Iterator

import numpy as np

from . import glyph_drawing
from .png import to_pillow
from .preprocessing import Preprocessing, prepare
from .source import Contents, Part, Source

_CHUNK = 512  # images drawn at a time


def glyph_source() -> Source:
    """The first images of the seed to train on, those that follow to test on."""
    train, test = glyph_drawing.TRAIN_COUNT, glyph_drawing.TEST_COUNT
    return Source(
        identity={"glyphs": glyph_drawing.VERSION, "seed": glyph_drawing.SEED, "counts": [train, test]},
        native=lambda: Preprocessing(height=glyph_drawing.SIZE, width=glyph_drawing.SIZE, channels=3),
        contents=lambda: Contents(glyph_drawing.CLASS_NAMES, _part("train", 0, train), _part("test", train, test)),
    )


def _part(part: str, start: int, count: int) -> Part:
    """Images `start` .. `start + count - 1` of the seed, drawn large enough to cover what is asked."""

    def prepared(preprocessing: Preprocessing) -> Iterator[np.ndarray]:
        size = max(preprocessing.height, preprocessing.width)
        for first in range(0, count, _CHUNK):
            number = min(_CHUNK, count - first)
            images, _ = glyph_drawing.draw_glyphs(number, size=size, start=start + first)
            yield from (prepare(to_pillow(image), preprocessing) for image in images)

    names = [f"{part}/{i:05d}" for i in range(count)]
    return Part(names, glyph_drawing.draw_labels(count, start=start).tolist(), prepared)
