"""Code grids as data sets on disk: a folder with `manifest.json` and shards that numpy reads without us.

manifest.json       what the codes are: counts, K, grid, class names, split, tokenizer fingerprint, hash of every file
codes-00000.npy     [n,H,W] uint8 if K <= 256, uint16 if K <= 65,536, else int32
labels-00000.npy    [n] int64, -1 where there is no label
names-00000.json    [n] names of the images, in the order of the rows
"""

import bisect
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import InputError
from .files import sha256, to_json, write_atomic

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_FILES = ("codes-{:05d}.npy", "labels-{:05d}.npy", "names-{:05d}.json")


@dataclass(frozen=True, kw_only=True)
class CodeManifest:
    """What `manifest.json` says. `shards` is a list of {"count": n, "files": {file name: SHA-256}}."""

    count: int  # grids
    num_codes: int  # K
    grid: tuple[int, int]  # H, W
    dtype: str  # of the codes in the shards
    class_names: list[str]  # label i is class_names[i]; empty without labels
    split: str  # part of the source: "train" or "test"
    source: str  # the images
    image: dict[str, int]  # height, width, channels that the tokenizer decodes to
    tokenizer_fingerprint: str
    shards: list[dict[str, Any]]
    format_version: int = FORMAT_VERSION


def code_dtype(num_codes: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and int32 that holds every code in [0, num_codes)."""
    if num_codes <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if num_codes <= 2**16 else np.dtype(np.int32)


def write_shard(
    folder: Path, index: int, codes: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """Write one shard, each file whole or not at all; returns its entry in the manifest."""
    contents = [npy_bytes(codes), npy_bytes(labels.astype(np.int64)), to_json(list(names))]
    files = {}
    for pattern, data in zip(SHARD_FILES, contents, strict=True):
        write_atomic(folder / pattern.format(index), data)
        files[pattern.format(index)] = sha256(data)
    return {"count": len(codes), "files": files}


def write_manifest(folder: Path, manifest: CodeManifest) -> None:
    write_atomic(folder / MANIFEST, to_json(asdict(manifest)))


def read_manifest(folder: str | Path) -> CodeManifest:
    """Read `manifest.json`.

    Raises:
        InputError: no code data set there, an unfinished one, or another format version.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        manifest = CodeManifest(**{**content, "grid": tuple(content["grid"])})
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            expected=f"a code data set in {folder}", got=f"no {MANIFEST}", do="make one with export-codes"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            expected=f"the manifest of a code data set in {path}", got=str(error), do="export the codes again"
        ) from None
    if manifest.format_version != FORMAT_VERSION:
        raise InputError(
            expected=f"format version {FORMAT_VERSION} in {path}",
            got=f"{manifest.format_version}",
            do="use the version of codegrid that wrote it",
        )
    return manifest


class CodeDataset(Dataset[tuple[Tensor, int]]):
    """The code grids of a folder, memory-mapped: `[i] -> (codes [H,W] int64, label int)`, label -1 for none.

    Raises:
        InputError: the folder is no code data set, or a shard is missing or of another shape than the manifest says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self._ends = list(accumulate(int(shard["count"]) for shard in self.manifest.shards))
        self._codes = [self._open(0, i, self.manifest.grid) for i in range(len(self._ends))]
        self._labels = [self._open(1, i, ()) for i in range(len(self._ends))]

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index from {-len(self)} to {len(self) - 1}, got {index}")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        return torch.from_numpy(self._codes[shard][row].astype(np.int64)), int(self._labels[shard][row])

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Codes [n,H,W] and labels [n], both int64, of the rows `indices` [n], gathered shard by shard."""
        if len(indices) and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"expected indices from {-len(self)} to {len(self) - 1}, got {indices}")
        indices = indices % len(self)
        codes = np.empty((len(indices), *self.manifest.grid), dtype=np.int64)
        labels = np.empty(len(indices), dtype=np.int64)
        shard_of = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shard_of):
            here = shard_of == shard
            rows = indices[here] - (self._ends[shard - 1] if shard else 0)
            codes[here], labels[here] = self._codes[shard][rows], self._labels[shard][rows]
        return torch.from_numpy(codes), torch.from_numpy(labels)

    @property
    def labels(self) -> np.ndarray:
        """All labels [n] int64, in memory."""
        return np.concatenate(self._labels)

    def names(self) -> Iterator[str]:
        """The names of the images, in the order of the rows."""
        for index in range(len(self._ends)):
            path = self.folder / SHARD_FILES[2].format(index)
            try:
                yield from json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise InputError(
                    expected=f"the names {path}", got=" ".join(str(error).split()), do="export the codes again"
                ) from None

    def _open(self, kind: int, index: int, row_shape: tuple[int, ...]) -> np.ndarray:
        path = self.folder / SHARD_FILES[kind].format(index)
        expected = (int(self.manifest.shards[index]["count"]), *row_shape)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                expected=f"the shard {path}", got=" ".join(str(error).split()), do="export the codes again"
            ) from None
        if array.shape != expected:
            raise InputError(
                expected=f"the shape {list(expected)} in {path}",
                got=f"{list(array.shape)}",
                do="export the codes again",
            )
        return array


def npy_bytes(array: np.ndarray) -> bytes:
    """The content of the `.npy` file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
