"""Where images come from: `glyphs`, a torchvision set by name, or a folder; all end as an `ImageSet`.

A folder holds images directly (no labels), or one subfolder a class (what lies deeper belongs to the
class), or `train/` and `test/`, each of the one kind or the other. Without `test/` a tenth becomes
the test part, chosen by a hash of each file's name, so that adding files moves none of the others.
Names are paths relative to the folder with `/` between parts, in Unicode NFC, in code point order.

N images, B in a batch, C channels, H' W' height and width in pixels.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import glyphs
from .errors import InputError
from .image_cache import Broken, cache_folder, open_entry, read_images, write_images
from .images import (
    IMAGE_ERRORS,
    Preprocessing,
    is_grey,
    prepare,
    read_image,
    to_float,
    upright_size,
    why_unreadable,
)

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("train", "test")
TEST_FRACTION = 0.1  # of a folder without test/
BROKEN_ONE_IN = 10  # more broken files than this, and nothing starts
DEFAULT_SIDE = 64  # pixels, of a folder's images if they differ in size or are larger than
LARGEST_NATIVE = 128  # this; others keep the size they have
IMAGE_FILE = re.compile(
    r"\.(apng|avif|bmp|dds|dib|gif|ico|j2k|jfif|jp[2ex]|jpe?g|mpo|p[bgnp]m|pcx|pfm|png|qoi|sgi|tga|tiff?|webp)",
    re.IGNORECASE,
)

_TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
IMAGE_SOURCES = ("glyphs", *_TORCHVISION)

_CHUNK = 512  # images drawn, or files read, at a time
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSplit:
    """The images of one part of a set."""

    images: np.ndarray  # uint8 [N, C, H', W'], memory-mapped
    labels: np.ndarray  # int64 [N]; -1 where there is none
    names: tuple[str, ...]  # N of them

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray | Tensor) -> Tensor:
        """The images at `indices` [B] as float32 [B, C, H', W'] in [0, 1]; one gather."""
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
    test: ImageSplit  # may be empty, if the source holds one image only
    broken: tuple[str, ...]  # names of the files that could not be read and are left out


@dataclass(frozen=True)
class _Part:
    """The images of one part, before they are prepared."""

    names: Sequence[str]
    labels: Sequence[int]
    prepared: Callable[[Preprocessing], Iterable[np.ndarray | Broken]]  # one for each name, in order


@dataclass(frozen=True)
class _Contents:
    """What a set holds."""

    class_names: Sequence[str]
    train: _Part
    test: _Part


@dataclass(frozen=True)
class _Source:
    """What is known of a set before it is looked into."""

    identity: dict[str, Any]  # JSON that differs whenever the images do
    native: Callable[[], Preprocessing]  # what its images have unless asked otherwise
    contents: Callable[[], _Contents]


def open_images(
    source: str,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    data_root: str | None = None,
    multiple_of: int = 1,
) -> ImageSet:
    """The images of `source`, each prepared once into a cache that later calls reuse.

    Args:
        source: one of IMAGE_SOURCES, or a folder (`./mnist` is the folder of that name).
        image_size: (height, width); by default the set's own, or 64x64 for a folder of images that
            are larger than 128 or of several sizes, lowered to a multiple of `multiple_of`.
        channels: 1 grey, 3 RGB; by default 1 if every image is grey.
        data_root: folder a torchvision set lies in or is downloaded to; by default in the cache.
        multiple_of: what height and width must be divisible by.

    Raises:
        InputError: there is no such source or size, the download failed, more than one file in ten
            is broken or none is left, or the cache cannot be written.
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
    train, test = (_open_split(folder, part, index[part]) for part in PARTS)
    return ImageSet(
        source=source if source in IMAGE_SOURCES else _absolute(source),
        data_root=data_root,
        preprocessing=preprocessing,
        class_names=tuple(index["class_names"]),
        train=train,
        test=test,
        broken=tuple(index["broken"]),
    )


def held_out(names: Sequence[str], fraction: float = 0.05) -> np.ndarray:
    """Which of the training images to validate on: bool [N], about `fraction` of them.

    Each name decides for itself, by its hash, the same on every system. Where that would choose none
    or all of two or more, the one with the smallest hash is chosen; of a single image, none is.
    """
    chosen = _by_hash(names, fraction, "validation")
    return chosen if len(names) > 1 else np.zeros(len(names), bool)


