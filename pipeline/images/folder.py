"""A folder of images as a source: its files are listed, their headers read, then each is prepared.

Names are paths relative to the folder with `/` as separator, in Unicode NFC, in code point order.

Legend: C channels, H' W' height and width in pixels.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from ..errors import InputError
from ..runtime.progress import with_progress
from .cache import Broken, open_entry
from .folder_layout import SplitLayout, read_layout
from .image_file import read_or_broken
from .preprocessing import IMAGE_ERRORS, Preprocessing, is_grey, read_image, upright_size
from .source import Contents, Source, SourceSplit, check_broken

DEFAULT_SIDE = 64  # pixels; what the images of a folder get if they differ in size, or a side is larger than
LARGEST_NATIVE = 128  # this; other folders keep their size
IMAGE_FILE = re.compile(
    r"\.(apng|avif|bmp|dds|dib|gif|ico|j2k|jfif|jp[2ex]|jpe?g|mpo|p[bgnp]m|pcx|pfm|png|qoi|sgi|tga|tiff?|webp)",
    re.IGNORECASE,
)

_CHUNK = 512  # files read at a time
_T = TypeVar("_T")


@dataclass(frozen=True)
class _File:
    """An image file of the folder."""

    path: str
    name: str  # relative to the folder, NFC, with `/`
    size: int  # bytes
    changed: int  # time of the last change, ns


def folder_source(folder: str) -> Source:
    """Return the images below `folder`, an absolute path, as a source.

    Raises:
        InputError: it cannot be read or holds no image.
    """
    files = _list_files(folder)
    identity = {
        "folder": folder,
        "files": [(file.name, file.size, file.changed) for file in files],
    }
    return Source(
        identity=identity,
        native=lambda: _native(identity, files),
        contents=lambda: _contents(folder, files),
    )


# Listing


def _list_files(folder: str) -> list[_File]:
    """Return the image files below `folder`, by name. Raise InputError if it cannot be read or holds none."""
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
    """Yield the image files below `folder` but the hidden ones; follow links, but never in a circle."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith((".", "__MACOSX"))]
    for entry in visible:
        name = prefix + unicodedata.normalize("NFC", entry.name)
        if entry.is_dir():
            yield from _walk(entry.path, f"{name}/", (*above, real))
        elif entry.is_file() and IMAGE_FILE.fullmatch(os.path.splitext(entry.name)[1]):
            status = entry.stat()
            yield _File(entry.path, name, status.st_size, status.st_mtime_ns)


# Headers


def _native(identity: dict[str, Any], files: list[_File]) -> Preprocessing:
    """Return the images' common size if it is small, else 64x64, and 1 channel if all are grey; kept in the cache."""
    _, index = open_entry({"headers": identity}, lambda _: {"native": asdict(_read_headers(files))})
    return Preprocessing(**index["native"])


def _read_headers(files: list[_File]) -> Preprocessing:
    """Find the same in the header of every file. Raise InputError if too many files are broken."""
    outcomes = list(with_progress(_threaded(_header, files), len(files), "reading headers"))
    headers = [outcome for outcome in outcomes if not isinstance(outcome, Broken)]
    broken = {
        file.name: outcome.reason for file, outcome in zip(files, outcomes, strict=True) if isinstance(outcome, Broken)
    }
    check_broken(broken, len(files), len(headers))
    channels = max(header.channels for header in headers)
    sizes = {(header.height, header.width) for header in headers}
    height, width = sizes.pop() if len(sizes) == 1 else (DEFAULT_SIDE, DEFAULT_SIDE)
    if max(height, width) > LARGEST_NATIVE:
        height, width = DEFAULT_SIDE, DEFAULT_SIDE
    return Preprocessing(height=height, width=width, channels=channels)


def _header(file: _File) -> Preprocessing | Broken:
    """Return the size and channels of one file. Raise InputError if the system cannot read it."""
    try:
        with open(file.path, "rb") as data:
            return _read_header(data)
    except IMAGE_ERRORS:  # only all of its bytes tell whether it is damaged
        return read_or_broken(file.path, _read_header)


def _read_header(data: BinaryIO) -> Preprocessing:
    with Image.open(data) as image:
        height, width = upright_size(image)
        return Preprocessing(height=height, width=width, channels=1 if is_grey(image) else 3)


# Images


def _contents(folder: str, files: list[_File]) -> Contents:
    layout = read_layout(folder, [file.name for file in files])
    return Contents(layout.class_names, _split(files, layout.train), _split(files, layout.test))


def _split(files: list[_File], layout: SplitLayout) -> SourceSplit:
    subset = [files[i] for i in layout.positions]
    return SourceSplit(
        names=[file.name for file in subset],
        labels=layout.labels,
        prepared=lambda preprocessing: _threaded(lambda file: _read(file, preprocessing), subset),
    )


def _read(file: _File, preprocessing: Preprocessing) -> np.ndarray | Broken:
    """Return the image as uint8 [C, H', W']. Raise InputError if the system cannot read the file."""
    return read_or_broken(file.path, lambda data: read_image(data, preprocessing))


def _threaded(work: Callable[[_File], _T], files: list[_File]) -> Iterator[_T]:
    """Yield what `work` returns for each file, in order; a chunk at a time, so that memory stays flat."""
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(files), _CHUNK):
            yield from pool.map(work, files[first : first + _CHUNK])
