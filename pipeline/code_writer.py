"""Writing a code data set so that it can be stopped at any moment, continued, and divided over processes.

A shard counts from the moment its entry, `shard-00003.json`, is written, after its files. The leading process moves
entries into the manifest as they come; once all shards are there the manifest gets its statistics and the folder its
card, and no entry is left. So a kill leaves whole shards, and a manifest that counts no others; the same request finds
them, checks their hashes, and writes what is missing. The bytes depend on the rows and the shard size alone.

n grids of H x W codes.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .code_card import CARD_MARK, write_card
from .code_manifest import CARD, MANIFEST, CodeManifest, read_manifest, write_manifest
from .code_shards import write_shard
from .code_statistics import CodeStatistics, count_codes
from .codes import CodeDataset
from .errors import InputError
from .files import sha256, to_json, write_atomic
from .folders import check_free
from .processes import Processes

ENTRY = "shard-{:05d}.json"
OUR_FILES = re.compile(
    r"manifest\.json|README\.md|(codes|labels)-\d{5,}\.npy|(names|shard)-\d{5,}\.json|codes\.npz|codes-\d{5,}\.parquet"
)
BEFORE_ALL = {".writable", f"{MANIFEST}.new"}  # a kill in the first moment leaves one of them, and nothing else
RESULTS = {"count", "shards", "statistics", "tables"}  # fields of the manifest that are not asked for but come out
MADE_WITH = "made_with"  # matters while shards are missing: two versions of torch may round differently
CAUSES = ("tokenizer_fingerprint", "source", "split", "flips", "shard_size")  # the other fields follow from these
QUIET = 20  # the manifest is written again no sooner than this many times as long as the last writing took
SEEN_WITHIN = 30.0  # seconds, for files that another machine wrote


class Rows(Protocol):
    """What is to be written: any rows from `start` on, before `stop`, whatever was asked before."""

    def __len__(self) -> int: ...

    def codes(self, start: int, stop: int) -> np.ndarray:
        """[n,H,W] of the type that the manifest names."""

    def labels(self, start: int, stop: int) -> np.ndarray:
        """[n] int64, -1 for none."""

    def names(self, start: int, stop: int) -> Sequence[str]:
        """n of them."""


def write_codes(
    folder: Path,
    asked: CodeManifest,
    rows: Rows,
    processes: Processes,
    *,
    force: bool = False,
    on_start: Callable[[int, int], None] = lambda here, there: None,
) -> CodeManifest:
    """Write `rows` into `folder`, or what is missing of them; each of `processes` calls this and does its share.

    Args:
        folder: new, empty, or left by the same request.
        asked: the manifest, without results; `shard_size` and `total` are set.
        rows: `asked.total` of them, the same in each process.
        processes: that share the work, and see one folder.
        force: clear what is in the folder first.
        on_start: called with the number of rows that this process will write, and of those that are there.

    Returns:
        the manifest as written.

    Raises:
        InputError: the folder holds something else, a shard cannot be found that another process wrote.
    """
    starts = range(0, len(rows), asked.shard_size or 1)
    found = processes.leader(lambda: _claim(folder, asked, force))
    there = {int(shard["start"]) for shard in found.shards}
    mine = processes.share([start for start in starts if start not in there])
    spans = [(start, min(start + starts.step, len(rows))) for start in mine]
    on_start(sum(stop - start for start, stop in spans), found.count)
    ledger = _Ledger(folder, found)
    for start, stop in spans:
        index = start // starts.step
        codes, labels, names = rows.codes(start, stop), rows.labels(start, stop), rows.names(start, stop)
        entry = write_shard(folder, index, codes, labels, names, start=start)
        write_atomic(folder / ENTRY.format(index), to_json(entry))
        if processes.leads:
            ledger.update()
    processes.wait()
    return processes.leader(ledger.finish)


class _Ledger:
    """The manifest while shards are coming in; the leading process keeps it."""

    def __init__(self, folder: Path, manifest: CodeManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._next = 0.0

    def update(self) -> None:
        """Count the shards that were finished since, unless that was done a moment ago."""
        begin = time.monotonic()
        if begin >= self._next:
            self.manifest = _move_entries(self.folder, self.manifest)
            self._next = time.monotonic() + QUIET * (time.monotonic() - begin)

    def finish(self) -> CodeManifest:
        """The manifest of the whole, with statistics, and the card."""
        deadline = time.monotonic() + SEEN_WITHIN
        self.manifest = _move_entries(self.folder, self.manifest)
        while not self.manifest.complete:
            if time.monotonic() > deadline:
                raise InputError(
                    expected=f"{self.manifest.total:,} grids in {self.folder} once all processes are done",
                    got=f"{self.manifest.count:,}",
                    do="give them one --out folder that all machines share, and run the same command again",
                )
            time.sleep(0.2)
            self.manifest = _move_entries(self.folder, self.manifest)
        if not self.manifest.statistics:
            self.manifest = replace(self.manifest, statistics=_statistics(CodeDataset(self.folder)))
            write_manifest(self.folder, self.manifest)
        write_card(self.folder, self.manifest)
        _remove(path for path in self.folder.iterdir() if _is_leftover(path.name))
        return self.manifest


def _move_entries(folder: Path, manifest: CodeManifest) -> CodeManifest:
    """The manifest with the entries that lie beside it, which it takes the place of."""
    entries = _entries(folder)
    if entries:
        manifest = _with_shards(manifest, [*manifest.shards, *entries.values()])
        write_manifest(folder, manifest)
        _remove(entries)
    return manifest


def _claim(folder: Path, asked: CodeManifest, force: bool) -> CodeManifest:
    """Make the folder this request's own: the manifest with the shards that are there and whole."""
    card = folder / CARD
    if card.exists() and CARD_MARK not in card.read_text("utf-8", "replace"):
        raise InputError(
            expected=f"a folder for codes as --out {folder}",
            got=f"one with a {CARD} that export-codes did not write",
            do="name another folder",
        )
    if (folder / MANIFEST).exists() and not force:
        return _go_on(folder, asked)
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= BEFORE_ALL:
        _remove(folder.iterdir())
    check_free(folder, force=force)
    (folder / MANIFEST).unlink(missing_ok=True)  # first: no manifest counts files that are gone
    _remove(path for path in folder.iterdir() if OUR_FILES.fullmatch(path.name.removesuffix(".new")))
    write_manifest(folder, asked)
    return asked


