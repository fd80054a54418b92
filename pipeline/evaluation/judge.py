"""The judge of a set of images: a network trained on its training part, which is shown other images.

Legend: n images, C channels, H W pixels.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..images.preprocessing import to_float
from ..models.inference import run_in_blocks_of_all
from ..runtime.process_group import ALONE, ProcessGroup
from .judge_network import Judge


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a judge makes of n images."""

    features: np.ndarray  # float32 [n,64], each with mean 0 and variance 1 over the training images
    predicted: np.ndarray | None  # int64 [n], the most likely class; None for an autoencoder

    @property
    def directions(self) -> np.ndarray:
        """The features at length 1, float32 [n,64], to compare single images by.

        Whatever the judge does not recognise has short features, near their mean 0 and so near to everything. By
        direction it is as far from all others as they are from each other.
        """
        lengths = np.linalg.norm(self.features, axis=1, keepdims=True)
        return self.features / np.maximum(lengths, np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class TrainedJudge:
    """A judge that has been trained on the training part of a set of images."""

    network: Judge  # in `eval()` mode
    class_names: tuple[str, ...]  # K names; empty for an autoencoder
    accuracy: float | None  # share of the test images whose class it recognises; None for an autoencoder
    tested_on: int  # test images

    @property
    def name(self) -> str:
        """What its features are, in words; the accuracy of a classifier is part of it."""
        if self.accuracy is None:
            return "an autoencoder of the training images"
        recognised = f"recognises {self.accuracy:.1%} of {self.tested_on:,} real test images"
        return f"a classifier of {len(self.class_names)} classes that {recognised}"

    def on(self, device: torch.device) -> "TrainedJudge":
        """Return the same judge, with a copy of its network on a device."""
        return replace(self, network=copy.deepcopy(self.network).to(device))

    def look(self, images: np.ndarray | Tensor, what: str = "images", group: ProcessGroup = ALONE) -> Seen:
        """Compute the features of images, and the classes that it takes them for, in float32.

        The result for an image is the same to the bit, alone or among others.

        Args:
            images: uint8 [n,C,H,W] of the size that it was trained on.
            what: they are, for the line of progress.
            group: processes that share the work; each must call this, and gets what all images are taken for.

        Raises:
            ValueError: images of another size or type.
        """
        return look_at(self.network, images, what, group)


def accuracy_of(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the predicted classes [n] that are the `labels` [n]."""
    return float((predicted == labels).mean())


def look_at(network: Judge, images: np.ndarray | Tensor, what: str, group: ProcessGroup = ALONE) -> Seen:
    """Return what a network makes of images, as `TrainedJudge.look` does, which says more."""
    if images.dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"expected images as uint8, got {images.dtype}")

    def compute(block: Tensor) -> tuple[Tensor, ...]:
        features = network(to_float(block))
        return (features, network.head(features).argmax(dim=1)) if network.config.num_classes else (features,)

    def load(start: int, stop: int) -> Tensor:
        return _tensor(images[start:stop])

    batches = run_in_blocks_of_all(network, compute, load, len(images), group, f"judging {what}")
    features, *predicted = (torch.cat(tensors).numpy() for tensors in zip(*batches, strict=True))
    return Seen(features=features, predicted=predicted[0] if predicted else None)


def _tensor(images: np.ndarray | Tensor) -> Tensor:
    """Return images as a tensor of its own memory; those of a set are mapped from a file, and read-only."""
    return images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
