"""Is a folder of codes what its manifest says? Every file is read."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .checkpoint import check_same_tokenizer, read_info
from .code_manifest import CARD, MANIFEST, CodeManifest, read_manifest
from .code_shards import map_npy, read_names
from .code_writer import OUR_FILES
from .errors import InputError

NAMED = 5  # problems in the one line of the error; all are printed
READ_AT_ONCE = 2**20  # bytes


def verify_codes(folder: Path, tokenizer_folder: Path | None = None) -> CodeManifest:
    """Check hashes, types, shapes, ranges, counts and names of all files, and that there are no others.

    Args:
        folder: what export-codes wrote.
        tokenizer_folder: the tokenizer that should have made the codes.

    Raises:
        InputError: something is not as it should be, after a line on standard output for each such thing.
    """
    manifest = read_manifest(folder)
    if tokenizer_folder is not None:
        fingerprint = read_info(tokenizer_folder, "tokenizer").fingerprint
        remedy = "name the tokenizer that made them, or export them again"
        check_same_tokenizer(fingerprint, manifest.tokenizer_fingerprint, f"codes in {folder}", remedy)
    problems = []
    for problem in _problems(folder, manifest):
        print(problem)
        problems.append(problem)
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise InputError(
            expected=f"{folder} as its manifest says",
            got="; ".join(problems[:NAMED]) + more,
            do="export the codes again, or restore the folder from a copy",
        )
    return manifest


def _problems(folder: Path, manifest: CodeManifest) -> Iterator[str]:
    if not manifest.complete:
        yield f"unfinished: {manifest.count:,} of {manifest.total:,} grids; the same export-codes goes on"
    if manifest.shard_size is not None:
        yield from _gaps(manifest, manifest.shard_size)
    expected = {MANIFEST, CARD, *manifest.tables}
    for entry in tqdm(manifest.shards, desc="verifying", unit="shard", dynamic_ncols=True):
        expected.update(entry["files"])
        changed = [*_changed(folder, entry["files"])]
        yield from changed
        if not changed:  # a file whose bytes are wrong is reported once
            yield from _wrong_content(folder, entry, manifest)
    yield from _changed(folder, manifest.tables)
    if manifest.complete and manifest.shard_size is not None and not (folder / CARD).exists():
        yield f"{CARD} is missing"
    for name in sorted(path.name for path in folder.iterdir()):
        coming = not manifest.complete and OUR_FILES.fullmatch(name.removesuffix(".new"))
        if name not in expected and not coming:
            yield f"{name.encode('utf-8', 'replace').decode()} is not of this data set"


def _gaps(manifest: CodeManifest, shard_size: int) -> Iterator[str]:
    """Rows that no shard holds, or that two do."""
    for index, entry in enumerate(manifest.shards):
        start, count = int(entry["start"]), int(entry["count"])
        last = start + count == manifest.total
        if start % shard_size or (count != shard_size and not last):
            yield f"shard {index} holds rows {start} to {start + count - 1}, which is no shard of {shard_size}"
        if manifest.complete and start != index * shard_size:
            yield f"shard {index} starts at row {start} in place of {index * shard_size}"


def _changed(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    for name, digest in files.items():
        try:
            found, size = _hash_and_size(folder / name)
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror or error})"
        else:
            if found != digest:
                yield f"{name} has other bytes than when it was written ({size:,} bytes, another SHA-256)"


def _hash_and_size(path: Path) -> tuple[str, int]:
    """SHA-256 and bytes of a file, which may be larger than the memory."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while part := file.read(READ_AT_ONCE):
            digest.update(part)
            size += len(part)
    return digest.hexdigest(), size


def _wrong_content(folder: Path, entry: Mapping[str, Any], manifest: CodeManifest) -> Iterator[str]:
    """What the right bytes say that cannot be: then the export itself, or the manifest, was wrong."""
    for name, check in zip(entry["files"], (_wrong_codes, _wrong_labels, _wrong_names), strict=True):
        try:
            problem = check(folder / name, int(entry["count"]), manifest)
        except InputError as error:
            problem = f"is {error.got}, in place of {error.expected}"
        if problem is not None:
            yield f"{name} {problem}"


def _wrong_codes(path: Path, count: int, manifest: CodeManifest) -> str | None:
    codes = map_npy(path, (count, *manifest.grid), np.dtype(manifest.dtype))
    lowest, highest = codes.min(), codes.max()
    if 0 <= lowest <= highest < manifest.num_codes:
        return None
    row = int(np.argmax((codes < 0) | (codes >= manifest.num_codes)) // np.prod(manifest.grid))
    possible = manifest.num_codes - 1
    return f"holds codes from {lowest} to {highest}, where 0 to {possible} is possible; first in row {row} of the file"


def _wrong_labels(path: Path, count: int, manifest: CodeManifest) -> str | None:
    labels = map_npy(path, (count,), np.dtype(np.int64))
    possible = len(manifest.class_names) - 1
    if -1 <= labels.min() <= labels.max() <= possible:
        return None
    return f"holds labels from {labels.min()} to {labels.max()}, where -1 to {possible} is possible"


def _wrong_names(path: Path, count: int, manifest: CodeManifest) -> str | None:
    names = read_names(path)
    return f"holds {len(names)} names for {count} grids" if len(names) != count else None
