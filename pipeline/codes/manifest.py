"""The manifest of a code data set: `manifest.json`, which describes the folder and names its other files.

    manifest.json       counts, K, grid, class names, split, tokenizer fingerprint, hash of every file
    codes-00000.npy     [n,H,W] uint8 if K <= 256, uint16 if K <= 65,536, else int32
    labels-00000.npy    [n] int64, -1 where there is no label
    names-00000.json    [n] names of the images, in the order of the rows
    README.md           the dataset card, once all grids are written

Rows are numbered through all shards. Where the images were also exported mirrored (`flips`), the second half of the
rows is the first half again, each image mirrored left to right, with the same labels and names.
"""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..runtime.atomic_files import write_atomic
from ..runtime.schema import from_json, short
from ..runtime.sealed_json import check_seal, sealed
from ..runtime.untrusted_files import parse_json, read_regular

FORMAT_VERSION = 1
MANIFEST, CARD = "manifest.json", "README.md"
SHARD_FILES = ("codes-{:05d}.npy", "labels-{:05d}.npy", "names-{:05d}.json")
MOST_CODES = 2**31  # K at most; the largest type of codes is int32
MOST_GRIDS = 2**40
MOST_SHARDS = 2**16  # Linux maps fewer than as many files into a process
MOST_CLASSES = 2**20
MOST_PIXELS = 2**28  # of an image, and codes of a grid; Pillow opens no image with more
MOST_CHANNELS = 2**8
MOST_PER_CODE = 2**8  # pixels along each side that a code covers
LARGEST_MANIFEST = 2**26  # bytes: 512 for each shard, the same for everything else
# Of a file inside the folder, on every system: Windows has devices with such names everywhere.
_PLAIN_NAME = re.compile(r"(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))\w[\w.-]{0,254}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class ShardEntry:
    """The entry of one shard in the manifest."""

    start: int  # row of its first grid
    count: int  # grids in it, at least 1
    files: dict[str, str]  # {file name: SHA-256}, in the order of SHARD_FILES


@dataclass(frozen=True, kw_only=True)
class CodeManifest:
    """The content of `manifest.json`; its fields are the keys, beside the checksum of the file."""

    count: int  # grids that are written so far
    num_codes: int  # K
    grid: tuple[int, int]  # H, W
    dtype: str  # of the codes in the shards
    class_names: list[str]  # label i is class_names[i]; empty without labels
    split: str  # of the images: "train" or "test"
    source: str  # of the images
    image: dict[str, int]  # height, width, channels that the tokenizer decodes to
    tokenizer_fingerprint: str
    shards: list[ShardEntry]  # in the order of rows
    total: int | None = None  # grids of the complete data set; None means `count`
    shard_size: int | None = None  # grids a shard, but for the last one
    flips: bool = False  # whether the second half of the rows is mirrored
    rows_sha256: str = ""  # of the names, labels and pixels of all images
    made_with: dict[str, str] = field(default_factory=dict)  # the device and the versions, on which rounding depends
    statistics: dict[str, float] = field(default_factory=dict)  # of all codes: the fields of `CodeStatistics`
    tables: dict[str, str] = field(default_factory=dict)  # {file name: SHA-256} of copies in other formats
    format_version: int = FORMAT_VERSION

    @property
    def complete(self) -> bool:
        """Whether every grid is written."""
        return self.total is None or self.count == self.total


def code_dtype(num_codes: int) -> np.dtype[Any]:
    """Return the smallest of uint8, uint16 and int32 that holds every code in [0, num_codes)."""
    if num_codes <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if num_codes <= 2**16 else np.dtype(np.int32)


def shard_files(index: int) -> list[str]:
    """Return the names of the files of a shard, in the order of SHARD_FILES."""
    return [pattern.format(index) for pattern in SHARD_FILES]


def write_manifest(folder: Path, manifest: CodeManifest) -> None:
    """Write `manifest.json` atomically, with its checksum."""
    write_atomic(folder / MANIFEST, sealed(asdict(manifest)))


def read_manifest(folder: str | Path) -> CodeManifest:
    """Return the content of `manifest.json`; every field and every entry of a shard is checked, and the checksum.

    Raises:
        InputError: no code data set there, another format version, a manifest that contradicts itself, or a damaged
            one.
    """
    path = Path(folder) / MANIFEST
    try:
        content = parse_json(read_regular(path, LARGEST_MANIFEST))
        _check_version(path, content)
        manifest = from_json(CodeManifest, _with_starts(content))
        check_manifest(manifest)
        check_seal(content)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            expected=f"a code data set in {folder}", got=f"no {MANIFEST}", do="make one with export-codes"
        ) from None
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or str(error)
        raise InputError(
            expected=f"the manifest of a code data set in {path}",
            got=got,
            do="export the codes again with --force, or into another folder",
        ) from None
    return manifest


