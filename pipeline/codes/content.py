"""What is wrong with the content of a shard's files, also of those whose hashes are right.

Legend: n grids of H x W codes, K codes in the codebook.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import InputError
from .hashes import HashedFile
from .manifest import CodeManifest, ShardEntry
from .shard import map_npy, read_names


def wrong_content(folder: Path, entry: ShardEntry, manifest: CodeManifest) -> Iterator[str]:
    """Yield a line for each file of a shard whose content is not what the manifest says. Every file is read."""
    for (name, digest), check in zip(entry.files.items(), (_wrong_codes, _wrong_labels, _wrong_names), strict=True):
        try:
            problem = check(HashedFile(folder / name, digest), entry.count, manifest)
        except InputError as error:
            problem = f"is {error.got}, in place of {error.expected}"
        if problem is not None:
            yield f"{name} {problem}"


def map_codes(path: Path, count: int, manifest: CodeManifest) -> np.ndarray:
    """Return the codes [n,H,W] of a shard, mapped. Raise InputError if the file is of another type or shape."""
    return map_npy(path, (count, *manifest.grid), np.dtype(manifest.dtype))


def _wrong_codes(file: HashedFile, count: int, manifest: CodeManifest) -> str | None:
    """Return what is wrong with the codes of a shard, if anything."""
    codes = map_codes(file.path, count, manifest)
    lowest, highest = codes.min(), codes.max()
    if 0 <= lowest <= highest < manifest.num_codes:
        return None
    row = next(row for row, grid in enumerate(codes) if grid.min() < 0 or grid.max() >= manifest.num_codes)
    possible = manifest.num_codes - 1
    return f"holds codes from {lowest} to {highest}, where 0 to {possible} is possible; first in row {row} of the file"


def _wrong_labels(file: HashedFile, count: int, manifest: CodeManifest) -> str | None:
    """Return what is wrong with the labels of a shard, if anything."""
    labels = map_npy(file.path, (count,), np.dtype(np.int64))
    possible = len(manifest.class_names) - 1
    if -1 <= labels.min() <= labels.max() <= possible:
        return None
    return f"holds labels from {labels.min()} to {labels.max()}, where -1 to {possible} is possible"


def _wrong_names(file: HashedFile, count: int, manifest: CodeManifest) -> str | None:
    """Return None for the names of a shard. Raise InputError if they are wrong."""
    read_names(file, count)
    return None
