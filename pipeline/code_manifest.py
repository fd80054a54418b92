"""What a folder of code grids says of itself: `manifest.json`, and the names of the files beside it.

    manifest.json       counts, K, grid, class names, split, tokenizer fingerprint, hash of every file
    codes-00000.npy     [n,H,W] uint8 if K <= 256, uint16 if K <= 65,536, else int32
    labels-00000.npy    [n] int64, -1 where there is no label
    names-00000.json    [n] names of the images, in the order of the rows
    README.md           the same for people, once all is written

Rows are numbered through all shards. Where the images were also exported mirrored (`flips`), the second half of the
rows is the first half again, each image mirrored left to right, with the same labels and names.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from .errors import InputError
from .files import to_json, write_atomic

FORMAT_VERSION = 1
MANIFEST, CARD = "manifest.json", "README.md"
SHARD_FILES = ("codes-{:05d}.npy", "labels-{:05d}.npy", "names-{:05d}.json")


@dataclass(frozen=True, kw_only=True)
class CodeManifest:
    """What `manifest.json` says."""

    count: int  # grids that are written
    num_codes: int  # K
    grid: tuple[int, int]  # H, W
    dtype: str  # of the codes in the shards
    class_names: list[str]  # label i is class_names[i]; empty without labels
    split: str  # part of the source: "train" or "test"
    source: str  # the images
    image: dict[str, int]  # height, width, channels that the tokenizer decodes to
    tokenizer_fingerprint: str
    shards: list[dict[str, Any]]  # {"start": first row, "count": n, "files": {file name: SHA-256}} in the order of rows
    total: int | None = None  # grids when all is written; None means `count`
    shard_size: int | None = None  # grids a shard, but for the last one
    flips: bool = False  # whether the second half of the rows is mirrored
    rows_sha256: str = ""  # of the names, labels and pixels of all images
    made_with: dict[str, str] = field(default_factory=dict)  # the device and the versions that decide a rounding
    statistics: dict[str, float] = field(default_factory=dict)  # of all codes: codes_used, perplexity, entropy in bits
    tables: dict[str, str] = field(default_factory=dict)  # {file name: SHA-256} of copies in other formats
    format_version: int = FORMAT_VERSION

    @property
    def complete(self) -> bool:
        """Whether every grid is written."""
        return self.total is None or self.count == self.total


def code_dtype(num_codes: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and int32 that holds every code in [0, num_codes)."""
    if num_codes <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if num_codes <= 2**16 else np.dtype(np.int32)


def write_manifest(folder: Path, manifest: CodeManifest) -> None:
    write_atomic(folder / MANIFEST, to_json(asdict(manifest)))


def read_manifest(folder: str | Path) -> CodeManifest:
    """Read `manifest.json`.

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
    except (OSError, ValueError) as error:
        raise _not_ours(path, str(error)) from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise InputError(
            expected=f"format version {FORMAT_VERSION} in {path}",
            got=f"{version}",
            do="use the version of codegrid that wrote it",
        )
    return _parse(content, path)


def _parse(content: Any, path: Path) -> CodeManifest:
    try:
        known = {item.name for item in fields(CodeManifest)}
        chosen = {name: value for name, value in content.items() if name in known}
        manifest = CodeManifest(**{**chosen, "grid": tuple(content["grid"])})
        problem = _mistyped(manifest) or _contradiction(manifest)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise _not_ours(path, str(error)) from None
    if problem is not None:
        raise _not_ours(path, problem)
    return manifest


def _mistyped(manifest: CodeManifest) -> str | None:
    """A field that holds another kind of value than it should, if there is one."""
    for name, hint in get_type_hints(CodeManifest).items():
        allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        value = getattr(manifest, name)
        if not isinstance(value, tuple(get_origin(kind) or kind for kind in allowed)):
            return f"the {type(value).__name__} {value} as {name}"
    if not all(isinstance(name, str) for name in manifest.class_names):
        return f"the class names {manifest.class_names}"
    return None


def _contradiction(manifest: CodeManifest) -> str | None:
    """What cannot be true of any data set, if there is anything."""
    counts = [int(shard["count"]) for shard in manifest.shards]
    if sum(counts) != manifest.count:
        return f"a count of {manifest.count} over shards of {sum(counts)} grids"
    if min(counts, default=1) < 1:
        return "a shard without grids"
    for shard in manifest.shards:
        if len(shard["files"]) != len(SHARD_FILES) or any(Path(name).name != name for name in shard["files"]):
            return f"a shard of the files {list(shard['files'])}"
    if len(manifest.grid) != 2 or not all(isinstance(side, int) and side >= 1 for side in manifest.grid):
        return f"the grid {list(manifest.grid)}"
    if manifest.num_codes < 1 or manifest.dtype != code_dtype(manifest.num_codes).name:
        return f"codes of {manifest.dtype} for K = {manifest.num_codes}"
    if not manifest.complete and manifest.count > int(manifest.total or 0):
        return f"{manifest.count} grids of {manifest.total}"
    return None


def _not_ours(path: Path, got: str) -> InputError:
    return InputError(expected=f"the manifest of a code data set in {path}", got=got, do="export the codes again")
