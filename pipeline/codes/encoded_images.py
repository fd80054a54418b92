"""The rows of an export: the images of a split, encoded when they are requested.

Legend: n rows, H W grid of codes.
"""

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import chain

import numpy as np
from torch import Tensor

from tokenizer import VQVAE

from ..images.image_set import ImageSplit
from ..models.inference import BLOCK, encode_images
from ..runtime.progress import Progress
from .manifest import code_dtype

HASHED_AT_ONCE = 4_096  # images


class EncodedImages:
    """The codes of the images of a split and then, with `flips`, of their mirror images.

    Codes are computed in blocks that start at multiples of BLOCK rows, wherever a shard starts, so that a row has the
    same neighbours in every export.
    """

    def __init__(self, tokenizer: VQVAE, split: ImageSplit, *, flips: bool, batch_size: int, bar: Progress) -> None:
        self.tokenizer, self.split, self.batch_size, self.bar = tokenizer, split, batch_size, bar
        self._len = len(split) * (2 if flips else 1)
        self._dtype = code_dtype(tokenizer.config.num_codes)
        self._last: tuple[int, np.ndarray] | None = None  # first row and codes of the block computed last

    def __len__(self) -> int:
        return self._len

    def codes(self, start: int, stop: int) -> np.ndarray:
        """Return the codes [n,H,W] of rows start .. stop - 1."""
        first, last = start - start % BLOCK, min(stop - stop % -BLOCK, len(self))
        cached = [self._last[1]] if self._last is not None and self._last[0] == first else []
        batches, done = [], first
        with closing(self._computed(first + sum(map(len, cached)), last)) as computed:
            for batch in chain(cached, computed):
                batches.append(batch)
                self.bar.update(max(0, min(done + len(batch), stop) - max(done, start)))
                done += len(batch)
        codes = np.concatenate(batches)
        last_block = (len(codes) - 1) // BLOCK * BLOCK
        self._last = (first + last_block, codes[last_block:].copy())
        return codes[start - first : stop - first]

    def labels(self, start: int, stop: int) -> np.ndarray:
        """Return the labels [n] int64 of rows start .. stop - 1; -1 for none."""
        return self.split.labels[self._rows(start, stop)]

    def names(self, start: int, stop: int) -> Sequence[str]:
        """Return the names of the images of rows start .. stop - 1."""
        return [self.split.names[row] for row in self._rows(start, stop)]

    def _computed(self, start: int, stop: int) -> Generator[np.ndarray, None, None]:
        """Yield the codes of rows start .. stop - 1, where a block starts, some blocks at a time."""
        batches = encode_images(
            self.tokenizer,
            lambda first, last: self._images(start + first, start + last),
            stop - start,
            batch_size=self.batch_size,
        )
        for codes in batches:
            yield codes.numpy().astype(self._dtype)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Return the rows of the split whose images are rows start .. stop - 1."""
        return np.arange(start, stop) % len(self.split)

    def _images(self, start: int, stop: int) -> Tensor:
        """Return the images of rows start .. stop - 1."""
        images = self.split.batch(self._rows(start, stop))
        first_mirrored = max(0, len(self.split) - start)
        images[first_mirrored:] = images[first_mirrored:].flip(-1)
        return images


def rows_sha256(split: ImageSplit) -> str:
    """Return the SHA-256 of the names, labels and pixels of all images of a split, in order: 64 hex digits."""
    digest = hashlib.sha256()
    for start in range(0, len(split), HASHED_AT_ONCE):
        rows = slice(start, start + HASHED_AT_ONCE)
        digest.update(json.dumps(split.names[rows], ensure_ascii=False).encode("utf-8", "surrogatepass"))
        digest.update(split.labels[rows].astype("<i8").tobytes())
        digest.update(split.images[rows].tobytes())
    return digest.hexdigest()
