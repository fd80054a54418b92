"""Images to code grids: runs the encoder over a data set and writes a code data set (`code_writer.py`)."""

import hashlib
import json
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenizer import VQVAE

from .checkpoint import CheckpointInfo, library_versions
from .code_manifest import CodeManifest, code_dtype
from .code_tables import add_table, check_table
from .code_writer import write_codes
from .device import choose_device
from .errors import InputError
from .inference import BLOCK, encode_images
from .loading import load_trained_tokenizer
from .processes import Processes, processes
from .sources import ImageSet, ImageSplit
from .stored_images import images_of, part_of

SHARD_SIZE = 65_536  # grids a shard
BATCH = 256  # images read at a time
HASHED_AT_ONCE = 4_096  # images


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
        known = [self._last[1]] if self._last is not None and self._last[0] == first else []
        blocks, done = [], first
        with closing(self._computed(first + sum(map(len, known)), last)) as computed:
            for some in chain(known, computed):
                blocks.append(some)
                self.bar.update(max(0, min(done + len(some), stop) - max(done, start)))
                done += len(some)
        codes = np.concatenate(blocks)
        tail = (len(codes) - 1) // BLOCK * BLOCK
        self._last = (first + tail, codes[tail:].copy())
        return codes[start - first : stop - first]

    def _computed(self, start: int, stop: int) -> Generator[np.ndarray, None, None]:
        """The codes of rows start .. stop - 1, where a block starts, some blocks at a time."""
        parts = encode_images(
            self.tokenizer,
            lambda first, last: self._images(start + first, start + last),
            stop - start,
            batch_size=self.batch_size,
        )
        for part in parts:
            yield part.numpy().astype(self._dtype)

    def labels(self, start: int, stop: int) -> np.ndarray:
        """[n], -1 for none."""
        return self.part.labels[self._rows(start, stop)]

    def names(self, start: int, stop: int) -> Sequence[str]:
        """n of them."""
        return [self.part.names[row] for row in self._rows(start, stop)]

    def sha256(self) -> str:
        """Of the names, labels and pixels of all images, in order."""
        digest = hashlib.sha256()
        for start in range(0, len(self.part), HASHED_AT_ONCE):
            some = slice(start, start + HASHED_AT_ONCE)
            names = json.dumps(self.part.names[some], ensure_ascii=False).encode("utf-8", "surrogatepass")
            digest.update(names)
            digest.update(self.part.labels[some].astype("<i8").tobytes())
            digest.update(self.part.images[some].tobytes())
        return digest.hexdigest()

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
    with processes() as team:
        team.together(lambda: check_table(to))
        where = team.together(lambda: choose_device(team.device(device)))
        trained = team.together(lambda: load_trained_tokenizer(tokenizer_folder, where))
        info, tokenizer = trained.info, trained.model
        images = team.in_turns(lambda: images_of(info, data=data, data_root=data_root))
        part = team.together(lambda: part_of(images, split))
        with _progress(split, team) as bar:
            rows = EncodedImages(tokenizer, part, flips=flips, batch_size=batch_size, bar=bar)
            asked = _request(info, tokenizer, images, rows, split=split, flips=flips, shard_size=shard_size)
            requests = team.gather(asked)
            team.together(lambda: _check_same_in_all(requests))
            team.together(lambda: check_table(to, asked))

            def start(here: int, there: int) -> None:
                bar.reset(here)
                if there and team.leads:
                    bar.write(f"{there:,} grids are there already, {asked.total:,} in all: {out}")

            with _said_when_stopped(bar, team, force=force):
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
        rows_sha256=rows.sha256(),
        made_with={
            "device": _device_name(next(tokenizer.parameters()).device),
            **{name: versions[name] for name in ("codegrid", "torch") if name in versions},
        },
    )


def _check_same_in_all(requests: Sequence[CodeManifest]) -> None:
    """See that every process is about to write the same; only where the images lie may be its machine's affair."""
    for name in (field.name for field in fields(CodeManifest) if field.name != "source"):
        values = [getattr(request, name) for request in requests]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise InputError(
                expected=f"the same {name.replace('_', ' ')} in every process",
                got=f"{values[other]} in process {other}, {values[0]} in process 0",
                do="give all machines the same tokenizer, images, devices and versions",
            )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _progress(split: str, team: Processes) -> "tqdm[Any]":
    share = f" (process {team.rank + 1} of {team.count})" if team.count > 1 else ""
    return tqdm(unit="image", desc=f"encoding {split}{share}", dynamic_ncols=True, disable=not team.leads, total=0)


@contextmanager
def _said_when_stopped(bar: "tqdm[Any]", team: Processes, *, force: bool) -> Iterator[None]:
    """On Ctrl-C, say that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        if team.leads:
            command = "the same command without --force" if force else "the same command"
            bar.write(f"stopped; finished shards are kept, and {command} continues", file=sys.stderr)
        raise
