"""The dataset card: the `README.md` of a code data set, which tells people what it holds and how to read it."""

from pathlib import Path

from ..errors import printable
from ..runtime.atomic_files import write_atomic
from .manifest import CARD, MANIFEST, CodeManifest, code_dtype
from .statistics import packed_bits, packed_bytes

CARD_MARK = "<!-- written by codegrid export-codes -->"  # a README.md without it is the user's own


FRONT = """---
configs:
- config_name: default
  data_files:
  - split: {split}
    path: "codes-*.parquet"
---
"""
INTRODUCTION = f"""{CARD_MARK}

# Code grids

Images as grids of discrete codes, made by the encoder of a VQ-VAE. Code [0,0] of a grid is that of the top left corner
of its image. To get images back, the tokenizer with the fingerprint below is needed.

| | |
|---|---|"""
READING = """## Reading it

With numpy alone, memory-mapped:

```python
import numpy
codes = numpy.load("codes-00000.npy", mmap_mode="r")  # [n,H,W]
labels = numpy.load("labels-00000.npy", mmap_mode="r")  # [n], -1 where there is none
```

The number of such pairs is {shards:,}. `names-00000.json` holds the names of the images in the same order, and
`{manifest}` the SHA-256 of every file.

With torch, all shards as one data set:

```python
from codegrid import CodeDataset
codes, label = CodeDataset(".")[0]  # [H,W] int64, int
```
"""
PARQUET = """With pandas, DuckDB or datasets, columns codes, label, class_name, name and flipped:

```python
import datasets
rows = datasets.load_dataset("parquet", data_files={{"{split}": "codes-*.parquet"}}, split="{split}")
```
"""
NPZ = """All in one file, arrays codes, labels, names, class_names and flipped:

```python
import numpy
codes = numpy.load("codes.npz")["codes"]  # [N,H,W]
```
"""
CHECKING = """## Checking it, and back to images

    codegrid verify-codes DIR
    codegrid decode-codes DIR --tokenizer TOKENIZER --out images.npy
"""


def write_card(folder: Path, manifest: CodeManifest) -> None:
    """Write the card into the folder of a data set."""
    write_atomic(folder / CARD, card(manifest).encode("utf-8", "replace"))


def card(manifest: CodeManifest) -> str:
    """Return the text of the card, Markdown; the same manifest gives the same text."""
    sections = [
        FRONT.format(split=manifest.split) if _has_table(manifest, ".parquet") else "",
        INTRODUCTION,
        "".join(f"| {name} | {_cell(value)} |\n" for name, value in _facts(manifest).items()),
        _classes(manifest),
        READING.format(shards=len(manifest.shards), manifest=MANIFEST),
        PARQUET.format(split=manifest.split) if _has_table(manifest, ".parquet") else "",
        NPZ if _has_table(manifest, ".npz") else "",
        CHECKING,
    ]
    return "\n".join(section for section in sections if section)


def _facts(manifest: CodeManifest) -> dict[str, str]:
    """Return the rows of the table."""
    (height, width), image, statistics = manifest.grid, manifest.image, manifest.statistics
    size = manifest.count * height * width * code_dtype(manifest.num_codes).itemsize
    half = manifest.count // 2
    return {
        "grids": f"{manifest.count:,}, of the {manifest.split} split of {manifest.source}",
        "grid": f"{height}x{width} codes, each from 0 to {manifest.num_codes - 1:,} (K = {manifest.num_codes:,})",
        "images": f"{image['height']}x{image['width']} pixels, {'grey' if image['channels'] == 1 else 'RGB'}",
        "mirrored": f"rows from {half:,} on are those before them, mirrored left to right" if manifest.flips else "no",
        "stored as": f"{manifest.dtype}, {size:,} bytes",
        "packed": f"{packed_bytes(manifest.grid, manifest.num_codes):,.1f} bytes an image, at "
        f"{packed_bits(manifest.num_codes)} bits per code",
        "entropy": f"{statistics['entropy_bits_per_code']:.3f} bits per code (order 0)",
        "codes in use": f"{statistics['codes_used']:,}, perplexity {statistics['perplexity']:.1f}",
        "tokenizer": f"fingerprint (SHA-256 of its model.safetensors) {manifest.tokenizer_fingerprint}",
        "made with": ", ".join(f"{name} {value}" for name, value in manifest.made_with.items()),
    }


def _cell(text: str) -> str:
    """Return `text` as a cell of a Markdown table."""
    return printable(" ".join(text.splitlines())).replace("|", "\\|")


def _has_table(manifest: CodeManifest, suffix: str) -> bool:
    """Return whether there is a copy in the format with this suffix."""
    return any(name.endswith(suffix) for name in manifest.tables)


def _classes(manifest: CodeManifest) -> str:
    """Return the list of class names, "" without classes."""
    if not manifest.class_names:
        return ""
    names = (printable(name) for name in manifest.class_names)
    return "Classes, by label:\n\n" + "".join(f"{label}. {name}\n" for label, name in enumerate(names))
