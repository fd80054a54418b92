"""A set of images, prepared and split: from `glyphs`, a torchvision set by name, or a folder.

Legend: N images, B in a batch, C channels, H' W' height and width in pixels.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .cache import Built, StoredFile, open_entry
from .cache_folder import cache_folder
from .cached_array import NewArray, read_images
from .folder import folder_source
from .glyphs import glyph_source
from .preprocessing import Preprocessing, to_float
from .source import SPLITS, Source, check_broken
from .torchvision_sets import TORCHVISION_SETS, torchvision_source

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SOURCES = ("glyphs", *TORCHVISION_SETS)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSplit:
    """The images of one split of a set."""

    images: np.ndarray  # uint8 [N, C, H', W'], memory-mapped
    labels: np.ndarray  # int64 [N]; -1 where there is none
    names: tuple[str, ...]  # N

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray | Tensor) -> Tensor:
        """Return the images at `indices` [B] as float32 [B, C, H', W'] in [0, 1], by one gather."""
        return to_float(self.batch_uint8(indices))

    def batch_uint8(self, indices: np.ndarray | Tensor) -> Tensor:
        """Return the images at `indices` [B] as uint8 [B, C, H', W'], by one gather.

        It takes a quarter of the memory of `batch`, to which `to_float` turns it on any device, bit for bit.
        """
        import torch

        return torch.from_numpy(np.asarray(self.images[np.asarray(indices)]))


@dataclass(frozen=True)
class ImageSet:
    """Prepared images, ready to train on (`train`) and to measure on (`test`)."""

    source: str  # what `open_images` takes to open it again: a name, or a folder's absolute path
    data_root: str | None  # absolute; None if it was not given
    preprocessing: Preprocessing
    class_names: tuple[str, ...]  # labels index it; empty if there are none
    train: ImageSplit
    test: ImageSplit  # empty if the source holds one image only
    broken: tuple[str, ...]  # names of the files that could not be read and are skipped


def open_images(
    source: str,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    data_root: str | None = None,
    multiple_of: int = 1,
) -> ImageSet:
    """Return the images of `source`, each prepared once into a cache that later calls reuse.

    Args:
        source: one of IMAGE_SOURCES, or a folder (`./mnist` is the folder of that name).
        image_size: (height, width); by default the set's own, or 64x64 for a folder of images that are larger than 128
            or of several sizes, lowered to a multiple of `multiple_of`.
        channels: 1 grey, 3 RGB; by default 1 if every image is grey.
        data_root: folder a torchvision set is stored in or is downloaded to; by default in the cache.
        multiple_of: what height and width must be divisible by.

    Raises:
        InputError: there is no such source or size, the download failed, more than one file in ten is broken or none is
            left, or the cache cannot be written.
    """
    if data_root is not None:
        data_root = os.path.abspath(os.path.expanduser(data_root))
    found = _find(source, data_root)
    preprocessing = _preprocessing(found, image_size, channels, multiple_of)
    stored = open_entry(
        {"source": found.identity, "preprocessing": asdict(preprocessing)},
        lambda folder: _build(found, preprocessing, folder),
        lambda folder, index: _read(preprocessing, folder, index),
    )
    _warn_of(stored.broken)
    return ImageSet(
        source=source_name(source),
        data_root=data_root,
        preprocessing=preprocessing,
        class_names=stored.class_names,
        train=stored.train,
        test=stored.test,
        broken=tuple(stored.broken),
    )


def source_name(source: str) -> str:
    """Return what `ImageSet.source` will be: the name of a built-in source, or the absolute path of a folder."""
    return source if source in IMAGE_SOURCES else _absolute(source)


def split_of(images: ImageSet, split: str) -> ImageSplit:
    """Return the "train" or the "test" split. Raises InputError if it is empty."""
    chosen = images.train if split == "train" else images.test
    if len(chosen) == 0:
        raise InputError(
            expected=f"images in the {split} split of {images.source}", got="none", do="use the other --split"
        )
    return chosen


def _find(source: str, data_root: str | None) -> Source:
    """Return what `source` names. Raise InputError if it names nothing, or `data_root` would do nothing."""
    if data_root is not None and source not in TORCHVISION_SETS:
        raise InputError(
            expected=f"a data root only with one of {', '.join(TORCHVISION_SETS)}",
            got=f"one with '{source}'",
            do="omit --data-root",
        )
    if source == "glyphs":
        return glyph_source()
    if source in TORCHVISION_SETS:
        return torchvision_source(source, data_root or str(cache_folder() / "torchvision"))
    if source and os.path.exists(_absolute(source)):
        return folder_source(_absolute(source))
    raise InputError(
        expected=f"a folder of images or one of {', '.join(IMAGE_SOURCES)}",
        got=f"'{source}', which is neither",
        do="check the spelling",
    )


def _absolute(source: str) -> str:
    return os.path.abspath(os.path.expanduser(source))


def _preprocessing(
    found: Source, image_size: tuple[int, int] | None, channels: int | None, multiple_of: int
) -> Preprocessing:
    """Return the requested preprocessing; what is not requested is as the images of the source are."""
    if image_size is None or channels is None:
        native = found.native()
        channels = native.channels if channels is None else channels
    if image_size is None:
        sides = (native.height, native.width)
        height, width = (max(multiple_of, side - side % multiple_of) for side in sides)
    else:
        height, width = image_size
        _check_multiple(height, width, multiple_of)
    return Preprocessing(height=height, width=width, channels=channels)


def _check_multiple(height: int, width: int, multiple_of: int) -> None:
    """Raise InputError unless both sides are multiples of `multiple_of`."""
    if height % multiple_of == 0 and width % multiple_of == 0:
        return
    nearest = (max(1, (2 * side + multiple_of) // (2 * multiple_of)) * multiple_of for side in (height, width))
    raise InputError(
        expected=f"an image size whose height and width are multiples of {multiple_of}",
        got=f"{height}x{width}",
        do="use {}x{}, the nearest that works".format(*nearest),
    )


@dataclass(frozen=True)
class _Stored:
    """What an entry of the cache holds."""

    class_names: tuple[str, ...]
    broken: dict[str, str]  # name -> why
    train: ImageSplit
    test: ImageSplit


def _build(found: Source, preprocessing: Preprocessing, folder: Path) -> Built:
    """Write the arrays of both splits. Raise InputError if the disk has no room for them, before an image is read."""
    contents = found.contents()
    splits = {"train": contents.train, "test": contents.test}
    arrays = {
        name: NewArray(folder / f"{name}.npy", len(split.names), _shape(preprocessing))
        for name, split in splits.items()
    }
    broken = dict(contents.broken)
    index: dict[str, Any] = {"class_names": list(contents.class_names), "broken": broken}
    files: dict[str, StoredFile] = {}
    for name, split in splits.items():
        written = arrays[name].write(split.prepared(preprocessing))
        files[f"{name}.npy"] = StoredFile(arrays[name].size, written.sha256)
        index[name] = {
            "names": [split.names[i] for i in written.kept],
            "labels": [int(split.labels[i]) for i in written.kept],
        }
        broken |= {split.names[i]: reason for i, reason in written.broken.items()}
    total = sum(len(split.names) for split in splits.values()) + len(contents.broken)
    check_broken(broken, total, len(index["train"]["names"]))
    return Built(index, files)


def _read(preprocessing: Preprocessing, folder: Path, index: dict[str, Any]) -> _Stored:
    """Return what `_build` stored. Raise ValueError, TypeError or KeyError if it is anything else."""
    broken = index["broken"]
    _require(isinstance(broken, dict) and _are(str, list(broken.values())), "broken")
    _require(_are(str, index["class_names"]), "class_names")
    class_names = tuple(index["class_names"])
    shape = _shape(preprocessing)
    train, test = (_read_split(folder / f"{name}.npy", index[name], shape, len(class_names)) for name in SPLITS)
    return _Stored(class_names, broken, train, test)


def _read_split(path: Path, index: dict[str, Any], shape: tuple[int, ...], classes: int) -> ImageSplit:
    """Return the images, labels and names of one split. Raises as `_read` does."""
    names, labels = index["names"], index["labels"]
    _require(_are(str, names), "names")
    _require(_are(int, labels) and all(-1 <= label < classes for label in labels), "labels")
    _require(len(names) == len(labels), "labels")
    images = read_images(path, len(labels), shape)
    return ImageSplit(images, np.array(labels, dtype=np.int64), tuple(names))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is not what it was")


def _are(kind: type, values: object) -> bool:
    """Return whether `values` is a list of nothing but this type."""
    return type(values) is list and all(type(value) is kind for value in values)


def _shape(preprocessing: Preprocessing) -> tuple[int, int, int]:
    return (preprocessing.channels, preprocessing.height, preprocessing.width)


def _warn_of(broken: dict[str, str]) -> None:
    """Name the broken images, but at most ten of them, in warnings."""
    for name, reason in list(broken.items())[:10]:
        _log.warning("Warning: skipped the broken image %s: %s", name, reason)
    if len(broken) > 10:
        _log.warning("Warning: skipped %d more broken images", len(broken) - 10)
