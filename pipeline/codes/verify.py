"""Is a folder of codes what its manifest says? Every file is read.

n grids of H x W codes.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..images.image_set import ImageSplit, open_images, split_of
from ..models.checkpoint import check_same_tokenizer, read_info
from ..runtime.folder_lock import LOCK
from ..runtime.progress import with_progress
from .encoded_images import rows_sha256
from .manifest import CARD, MANIFEST, CodeManifest, ShardEntry, read_manifest
from .shard import map_npy, read_names
from .statistics import CodeStatistics, count_codes
from .unfinished import OUR_FILES

NAMED = 5  # problems in the one line of the error; all are printed
READ_AT_ONCE = 2**20  # bytes
ROUNDING = 1e-9  # by which two machines may differ in a statistic
_SHA256 = re.compile("[0-9a-f]{64}")


def verify_codes(
    folder: Path, tokenizer_folder: Path | None = None, *, data: str | None = None, data_root: str | None = None
) -> CodeManifest:
    """Check hashes, types, shapes, ranges, counts, names and statistics, and that there are no other files.

    Args:
        folder: what export-codes wrote.
        tokenizer_folder: the tokenizer that should have made the codes.
        data: the source of the images that they should be of; without it, names, labels and pixels are not compared.
        data_root: folder of a torchvision set, with `data`.

    Raises:
        InputError: something is not as it should be, after a line on standard output for each such thing.
    """
    manifest = read_manifest(folder)
    if tokenizer_folder is not None:
        fingerprint = read_info(tokenizer_folder, "tokenizer").fingerprint
        remedy = "name the tokenizer that made them, or export them again"
        check_same_tokenizer(fingerprint, manifest.tokenizer_fingerprint, f"codes in {folder}", remedy)
    split = _images_of(folder, manifest, data, data_root)
    problems = []
    for problem in _problems(folder, manifest, split):
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


def _images_of(folder: Path, manifest: CodeManifest, data: str | None, data_root: str | None) -> ImageSplit | None:
    """Return the images that the codes should be of, prepared as the tokenizer takes them; None if none are named."""
    if data is None:
        if data_root is not None:
            raise InputError(expected="--data-root only with --data", got="it alone", do="name the images with --data")
        return None
    if not manifest.rows_sha256:
        raise InputError(
            expected=f"a manifest that names the rows_sha256 of its images in {folder}",
            got="one that does not, as the first version wrote it",
            do="omit --data, or export the codes again",
        )
    image = manifest.image
    size, channels = (image["height"], image["width"]), image["channels"]
    return split_of(open_images(data, image_size=size, channels=channels, data_root=data_root), manifest.split)


def _problems(folder: Path, manifest: CodeManifest, split: ImageSplit | None) -> Iterator[str]:
    if not manifest.complete:
        yield f"unfinished: {manifest.count:,} of {manifest.total:,} grids; the same export-codes goes on"
    if manifest.shard_size is not None:
        yield from _gaps(manifest, manifest.shard_size)
    histogram, intact = torch.zeros(manifest.num_codes, dtype=torch.int64), True
    for entry in with_progress(manifest.shards, len(manifest.shards), "verifying", "shard"):
        problems = [*_changed(folder, entry.files)]
        if not problems:  # a file whose bytes are wrong is reported once
            problems = [*_wrong_content(folder, entry, manifest)]
        yield from problems
        intact = intact and not problems
        if intact:
            histogram += _count(folder, entry, manifest)
    if intact:
        yield from _wrong_statistics(manifest, histogram)
    yield from _wrong_rows(manifest, split)
    yield from _changed(folder, manifest.tables)
    yield from _missing_or_foreign(folder, manifest)


def _missing_or_foreign(folder: Path, manifest: CodeManifest) -> Iterator[str]:
    """Say which files are there that should not be, and whether the card is missing."""
    expected = {MANIFEST, CARD, LOCK, *manifest.tables}.union(*(entry.files for entry in manifest.shards))
    if manifest.complete and manifest.shard_size is not None and not (folder / CARD).exists():
        yield f"{CARD} is missing"
    for name in sorted(path.name for path in folder.iterdir()):
        coming = not manifest.complete and OUR_FILES.fullmatch(name.removesuffix(".new"))
        if name not in expected and not coming:
            yield f"{name.encode('utf-8', 'replace').decode()} is not of this data set"


def _gaps(manifest: CodeManifest, shard_size: int) -> Iterator[str]:
    """Say which rows no shard holds, or two do."""
    for index, entry in enumerate(manifest.shards):
        end = entry.start + entry.count
        last = end == manifest.total
        if entry.start % shard_size or (entry.count != shard_size and not last):
            yield f"shard {index} holds rows {entry.start} to {end - 1}, which is no shard of {shard_size}"
        if manifest.complete and entry.start != index * shard_size:
            yield f"shard {index} starts at row {entry.start} in place of {index * shard_size}"


def _count(folder: Path, entry: ShardEntry, manifest: CodeManifest) -> Tensor:
    """Return the histogram [K] of the codes of a shard that is intact."""
    return count_codes(_map_codes(folder / next(iter(entry.files)), entry.count, manifest), manifest.num_codes)


def _wrong_statistics(manifest: CodeManifest, histogram: Tensor) -> Iterator[str]:
    """Say where the statistics are not those of the codes. The first version wrote none."""
    if not manifest.statistics:
        if manifest.complete and manifest.shard_size is not None:
            yield "the statistics are missing; the same export-codes adds them"
        return
    for name, true in asdict(CodeStatistics.of(histogram)).items():
        stated = manifest.statistics.get(name)
        if stated is None or not math.isclose(stated, true, rel_tol=ROUNDING, abs_tol=ROUNDING):
            yield f"the statistics say {name} {stated}, the codes have {true}"


def _wrong_rows(manifest: CodeManifest, split: ImageSplit | None) -> Iterator[str]:
    """Say whether the codes are of other images than `split`, as far as that can be known."""
    if manifest.rows_sha256 and not _SHA256.fullmatch(manifest.rows_sha256):
        yield f"rows_sha256 is {manifest.rows_sha256!r} in {MANIFEST}, which is no SHA-256 of 64 hex digits"
    elif split is not None:
        total = manifest.count if manifest.total is None else manifest.total
        count = total // 2 if manifest.flips else total
        if len(split) != count:
            yield f"the codes are of {count} images, the {manifest.split} part of the named images has {len(split)}"
        elif (found := rows_sha256(split)) != manifest.rows_sha256:
            yield (
                f"rows_sha256 is {manifest.rows_sha256}, the names, labels and pixels of the named images have {found}"
            )


def _changed(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Say which files are missing or have another hash than in `files`."""
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
    """Return the SHA-256 and the bytes of a file, which may be larger than the memory."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while part := file.read(READ_AT_ONCE):
            digest.update(part)
            size += len(part)
    return digest.hexdigest(), size


def _wrong_content(folder: Path, entry: ShardEntry, manifest: CodeManifest) -> Iterator[str]:
    """Say what the right bytes hold that cannot be: then the export itself, or the manifest, was wrong."""
    for name, check in zip(entry.files, (_wrong_codes, _wrong_labels, _wrong_names), strict=True):
        try:
            problem = check(folder / name, entry.count, manifest)
        except InputError as error:
            problem = f"is {error.got}, in place of {error.expected}"
        if problem is not None:
            yield f"{name} {problem}"


def _wrong_codes(path: Path, count: int, manifest: CodeManifest) -> str | None:
    codes = _map_codes(path, count, manifest)
    lowest, highest = codes.min(), codes.max()
    if 0 <= lowest <= highest < manifest.num_codes:
        return None
    row = int(np.argmax((codes < 0) | (codes >= manifest.num_codes)) // np.prod(manifest.grid))
    possible = manifest.num_codes - 1
    return f"holds codes from {lowest} to {highest}, where 0 to {possible} is possible; first in row {row} of the file"


def _map_codes(path: Path, count: int, manifest: CodeManifest) -> np.ndarray:
    """Return the codes [n,H,W] of a shard, mapped. Raise InputError if the file is of another type or shape."""
    return map_npy(path, (count, *manifest.grid), np.dtype(manifest.dtype))


def _wrong_labels(path: Path, count: int, manifest: CodeManifest) -> str | None:
    labels = map_npy(path, (count,), np.dtype(np.int64))
    possible = len(manifest.class_names) - 1
    if -1 <= labels.min() <= labels.max() <= possible:
        return None
    return f"holds labels from {labels.min()} to {labels.max()}, where -1 to {possible} is possible"


def _wrong_names(path: Path, count: int, manifest: CodeManifest) -> str | None:
    names = read_names(path)
    return f"holds {len(names)} names for {count} grids" if len(names) != count else None
