"""Code grids as a data set that torch reads: memory-mapped, from one folder or several.

Legend: N rows in all, n in a batch, H W grid of codes.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..runtime.progress import with_progress
from .hashes import HashedFile
from .manifest import CodeManifest, read_manifest
from .shard import Shard, open_shard, read_names

_log = logging.getLogger(__name__)


class CodeDataset(Dataset[tuple[Tensor, int]]):
    """The code grids of a folder, memory-mapped: `[i] -> (codes [H,W] int64, label int)`, label -1 for none.

    Opening reads the manifest and the headers of the shards. A copy in another process, forked or spawned, maps the
    same files again: a pickle holds only their names, and the system keeps the pages once for all processes.

    Before the first row of a shard is used, its files are compared with their SHA-256 in the manifest, so that damage
    is named and never learned from. That reads each file once, as fast as the disk gives it and at most at about 2,000
    MB/s (measured on one core with instructions for SHA-256; without them a third of that): 0.7 s for 10 million grids
    of 8x8 codes of two bytes. Random batches need every shard at once; call `check_files` before them, and before
    copies are made, each of which would otherwise check for itself.

    Args:
        folders: one or several that export-codes wrote; the rows of several follow each other.
        verify: whether files of codes and labels are compared; codes out of range are always refused.

    Raises:
        InputError: a folder is no code data set, a shard is missing or is not what the manifest says, or the folders
            differ in tokenizer, grid or class names.
    """

    def __init__(self, folders: str | Path | Sequence[str | Path], *, verify: bool = True) -> None:
        listed = [folders] if isinstance(folders, (str, Path)) else list(folders)
        if not listed:
            raise InputError(expected="at least one folder of codes", got="none", do="name one")
        self.folders = [Path(folder) for folder in listed]
        self._manifests = [read_manifest(folder) for folder in self.folders]
        self.manifest = _merged(self.folders, self._manifests)
        self._map_shards()
        self._unchecked = {file for shard in self._shards for file in _arrays(shard)} if verify else set()
        for folder, manifest in zip(self.folders, self._manifests, strict=True):
            if not manifest.complete:
                _log.warning(
                    "Warning: %s holds %d of %d grids; the export-codes that wrote it resumes when it is run again",
                    folder,
                    manifest.count,
                    manifest.total,
                )

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index from {-len(self)} to {len(self) - 1}, got {index}")
        index = int(index) % len(self)
        shard_index = np.searchsorted(self._ends, index, side="right")
        row, shard = index - self._starts[shard_index], self._shards[shard_index]
        if self._unchecked:
            self._check(*_arrays(shard))
        codes = shard.codes[row]
        self._check_range(codes)
        return torch.from_numpy(codes.astype(np.int64)), int(shard.labels[row])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return the rows of a batch, gathered at once; `DataLoader` calls this."""
        codes, labels = self.batch(np.asarray(indices, dtype=np.int64))
        return list(zip(codes, labels.tolist(), strict=True))

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return codes [n,H,W] and labels [n], both int64, of the rows `indices` [n].

        Raises:
            IndexError: there is no such row.
            InputError: a file is damaged, or a stored code is not in [0, K).
        """
        if len(indices) and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"expected indices from {-len(self)} to {len(self) - 1}, got {indices}")
        rows = indices.astype(np.int64) % len(self)
        order = np.argsort(rows)
        stored, stored_labels = self._gather(rows[order])
        self._check_range(stored)
        codes = np.empty(stored.shape, dtype=np.int64)
        labels = np.empty(len(rows), dtype=np.int64)
        codes[order], labels[order] = stored, stored_labels
        return torch.from_numpy(codes), torch.from_numpy(labels)

    def check_files(self) -> None:
        """Compare every file of codes and labels that was not compared yet with its SHA-256, and show the progress.

        Copies that are made later, by a fork or a pickle, do not compare them again. The names are compared when they
        are read.

        Raises:
            InputError: a file is damaged.
        """
        files = [file for shard in self._shards for file in _arrays(shard) if file in self._unchecked]
        if files:
            for file in with_progress(files, len(files), "checking codes", "file"):
                self._check(file)

    def shards(self) -> Iterator[Shard]:
        """Yield the shards, mapped, in the order of the rows. Raise InputError if a file is damaged."""
        for shard in self._shards:
            self._check(*_arrays(shard))
            yield shard

    def names(self) -> Iterator[str]:
        """Yield the names of the images, in the order of the rows. Raise InputError if a file of names is damaged."""
        for shard in self._shards:
            yield from read_names(shard.names_file, len(shard.labels))

    @property
    def labels(self) -> np.ndarray:
        """The labels [N] int64 of all rows, in memory. Raise InputError if a file of labels is damaged."""
        self._check(*(shard.labels_file for shard in self._shards))
        return np.concatenate([shard.labels for shard in self._shards] or [np.empty(0, dtype=np.int64)])

    @property
    def location(self) -> str:
        """The names of the folders, for messages."""
        return ", ".join(str(folder) for folder in self.folders)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_shards()

    def _map_shards(self) -> None:
        """Map the arrays of all shards, and note the row where each starts and that where it ends."""
        self._shards = [
            open_shard(folder, entry, manifest)
            for folder, manifest in zip(self.folders, self._manifests, strict=True)
            for entry in manifest.shards
        ]
        counts = np.array([len(shard.labels) for shard in self._shards], dtype=np.int64)
        self._ends = counts.cumsum()
        self._starts = self._ends - counts

    def _gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return codes [n,H,W] as they are stored, and labels [n], of ascending rows; each shard is read once."""
        codes = np.empty((len(rows), *self.manifest.grid), dtype=self.manifest.dtype)
        labels = np.empty(len(rows), dtype=np.int64)
        shard_indices = np.searchsorted(self._ends, rows, side="right")
        rows = rows - self._starts[shard_indices]
        cuts = np.flatnonzero(np.diff(shard_indices, prepend=-1)).tolist()
        for first, last in pairwise([*cuts, len(rows)]):
            shard, shard_rows = self._shards[shard_indices[first]], rows[first:last]
            if self._unchecked:
                self._check(*_arrays(shard))
            # The rows are in range; numpy writes into `out` without a buffer only with another mode than "raise".
            shard.codes.take(shard_rows, axis=0, out=codes[first:last], mode="clip")
            shard.labels.take(shard_rows, out=labels[first:last], mode="clip")
        return codes, labels

    def _check(self, *files: HashedFile) -> None:
        """Compare those of the files that were not compared yet. Raise InputError if one is damaged."""
        for file in files:
            if file in self._unchecked:
                file.check()
                self._unchecked.discard(file)

    def _check_range(self, codes: np.ndarray) -> None:
        """Raise InputError for a code out of range, which would fail far from here, in an embedding on the GPU."""
        if codes.size and not 0 <= codes.min() <= codes.max() < self.manifest.num_codes:
            wrong = codes.max() if codes.max() >= self.manifest.num_codes else codes.min()
            raise InputError(
                expected=f"codes from 0 to {self.manifest.num_codes - 1} in {self.location}",
                got=str(wrong),
                do="find the damaged shard with verify-codes",
            )


