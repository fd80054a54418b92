"""The judges in the cache: each is trained once for a set of images, and kept.

    $CODEGRID_CACHE/judges/<first half of the SHA-256 of what it depends on>/    a checkpoint of the kind "judge"

It depends on the images and labels of both parts, the names of the classes, and its recipe. While it is trained, the
folder holds the state to continue from. A damaged one is trained again.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..errors import InputError
from ..images.cache_folder import cache_folder, within_cache
from ..images.image_set import ImageSet, ImageSplit
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
from ..models.tensor_file import Outline, check_finite, check_outlines, outlines_of, parse_tensors
from ..runtime.console import note
from ..runtime.device import choose_device
from ..runtime.folder_lock import LOCK, only_writer
from ..runtime.progress import Progress
from .judge import TrainedJudge, accuracy_of, look_at
from .judge_network import Judge
from .judge_training import WEIGHTS, TrainingImages, steps_for, train_judge

RECIPE = 1  # of the network and its training; another number leaves judges of older recipes unused
SEED = 0  # there is one judge for a set of images
KIND = "judge"
HASHED_AT_ONCE = 4_096  # images

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What a folder of the cache holds."""

    network: Judge  # in `eval()` mode
    accuracy: float | None  # None for an autoencoder


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
    data = TrainingImages(images=images.train.images, labels=images.train.labels, num_classes=len(class_names))
    kept = _cached(folder, data)
    if kept is None:
        with within_cache(), only_writer(folder, "training of a judge"):
            kept = _cached(folder, data, warn=True)  # of another process that has just trained it
            if kept is None:
                kept = _trained(folder, images, data, class_names, chosen)
    return TrainedJudge(
        network=kept.network.to(chosen), class_names=class_names, accuracy=kept.accuracy, tested_on=len(images.test)
    )


def _key(images: ImageSet, class_names: tuple[str, ...]) -> str:
    """Return the name of the judge's folder: a hash of everything that the judge and its accuracy depend on."""
    with Progress(len(images.train) + len(images.test), "looking for the judge of these images") as bar:
        train, test = (_content(split, bool(class_names), bar) for split in (images.train, images.test))
    described = {"recipe": RECIPE, "class_names": class_names, "train": train, "test": test}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _content(split: ImageSplit, labelled: bool, bar: Progress) -> str:
    """Return a hash of the images of a split, and of their labels if those count."""
    digest = hashlib.sha256(repr(split.images.shape).encode())
    for start in range(0, len(split), HASHED_AT_ONCE):
        part = split.images[start : start + HASHED_AT_ONCE]
        digest.update(part.tobytes())
        bar.update(len(part))
    if labelled:
        digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _cached(folder: Path, data: TrainingImages, *, warn: bool = False) -> _Kept | None:
    """Return the judge of the folder; None if there is none, it is not complete, or it is damaged: then `warn`."""
    try:
        if not has_checkpoint(folder) or read_info(folder, KIND).step < steps_for(len(data.images)):
            return None
        return _loaded(folder, data)
    except InputError as error:
        if warn:
            _log.warning("Warning: the judge in %s is damaged and is trained again: %s", folder, error.got)
        return None


def _loaded(folder: Path, data: TrainingImages) -> _Kept:
    """Return the judge of the folder. Raise InputError if it is damaged, or none for such images."""
    network = Judge(data.config)

    def check(info: CheckpointInfo, found: Mapping[str, Outline]) -> None:
        if info.config != asdict(data.config) or info.step < steps_for(len(data.images)):
            raise ValueError("a config of another judge")
        accuracy = info.metrics.get("accuracy")
        if data.num_classes and not (isinstance(accuracy, float) and 0 <= accuracy <= 1):
            raise ValueError(f"the accuracy {accuracy!r}")
        check_outlines(outlines_of(network.state_dict()), found)

    info, weights = read_checkpoint(folder, KIND, check)
    tensors = parse_tensors(weights)
    try:
        check_finite(tensors)
    except ValueError as error:
        raise InputError(expected=f"finite weights in {folder}", got=str(error), do="remove the folder") from None
    network.load_state_dict(tensors)
    return _Kept(network=network.eval(), accuracy=info.metrics["accuracy"] if data.num_classes else None)


def _trained(
    folder: Path, images: ImageSet, data: TrainingImages, class_names: tuple[str, ...], device: torch.device
) -> _Kept:
    """Train the judge, from the start or from where it was stopped, and put it into the folder."""
    reason = "" if images.class_names else ", as there are no classes"
    kind = f"a classifier of {len(class_names)} classes" if class_names else f"an autoencoder{reason}"
    note(f"the judge of these images, {kind}, is trained once and kept in {folder}")
    steps = steps_for(len(data.images))
    finished = CheckpointInfo(
        kind=KIND,
        config=asdict(data.config),
        step=steps,
        class_names=list(class_names),
        preprocessing=asdict(images.preprocessing),
        training={"recipe": RECIPE, "seed": SEED, "steps": steps},
    )

    def save(state: TrainingState) -> None:
        own = (name for name in state.tensors if name.startswith(WEIGHTS))
        weights = {name.removeprefix(WEIGHTS): state.tensors[name] for name in own}
        save_checkpoint(folder, replace(finished, step=state.values["step"]), weights, state)

    resume = _stopped(folder, finished)
    network = train_judge(data, seed=SEED, device=device, description="training the judge", resume=resume, save=save)
    accuracy = None
    if class_names:
        seen = look_at(network, images.test.images, "test images")
        assert seen.predicted is not None
        accuracy = accuracy_of(seen.predicted, images.test.labels)
        finished = replace(finished, metrics={"accuracy": accuracy})
    save_checkpoint(folder, finished, network.state_dict())
    (folder / TRAINING).unlink(missing_ok=True)
    return _Kept(network=network, accuracy=accuracy)


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
