"""Resuming an unfinished export: which shards of an interrupted export of the same request are intact, and are kept.

The files of an export are recognised by the exact form of their names; no other file in the folder is ever changed or
removed.
"""

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from ..errors import InputError
from ..runtime.atomic_files import TEMPORARY
from ..runtime.filesystem import check_writable, make_folder, names_in
from ..runtime.folder_lock import LOCK
from ..runtime.output_paths import remove_file
from ..runtime.schema import from_json, short
from ..runtime.sealed_json import sealed
from ..runtime.untrusted_files import parse_json, read_regular, regular_size
from .card import CARD_MARK
from .content import wrong_content
from .hashes import HashedFile
from .manifest import (
    CARD,
    LARGEST_MANIFEST,
    MANIFEST,
    CodeManifest,
    ShardEntry,
    check_manifest,
    read_manifest,
    shard_files,
    write_manifest,
)

ENTRY = "shard-{:05d}.json"
_EXPORT_FILES = re.compile(
    r"manifest\.json|README\.md|(codes|labels)-[0-9]{5,}\.npy|(names|shard)-[0-9]{5,}\.json|codes\.npz"
    r"|codes-[0-9]{5,}\.parquet"
)
FIRST_FILES = {f"{MANIFEST}{TEMPORARY}"}  # all that a kill leaves before the first manifest is complete
RESULTS = {"count", "shards", "statistics", "tables"}  # fields of the manifest that a request leaves open
MADE_WITH = "made_with"  # compared while shards are missing: two versions of torch may round differently
CAUSES = ("tokenizer_fingerprint", "source", "split", "flips", "shard_size")  # the other fields follow from these
LARGEST_ENTRY = 2**12  # bytes
LARGEST_CARD = LARGEST_MANIFEST  # bytes; most of what it holds are class names
_ENTRY_FILE = re.compile(r"shard-([0-9]{5,})\.json")


def check_destination(
    folder: Path, requested: CodeManifest, *, force: bool, unknown: Collection[str] = ()
) -> CodeManifest | None:
    """Check that `requested` may be written into `folder`; nothing is changed there.

    Args:
        folder: where to write.
        requested: the manifest, without results.
        force: whether what is in the folder may be replaced.
        unknown: fields of `requested` that are not known yet and not compared.

    Returns:
        the manifest that an export of the same request left there; None if the export starts from the beginning.

    Raises:
        InputError: the folder holds a README.md of the user, or something that is no file under the name of a file
            that will be written, or, unless `force`, another export or other files; or the request is of more grids,
            shards or classes than a manifest can hold.
    """
    _check_describable(requested)
    names = sorted(names_in(folder))
    _check_nothing_in_the_way(folder, names)
    if force:
        return None
    if os.path.exists(folder / MANIFEST):
        existing = read_manifest(folder)
        _check_same_request(folder, existing, requested, unknown)
        return existing
    if not {*names} <= {*FIRST_FILES, LOCK}:
        raise InputError(
            expected=f"an empty or new folder as --out {folder}",
            got="a folder with files in it",
            do="name another folder, or use --force to replace what is there",
        )
    return None


def prepare_destination(folder: Path, requested: CodeManifest, *, force: bool) -> CodeManifest:
    """Prepare `folder` to be written into: keep the intact shards of the same request, or remove what an export wrote.

    Returns:
        the manifest that is now there, with the shards that are intact and no others.

    Raises:
        InputError: like `check_destination`, or the folder cannot be written.
    """
    existing = check_destination(folder, requested, force=force)
    if existing is not None:
        return _resume(folder, existing, requested)
    check_writable(folder)
    make_folder(folder)
    remove_file(folder / MANIFEST)  # first, so that no manifest counts files that are gone
    for name in filter(is_export_file, names_in(folder)):
        remove_file(folder / name)
    write_manifest(folder, requested)
    return requested


def collect_entries(folder: Path, manifest: CodeManifest) -> CodeManifest:
    """Move the entries of finished shards from their files into the manifest, which is written and returned."""
    entries = _read_entries(folder, manifest)
    if entries:
        manifest = _with_shards(manifest, [*manifest.shards, *_valid(entries)])
        write_manifest(folder, manifest)
        _remove(entries)
    return manifest


def holds_only_an_export(folder: Path) -> bool:
    """Return whether all that is in `folder` was written by export-codes, as far as names tell.

    So it is after any interruption of one, at which a command that exports by itself may continue unasked.
    """
    return all(name == LOCK or is_export_file(name) for name in names_in(folder))


