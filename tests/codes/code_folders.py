"""Code data sets made from arrays, without images, as export-codes would write them; and how numpy alone reads one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.codes.manifest import CodeManifest, code_dtype
from pipeline.codes.writer import write_codes
from pipeline.runtime.process_group import ProcessGroup

from ..training.training_runs import Killed

GRID = (3, 5)
CLASS_NAMES = ("disc", "été", "線")
FINGERPRINT = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, in memory."""

    all_codes: np.ndarray  # [N,H,W]
    all_labels: np.ndarray  # [N]
    all_names: list[str]  # N

    def __len__(self) -> int:
        return len(self.all_labels)

    def codes(self, start: int, stop: int) -> np.ndarray:
        return self.all_codes[start:stop]

    def labels(self, start: int, stop: int) -> np.ndarray:
        return self.all_labels[start:stop]

    def names(self, start: int, stop: int) -> Sequence[str]:
        return self.all_names[start:stop]


@dataclass(frozen=True)
class StoppedRows(Rows):
    """Rows at one of which the export is killed."""

    stop_at: int

    def codes(self, start: int, stop: int) -> np.ndarray:
        if start == self.stop_at:
            raise Killed
        return super().codes(start, stop)


def random_rows(count: int, num_codes: int = 16, *, labelled: bool = True, seed: int = 0) -> Rows:
    """Return grids that hold the codes 0 and K - 1, names with accents, and labels of which some are -1."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, num_codes, (count, *GRID))
    codes[0, 0, 1], codes[-1, -1, 0] = 0, num_codes - 1
    labels = np.arange(count) % (len(CLASS_NAMES) + 1) - 1 if labelled else np.full(count, -1)
    return Rows(codes.astype(code_dtype(num_codes)), labels, [f"été/{row} 線.png" for row in range(count)])


def request(
    rows: Rows, num_codes: int = 16, *, shard_size: int = 4, split: str = "train", flips: bool = False
) -> CodeManifest:
    """Return the manifest to request of `write_codes`, so that it writes `rows`."""
    return CodeManifest(
        count=0,
        total=len(rows),
        num_codes=num_codes,
        grid=GRID,
        dtype=code_dtype(num_codes).name,
        class_names=list(CLASS_NAMES) if rows.all_labels.max() >= 0 else [],
        split=split,
        source="here | there",
        image={"height": 6, "width": 10, "channels": 1},
        tokenizer_fingerprint=FINGERPRINT,
        shards=[],
        shard_size=shard_size,
        flips=flips,
        made_with={"device": "cpu", "torch": "2"},
    )


def write_rows(folder: Path, rows: Rows, requested: CodeManifest | None = None) -> CodeManifest:
    """Write `rows` as a data set into `folder`."""
    return write_codes(folder, requested or request(rows), rows, ProcessGroup())


def read_by_numpy(folder: Path) -> Rows:
    """Return the rows of a folder, read by the documented names of the files and without this program."""
    codes, labels = ([np.load(path) for path in sorted(folder.glob(f"{stem}-*.npy"))] for stem in ("codes", "labels"))
    names = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("names-*.json"))]
    return Rows(np.concatenate(codes), np.concatenate(labels), [name for shard in names for name in shard])