def _by_hash(names: Sequence[str], fraction: float, salt: str) -> np.ndarray:
    scores = np.array([_score(name, salt) for name in names])
    chosen = scores < fraction
    if len(names) > 1 and (chosen.all() or not chosen.any()):
        chosen = np.arange(len(names)) == scores.argmin()
    return chosen


def _score(name: str, salt: str) -> float:
    """Uniform in [0, 1)."""
    text = f"{salt}/{_normal(name)}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def _normal(name: str) -> str:
    """A path as every system would write it."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


# Asking, building, refusing


def _find(source: str, data_root: str | None) -> _Source:
    if data_root is not None and source not in _TORCHVISION:
        raise InputError(
            expected=f"a data root only with one of {', '.join(_TORCHVISION)}",
            got=f"one with '{source}'",
            do="leave out --data-root",
        )
    if source == "glyphs":
        return _glyphs()
    if source in _TORCHVISION:
        return _torchvision(source, data_root or str(cache_folder() / "torchvision"))
    return _folder(source)


def _preprocessing(
    found: _Source, image_size: tuple[int, int] | None, channels: int | None, multiple_of: int
) -> Preprocessing:
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
    if height % multiple_of == 0 and width % multiple_of == 0:
        return
    nearest = (max(1, (2 * side + multiple_of) // (2 * multiple_of)) * multiple_of for side in (height, width))
    raise InputError(
        expected=f"an image size whose height and width are multiples of {multiple_of}",
        got=f"{height}x{width}",
        do="use {}x{}, the nearest that works".format(*nearest),
    )


def _build(found: _Source, preprocessing: Preprocessing, folder: Path) -> dict[str, Any]:
    """Write the arrays of both parts; their index."""
    contents = found.contents()
    parts = (contents.train, contents.test)
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    broken: dict[str, str] = {}
    index: dict[str, Any] = {"class_names": list(contents.class_names), "broken": broken}
    for name, part in zip(PARTS, parts, strict=True):
        images = part.prepared(preprocessing)
        kept, unread = write_images(folder / f"{name}.npy", images, len(part.names), shape)
        index[name] = {
            "names": [part.names[i] for i in kept],
            "labels": [int(part.labels[i]) for i in kept],
        }
        broken |= {part.names[i]: reason for i, reason in unread.items()}
    _check_broken(broken, sum(len(part.names) for part in parts), len(index["train"]["names"]))
    return index


def _check_broken(broken: dict[str, str], total: int, left: int) -> None:
    """Refuse to go on with `broken` of `total` files, and `left` to train on."""
    if left > 0 and len(broken) * BROKEN_ONE_IN <= total:
        return
    named = ", ".join(list(broken)[:10]) + (", ..." if len(broken) > 10 else "")
    raise InputError(
        expected=f"images to train on, and at most 1 broken file in {BROKEN_ONE_IN}",
        got=f"{len(broken)} broken of {total}: {named}",
        do="repair or remove these files",
    )


def _warn_of(broken: dict[str, str]) -> None:
    for name, reason in list(broken.items())[:10]:
        _log.warning("Warning: skipped the broken image %s: %s", name, reason)
    if len(broken) > 10:
        _log.warning("Warning: skipped %d more broken images", len(broken) - 10)


def _open_split(folder: Path, part: str, index: dict[str, Any]) -> ImageSplit:
    labels = np.array(index["labels"], dtype=np.int64)
    images = read_images(folder / f"{part}.npy", len(labels))
    return ImageSplit(images, labels, tuple(index["names"]))


# Glyphs


def _glyphs() -> _Source:
    train, test = glyphs.TRAIN_COUNT, glyphs.TEST_COUNT
    return _Source(
        identity={"glyphs": glyphs.VERSION, "seed": glyphs.SEED, "counts": [train, test]},
        native=lambda: Preprocessing(height=glyphs.SIZE, width=glyphs.SIZE, channels=3),
        contents=lambda: _Contents(
            glyphs.CLASS_NAMES, _glyph_part("train", 0, train), _glyph_part("test", train, test)
        ),
    )


def _glyph_part(part: str, start: int, count: int) -> _Part:
    """Images `start` .. `start + count - 1` of the seed, drawn large enough to cover what is asked."""

    def prepared(preprocessing: Preprocessing) -> Iterator[np.ndarray]:
        size = max(preprocessing.height, preprocessing.width)
        for first in range(0, count, _CHUNK):
            number = min(_CHUNK, count - first)
            images, _ = glyphs.draw_glyphs(number, size=size, start=start + first)
            yield from (prepare(_picture(image), preprocessing) for image in images)

    names = [f"{part}/{i:05d}" for i in range(count)]
    return _Part(names, glyphs.draw_labels(count, start=start).tolist(), prepared)


def _picture(image: np.ndarray) -> Image.Image:
    """uint8 [3, H, W] as a Pillow image."""
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))


# Torchvision


def _torchvision(name: str, root: str) -> _Source:
    grey = name.endswith("mnist")
    side = 28 if grey else 32
    return _Source(
        identity={"torchvision": name, "root": root},
        native=lambda: Preprocessing(height=side, width=side, channels=1 if grey else 3),
        contents=lambda: _published(name, root),
    )


def _published(name: str, root: str) -> _Contents:
    train, test = (_torchvision_set(name, root, part) for part in PARTS)
    digits = name in ("mnist", "svhn")  # torchvision has "0 - zero" for one, nothing for the other
    return _Contents(
        "0123456789" if digits else train.classes,
        _torchvision_part("train", train),
        _torchvision_part("test", test),
    )


def _torchvision_part(part: str, images: Any) -> _Part:
    labels = images.labels if hasattr(images, "labels") else images.targets  # svhn; the others
    return _Part(
        names=[f"{part}/{i:05d}" for i in range(len(images))],
        labels=np.asarray(labels).tolist(),
        prepared=lambda preprocessing: (prepare(images[i][0], preprocessing) for i in range(len(images))),
    )


def _torchvision_set(name: str, root: str, part: str) -> Any:
    """The torchvision data set, downloaded only if it is not at `root`, which may be read-only."""
    if name == "svhn" and find_spec("scipy") is None:
        raise InputError(
            expected="scipy, with which torchvision reads svhn's .mat files",
            got="a Python without it",
            do="run `pip install scipy`",
        )
    from torchvision import datasets

    which = {"split": part} if name == "svhn" else {"train": part == "train"}
    kind = getattr(datasets, _TORCHVISION[name])
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


# Folders


@dataclass(frozen=True)
class _File:
    path: str
    name: str  # relative to the folder, NFC, with `/`
    size: int  # bytes
    changed: int  # time of the last change, ns


def _folder(source: str) -> _Source:
    folder = _absolute(source)
    files = _list_files(source, folder)
    identity = {
        "folder": folder,
        "files": [(file.name, file.size, file.changed) for file in files],
    }
    return _Source(
        identity=identity,
        native=lambda: _native(identity, files),
        contents=lambda: _arrange(folder, files),
    )


def _absolute(source: str) -> str:
    return os.path.abspath(os.path.expanduser(source))


def _list_files(source: str, folder: str) -> list[_File]:
    if not source or not os.path.exists(folder):
        raise InputError(
            expected=f"a folder of images or one of {', '.join(IMAGE_SOURCES)}",
            got=f"'{source}', which is neither",
            do="check the spelling",
        )
    try:
        files = sorted(_walk(folder, "", ()), key=lambda file: (file.name, file.path))
    except OSError as error:
        raise InputError(
            expected=f"a folder that can be read at {folder}", got=str(error), do="check the path"
        ) from error
    if not files:
        raise InputError(
            expected=f"images (.png, .jpg, .gif, .webp, .tif, ...) in {folder}",
            got="none",
            do="give a folder that holds some",
        )
    return files


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[_File]:
    """The image files below `folder`, hidden ones left out, links followed but never in a circle."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith((".", "__MACOSX"))]
    for entry in visible:
        name = prefix + unicodedata.normalize("NFC", entry.name)
        if entry.is_dir():
            yield from _walk(entry.path, f"{name}/", (*above, here))
        elif entry.is_file() and IMAGE_FILE.fullmatch(os.path.splitext(entry.name)[1]):
            facts = entry.stat()
            yield _File(entry.path, name, facts.st_size, facts.st_mtime_ns)


