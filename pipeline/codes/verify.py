"""Verifying that a folder of codes is what its manifest says; every file is read.

Legend: n grids of H x W codes, K codes in the codebook.
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
from ..runtime.atomic_files import TEMPORARY
from ..runtime.console import check_output, say
from ..runtime.folder_lock import LOCK
from ..runtime.progress import with_progress
from .encoded_images import rows_sha256
from .manifest import CARD, MANIFEST, CodeManifest, ShardEntry, read_manifest
from .shard import map_npy, read_names
from .statistics import CodeStatistics, count_codes
from .unfinished import EXPORT_FILES

NAMED = 5  # problems that the one line of the error names at most; all are printed
READ_AT_ONCE = 2**20  # bytes
ROUNDING = 1e-9  # relative difference that a statistic may have on another machine
_SHA256 = re.compile("[0-9a-f]{64}")


def verify_codes(
    folder: Path, tokenizer_folder: Path | None = None, *, data: str | None = None, data_root: str | None = None
) -> CodeManifest:
    """Check hashes, types, shapes, ranges, counts, names and statistics, and that there are no other files.

    Args:
        folder: what export-codes wrote.
        tokenizer_folder: the tokenizer that should have made the codes.
        data: the source of the images that were encoded; without it, names, labels and pixels are not compared.
        data_root: folder of a torchvision set, with `data`.

    Returns:
        the manifest.

    Raises:
        InputError: there are problems, each of which is printed first.
    """
    manifest = read_manifest(folder)
    if tokenizer_folder is not None:
        fingerprint = read_info(tokenizer_folder, "tokenizer").fingerprint
        remedy = "name the tokenizer that made them, or export them again"
        check_same_tokenizer(fingerprint, manifest.tokenizer_fingerprint, f"codes in {folder}", remedy)
    images = _named_images(folder, manifest, data, data_root)
    problems = []
    for problem in _problems(folder, manifest, images):
        say(problem)
        check_output()
        problems.append(problem)
    if problems:
        others = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise InputError(
            expected=f"{folder} as its manifest says",
            got="; ".join(problems[:NAMED]) + others,
            do="export the codes again, or restore the folder from a copy",
        )
    return manifest


def _named_images(folder: Path, manifest: CodeManifest, data: str | None, data_root: str | None) -> ImageSplit | None:
    """Return the images to compare with, prepared as the tokenizer takes them; None without `data`."""
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


def _problems(folder: Path, manifest: CodeManifest, images: ImageSplit | None) -> Iterator[str]:
    """Yield a line for each problem."""
    if not manifest.complete:
        yield f"unfinished: {manifest.count:,} of {manifest.total:,} grids; the same export-codes resumes"
    if manifest.shard_size is not None:
        yield from _gaps(manifest, manifest.shard_size)
    histogram, intact = torch.zeros(manifest.num_codes, dtype=torch.int64), True
    for entry in with_progress(manifest.shards, len(manifest.shards), "verifying", "shard"):
        problems = [*_changed(folder, entry.files)]
        if not problems:  # so that a file of wrong bytes is reported once
            problems = [*_wrong_content(folder, entry, manifest)]
        yield from problems
        intact = intact and not problems
        if intact:
            histogram += _count(folder, entry, manifest)
    if intact:
        yield from _wrong_statistics(manifest, histogram)
    yield from _wrong_rows(manifest, images)
    yield from _changed(folder, manifest.tables)
    yield from _missing_or_foreign(folder, manifest)


def _missing_or_foreign(folder: Path, manifest: CodeManifest) -> Iterator[str]:
    """Yield a line for each file that is not of the data set, and if the card is missing."""
    expected = {MANIFEST, CARD, LOCK, *manifest.tables}.union(*(entry.files for entry in manifest.shards))
    if manifest.complete and manifest.shard_size is not None and not (folder / CARD).exists():
        yield f"{CARD} is missing"
    for name in sorted(path.name for path in folder.iterdir()):
        in_progress = not manifest.complete and EXPORT_FILES.fullmatch(name.removesuffix(TEMPORARY))
        if name not in expected and not in_progress:
            yield f"{name} is not of this data set"


def _gaps(manifest: CodeManifest, shard_size: int) -> Iterator[str]:
    """Yield a line for each shard that does not hold the rows it should."""
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
    """Yield a line for each statistic that is not that of the codes. The first version wrote none."""
    if not manifest.statistics:
        if manifest.complete and manifest.shard_size is not None:
            yield "the statistics are missing; the same export-codes adds them"
        return
    for name, actual in asdict(CodeStatistics.of(histogram)).items():
        stated = manifest.statistics.get(name)
        if stated is None or not math.isclose(stated, actual, rel_tol=ROUNDING, abs_tol=ROUNDING):
            yield f"the statistics say {name} {stated}, the codes have {actual}"


def _wrong_rows(manifest: CodeManifest, images: ImageSplit | None) -> Iterator[str]:
    """Yield a line if the codes cannot be of these images, or their hash is none."""
    if manifest.rows_sha256 and not _SHA256.fullmatch(manifest.rows_sha256):
        yield f"rows_sha256 is {manifest.rows_sha256!r} in {MANIFEST}, which is no SHA-256 of 64 hex digits"
    elif images is not None:
        total = manifest.count if manifest.total is None else manifest.total
        count = total // 2 if manifest.flips else total
        if len(images) != count:
            yield f"the codes are of {count} images, the {manifest.split} split of the named images has {len(images)}"
        elif (found := rows_sha256(images)) != manifest.rows_sha256:
            yield (
                f"rows_sha256 is {manifest.rows_sha256}, the names, labels and pixels of the named images have {found}"
            )


def _changed(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each file that is missing or has another hash than in `files`."""
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
    """Return the SHA-256 and the size in bytes of a file, which may be larger than the memory."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(READ_AT_ONCE):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _wrong_content(folder: Path, entry: ShardEntry, manifest: CodeManifest) -> Iterator[str]:
    """Yield a line for each file whose hash is right and whose content is not: the export or the manifest was wrong."""
    for name, check in zip(entry.files, (_wrong_codes, _wrong_labels, _wrong_names), strict=True):
        try:
            problem = check(folder / name, entry.count, manifest)
        except InputError as error:
            problem = f"is {error.got}, in place of {error.expected}"
        if problem is not None:
            yield f"{name} {problem}"


def _wrong_codes(path: Path, count: int, manifest: CodeManifest) -> str | None:
    """Return what is wrong with the codes of a shard, if anything."""
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
    """Return what is wrong with the labels of a shard, if anything."""
    labels = map_npy(path, (count,), np.dtype(np.int64))
    possible = len(manifest.class_names) - 1
    if -1 <= labels.min() <= labels.max() <= possible:
        return None
    return f"holds labels from {labels.min()} to {labels.max()}, where -1 to {possible} is possible"


def _wrong_names(path: Path, count: int, manifest: CodeManifest) -> str | None:
    """Return what is wrong with the names of a shard, if anything."""
    names = read_names(path)
    return f"holds {len(names)} names for {count} grids" if len(names) != count else None
