"""Tables: copies of a code data set in formats that other programs read, one `codes.npz`, or Parquet, a file a shard.

    codes.npz            arrays codes [N,H,W], labels [N], names [N], class_names [classes], and flipped [N] bool
    codes-00000.parquet  columns codes (a list of H lists of W numbers), label, class_name, name, flipped

Legend: n grids of H x W codes; N in all.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..runtime.atomic_files import sha256, write_atomic
from .card import write_card
from .dataset import CodeDataset
from .manifest import CodeManifest, read_manifest, write_manifest
from .shard import Shard, open_shard, read_names

if TYPE_CHECKING:
    import pyarrow

LARGEST_NPZ = 2**32  # bytes of codes; a .npz is made and read in memory
ROW_GROUP = 2**24  # codes written at a time; the lists of one group can hold 2**31 of them


def check_table(to: str | None, requested: CodeManifest | None = None) -> None:
    """Raise InputError unless the format `to` can be written, and can hold all codes of the `requested` manifest."""
    if to not in (None, "npz", "parquet"):
        raise InputError(expected="npz or parquet as --to", got=str(to), do="choose one of them")
    if to == "parquet" and find_spec("pyarrow") is None:
        raise InputError(
            expected="the library pyarrow for --to parquet", got="none", do="pip install 'codegrid[parquet]'"
        )
    if to == "npz" and requested is not None:
        count = requested.count if requested.total is None else requested.total
        size = count * math.prod(requested.grid) * np.dtype(requested.dtype).itemsize
        if size > LARGEST_NPZ:
            raise InputError(
                expected=f"at most {LARGEST_NPZ:,} bytes of codes for --to npz", got=f"{size:,}", do="use --to parquet"
            )


def add_table(folder: Path, to: str) -> CodeManifest:
    """Write a copy of a finished data set in the format `to`, name its files in manifest and card, return the manifest.

    Raises:
        InputError: the format is not known, its library is missing, or the codes are too many for it.
    """
    manifest = read_manifest(folder)
    check_table(to, manifest)
    files = {"npz": _npz, "parquet": _parquet}[to](folder, manifest)
    tables = dict(manifest.tables)
    for name, data in files:
        write_atomic(folder / name, data)
        tables[name] = sha256(data)
    manifest = replace(manifest, tables=dict(sorted(tables.items())))
    write_manifest(folder, manifest)
    write_card(folder, manifest)
    return manifest


def flipped(manifest: CodeManifest, start: int, stop: int) -> np.ndarray:
    """Return whether rows start .. stop - 1 are of mirrored images: bool [n]."""
    return np.arange(start, stop) >= (manifest.count // 2 if manifest.flips else manifest.count)


def _npz(folder: Path, manifest: CodeManifest) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of the one file."""
    codes = CodeDataset(folder)
    buffer = io.BytesIO()
    np.savez_compressed(  # with fixed dates inside, so that the same codes give the same bytes
        buffer,
        codes=np.concatenate([shard.codes for shard in codes.shards()]),
        labels=codes.labels,
        names=np.array(list(codes.names()), dtype=np.str_),
        class_names=np.array(manifest.class_names, dtype=np.str_),
        flipped=flipped(manifest, 0, manifest.count),
    )
    yield "codes.npz", buffer.getvalue()


def _parquet(folder: Path, manifest: CodeManifest) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of the file of each shard."""
    for index, entry in enumerate(manifest.shards):
        shard = open_shard(folder, entry, manifest)
        shard.codes_file.check()
        shard.labels_file.check()
        yield f"codes-{index:05d}.parquet", _parquet_bytes(shard, entry.start, manifest)


def _parquet_bytes(shard: Shard, start: int, manifest: CodeManifest) -> bytes:
    """Return the content of the file of a shard whose first row is `start`."""
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.string()
    codes_type = pyarrow.list_(pyarrow.list_(pyarrow.from_numpy_dtype(shard.codes.dtype)))
    schema = pyarrow.schema(
        {"codes": codes_type, "label": pyarrow.int64(), "class_name": text, "name": text, "flipped": pyarrow.bool_()}
    )
    names, class_names = _unicode(read_names(shard.names_file, len(shard.labels))), _unicode(manifest.class_names)
    mirrored = flipped(manifest, start, start + len(names))
    step = max(1, ROW_GROUP // math.prod(manifest.grid))
    buffer = io.BytesIO()
    with parquet.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for first in range(0, len(names), step):
            rows = slice(first, first + step)
            labels = shard.labels[rows]
            classes = [class_names[label] if label >= 0 else None for label in labels.tolist()]
            columns = [_lists(shard.codes[rows]), labels, pyarrow.array(classes, text), names[rows], mirrored[rows]]
            writer.write_table(pyarrow.table(dict(zip(schema.names, columns, strict=True)), schema))
    return buffer.getvalue()


def _unicode(texts: Sequence[str]) -> list[str]:
    """Return `texts` with "?" for each byte of a file name that is no Unicode."""
    return [text.encode("utf-8", "replace").decode() for text in texts]


def _lists(codes: np.ndarray) -> "pyarrow.ListArray":
    """Return grids [n,H,W] as n lists of H lists of W numbers."""
    import pyarrow

    column = pyarrow.array(np.ascontiguousarray(codes).ravel())
    count, height, width = codes.shape
    for length, lists in ((width, count * height), (height, count)):
        column = pyarrow.ListArray.from_arrays(np.arange(lists + 1, dtype=np.int32) * length, column)
    return column