def _arrays(shard: Shard) -> tuple[HashedFile, HashedFile]:
    """Return the files of codes and labels of a shard."""
    return shard.codes_file, shard.labels_file


def _merged(folders: Sequence[Path], manifests: Sequence[CodeManifest]) -> CodeManifest:
    """Return the manifest of the rows of all folders. Raise InputError if the folders do not fit together."""
    first = manifests[0]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        for name in ("tokenizer_fingerprint", "num_codes", "grid", "image", "class_names"):
            expected, found = getattr(first, name), getattr(manifest, name)
            if expected != found:
                raise InputError(
                    expected=f"the same {name.replace('_', ' ')} in {folders[0]} and {folder}",
                    got=f"{expected} and {found}",
                    do="export both with one tokenizer, from images with the same classes",
                )
    if len(manifests) == 1:
        return first
    return replace(
        first,
        count=sum(manifest.count for manifest in manifests),
        total=sum(manifest.total or manifest.count for manifest in manifests),
        split="+".join(dict.fromkeys(manifest.split for manifest in manifests)),
        source=", ".join(dict.fromkeys(manifest.source for manifest in manifests)),
        shards=[entry for manifest in manifests for entry in manifest.shards],
        shard_size=None,
        flips=False,
        rows_sha256="",
        made_with={},
        statistics={},
        tables={},
    )
