"""Images to code grids: runs the encoder over a data set and writes a code data set (`codes.py`)."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenizer import VQVAE

from .checkpoint import load_tokenizer, read_info
from .codes import CodeManifest, code_dtype, write_manifest, write_shard
from .device import choose_device
from .folders import claim_folder
from .sources import ImageSplit
from .stored_images import images_of, part_of

SHARD_SIZE = 65_536  # grids a shard
BATCH = 256  # images encoded at a time
OUR_FILES = ("manifest.json", "codes-*.npy", "labels-*.npy", "names-*.json")


def export_codes(
    tokenizer_folder: Path,
    out: Path,
    *,
    data: str | None = None,
    data_root: str | None = None,
    split: str = "train",
    shard_size: int = SHARD_SIZE,
    device: str = "auto",
    force: bool = False,
) -> CodeManifest:
    """Write the codes of every image of a split of `data` (by default what the tokenizer was trained on) into `out`.

    The manifest is written last: a folder without one is an export that did not finish.

    Raises:
        InputError: the tokenizer, the images or the folder cannot be used.
    """
    info = read_info(tokenizer_folder, "tokenizer")
    tokenizer = load_tokenizer(tokenizer_folder).to(choose_device(device))
    images = images_of(info, data=data, data_root=data_root)
    part = part_of(images, split)
    claim_folder(out, force=force, ours=OUR_FILES)
    with tqdm(total=len(part), unit="image", desc=f"encoding {split}", dynamic_ncols=True) as bar:
        shards = []
        for index, start in enumerate(range(0, len(part), shard_size)):
            rows = np.arange(start, min(start + shard_size, len(part)))
            names = [part.names[row] for row in rows]
            shards.append(write_shard(out, index, encode_rows(tokenizer, part, rows, bar), part.labels[rows], names))
    size = info.preprocessing
    manifest = CodeManifest(
        count=len(part),
        num_codes=tokenizer.config.num_codes,
        grid=tokenizer.grid(size["height"], size["width"]),
        dtype=code_dtype(tokenizer.config.num_codes).name,
        class_names=list(images.class_names),
        split=split,
        source=images.source,
        image=size,
        tokenizer_fingerprint=info.fingerprint,
        shards=shards,
    )
    write_manifest(out, manifest)
    print(f"{len(part):,} grids of {manifest.grid[0]}x{manifest.grid[1]} codes: {out}")
    return manifest


def encode_rows(tokenizer: VQVAE, part: ImageSplit, rows: np.ndarray, bar: "tqdm[None]") -> np.ndarray:
    """The codes [n,H,W] of the images at `rows` [n], in float32 and `eval()`."""
    device = next(tokenizer.parameters()).device
    grids = []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            batch = part.batch(rows[start : start + BATCH]).to(device)
            grids.append(tokenizer.encode(batch).cpu().numpy())
            bar.update(len(batch))
    return np.concatenate(grids).astype(code_dtype(tokenizer.config.num_codes))
