"""A folder of images as a source: its files are listed, their headers read, then each is prepared.

Names are paths relative to the folder with `/` as separator, in Unicode NFC, in code point order.

Legend: C channels, H' W' height and width in pixels.
"""

import errno
import logging
import os
import re
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np

from ..errors import InputError
from ..runtime.progress import with_progress
from .cache import Built, open_entry
from .folder_layout import SplitLayout, read_layout
from .image_file import read_or_broken
from .preprocessing import IMAGE_ERRORS, Preprocessing, is_grey, open_picture, read_image, upright_size
from .source import Broken, Contents, Source, SourceSplit, check_broken

DEFAULT_SIDE = 64  # pixels; what the images of a folder get if they differ in size, or a side is larger than
LARGEST_NATIVE = 128  # this; other folders keep their size
IMAGE_FILE = re.compile(
    r"\.(apng|avif|bmp|dds|dib|gif|ico|j2k|jfif|jp[2ex]|jpe?g|mpo|p[bgnp]m|pcx|pfm|png|qoi|sgi|tga|tiff?|webp)",
    re.IGNORECASE,
)

MOST_PATHS = 100  # through links to one folder; more would come from a handful of folders that link to each other

_CHUNK = 512  # files read at a time
_LASTING = {  # errors of one entry, which do not pass by waiting
    errno.ENOENT: "no such file, or a link to none",
    errno.ELOOP: "a link in a circle",
    errno.EACCES: "no permission to read it",
    errno.EPERM: "no permission to read it",
    errno.ENAMETOOLONG: "a path that is too long",
}
_NO_FILES = {  # what may have the name of an image
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class _File:
    """An image file of the folder."""

    path: str
    name: str  # relative to the folder, NFC, with `/`
    size: int  # bytes
    changed: int  # time of the last change, ns
    unusable: str = ""  # why it cannot be read, such as a link to nothing; it is never opened then


@dataclass(frozen=True)
class _Folder:
    """A folder to list."""

    path: str
    prefix: str  # what the names of its files begin with
    real: str  # the path without links
    through: tuple[str, ...]  # the folders, without links, that hold the links on the way


def folder_source(folder: str) -> Source:
    """Return the images below `folder`, an absolute path, as a source.

    Raises:
        InputError: it cannot be read or holds no image.
    """
    files = _list_files(folder)
    identity = {
        "folder": folder,
        "files": [(file.name, file.size, file.changed, file.unusable) for file in files],
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
        files = sorted(_walk(folder), key=lambda file: (file.name, file.path))
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


def _walk(top: str) -> Iterator[_File]:
    """Yield the image files below `top` but the hidden ones; follow links, but never in a circle."""
    pending = [_Folder(top, "", os.path.realpath(top), ())]
    listed: Counter[str] = Counter()
    while pending:
        folder = pending.pop()
        listed[folder.real] += 1
        if listed[folder.real] > MOST_PATHS:
            raise _too_many_paths(folder.real)
        for entry in _visible(folder):
            name = folder.prefix + unicodedata.normalize("NFC", entry.name)
            if _is_folder(entry):
                pending.extend(_below(folder, entry, name))
            elif IMAGE_FILE.fullmatch(os.path.splitext(entry.name)[1]):
                yield _file(entry, name)


def _below(folder: _Folder, entry: os.DirEntry[str], name: str) -> list[_Folder]:
    """Return the folder of an entry, in a list; an empty one if it is a link in a circle."""
    if not entry.is_symlink() and sys.platform != "win32":  # whose junctions are no links to Python
        return [_Folder(entry.path, f"{name}/", os.path.join(folder.real, entry.name), folder.through)]
    real, through = os.path.realpath(entry.path), (*folder.through, folder.real)
    circle = any(_is_in(path, real) for path in through)
    return [] if circle else [_Folder(entry.path, f"{name}/", real, through)]


def _is_in(path: str, folder: str) -> bool:
    """Return whether a path is that of a folder or of what is in it; both without links."""
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


def _visible(folder: _Folder) -> list[os.DirEntry[str]]:
    """Return the entries of a folder but the hidden ones; none, and a warning, if it may not be read."""
    try:
        with os.scandir(folder.path) as entries:
            return [entry for entry in entries if not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        if not folder.prefix or error.errno not in _LASTING:
            raise
        _log.warning("Warning: skipped the folder %s: %s", folder.path, _LASTING[error.errno])
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; False if it leads nowhere."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno not in _LASTING:
            raise
        return False


def _file(entry: os.DirEntry[str], name: str) -> _File:
    """Return the file of an entry that is named like an image; if it is none that can be read, with the reason."""
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in _LASTING:
            raise
        return _File(entry.path, name, 0, 0, _LASTING[error.errno])
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        return _File(entry.path, name, 0, 0, f"{_NO_FILES.get(kind, 'something else')} in place of a file")
    if not os.access(entry.path, os.R_OK):
        return _File(entry.path, name, 0, 0, _LASTING[errno.EACCES])
    return _File(entry.path, name, status.st_size, status.st_mtime_ns)


def _too_many_paths(folder: str) -> InputError:
    return InputError(
        expected="links between folders of images that end somewhere",
        got=f"more than {MOST_PATHS} paths that lead to {folder}",
        do="remove some of the links",
    )


# Headers


def _native(identity: dict[str, Any], files: list[_File]) -> Preprocessing:
    """Return the images' common size if it is small, else 64x64, and 1 channel if all are grey; kept in the cache."""
    return open_entry(
        {"headers": identity},
        lambda _: Built({"native": asdict(_read_headers(files))}),
        lambda _, index: _stored_native(index),
    )


def _stored_native(index: dict[str, Any]) -> Preprocessing:
    """Return what the cache holds. Raise TypeError, KeyError or InputError if it is something else."""
    native = Preprocessing(**index["native"])
    if any(type(value) is not int for value in astuple(native)):
        raise TypeError("a size that is no whole number")
    return native


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
    if file.unusable:
        return Broken(file.unusable)
    try:
        with open(file.path, "rb") as data:
            return _read_header(data)
    except IMAGE_ERRORS:  # only all of its bytes tell whether it is damaged
        return read_or_broken(file.path, _read_header)


def _read_header(data: BinaryIO) -> Preprocessing:
    with open_picture(data) as image:
        height, width = upright_size(image)
        return Preprocessing(height=height, width=width, channels=1 if is_grey(image) else 3)


# Images


def _contents(folder: str, files: list[_File]) -> Contents:
    usable = [file for file in files if not file.unusable]
    unusable = {file.name: file.unusable for file in files if file.unusable}
    layout = read_layout(folder, [file.name for file in usable])
    return Contents(layout.class_names, _split(usable, layout.train), _split(usable, layout.test), unusable)


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
