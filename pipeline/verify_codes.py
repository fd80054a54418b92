"""Is a folder of codes what its manifest says? Every file is read."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .checkpoint import check_same_tokenizer, read_info
from .code_manifest import CARD, MANIFEST, CodeManifest, read_manifest
from .code_shards import open_shard, read_names
from .errors import InputError
from .files import sha256

NAMED = 5  # problems in the one line of the error; all are printed


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
    if manifest.complete and not (folder / CARD).exists():
        yield f"{CARD} is missing"
    for path in sorted(folder.iterdir()):
        if path.name not in expected:
            yield f"{path.name} is not of this data set"


def _gaps(manifest: CodeManifest, shard_size: int) -> Iterator[str]:
    """Rows that no shard holds, or that two do."""
    for index, entry in enumerate(manifest.shards):
        start, count = int(entry["start"]), int(entry["count"])
        last = start + count == manifest.total
        if start % shard_size or (count != shard_size and not last):
            yield f"shard {index} holds rows {start} to {start + count - 1}, which is no shard of {shard_size}"
        if manifest.complete and start != index * shard_size:
            yield f"shard {index} starts at row {start} in place of {index * shard_size}"


def _changed(folder: Path, files: dict[str, str]) -> Iterator[str]:
    for name, digest in files.items():
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror or error})"
        else:
            if sha256(data) != digest:
                yield f"{name} has other bytes than when it was written ({len(data):,} bytes, another SHA-256)"


def _wrong_content(folder: Path, entry: dict[str, dict[str, str]], manifest: CodeManifest) -> Iterator[str]:
    """What the right bytes say that cannot be: then the export itself, or the manifest, was wrong."""
    codes_file, labels_file, names_file = entry["files"]
    try:
        shard = open_shard(folder, entry, manifest)
        names = read_names(shard.names_file)
    except InputError as error:
        yield f"{codes_file}: {error}"
        return
    if not 0 <= shard.codes.min() <= shard.codes.max() < manifest.num_codes:
        row = int(np.argmax((shard.codes < 0) | (shard.codes >= manifest.num_codes)) // np.prod(manifest.grid))
        found = f"{shard.codes.min()} to {shard.codes.max()}, first in row {row}"
        yield f"{codes_file} holds codes from {found}, where 0 to {manifest.num_codes - 1} is possible"
    highest = max(len(manifest.class_names), 0) - 1
    if shard.labels.min() < -1 or shard.labels.max() > highest:
        found = f"{shard.labels.min()} to {shard.labels.max()}"
        yield f"{labels_file} holds labels from {found}, where -1 to {highest} is possible"
    if len(names) != len(shard.labels):
        yield f"{names_file} holds {len(names)} names for {len(shard.labels)} grids"
