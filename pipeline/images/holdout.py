"""Which images are set aside: each name decides for itself, by its hash, the same on every system.

So adding images moves none of the others from one side to the other. A name is taken as a path in Unicode NFC with `/`
between its parts, whatever the system writes.

N names.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np

MOST_HELD_OUT = 4096  # items that the evaluations during training use at most


def held_out(names: Iterable[str], fraction: float = 0.05) -> np.ndarray:
    """Which of the training images to validate on: bool [N], about `fraction` of them.

    Where the hashes would choose none or all of two or more, the one with the smallest is chosen; of a single image,
    none is.
    """
    chosen = by_hash(names, fraction, "validation")
    return chosen if len(chosen) > 1 else np.zeros(len(chosen), bool)


def split_rows(held_out_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the rows to evaluate on, ascending.

    Args:
        held_out_mask: bool [N]; the first MOST_HELD_OUT of its rows are evaluated on. Where it holds out none, all
            rows serve as both.
    """
    train, held_out_rows = np.flatnonzero(~held_out_mask), np.flatnonzero(held_out_mask)[:MOST_HELD_OUT]
    return (train, held_out_rows) if len(held_out_rows) else (train, train)


def by_hash(names: Iterable[str], fraction: float, salt: str) -> np.ndarray:
    """About `fraction` of the names, and of two or more never none and never all: bool [N].

    Another `salt` chooses independently of this one.
    """
    scores = _scores(names, salt)
    chosen = scores < fraction
    if len(scores) > 1 and (chosen.all() or not chosen.any()):
        chosen = scores == scores.min()  # an image and its mirror image have one name
    if len(scores) > 1 and chosen.all():
        chosen = np.arange(len(scores)) == 0
    return chosen


def _scores(names: Iterable[str], salt: str) -> np.ndarray:
    """Of each name a number uniform in [0, 1), the first 8 bytes of its hash: float64 [N]."""
    before = f"{salt}/".encode()
    texts = (before + _normal(name).encode("utf-8", "surrogatepass") for name in names)
    hashes = np.fromiter((hashlib.sha256(text).digest()[:8] for text in texts), dtype="V8")
    return hashes.view(">u8") / 2.0**64


def _normal(name: str) -> str:
    """A path as every system would write it."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))