def _go_on(folder: Path, asked: CodeManifest) -> CodeManifest:
    """The manifest of the same request, with the shards that are whole, and with no others. Raises InputError."""
    found = read_manifest(folder)
    _check_same_request(folder, found, asked)
    entries = _entries(folder)
    shards = [entry for entry in (*found.shards, *entries.values()) if _is_whole(folder, entry)]
    claimed = _with_shards(replace(found, statistics={}), shards)
    if claimed.shards == found.shards:
        claimed = found
    else:
        _check_same_request(folder, claimed, asked)
        write_manifest(folder, claimed)
    _remove(entries)
    return claimed


def _with_shards(manifest: CodeManifest, entries: Sequence[dict[str, Any]]) -> CodeManifest:
    """`manifest` with these shards, each once, in the order of rows."""
    by_start = {int(entry["start"]): entry for entry in entries}
    shards = [by_start[start] for start in sorted(by_start)]
    return replace(manifest, shards=shards, count=sum(int(shard["count"]) for shard in shards))


def _check_same_request(folder: Path, found: CodeManifest, asked: CodeManifest) -> None:
    before, now = asdict(found), asdict(asked)
    settled = RESULTS | {MADE_WITH} if found.complete else RESULTS
    for name in (*CAUSES, *now):
        if name not in settled and before[name] != now[name]:
            raise InputError(
                expected=f"an empty or new folder as --out {folder}, or one that this very command began",
                got=f"codes with {name.replace('_', ' ')} {_short(before[name])} where this is {_short(now[name])}",
                do="name another folder, or use --force to replace what is there",
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether its files are there, with their hashes."""
    try:
        return all(sha256((folder / name).read_bytes()) == digest for name, digest in entry["files"].items())
    except OSError:
        return False


def _entries(folder: Path) -> dict[Path, dict[str, Any]]:
    """The entries of shards that were finished and may not be in the manifest, by the file of each."""
    return {path: json.loads(path.read_bytes()) for path in sorted(folder.glob("shard-*.json"))}


def _is_leftover(name: str) -> bool:
    """Whether a kill in the middle of a writing left this file."""
    return name in BEFORE_ALL or (name.endswith(".new") and bool(OUR_FILES.fullmatch(name.removesuffix(".new"))))


def _remove(files: Iterable[Path]) -> None:
    for path in list(files):
        path.unlink(missing_ok=True)


def _statistics(codes: CodeDataset) -> dict[str, float]:
    """Return the statistics of all codes."""
    histogram = torch.zeros(codes.manifest.num_codes, dtype=torch.int64)
    for shard in codes.shards():
        histogram += count_codes(shard.codes, len(histogram))
    return asdict(CodeStatistics.of(histogram))
