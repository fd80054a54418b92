"""Which images are held out: the hash of each name decides, in the same way on every system.

So adding images moves none of the others from one split to the other. A name is taken as a path in Unicode NFC with `/`
as separator, whatever the system writes.

Legend: N names.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np

from .rows import evenly_spaced

MOST_HELD_OUT = 4096  # items that the evaluations during training use at most


def held_out(names: Iterable[str], fraction: float = 0.05) -> np.ndarray:
    """Return which of the training images to validate on: bool [N], true for about `fraction` of them.

    Where the hashes would choose none or all of two or more, the one with the smallest hash is chosen; of a single
    image, none is.
    """
    chosen = by_hash(names, fraction, "validation")
    return chosen if len(chosen) > 1 else np.zeros(len(chosen), bool)


def split_rows(held_out_mask: np.ndarray, most: int = MOST_HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the rows to evaluate on, ascending.

    Args:
        held_out_mask: bool [N]. If it holds out none, all rows are trained on and evaluated on.
        most: how many of those held out are evaluated on, evenly spaced, at most.
    """
    train, rows = np.flatnonzero(~held_out_mask), np.flatnonzero(held_out_mask)
    return (train, rows[evenly_spaced(len(rows), most)]) if len(rows) else (train, train)


def by_hash(names: Iterable[str], fraction: float, salt: str) -> np.ndarray:
    """Choose about `fraction` of the names, and of two or more never none and never all; return bool [N].

    What two different salts choose is independent.
    """
    scores = _scores(names, salt)
    chosen = scores < fraction
    if len(scores) > 1 and (chosen.all() or not chosen.any()):
        chosen = scores == scores.min()  # an image and its mirror image have one name
    if len(scores) > 1 and chosen.all():
        chosen = np.arange(len(scores)) == 0
    return chosen


def _scores(names: Iterable[str], salt: str) -> np.ndarray:
    """Return for each name a number uniform in [0, 1), the first 8 bytes of its hash: float64 [N]."""
    prefix = f"{salt}/".encode()
    texts = (prefix + _normal(name).encode("utf-8", "surrogatepass") for name in names)
    hashes = np.fromiter((hashlib.sha256(text).digest()[:8] for text in texts), dtype="V8")
    return hashes.view(">u8") / 2.0**64


def _normal(name: str) -> str:
    """Return a path in the form it has on every system."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))