def check_manifest(manifest: CodeManifest) -> None:
    """Raise ValueError for numbers that no data set has, and for fields that contradict each other.

    Nothing is allocated from a number of a manifest before this.
    """
    _check_sizes(manifest)
    _check_counts(manifest)
    for index, entry in enumerate(manifest.shards):
        check_entry(entry, f"shards[{index}]")
    for name in manifest.tables:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"a table in the file {short(repr(name))}, which is not in the folder")
    listed = Counter(name for files in (*(entry.files for entry in manifest.shards), manifest.tables) for name in files)
    for name, times in listed.items():
        if times > 1:
            raise ValueError(f"the file {short(name)} {times:,} times")


def check_entry(entry: ShardEntry, what: str) -> None:
    """Raise ValueError for the entry of a shard, in the place `what`, that is of no rows or of files elsewhere."""
    if len(entry.files) != len(SHARD_FILES) or not all(map(_PLAIN_NAME.fullmatch, entry.files)):
        raise ValueError(f"the files {short(list(entry.files))} as {what}.files")
    _check_range(f"{what}.start", entry.start, 0, MOST_GRIDS)
    _check_range(f"{what}.count", entry.count, 1, MOST_GRIDS)


def _check_version(path: Path, content: Any) -> None:
    """Raise InputError if this is a manifest of another version of the format."""
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise InputError(
            expected=f"format version {FORMAT_VERSION} in {path}",
            got=short(version),
            do="use the version of codegrid that wrote it",
        )


def _with_starts(content: Any) -> Any:
    """Return the JSON of a manifest with the starts of the shards, which the first version did not name."""
    if not isinstance(content, dict) or content.get("shard_size") is not None:
        return content
    entries = content.get("shards")
    if not isinstance(entries, list):
        return content
    started, end = [], 0
    for entry in entries:
        if isinstance(entry, dict):
            entry = {"start": end, **entry}
            end = sum(entry[name] for name in ("start", "count") if type(entry.get(name)) is int)
        started.append(entry)
    return {**content, "shards": started}


def _check_sizes(manifest: CodeManifest) -> None:
    """Raise ValueError unless K, the grid and the image are of a size that the files of a data set could have."""
    if not 1 <= manifest.num_codes <= MOST_CODES or manifest.dtype != code_dtype(manifest.num_codes).name:
        raise ValueError(f"codes of {short(manifest.dtype)} for K = {short(manifest.num_codes)}")
    image = manifest.image
    if not {"height", "width", "channels"} <= image.keys() or not 1 <= image["channels"] <= MOST_CHANNELS:
        raise ValueError(f"the image {short(image)}")
    size = image["height"], image["width"]
    for what, sides in (("the grid", manifest.grid), ("the image", size)):
        if min(sides) < 1 or math.prod(sides) > MOST_PIXELS:
            raise ValueError(f"{what} {short(list(sides))}")
    if any(pixels > MOST_PER_CODE * codes for pixels, codes in zip(size, manifest.grid, strict=True)):
        raise ValueError(f"the image {short(list(size))} for the grid {short(list(manifest.grid))}")


def _check_counts(manifest: CodeManifest) -> None:
    """Raise ValueError unless the numbers of grids, shards and classes are possible and fit together."""
    _check_range("count", manifest.count, 0, MOST_GRIDS)
    written = sum(shard.count for shard in manifest.shards)
    if written != manifest.count:
        raise ValueError(f"a count of {manifest.count} over shards of {short(written)} grids")
    total = manifest.count if manifest.total is None else manifest.total
    _check_range("total", total, manifest.count, MOST_GRIDS)
    if manifest.shard_size is not None:
        _check_range("shard_size", manifest.shard_size, 1, MOST_GRIDS)
        _check_range("the number of shards", -(-total // manifest.shard_size), 0, MOST_SHARDS)
    _check_range("the number of shards", len(manifest.shards), 0, MOST_SHARDS)
    _check_range("the number of class names", len(manifest.class_names), 0, MOST_CLASSES)


def _check_range(what: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{short(value)} as {what}, which is from {lowest:,} to {highest:,}")