def _native(identity: dict[str, Any], files: list[_File]) -> Preprocessing:
    """From every file's header: their common size if it is small, else 64x64; grey if all are."""
    _, index = open_entry({"headers": identity}, lambda _: {"native": asdict(_read_headers(files))})
    return Preprocessing(**index["native"])


def _read_headers(files: list[_File]) -> Preprocessing:
    progress = tqdm(_threaded(_header, files), desc="reading headers", total=len(files), unit="image")
    outcomes = list(progress)
    headers = [outcome for outcome in outcomes if not isinstance(outcome, Broken)]
    broken = {
        file.name: outcome.reason for file, outcome in zip(files, outcomes, strict=True) if isinstance(outcome, Broken)
    }
    _check_broken(broken, len(files), len(headers))
    channels = max(header.channels for header in headers)
    sizes = {(header.height, header.width) for header in headers}
    height, width = sizes.pop() if len(sizes) == 1 else (DEFAULT_SIDE, DEFAULT_SIDE)
    if max(height, width) > LARGEST_NATIVE:
        height, width = DEFAULT_SIDE, DEFAULT_SIDE
    return Preprocessing(height=height, width=width, channels=channels)


def _header(file: _File) -> Preprocessing | Broken:
    """The size and channels one file has."""
    try:
        with Image.open(file.path) as image:
            height, width = upright_size(image)
            return Preprocessing(height=height, width=width, channels=1 if is_grey(image) else 3)
    except IMAGE_ERRORS as error:
        return Broken(why_unreadable(error))