def is_export_file(name: str) -> bool:
    """Return whether this is the name of a file of an export, or of its temporary file."""
    return _EXPORT_FILES.fullmatch(name.removesuffix(TEMPORARY)) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed export left."""
    for name in filter(is_export_file, names_in(folder)):
        if name.endswith(TEMPORARY):
            remove_file(folder / name)


def _resume(folder: Path, existing: CodeManifest, requested: CodeManifest) -> CodeManifest:
    """Write and return the manifest with the intact shards, and no others.

    Raise InputError if shards are missing and other versions of the libraries wrote the rest.
    """
    entries = _read_entries(folder, existing)
    mine = [entry for entry in existing.shards if _belongs(entry, existing)]
    intact = [entry for entry in (*mine, *_valid(entries)) if _is_intact(folder, entry, existing)]
    resumed = _with_shards(replace(existing, statistics={}), intact)
    if resumed.shards == existing.shards:
        resumed = existing
    else:
        _check_same_request(folder, resumed, requested)
        write_manifest(folder, resumed)
    _remove(entries)
    return resumed


def _remove(files: Iterable[Path]) -> None:
    """Remove files, which may be gone already. Raise InputError for one that stays."""
    for path in files:
        remove_file(path)


def _with_shards(manifest: CodeManifest, entries: Sequence[ShardEntry]) -> CodeManifest:
    """Return `manifest` with these shards, each once, in the order of rows."""
    by_start = {entry.start: entry for entry in entries}
    shards = [by_start[start] for start in sorted(by_start)]
    return replace(manifest, shards=shards, count=sum(shard.count for shard in shards))


def _check_same_request(
    folder: Path, existing: CodeManifest, requested: CodeManifest, unknown: Collection[str] = ()
) -> None:
    """Raise InputError unless the manifest in the folder answers the same request, as far as that is known."""
    ignored = {*RESULTS, *unknown, *([MADE_WITH] if existing.complete else [])}
    for name in (*CAUSES, *(field.name for field in fields(CodeManifest))):
        before, now = getattr(existing, name), getattr(requested, name)
        if name not in ignored and before != now:
            raise InputError(
                expected=f"an empty or new folder as --out {folder}, or one that the same command began",
                got=f"codes with {name.replace('_', ' ')} {short(before)} where this is {short(now)}",
                do="name another folder, or use --force to replace what is there",
            )


def _is_intact(folder: Path, entry: ShardEntry, manifest: CodeManifest) -> bool:
    """Return whether the files of a shard exist, have the hashes of its entry, and hold what the manifest says."""
    hashed = (HashedFile(folder / name, digest) for name, digest in entry.files.items())
    return all(file.problem() is None for file in hashed) and not any(wrong_content(folder, entry, manifest))


def _read_entries(folder: Path, manifest: CodeManifest) -> dict[Path, ShardEntry | None]:
    """Return, by file, the entries of finished shards that the manifest may not hold yet; None for what is no entry."""
    paths = (folder / name for name in sorted(names_in(folder)) if _ENTRY_FILE.fullmatch(name))
    return {path: _read_entry(path, manifest) for path in paths}


def _read_entry(path: Path, manifest: CodeManifest) -> ShardEntry | None:
    """Return the entry in a file; None if it holds none of this data set, whose shard is then written again."""
    try:
        entry = from_json(ShardEntry, parse_json(read_regular(path, LARGEST_ENTRY)))
    except (OSError, ValueError):
        return None
    belongs = _belongs(entry, manifest) and ENTRY.format(entry.start // (manifest.shard_size or 1)) == path.name
    return entry if belongs else None


def _belongs(entry: ShardEntry, manifest: CodeManifest) -> bool:
    """Return whether this is the entry of a shard of the data set: of its rows, in its files."""
    total, size = manifest.total or 0, manifest.shard_size or 1
    index, offset = divmod(entry.start, size)
    within = offset == 0 <= entry.start < total and entry.count == min(size, total - entry.start)
    return within and list(entry.files) == shard_files(index)


def _valid(entries: dict[Path, ShardEntry | None]) -> list[ShardEntry]:
    """Return the entries whose files are not damaged."""
    return [entry for entry in entries.values() if entry is not None]


def _check_describable(requested: CodeManifest) -> None:
    """Raise InputError unless the manifest of what is requested can be read again."""
    try:
        check_manifest(requested)
        size = len(sealed(asdict(requested)))
        if size > LARGEST_MANIFEST // 2:  # the other half is for the shards
            raise ValueError(f"{size:,} bytes of class names")
    except ValueError as error:
        raise InputError(
            expected=f"a data set that a {MANIFEST} can describe",
            got=str(error),
            do="choose another --shard-size, or other images",
        ) from None


def _check_nothing_in_the_way(folder: Path, names: Collection[str]) -> None:
    """Raise InputError for a README.md of the user, or a folder, a pipe or a device in the place of a file.

    A link to a file, or to nothing, is replaced, but for one with a temporary name, through which would be written.
    """
    for name in filter(is_export_file, names):
        try:
            regular_size(folder / name, follow_links=not name.endswith(TEMPORARY))
        except FileNotFoundError:  # a link that leads nowhere, which is replaced
            continue
        except (OSError, ValueError) as error:
            raise InputError(
                expected=f"a file or nothing at {folder / name}",
                got=getattr(error, "strerror", None) or str(error),
                do="move it away or name another folder",
            ) from None
    if CARD in names and not _is_card(folder / CARD):
        raise InputError(
            expected=f"a folder for codes as --out {folder}",
            got=f"one with a {CARD} that export-codes did not write",
            do="name another folder",
        )


def _is_card(path: Path) -> bool:
    """Return whether export-codes wrote this card, or it is a link that leads nowhere."""
    try:
        return CARD_MARK.encode() in read_regular(path, LARGEST_CARD)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
