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
from .cache import cache_folder, open_entry, read_images, write_images
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
        import torch

        gathered = np.asarray(self.images[np.asarray(indices)])
        return to_float(torch.from_numpy(gathered))


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
    folder, index = open_entry(
        {"source": found.identity, "preprocessing": asdict(preprocessing)},
        lambda folder: _build(found, preprocessing, folder),
    )
    _warn_of(index["broken"])
    train, test = (_open_split(folder, split, index[split]) for split in SPLITS)
    return ImageSet(
        source=source_name(source),
        data_root=data_root,
        preprocessing=preprocessing,
        class_names=tuple(index["class_names"]),
        train=train,
        test=test,
        broken=tuple(index["broken"]),
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


def _build(found: Source, preprocessing: Preprocessing, folder: Path) -> dict[str, Any]:
    """Write the arrays of both splits; return their index."""
    contents = found.contents()
    splits = (contents.train, contents.test)
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    broken: dict[str, str] = {}
    index: dict[str, Any] = {"class_names": list(contents.class_names), "broken": broken}
    for name, split in zip(SPLITS, splits, strict=True):
        images = split.prepared(preprocessing)
        kept, unread = write_images(folder / f"{name}.npy", images, len(split.names), shape)
        index[name] = {
            "names": [split.names[i] for i in kept],
            "labels": [int(split.labels[i]) for i in kept],
        }
        broken |= {split.names[i]: reason for i, reason in unread.items()}
    check_broken(broken, sum(len(split.names) for split in splits), len(index["train"]["names"]))
    return index


def _warn_of(broken: dict[str, str]) -> None:
    """Name the broken images, but at most ten of them, in warnings."""
    for name, reason in list(broken.items())[:10]:
        _log.warning("Warning: skipped the broken image %s: %s", name, reason)
    if len(broken) > 10:
        _log.warning("Warning: skipped %d more broken images", len(broken) - 10)


def _open_split(folder: Path, split: str, index: dict[str, Any]) -> ImageSplit:
    labels = np.array(index["labels"], dtype=np.int64)
    images = read_images(folder / f"{split}.npy", len(labels))
    return ImageSplit(images, labels, tuple(index["names"]))
