"""The source `glyphs`: the images that `glyph_drawing.py` draws."""

from collections.abc import Iterator

import numpy as np

from . import glyph_drawing
from .png import to_pillow
from .preprocessing import Preprocessing, prepare
from .source import Contents, Source, SourceSplit

_CHUNK = 512  # images drawn at a time


def glyph_source() -> Source:
    """Return the first images of the seed to train on and those that follow to test on, as a source."""
    train, test = glyph_drawing.TRAIN_COUNT, glyph_drawing.TEST_COUNT
    return Source(
        identity={"glyphs": glyph_drawing.VERSION, "seed": glyph_drawing.SEED, "counts": [train, test]},
        native=lambda: Preprocessing(height=glyph_drawing.SIZE, width=glyph_drawing.SIZE, channels=3),
        contents=lambda: Contents(glyph_drawing.CLASS_NAMES, _split("train", 0, train), _split("test", train, test)),
    )


def _split(split: str, start: int, count: int) -> SourceSplit:
    """Return images `start` .. `start + count - 1` of the seed, drawn large enough for what is requested."""

    def prepared(preprocessing: Preprocessing) -> Iterator[np.ndarray]:
        size = max(preprocessing.height, preprocessing.width)
        for first in range(0, count, _CHUNK):
            number = min(_CHUNK, count - first)
            images, _ = glyph_drawing.draw_glyphs(number, size=size, start=start + first)
            yield from (prepare(to_pillow(image), preprocessing) for image in images)

    names = [f"{split}/{i:05d}" for i in range(count)]
    return SourceSplit(names, glyph_drawing.draw_labels(count, start=start).tolist(), prepared)
