"""Verifying that a folder of codes is what its manifest says; every file is read."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from ..errors import InputError
from ..images.image_set import ImageSplit, open_images, split_of
from ..models.checkpoint import check_same_tokenizer, read_info
from ..runtime.console import check_output, say
from ..runtime.folder_lock import LOCK
from ..runtime.progress import with_progress
from ..runtime.schema import short
from ..runtime.untrusted_files import regular_size
from .content import map_codes, wrong_content
from .encoded_images import rows_sha256
from .hashes import HashedFile
from .manifest import CARD, MANIFEST, CodeManifest, read_manifest
from .statistics import CodeStatistics, Histogram
from .unfinished import is_export_file

NAMED = 5  # problems that the one line of the error names at most; all are printed
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
    histogram, intact = Histogram(manifest.num_codes), True
    for entry in with_progress(manifest.shards, len(manifest.shards), "verifying", "shard"):
        problems = [*_changed(folder, entry.files)]
        if not problems:  # so that a file of wrong bytes is reported once
            problems = [*wrong_content(folder, entry, manifest)]
        yield from problems
        intact = intact and not problems
        if intact:
            histogram.add(map_codes(folder / next(iter(entry.files)), entry.count, manifest))
    if intact:
        yield from _wrong_statistics(manifest, CodeStatistics.of(histogram.counts))
    yield from _wrong_rows(manifest, images)
    yield from _changed(folder, manifest.tables)
    yield from _missing_or_foreign(folder, manifest)


def _missing_or_foreign(folder: Path, manifest: CodeManifest) -> Iterator[str]:
    """Yield a line for each file that is not of the data set, and if the card is missing."""
    expected = {MANIFEST, CARD, LOCK, *manifest.tables}.union(*(entry.files for entry in manifest.shards))
    if manifest.complete and manifest.shard_size is not None:
        yield from _wrong_card(folder / CARD)
    for name in sorted(os.listdir(folder)):
        in_progress = not manifest.complete and is_export_file(name)
        if name not in expected and not in_progress:
            yield f"{name} is not of this data set"


def _wrong_card(path: Path) -> Iterator[str]:
    """Yield a line if the card is no file. People may change it, so that it has no hash."""
    try:
        regular_size(path)
    except FileNotFoundError:
        yield f"{path.name} is missing"
    except (OSError, ValueError) as error:
        yield f"{path.name} cannot be read ({getattr(error, 'strerror', None) or error})"


def _gaps(manifest: CodeManifest, shard_size: int) -> Iterator[str]:
    """Yield a line for each shard that does not hold the rows it should."""
    for index, entry in enumerate(manifest.shards):
        end = entry.start + entry.count
        last = end == manifest.total
        if entry.start % shard_size or (entry.count != shard_size and not last):
            yield f"shard {index} holds rows {entry.start} to {end - 1}, which is no shard of {shard_size}"
        if manifest.complete and entry.start != index * shard_size:
            yield f"shard {index} starts at row {entry.start} in place of {index * shard_size}"


def _wrong_statistics(manifest: CodeManifest, counted: CodeStatistics) -> Iterator[str]:
    """Yield a line for each statistic that is not that of the codes. The first version wrote none."""
    if not manifest.statistics:
        if manifest.complete and manifest.shard_size is not None:
            yield "the statistics are missing; the same export-codes adds them"
        return
    for name, actual in asdict(counted).items():
        stated = manifest.statistics.get(name)
        if stated is None or not math.isclose(stated, actual, rel_tol=ROUNDING, abs_tol=ROUNDING):
            yield f"the statistics say {name} {stated}, the codes have {actual}"


def _wrong_rows(manifest: CodeManifest, images: ImageSplit | None) -> Iterator[str]:
    """Yield a line if the codes cannot be of these images, or their hash is none."""
    if manifest.rows_sha256 and not _SHA256.fullmatch(manifest.rows_sha256):
        yield f"rows_sha256 is {short(repr(manifest.rows_sha256))} in {MANIFEST}, which is no SHA-256 of 64 hex digits"
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
        if problem := HashedFile(folder / name, digest).problem():
            yield f"{name} {problem}"
