"""Resuming an unfinished export: which shards of an interrupted export of the same request are intact, and are kept.

The files of an export are recognised by the exact form of their names; no other file in the folder is ever changed or
removed.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from ..errors import InputError
from ..runtime.atomic_files import TEMPORARY, sha256
from ..runtime.filesystem import check_writable
from ..runtime.folder_lock import LOCK
from .card import CARD_MARK
from .manifest import CARD, MANIFEST, CodeManifest, ShardEntry, read_manifest, shard_entry, short, write_manifest

ENTRY = "shard-{:05d}.json"
EXPORT_FILES = re.compile(
    r"manifest\.json|README\.md|(codes|labels)-[0-9]{5,}\.npy|(names|shard)-[0-9]{5,}\.json|codes\.npz"
    r"|codes-[0-9]{5,}\.parquet"
)
FIRST_FILES = {f"{MANIFEST}{TEMPORARY}"}  # all that a kill leaves before the first manifest is complete
RESULTS = {"count", "shards", "statistics", "tables"}  # fields of the manifest that a request leaves open
MADE_WITH = "made_with"  # compared while shards are missing: two versions of torch may round differently
CAUSES = ("tokenizer_fingerprint", "source", "split", "flips", "shard_size")  # the other fields follow from these
_ENTRY_FILE = re.compile(r"shard-[0-9]{5,}\.json")


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
        InputError: the folder holds a README.md of the user, or, unless `force`, another export or other files.
    """
    card = folder / CARD
    if card.exists() and CARD_MARK not in card.read_text("utf-8", "replace"):
        raise InputError(
            expected=f"a folder for codes as --out {folder}",
            got=f"one with a {CARD} that export-codes did not write",
            do="name another folder",
        )
    if force:
        return None
    if (folder / MANIFEST).exists():
        existing = read_manifest(folder)
        _check_same_request(folder, existing, requested, unknown)
        return existing
    if folder.is_dir() and not {path.name for path in folder.iterdir()} <= {*FIRST_FILES, LOCK}:
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # first, so that no manifest counts files that are gone
    remove(path for path in folder.iterdir() if EXPORT_FILES.fullmatch(path.name.removesuffix(TEMPORARY)))
    write_manifest(folder, requested)
    return requested


def collect_entries(folder: Path, manifest: CodeManifest) -> CodeManifest:
    """Move the entries of finished shards from their files into the manifest, which is written and returned."""
    entries = _read_entries(folder)
    if entries:
        manifest = _with_shards(manifest, [*manifest.shards, *_valid(entries)])
        write_manifest(folder, manifest)
        remove(entries)
    return manifest


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed export left."""
    remove(path for path in folder.iterdir() if _is_leftover(path.name))


def remove(files: Iterable[Path]) -> None:
    """Remove files, which may be gone already."""
    for path in list(files):
        path.unlink(missing_ok=True)


def _resume(folder: Path, existing: CodeManifest, requested: CodeManifest) -> CodeManifest:
    """Write and return the manifest with the intact shards, and no others.

    Raise InputError if shards are missing and other versions of the libraries wrote the rest.
    """
    entries = _read_entries(folder)
    intact = [entry for entry in (*existing.shards, *_valid(entries)) if _is_intact(folder, entry)]
    resumed = _with_shards(replace(existing, statistics={}), intact)
    if resumed.shards == existing.shards:
        resumed = existing
    else:
        _check_same_request(folder, resumed, requested)
        write_manifest(folder, resumed)
    remove(entries)
    return resumed


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


def _is_intact(folder: Path, entry: ShardEntry) -> bool:
    """Return whether the files of a shard exist and have the hashes of its entry."""
    try:
        return all(sha256((folder / name).read_bytes()) == digest for name, digest in entry.files.items())
    except OSError:
        return False


def _read_entries(folder: Path) -> dict[Path, ShardEntry | None]:
    """Return, by file, the entries of finished shards that the manifest may not hold yet; None for a damaged file."""
    return {path: _read_entry(path) for path in sorted(folder.iterdir()) if _ENTRY_FILE.fullmatch(path.name)}


def _read_entry(path: Path) -> ShardEntry | None:
    """Return the entry in a file; None if it holds none, and its shard is then written again."""
    try:
        return shard_entry(json.loads(path.read_bytes()), int(path.stem.removeprefix("shard-")))
    except ValueError:
        return None


def _valid(entries: dict[Path, ShardEntry | None]) -> list[ShardEntry]:
    """Return the entries whose files are not damaged."""
    return [entry for entry in entries.values() if entry is not None]


def _is_leftover(name: str) -> bool:
    """Return whether this is the name of a temporary file of an export."""
    return name in FIRST_FILES or (
        name.endswith(TEMPORARY) and bool(EXPORT_FILES.fullmatch(name.removesuffix(TEMPORARY)))
    )