def _arrange(folder: str, files: list[_File]) -> _Contents:
    """Parts, classes and labels, from the names alone."""
    tops = {_top(file) for file in files}
    divided = {"train", "test"} <= tops
    depth = 1 if divided or tops == {"train"} else 0  # folders above the classes
    if divided:
        train, test = ([file for file in files if _top(file) == part] for part in PARTS)
        if len(train) + len(test) < len(files):
            _log.warning("Warning: of %s only train/ and test/ are used", folder)
    else:
        in_test = _by_hash([file.name for file in files], TEST_FRACTION, "test")
        train = [file for file, chosen in zip(files, in_test, strict=True) if not chosen]
        test = [file for file, chosen in zip(files, in_test, strict=True) if chosen]
    classes = _classes(folder, train if divided else files, depth)
    unknown = sorted(set(_classes(folder, test, depth)) - set(classes))
    if unknown:
        raise InputError(
            expected=f"in {folder} no class in test/ that is not in train/",
            got=", ".join(unknown),
            do="rename or remove these folders",
        )
    return _Contents(classes, *(_file_part(part, classes, depth) for part in (train, test)))


def _top(file: _File) -> str:
    """The first folder of its name; "" for a file directly in the set's folder."""
    top, slash, _ = file.name.partition("/")
    return top.casefold() if slash else ""


def _class(file: _File, depth: int) -> str:
    """The folder that names its class, "" where there is none."""
    folders = file.name.split("/")[depth:-1]
    return folders[0] if folders else ""


def _classes(folder: str, files: list[_File], depth: int) -> list[str]:
    """In code point order; empty where there are no labels."""
    found = sorted({_class(file, depth) for file in files})
    if len(found) > 1 and "" in found:
        raise InputError(
            expected=f"in {folder} either images alone, or all of them in one subfolder a class",
            got=f"images beside the subfolder {found[1]}",
            do="move the images into subfolders, or the subfolders elsewhere",
        )
    return [name for name in found if name]


def _file_part(files: list[_File], classes: list[str], depth: int) -> _Part:
    label = {name: i for i, name in enumerate(classes)} | {"": -1}
    return _Part(
        names=[file.name for file in files],
        labels=[label[_class(file, depth)] for file in files],
        prepared=lambda preprocessing: _threaded(lambda file: _read(file, preprocessing), files),
    )


def _read(file: _File, preprocessing: Preprocessing) -> np.ndarray | Broken:
    try:
        return read_image(file.path, preprocessing)
    except IMAGE_ERRORS as error:
        return Broken(why_unreadable(error))


def _threaded(work: Callable[[_File], _T], files: list[_File]) -> Iterator[_T]:
    """`work` of each file, in order; a chunk at a time, so that memory stays flat."""
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(files), _CHUNK):
            yield from pool.map(work, files[first : first + _CHUNK])
