"""What the names in a folder of images say: the split and the class each image belongs to.

A folder holds images directly (no labels), or one subfolder a class (what is deeper belongs to the class), or
`train/` and `test/`, each of them in one of these two forms. Without `test/` a tenth becomes the test split, chosen by
a hash of each file's name, so that adding files moves none of the others.

    no labels      classes a and b      splits, with or without classes
    1.png          a/1.png              train/a/1.png
    2.png          b/more/2.png         test/a/2.png
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .holdout import by_hash
from .source import SPLITS

TEST_FRACTION = 0.1  # of a folder without test/

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitLayout:
    """The images of one split, as positions in the list of all names."""

    positions: list[int]  # ascending
    labels: list[int]  # of each position; -1 where there is none


@dataclass(frozen=True)
class Layout:
    """The split and the class of every image."""

    class_names: list[str]  # in code point order; empty where there are no labels
    train: SplitLayout
    test: SplitLayout


def read_layout(folder: str, names: Sequence[str]) -> Layout:
    """Return splits, classes and labels, from the names alone: paths relative to `folder` with `/` as separator.

    Raises:
        InputError: some images are beside the classes, or a class is in the test split only.
    """
    tops = [_top(name) for name in names]
    divided = set(SPLITS) <= set(tops)
    depth = 1 if divided or set(tops) == {"train"} else 0  # folders above the classes
    if divided:
        train, test = ([i for i, top in enumerate(tops) if top == split] for split in SPLITS)
        if len(train) + len(test) < len(names):
            _log.warning("Warning: of %s only train/ and test/ are used", folder)
    else:
        in_test = by_hash(names, TEST_FRACTION, "test")
        train, test = np.flatnonzero(~in_test).tolist(), np.flatnonzero(in_test).tolist()
    found = [_class(name, depth) for name in names]
    classes = _classes(folder, (found[i] for i in (train if divided else range(len(names)))))
    unknown = sorted(set(_classes(folder, (found[i] for i in test))) - set(classes))
    if unknown:
        raise InputError(
            expected=f"in {folder} no class in test/ that is not in train/",
            got=", ".join(unknown),
            do="rename or remove these folders",
        )
    label = {name: i for i, name in enumerate(classes)} | {"": -1}
    return Layout(classes, *(SplitLayout(rows, [label[found[i]] for i in rows]) for rows in (train, test)))


def _top(name: str) -> str:
    """Return the first folder of a name, case-folded; "" for a file directly in the set's folder."""
    top, slash, _ = name.partition("/")
    return top.casefold() if slash else ""


def _class(name: str, depth: int) -> str:
    """Return the folder of a name that is its class, "" where there is none."""
    folders = name.split("/")[depth:-1]
    return folders[0] if folders else ""


def _classes(folder: str, found: Iterable[str]) -> list[str]:
    """Return the classes `found`, in code point order; none if there are no labels.

    Raises:
        InputError: some images have a class and some have none.
    """
    names = sorted(set(found))
    if len(names) > 1 and "" in names:
        raise InputError(
            expected=f"in {folder} either images alone, or all of them in one subfolder a class",
            got=f"images beside the subfolder {names[1]}",
            do="move the images into subfolders, or the subfolders elsewhere",
        )
    return [name for name in names if name]
