"""The sources torchvision knows by name, downloaded only where they are missing."""

from http.client import HTTPException
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..errors import InputError
from .preprocessing import Preprocessing, prepare
from .source import PARTS, Contents, Part, Source

TORCHVISION_SETS = {  # the name of the source -> torchvision's class
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}


def torchvision_source(name: str, root: str) -> Source:
    """One of TORCHVISION_SETS that lies in the folder `root`, or is downloaded to it once its images are asked for."""
    grey = name.endswith("mnist")
    side = 28 if grey else 32
    return Source(
        identity={"torchvision": name, "root": root},
        native=lambda: Preprocessing(height=side, width=side, channels=1 if grey else 3),
        contents=lambda: _contents(name, root),
    )


def _contents(name: str, root: str) -> Contents:
    train, test = (_data_set(name, root, part) for part in PARTS)
    digits = name in ("mnist", "svhn")  # torchvision has "0 - zero" for one, nothing for the other
    return Contents("0123456789" if digits else train.classes, _part("train", train), _part("test", test))


def _part(part: str, images: Any) -> Part:
    labels = images.labels if hasattr(images, "labels") else images.targets  # svhn; the others
    return Part(
        names=[f"{part}/{i:05d}" for i in range(len(images))],
        labels=np.asarray(labels).tolist(),
        prepared=lambda preprocessing: (prepare(images[i][0], preprocessing) for i in range(len(images))),
    )


def _data_set(name: str, root: str, part: str) -> Any:
    """The torchvision data set, downloaded only if it is not at `root`, which may be read-only."""
    if name == "svhn" and find_spec("scipy") is None:
        raise InputError(
            expected="scipy, with which torchvision reads svhn's .mat files",
            got="a Python without it",
            do='run `pip install "codegrid[svhn]"`',
        )
    from torchvision import datasets  # here, because it imports torch

    which = {"split": part} if name == "svhn" else {"train": part == "train"}
    kind = getattr(datasets, TORCHVISION_SETS[name])
    try:
        try:
            return kind(root, **which)
        except RuntimeError:  # torchvision's word for "not found"
            return kind(root, download=True, **which)
    except (OSError, RuntimeError, ValueError, AssertionError, HTTPException) as error:
        raise InputError(
            expected=f"{name} in {root}, or a network to download it from",
            got=f"{type(error).__name__}: {error}",
            do="connect, or give the folder that holds it as --data-root",
        ) from error
