"""The judge of a set of images: trained once on its training part, cached, and shown other images.

    $CODEGRID_CACHE/judges/<first half of the SHA-256 of what it depends on>/    a checkpoint of the kind "judge"

It depends on the images and labels of both parts, the names of the classes, and its recipe. While it is trained, the
folder holds the state to continue from. A damaged one is trained again.

Legend: n images, N of a split, C channels, H W pixels, K classes.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..images.cache_folder import cache_folder, within_cache
from ..images.image_set import ImageSet, ImageSplit
from ..images.preprocessing import to_float
from ..models.checkpoint import (
    TRAINING,
    CheckpointInfo,
    TrainingState,
    has_checkpoint,
    read_checkpoint,
    read_info,
    read_run,
    save_checkpoint,
)
from ..models.inference import run_in_blocks
from ..models.tensor_file import Outline, check_finite, check_outlines, outlines_of, parse_tensors
from ..runtime.console import note
from ..runtime.device import choose_device
from ..runtime.folder_lock import LOCK, only_writer
from ..runtime.progress import with_progress
from .judge_network import Judge
from .judge_training import WEIGHTS, TrainingImages, steps_for, train_judge

RECIPE = 1  # of the network and its training; another number leaves judges of older recipes unused
SEED = 0  # there is one judge for a set of images
KIND = "judge"
HASHED_AT_ONCE = 4_096  # images

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a judge makes of n images."""

    features: np.ndarray  # float32 [n,64], each with mean 0 and variance 1 over the training images
    predicted: np.ndarray | None  # int64 [n], the most likely class; None for an autoencoder


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

    def look(self, images: np.ndarray | Tensor, what: str = "images") -> Seen:
        """Compute the features of images, and the classes that it takes them for, in float32.

        The result for an image is the same to the bit, alone or among others.

        Args:
            images: uint8 [n,C,H,W] of the size that it was trained on.
            what: they are, for the line of progress.

        Raises:
            ValueError: images of another size or type.
        """
        if images.dtype not in (np.uint8, torch.uint8):
            raise ValueError(f"expected images as uint8, got {images.dtype}")
        return _look(self.network, lambda start, stop: _tensor(images[start:stop]), len(images), what)


def training_images(split: ImageSplit, class_names: tuple[str, ...]) -> TrainingImages:
    """Return what a judge of these classes is trained on; of none, if `class_names` is empty."""
    return TrainingImages(images=split.images, labels=split.labels, num_classes=len(class_names))


def open_judge(images: ImageSet, class_names: tuple[str, ...], device: str = "auto") -> TrainedJudge:
    """Return the judge of a set of images, which is trained if there is none in the cache.

    Args:
        images: with at least one image in either part.
        class_names: those of the set for a classifier, then every image has a label; none for an autoencoder.
        device: auto, cpu, cuda, cuda:1 or mps.

    Raises:
        InputError: the cache cannot be written, there is no such device, or another process trains this judge.
    """
    chosen = choose_device(device)
    folder = cache_folder() / "judges" / _key(images, class_names)
    data = training_images(images.train, class_names)
    network = _cached(folder, data)
    if network is None:
        with within_cache(), only_writer(folder, "training of a judge"):
            network = _cached(folder, data, warn=True)  # of another process that has just trained it
            if network is None:
                network = _trained(folder, images, data, class_names, chosen)
    info = read_info(folder, KIND)
    accuracy = info.metrics["accuracy"] if class_names else None
    return TrainedJudge(
        network=network.to(chosen), class_names=class_names, accuracy=accuracy, tested_on=len(images.test)
    )


