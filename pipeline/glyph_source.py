"""The source `glyphs`: the images `glyphs.py` draws, drawn once into the cache.

H W height and width in pixels.
"""

from collections.abc import Iterator

import numpy as np

from . import glyphs
from .image_source import Contents, Part, Source
from .images import Preprocessing, prepare
from .pictures import to_pillow

_CHUNK = 512  # images drawn at a time


def glyph_source() -> Source:
    """The first images of the seed to train on, those that follow to test on."""
    train, test = glyphs.TRAIN_COUNT, glyphs.TEST_COUNT
    return Source(
        identity={"glyphs": glyphs.VERSION, "seed": glyphs.SEED, "counts": [train, test]},
        native=lambda: Preprocessing(height=glyphs.SIZE, width=glyphs.SIZE, channels=3),
        contents=lambda: Contents(glyphs.CLASS_NAMES, _part("train", 0, train), _part("test", train, test)),
    )


def _part(part: str, start: int, count: int) -> Part:
    """Images `start` .. `start + count - 1` of the seed, drawn large enough to cover what is asked."""

    def prepared(preprocessing: Preprocessing) -> Iterator[np.ndarray]:
        size = max(preprocessing.height, preprocessing.width)
        for first in range(0, count, _CHUNK):
            number = min(_CHUNK, count - first)
            images, _ = glyphs.draw_glyphs(number, size=size, start=start + first)
            yield from (prepare(to_pillow(image), preprocessing) for image in images)

    names = [f"{part}/{i:05d}" for i in range(count)]
    return Part(names, glyphs.draw_labels(count, start=start).tolist(), prepared)
