"""What each kind of image source tells `open_images`: what names it in the cache, its native size, its images.

C channels, H' W' height and width in pixels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .cache import Broken
from .preprocessing import Preprocessing

PARTS = ("train", "test")
BROKEN_ONE_IN = 10  # more broken files than this, and nothing starts


@dataclass(frozen=True)
class Part:
    """The images of one part, before they are prepared."""

    names: Sequence[str]
    labels: Sequence[int]  # -1 where there is none
    prepared: Callable[[Preprocessing], Iterable[np.ndarray | Broken]]  # uint8 [C, H', W'] for each name, in order


@dataclass(frozen=True)
class Contents:
    """What a set holds."""

    class_names: Sequence[str]
    train: Part
    test: Part


@dataclass(frozen=True)
class Source:
    """What is known of a set before it is looked into."""

    identity: dict[str, Any]  # JSON that differs whenever the images do
    native: Callable[[], Preprocessing]  # what its images have unless asked otherwise
    contents: Callable[[], Contents]


def check_broken(broken: Mapping[str, str], total: int, left: int) -> None:
    """Refuse to go on with `broken` (name -> reason) of `total` files, and `left` to train on."""
    if left > 0 and len(broken) * BROKEN_ONE_IN <= total:
        return
    named = ", ".join(list(broken)[:10]) + (", ..." if len(broken) > 10 else "")
    raise InputError(
        expected=f"images to train on, and at most 1 broken file in {BROKEN_ONE_IN}",
        got=f"{len(broken)} broken of {total}: {named}",
        do="repair or remove these files",
    )
