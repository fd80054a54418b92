"""The manifest of a code data set: `manifest.json`, which describes the folder and names its other files.

    manifest.json       counts, K, grid, class names, split, tokenizer fingerprint, hash of every file
    codes-00000.npy     [n,H,W] uint8 if K <= 256, uint16 if K <= 65,536, else int32
    labels-00000.npy    [n] int64, -1 where there is no label
    names-00000.json    [n] names of the images, in the order of the rows
    README.md           the dataset card, once all grids are written

Rows are numbered through all shards. Where the images were also exported mirrored (`flips`), the second half of the
rows is the first half again, each image mirrored left to right, with the same labels and names.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from ..errors import InputError
from ..runtime.atomic_files import to_json, write_atomic

FORMAT_VERSION = 1
MANIFEST, CARD = "manifest.json", "README.md"
SHARD_FILES = ("codes-{:05d}.npy", "labels-{:05d}.npy", "names-{:05d}.json")
MOST_CODES = 2**31  # K at most; the largest type of codes is int32
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # of a file inside the folder, on every system


@dataclass(frozen=True)
class ShardEntry:
    """The entry of one shard in the manifest."""

    start: int  # row of its first grid
    count: int  # grids in it, at least 1
    files: dict[str, str]  # {file name: SHA-256}, in the order of SHARD_FILES


_ENTRY_TYPES = get_type_hints(ShardEntry)


@dataclass(frozen=True, kw_only=True)
class CodeManifest:
    """The content of `manifest.json`; its fields are the keys."""

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


def write_manifest(folder: Path, manifest: CodeManifest) -> None:
    """Write `manifest.json` atomically."""
    write_atomic(folder / MANIFEST, to_json(asdict(manifest)))


def read_manifest(folder: str | Path) -> CodeManifest:
    """Return the content of `manifest.json`; every field and every entry of a shard is checked.

    Raises:
        InputError: no code data set there, another format version, or a manifest that contradicts itself.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            expected=f"a code data set in {folder}", got=f"no {MANIFEST}", do="make one with export-codes"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _invalid(path, str(error)) from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise InputError(
            expected=f"format version {FORMAT_VERSION} in {path}",
            got=f"{version}",
            do="use the version of codegrid that wrote it",
        )
    try:
        return _parse(content)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise _invalid(path, str(error)) from None


def shard_entry(content: Any, index: int, *, start: int | None = None) -> ShardEntry:
    """Return the entry of shard number `index`, from its JSON.

    Args:
        content: JSON.
        index: for messages.
        start: first row, if `content` does not name it; the first version of the format did not.

    Raises:
        ValueError: a field is missing or of another type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{short(content)} as shard {index}")
    found = {"start": start, **content} if start is not None else content
    for name, hint in _ENTRY_TYPES.items():
        if name not in found:
            raise ValueError(f"shard {index} without {name}")
        if not _is_a(found[name], hint):
            raise ValueError(f"the {type(found[name]).__name__} {short(found[name])} as {name} of shard {index}")
    entry = ShardEntry(**{name: found[name] for name in _ENTRY_TYPES})
    if len(entry.files) != len(SHARD_FILES) or not all(map(_PLAIN_NAME.fullmatch, entry.files)):
        raise ValueError(f"a shard of the files {list(entry.files)}")
    if entry.count < 1:
        raise ValueError("a shard without grids")
    if entry.start < 0:
        raise ValueError(f"a start of {entry.start} in shard {index}")
    return entry


def short(value: Any) -> str:
    """Return `value` as a text of about 100 characters at most, for a message."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _parse(content: Any) -> CodeManifest:
    """Return the manifest with this content. Raise a built-in error, which says what is wrong, if it is none."""
    known = {item.name for item in fields(CodeManifest)}
    chosen = {name: value for name, value in content.items() if name in known}
    manifest = CodeManifest(**{**chosen, "grid": tuple(content["grid"]), "shards": []})
    _check_grid(manifest.grid)
    _check_types(manifest)
    manifest = CodeManifest(**{**vars(manifest), "shards": _parse_shards(chosen["shards"], manifest.shard_size)})
    _check_consistency(manifest)
    return manifest


def _parse_shards(content: Any, shard_size: int | None) -> list[ShardEntry]:
    """Return the entries of all shards. Raise ValueError if they are none."""
    if not isinstance(content, list):
        raise ValueError(f"the {type(content).__name__} {short(content)} as shards")
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shards of {shard_size} grids")
    entries: list[ShardEntry] = []
    for index, item in enumerate(content):
        end = entries[-1].start + entries[-1].count if entries else 0
        entries.append(shard_entry(item, index, start=end if shard_size is None else None))
    return entries


def _check_grid(grid: tuple[Any, ...]) -> None:
    """Raise ValueError unless `grid` is a height and a width."""
    if len(grid) != 2 or not all(_is_a(side, int) and side >= 1 for side in grid):
        raise ValueError(f"the grid {short(list(grid))}")


def _check_types(manifest: CodeManifest) -> None:
    """Raise ValueError for a field that holds a value of another type than it should."""
    for name, hint in get_type_hints(CodeManifest).items():
        value = getattr(manifest, name)
        if not _is_a(value, hint):
            raise ValueError(f"the {type(value).__name__} {short(value)} as {name}")


def _check_consistency(manifest: CodeManifest) -> None:
    """Raise ValueError for what cannot be true of any data set: fields that contradict each other."""
    written = sum(shard.count for shard in manifest.shards)
    if written != manifest.count:
        raise ValueError(f"a count of {manifest.count} over shards of {written} grids")
    if not 1 <= manifest.num_codes <= MOST_CODES or manifest.dtype != code_dtype(manifest.num_codes).name:
        raise ValueError(f"codes of {short(manifest.dtype)} for K = {manifest.num_codes}")
    if manifest.total is not None and manifest.count > manifest.total:
        raise ValueError(f"{manifest.count} grids of {manifest.total}")
    if not {"height", "width", "channels"} <= manifest.image.keys():
        raise ValueError(f"the image {short(manifest.image)}")
    _check_tables(manifest.tables)


def _check_tables(tables: Mapping[str, str]) -> None:
    """Raise ValueError for a file outside the folder."""
    for name in tables:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"a table in the file {name!r}, which is not in the folder")


def _is_a(value: Any, hint: Any) -> bool:
    """Return whether `value`, which JSON gave, is of the type `hint`; True is no int, and an int is a float."""
    outer, inner = get_origin(hint) or hint, get_args(hint)
    if outer is UnionType:
        return any(_is_a(value, allowed) for allowed in inner)
    if outer is float:
        return type(value) in (int, float)
    if type(value) is not outer:
        return False
    if outer is dict:
        return all(_is_a(key, inner[0]) and _is_a(item, inner[1]) for key, item in value.items())
    if outer is list:
        return all(_is_a(item, inner[0]) for item in value)
    return True


def _invalid(path: Path, got: str) -> InputError:
    return InputError(expected=f"the manifest of a code data set in {path}", got=got, do="export the codes again")
