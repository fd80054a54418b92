"""Class labels: given by name or index, and translated from the numbering of a data set to that of a prior.

Label i of a model is `class_names[i]` of its checkpoint; -1 means that an image has none.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .loading import TrainedPrior

Labels = Sequence[str | int] | Tensor | str | int | None


def resolve_labels(n: int, labels: Labels, class_names: Sequence[str]) -> Tensor | None:
    """Return the label int64 [n] of each of n samples, None for a prior without classes.

    Args:
        n: how many samples.
        labels: class names or indices, taken in turn until there are n; None takes all classes in turn.
        class_names: of the prior.

    Raises:
        InputError: a label that the prior does not know, or an empty list of them.
    """
    if isinstance(labels, (str, int)):
        labels = [labels]
    if not class_names:
        if labels is not None:
            raise InputError(
                expected="no label, because this prior was trained without them",
                got=", ".join(str(label) for label in labels) or "an empty list",
                do="omit the label, or train on a folder with one subfolder a class",
            )
        return None
    if labels is not None and len(labels) == 0:
        raise InputError(expected="at least one label", got="none", do="omit the labels for all in turn")
    chosen = range(len(class_names)) if labels is None else [_index(label, class_names) for label in labels]
    return torch.tensor([chosen[i % len(chosen)] for i in range(n)])


def match_labels(labels: np.ndarray, class_names: Sequence[str], prior: TrainedPrior) -> np.ndarray:
    """Return labels [n] of a data set in the prior's numbering, matched by class name.

    Args:
        labels: indices into `class_names`.
        class_names: of the data set.
        prior: with classes, or without, where the labels stay as they are.

    Raises:
        InputError: an image without a label, or a class that the prior does not know.
    """
    if prior.model.config.num_classes == 0:
        return labels
    known = prior.info.class_names
    unknown = sorted(set(class_names) - set(known))
    if unknown or not class_names or (labels < 0).any():
        raise InputError(
            expected=f"images labelled with the prior's classes ({', '.join(known)})",
            got=f"the class {unknown[0]}" if unknown else "images without labels",
            do="use images with those classes, or omit --prior",
        )
    return np.array([known.index(name) for name in class_names], dtype=np.int64)[labels]


def all_labelled(class_names: Sequence[str], labels: Iterable[np.ndarray]) -> bool:
    """Return whether there are classes and none of the arrays of labels [n] has a missing label (-1)."""
    return bool(class_names) and all(shard.min() >= 0 for shard in labels)


def _index(label: str | int | Tensor, class_names: Sequence[str]) -> int:
    """Return the index of a class given by name or index; a class whose name looks like an index is taken by name."""
    if isinstance(label, str) and label in class_names:
        return class_names.index(label)
    try:
        index = int(label)
    except ValueError:
        index = -1
    if not 0 <= index < len(class_names):
        raise InputError(
            expected=f"a class name ({', '.join(class_names[:20])}{', ...' if len(class_names) > 20 else ''}) "
            f"or an index from 0 to {len(class_names) - 1}",
            got=f"the label {label}",
            do="choose one of them",
        )
    return index
