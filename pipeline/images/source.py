"""A source of images, before they are prepared: its identity in the cache, its native size, its images.

Legend: C channels, H' W' height and width in pixels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .preprocessing import Preprocessing

SPLITS = ("train", "test")
BROKEN_ONE_IN = 10  # more broken files than one in this many are refused


@dataclass(frozen=True)
class Broken:
    """Takes the place of an image that could not be read."""

    reason: str


@dataclass(frozen=True)
class SourceSplit:
    """The images of one split, before they are prepared."""

    names: Sequence[str]
    labels: Sequence[int]  # -1 where there is none
    prepared: Callable[[Preprocessing], Iterable[np.ndarray | Broken]]  # -> uint8 [C, H', W'] for each name, in order


@dataclass(frozen=True)
class Contents:
    """The classes and the splits of a source."""

    class_names: Sequence[str]
    train: SourceSplit
    test: SourceSplit
    broken: Mapping[str, str] = field(default_factory=dict)  # what is in no split because it cannot be a file -> why


@dataclass(frozen=True)
class Source:
    """A source of images; only its identity is known before it is read."""

    identity: dict[str, Any]  # JSON that differs whenever the images do
    native: Callable[[], Preprocessing]  # what its images become unless another size or number of channels is requested
    contents: Callable[[], Contents]


def check_broken(broken: Mapping[str, str], total: int, left: int) -> None:
    """Raise InputError if too many of `total` files are `broken` (name -> reason), or none is `left` to train on."""
    if left > 0 and len(broken) * BROKEN_ONE_IN <= total:
        return
    named = ", ".join(list(broken)[:10]) + (", ..." if len(broken) > 10 else "")
    raise InputError(
        expected=f"images to train on, and at most 1 broken file in {BROKEN_ONE_IN}",
        got=f"{len(broken)} broken of {total}: {named}",
        do="repair or remove these files",
    )
