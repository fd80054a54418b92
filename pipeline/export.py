"""Images to code grids: runs the encoder over a data set and writes a code data set (`code_writer.py`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenizer import VQVAE

from .blocks import BLOCK, in_blocks
from .checkpoint import CheckpointInfo, library_versions, load_tokenizer, read_info
from .code_manifest import CodeManifest, code_dtype
from .code_tables import add_table, check_table
from .code_writer import rows_hash, write_codes
from .device import choose_device
from .errors import InputError
from .processes import Processes, processes
from .sources import ImageSet, ImageSplit
from .stored_images import images_of, part_of

SHARD_SIZE = 65_536  # grids a shard
BATCH = 256  # images read at a time


class EncodedImages:
    """The rows of an export: the codes of the images of a split and then, with `flips`, of their mirror images.

    Codes are computed in blocks that start at multiples of BLOCK rows, wherever a shard starts, so that a row has the
    same neighbours in every export.
    """

    def __init__(self, tokenizer: VQVAE, part: ImageSplit, *, flips: bool, batch_size: int, bar: "tqdm[Any]") -> None:
        self.tokenizer, self.part, self.batch_size, self.bar = tokenizer, part, batch_size, bar
        self._len = len(part) * (2 if flips else 1)
        self._dtype = code_dtype(tokenizer.config.num_codes)
        self._last: tuple[int, np.ndarray] | None = None  # the block computed last: its first row, its codes

    def __len__(self) -> int:
        return self._len

    def codes(self, start: int, stop: int) -> np.ndarray:
        """[n,H,W] of rows start .. stop - 1."""
        first, last = start - start % BLOCK, min(stop - stop % -BLOCK, len(self))
        blocks = []
        if self._last is not None and self._last[0] == first:
            blocks.append(self._last[1])
        known = first + sum(map(len, blocks))
        self.bar.update(max(0, min(known, stop) - start))
        for part in in_blocks(
            self.tokenizer,
            self.tokenizer.encode,
            lambda a, b: self._images(known + a, known + b),
            last - known,
            batch_size=self.batch_size,
        ):
            done = first + sum(map(len, blocks))
            blocks.append(part.numpy().astype(self._dtype))
            self.bar.update(max(0, min(done + len(part), stop) - max(done, start)))
        codes = np.concatenate(blocks)
        tail = (len(codes) - 1) // BLOCK * BLOCK
        self._last = (first + tail, codes[tail:].copy())
        return codes[start - first : stop - first]

    def labels(self, start: int, stop: int) -> np.ndarray:
        """[n], -1 for none."""
        return self.part.labels[self._rows(start, stop)]

    def names(self, start: int, stop: int) -> Sequence[str]:
        """n of them."""
        return [self.part.names[row] for row in self._rows(start, stop)]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop) % len(self.part)

    def _images(self, start: int, stop: int) -> Tensor:
        images = self.part.batch(self._rows(start, stop))
        mirrored = max(0, len(self.part) - start)  # from there on
        images[mirrored:] = images[mirrored:].flip(-1)
        return images


def export_codes(
    tokenizer_folder: Path,
    out: Path,
    *,
    data: str | None = None,
    data_root: str | None = None,
    split: str = "train",
    flips: bool = False,
    shard_size: int = SHARD_SIZE,
    batch_size: int = BATCH,
    to: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> CodeManifest:
    """Write the codes of every image of a split of `data` (by default what the tokenizer was trained on) into `out`.

    What an earlier call with the same arguments wrote into `out` is kept, and only the rest is written. Processes that
    torchrun started share the work. The bytes depend on neither, nor on `batch_size`.

    Args:
        tokenizer_folder: what train-tokenizer wrote.
        out: folder to write.
        data: an image source.
        data_root: folder of a torchvision set.
        split: "train" or "test".
        flips: also write every image mirrored left to right, as further rows after all others.
        shard_size: grids a file.
        batch_size: images read at a time.
        to: "npz" or "parquet" to also write the whole in that format.
        device: where to compute.
        force: replace what `out` holds.

    Raises:
        InputError: the tokenizer, the images or the folder cannot be used.
    """
    check_table(to)
    with processes() as team:
        info = team.together(lambda: read_info(tokenizer_folder, "tokenizer"))
        where = team.together(lambda: choose_device(team.device(device)))
        tokenizer = team.together(lambda: load_tokenizer(tokenizer_folder)).to(where)
        images = team.in_turns(lambda: images_of(info, data=data, data_root=data_root))
        part = team.together(lambda: part_of(images, split))
        with _progress(split, team) as bar:
            rows = EncodedImages(tokenizer, part, flips=flips, batch_size=batch_size, bar=bar)
            asked = _request(info, tokenizer, images, rows, split=split, flips=flips, shard_size=shard_size)
            team.together(lambda: _check_same_images(team.gather(asked.rows_sha256)))

            def start(here: int, there: int) -> None:
                bar.reset(here)
                if there and team.leads:
                    bar.write(f"{there:,} grids are there already, {asked.total:,} in all: {out}")

            manifest = write_codes(out, asked, rows, team, force=force, on_start=start)
        if to is not None:
            manifest = team.leader(lambda: add_table(out, to))
        if team.leads:
            print(f"{manifest.count:,} grids of {manifest.grid[0]}x{manifest.grid[1]} codes: {out}")
    return manifest


def _request(
    info: CheckpointInfo,
    tokenizer: VQVAE,
    images: ImageSet,
    rows: EncodedImages,
    *,
    split: str,
    flips: bool,
    shard_size: int,
) -> CodeManifest:
    """The manifest before anything is written: what is asked for."""
    size, num_codes = info.preprocessing, tokenizer.config.num_codes
    versions = library_versions()
    return CodeManifest(
        count=0,
        total=len(rows),
        num_codes=num_codes,
        grid=tokenizer.grid(size["height"], size["width"]),
        dtype=code_dtype(num_codes).name,
        class_names=list(images.class_names),
        split=split,
        source=images.source,
        image=size,
        tokenizer_fingerprint=info.fingerprint,
        shards=[],
        shard_size=shard_size,
        flips=flips,
        rows_sha256=rows_hash(rows),
        made_with={
            "device": _device_name(next(tokenizer.parameters()).device),
            **{name: versions[name] for name in ("codegrid", "torch") if name in versions},
        },
    )


def _check_same_images(hashes: list[str]) -> None:
    if len(set(hashes)) > 1:
        other = next(rank for rank, found in enumerate(hashes) if found != hashes[0])
        raise InputError(
            expected="the same images in every process",
            got=f"other names or labels in process {other} than in process 0",
            do="give all machines the same --data",
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _progress(split: str, team: Processes) -> "tqdm[Any]":
    share = f" (process {team.rank + 1} of {team.count})" if team.count > 1 else ""
    return tqdm(unit="image", desc=f"encoding {split}{share}", dynamic_ncols=True, disable=not team.leads, total=0)