def accuracy_of(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the predicted classes [n] that are the `labels` [n]."""
    return float((predicted == labels).mean())


def look_at(network: Judge, split: ImageSplit, what: str) -> Seen:
    """Return what a judge makes of all images of a split, as `TrainedJudge.look` does."""
    return _look(network, lambda start, stop: _tensor(split.images[start:stop]), len(split), what)


def _tensor(images: np.ndarray | Tensor) -> Tensor:
    """Return images as a tensor of its own memory; those of a set are mapped from a file, and read-only."""
    return images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))


def _look(network: Judge, load: Callable[[int, int], Tensor], count: int, what: str) -> Seen:
    """Show the images that `load` returns, uint8 [n,C,H,W] of a range of rows, to the judge."""

    def compute(block: Tensor) -> tuple[Tensor, ...]:
        features = network(to_float(block))
        return (features, network.head(features).argmax(dim=1)) if network.config.num_classes else (features,)

    batches = run_in_blocks(network, compute, load, count)
    shown = list(with_progress(batches, count, f"judging {what}", size=lambda batch: len(batch[0])))
    features, *predicted = (torch.cat(tensors).numpy() for tensors in zip(*shown, strict=True))
    return Seen(features=features, predicted=predicted[0] if predicted else None)


def _key(images: ImageSet, class_names: tuple[str, ...]) -> str:
    """Return the name of the judge's folder: a hash of everything that the judge and its accuracy depend on."""
    described = {
        "recipe": RECIPE,
        "class_names": class_names,
        "train": _content(images.train, labelled=bool(class_names)),
        "test": _content(images.test, labelled=bool(class_names)),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _content(split: ImageSplit, *, labelled: bool) -> str:
    """Return a hash of the images of a split, and of their labels if those count."""
    digest = hashlib.sha256(repr(split.images.shape).encode())
    for start in range(0, len(split), HASHED_AT_ONCE):
        digest.update(split.images[start : start + HASHED_AT_ONCE].tobytes())
    if labelled:
        digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _cached(folder: Path, data: TrainingImages, *, warn: bool = False) -> Judge | None:
    """Return the judge of the folder; None if there is none, it is not complete, or it is damaged: then `warn`."""
    try:
        if not has_checkpoint(folder) or read_info(folder, KIND).step < steps_for(len(data.images)):
            return None
        return _loaded(folder, data)
    except InputError as error:
        if warn:
            _log.warning("Warning: the judge in %s is damaged and is trained again: %s", folder, error.got)
        return None


def _loaded(folder: Path, data: TrainingImages) -> Judge:
    """Return the judge of the folder. Raise InputError if it is damaged, or none for such images."""
    network = Judge(data.config)

    def check(info: CheckpointInfo, found: Mapping[str, Outline]) -> None:
        if info.config != asdict(data.config):
            raise ValueError("a config of another judge")
        accuracy = info.metrics.get("accuracy")
        if data.num_classes and not (isinstance(accuracy, float) and 0 <= accuracy <= 1):
            raise ValueError(f"the accuracy {accuracy!r}")
        check_outlines(outlines_of(network.state_dict()), found)

    _, weights = read_checkpoint(folder, KIND, check)
    tensors = parse_tensors(weights)
    try:
        check_finite(tensors)
    except ValueError as error:
        raise InputError(expected=f"finite weights in {folder}", got=str(error), do="remove the folder") from None
    network.load_state_dict(tensors)
    return network.eval()


def _trained(
    folder: Path, images: ImageSet, data: TrainingImages, class_names: tuple[str, ...], device: torch.device
) -> Judge:
    """Train the judge, from the start or from where it was stopped, and put it into the folder."""
    reason = "" if images.class_names else ", as there are no classes"
    kind = f"a classifier of {len(class_names)} classes" if class_names else f"an autoencoder{reason}"
    note(f"the judge of these images, {kind}, is trained once and kept in {folder}")
    info = CheckpointInfo(
        kind=KIND,
        config=asdict(data.config),
        step=0,
        class_names=list(class_names),
        preprocessing=asdict(images.preprocessing),
        training={"recipe": RECIPE, "seed": SEED, "steps": steps_for(len(data.images))},
    )

    def save(state: TrainingState) -> None:
        own = (name for name in state.tensors if name.startswith(WEIGHTS))
        weights = {name.removeprefix(WEIGHTS): state.tensors[name] for name in own}
        save_checkpoint(folder, _after(info, state.values["step"]), weights, state)

    resume = _stopped(folder, info)
    network = train_judge(data, seed=SEED, device=device, description="training the judge", resume=resume, save=save)
    metrics = {}
    if class_names:
        seen = look_at(network, images.test, "test images")
        assert seen.predicted is not None
        metrics = {"accuracy": accuracy_of(seen.predicted, images.test.labels)}
    finished = _after(info, info.training["steps"], metrics)
    save_checkpoint(folder, finished, network.state_dict())
    (folder / TRAINING).unlink(missing_ok=True)
    return network


def _after(info: CheckpointInfo, step: int, metrics: dict[str, float] | None = None) -> CheckpointInfo:
    """Return the info of a judge after `step` steps."""
    return CheckpointInfo(**{**asdict(info), "step": step, "metrics": metrics or {}})


def _stopped(folder: Path, expected: CheckpointInfo) -> TrainingState | None:
    """Return the state of a training as `expected` that was stopped; None without one, and other files are removed."""
    try:
        if has_checkpoint(folder):
            saved = read_run(folder, KIND)
            if (saved.info.config, saved.info.training) == (expected.config, expected.training):
                return saved.training
    except InputError:
        pass
    for path in folder.iterdir():  # whatever it is: the folder is of the cache, and of this judge alone
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    return None
