"""Writing a code data set so that it can be stopped at any moment, resumed, and divided over processes.

A shard counts from the moment its entry, `shard-00003.json`, is written, after its files. The main process moves
entries into the manifest as they appear; once all shards are written it adds the statistics to the manifest and the
card to the folder, and no entry is left. So a kill leaves complete shards, and a manifest that counts no others; the
same request finds them (`unfinished.py`), checks their hashes, and writes what is missing. The bytes depend on the rows
and the shard size alone.

The caller holds the lock of the folder (`folder_lock.py`): two programs must not write into it at once.

Legend: n grids of H x W codes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import InputError
from ..runtime.atomic_files import to_json, write_atomic
from ..runtime.process_group import ProcessGroup
from .card import write_card
from .dataset import CodeDataset
from .manifest import CodeManifest, write_manifest
from .shard import write_shard
from .statistics import CodeStatistics, Histogram
from .unfinished import ENTRY, collect_entries, prepare_destination, remove_leftovers

UPDATE_PAUSE = 20  # after an update of the manifest, in multiples of the time that it took
VISIBLE_WITHIN = 30.0  # seconds until a file that another machine wrote is visible here


class Rows(Protocol):
    """The rows to write; any range of them can be requested, in any order."""

    def __len__(self) -> int: ...

    def codes(self, start: int, stop: int) -> np.ndarray:
        """Return the codes [n,H,W] of rows start .. stop - 1, of the type in the manifest."""

    def labels(self, start: int, stop: int) -> np.ndarray:
        """Return the labels [n] int64 of rows start .. stop - 1; -1 for none."""

    def names(self, start: int, stop: int) -> Sequence[str]:
        """Return the names of the n images of rows start .. stop - 1."""


def write_codes(
    folder: Path,
    requested: CodeManifest,
    rows: Rows,
    group: ProcessGroup,
    *,
    force: bool = False,
    on_start: Callable[[int, int], None] = lambda to_write, existing: None,
) -> CodeManifest:
    """Write `rows` into `folder`, or what is missing of them; each process of the group calls this and does its share.

    Args:
        folder: new, empty, or left by the same request.
        requested: the manifest, without results; `shard_size` and `total` are set.
        rows: `requested.total` of them, the same in each process.
        group: processes that share the work and the folder.
        force: clear what is in the folder first.
        on_start: called with the number of rows that this process will write, and of all rows that exist.

    Returns:
        the manifest as written.

    Raises:
        InputError: the folder holds something else, or a shard that another process wrote does not appear.
    """
    starts = range(0, len(rows), requested.shard_size or 1)
    manifest = group.run_on_main(lambda: prepare_destination(folder, requested, force=force))
    existing = {shard.start for shard in manifest.shards}
    my_starts = group.share([start for start in starts if start not in existing])
    spans = [(start, min(start + starts.step, len(rows))) for start in my_starts]
    on_start(sum(stop - start for start, stop in spans), manifest.count)
    ledger = _Ledger(folder, manifest)
    for start, stop in spans:
        index = start // starts.step
        codes, labels, names = rows.codes(start, stop), rows.labels(start, stop), rows.names(start, stop)
        entry = write_shard(folder, index, codes, labels, names, start=start)
        write_atomic(folder / ENTRY.format(index), to_json(asdict(entry)))
        if group.is_main:
            ledger.update()
    group.wait()
    return group.run_on_main(ledger.finish)


class _Ledger:
    """The manifest while shards are coming in, kept by the main process."""

    def __init__(self, folder: Path, manifest: CodeManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._next = 0.0

    def update(self) -> None:
        """Count the shards that were finished since the last update, unless that was a moment ago."""
        begin = time.monotonic()
        if begin >= self._next:
            self.manifest = collect_entries(self.folder, self.manifest)
            self._next = time.monotonic() + UPDATE_PAUSE * (time.monotonic() - begin)

    def finish(self) -> CodeManifest:
        """Complete the manifest with statistics, write the card, and return the manifest."""
        self._wait_for_all()
        if not {item.name for item in fields(CodeStatistics)} <= self.manifest.statistics.keys():
            self.manifest = replace(self.manifest, statistics=_statistics(CodeDataset(self.folder)))
            write_manifest(self.folder, self.manifest)
        write_card(self.folder, self.manifest)
        remove_leftovers(self.folder)
        return self.manifest

    def _wait_for_all(self) -> None:
        """Count the entries until none is missing. Raise InputError if one does not appear within VISIBLE_WITHIN."""
        deadline = time.monotonic() + VISIBLE_WITHIN
        self.manifest = collect_entries(self.folder, self.manifest)
        while not self.manifest.complete:
            if time.monotonic() > deadline:
                raise InputError(
                    expected=f"{self.manifest.total:,} grids in {self.folder} once all processes are done",
                    got=f"{self.manifest.count:,}",
                    do="give them one --out folder that all machines share, and run the same command again",
                )
            time.sleep(0.2)
            self.manifest = collect_entries(self.folder, self.manifest)


def _statistics(codes: CodeDataset) -> dict[str, float]:
    """Return the statistics of all codes."""
    histogram = Histogram(codes.manifest.num_codes)
    for shard in codes.shards():
        histogram.add(shard.codes)
    return asdict(CodeStatistics.of(histogram.counts))
