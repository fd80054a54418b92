"""The data sets of torchvision as sources, downloaded only if they are missing."""

from http.client import HTTPException
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..errors import InputError
from .preprocessing import Preprocessing, prepare
from .source import SPLITS, Contents, Source, SourceSplit

TORCHVISION_SETS = {  # the name of the source -> torchvision's class
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}


def torchvision_source(name: str, root: str) -> Source:
    """Return one of TORCHVISION_SETS, stored in the folder `root` or downloaded to it once its images are needed."""
    grey = name.endswith("mnist")
    side = 28 if grey else 32
    return Source(
        identity={"torchvision": name, "root": root},
        native=lambda: Preprocessing(height=side, width=side, channels=1 if grey else 3),
        contents=lambda: _contents(name, root),
    )


def _contents(name: str, root: str) -> Contents:
    train, test = (_data_set(name, root, split) for split in SPLITS)
    digits = name in ("mnist", "svhn")  # torchvision has "0 - zero" for one, nothing for the other
    return Contents("0123456789" if digits else train.classes, _split("train", train), _split("test", test))


def _split(split: str, images: Any) -> SourceSplit:
    labels = images.labels if hasattr(images, "labels") else images.targets  # svhn; the others
    return SourceSplit(
        names=[f"{split}/{i:05d}" for i in range(len(images))],
        labels=np.asarray(labels).tolist(),
        prepared=lambda preprocessing: (prepare(images[i][0], preprocessing) for i in range(len(images))),
    )


def _data_set(name: str, root: str, split: str) -> Any:
    """Return the torchvision data set, downloaded only if it is not at `root`, which may be read-only."""
    if name == "svhn" and find_spec("scipy") is None:
        raise InputError(
            expected="scipy, with which torchvision reads svhn's .mat files",
            got="a Python without it",
            do='run `pip install "codegrid[svhn]"`',
        )
    from torchvision import datasets  # here, because it imports torch

    chosen_split = {"split": split} if name == "svhn" else {"train": split == "train"}
    data_set = getattr(datasets, TORCHVISION_SETS[name])
    try:
        try:
            return data_set(root, **chosen_split)
        except RuntimeError:  # how torchvision says "not found"
            return data_set(root, download=True, **chosen_split)
    except (OSError, RuntimeError, ValueError, AssertionError, HTTPException) as error:
        raise InputError(
            expected=f"{name} in {root}, or a network to download it from",
            got=" ".join(f"{type(error).__name__}: {error}".split()),
            do="connect, or give the folder that holds it as --data-root",
        ) from error
