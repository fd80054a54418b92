"""Exporting codes: encodes the images of a split and writes them as a code data set (`writer.py`).

What can be refused is refused before images are prepared, which may take minutes. Only what depends on the images
themselves (how many, their classes, their hash) is compared with an existing export afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch

from tokenizer import VQVAE

from ..images.image_set import ImageSet, ImageSplit, source_name, split_of
from ..models.checkpoint import CheckpointInfo, library_versions
from ..models.loading import images_of, load_trained_tokenizer, own_images
from ..models.shares import check_same, of_process
from ..runtime.console import note, say
from ..runtime.device import choose_device
from ..runtime.folder_lock import only_writer
from ..runtime.interrupts import Terminated
from ..runtime.process_group import ProcessGroup, process_group
from ..runtime.progress import Progress
from .encoded_images import EncodedImages, rows_sha256
from .manifest import CodeManifest, code_dtype
from .tables import add_table, check_table
from .unfinished import check_destination
from .writer import write_codes

SHARD_SIZE = 65_536  # grids a shard
BATCH = 256  # images read at a time
FROM_IMAGES = {"total", "class_names", "rows_sha256"}  # fields of the manifest that are known once images are prepared


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
    torchrun started share the work. The bytes depend on neither, nor on `batch_size`. Meanwhile the main process holds
    the lock of `out` (`folder_lock.py`) for all processes of the export.

    Args:
        tokenizer_folder: what train-tokenizer wrote.
        out: folder to write.
        data: an image source.
        data_root: folder of a torchvision set.
        split: "train" or "test".
        flips: also write every image mirrored left to right, as further rows after all others.
        shard_size: grids a file.
        batch_size: images read at a time.
        to: "npz" or "parquet" to also write all codes in that format.
        device: where to compute.
        force: replace what `out` holds.

    Raises:
        InputError: the tokenizer, the images or the folder cannot be used, or another export writes into it.
    """
    with process_group() as group:
        group.run_on_all(lambda: check_table(to))
        chosen = group.run_on_all(lambda: choose_device(group.device(device)))
        with group.entered_by_main(lambda: only_writer(out, "export")):
            trained = group.run_on_all(lambda: load_trained_tokenizer(tokenizer_folder, chosen, decoder="plain"))
            info, tokenizer = trained.info, trained.model
            source = group.run_on_all(lambda: source_name(own_images(info)[0] if data is None else data))
            known = _known_before_images(info, tokenizer, source, split=split, flips=flips, shard_size=shard_size)
            group.run_on_main(lambda: check_destination(out, known, force=force, unknown=FROM_IMAGES))
            image_set = group.main_first(lambda: images_of(info, data=data, data_root=data_root))
            images = group.run_on_all(lambda: split_of(image_set, split))
            requested = _request(known, image_set, images)
            check_same(
                group, _to_compare(requested), "give all machines the same tokenizer, images, devices and versions"
            )
            group.run_on_all(lambda: check_table(to, requested))
            manifest = _encode(tokenizer, images, out, requested, group, batch_size=batch_size, force=force)
            if to is not None:
                manifest = group.run_on_main(lambda: add_table(out, to))
        if group.is_main:
            say(f"{manifest.count:,} grids of {manifest.grid[0]}x{manifest.grid[1]} codes: {out}")
    return manifest


def _encode(
    tokenizer: VQVAE,
    images: ImageSplit,
    out: Path,
    requested: CodeManifest,
    group: ProcessGroup,
    *,
    batch_size: int,
    force: bool,
) -> CodeManifest:
    """Write the codes of all images and show the progress; return the manifest."""
    with _progress(requested.split, group) as bar:

        def on_start(to_write: int, existing: int) -> None:
            bar.reset(to_write)
            if existing and group.is_main:
                say(f"{existing:,} of {requested.total:,} grids exist already: {out}")

        rows = EncodedImages(tokenizer, images, flips=requested.flips, batch_size=batch_size, bar=bar)
        with _explain_interrupt(group, force=force):
            return write_codes(out, requested, rows, group, force=force, on_start=on_start)


def _known_before_images(
    info: CheckpointInfo, tokenizer: VQVAE, source: str, *, split: str, flips: bool, shard_size: int
) -> CodeManifest:
    """Return the manifest that is requested, without the fields FROM_IMAGES."""
    size, num_codes = info.preprocessing, tokenizer.config.num_codes
    versions = library_versions()
    return CodeManifest(
        count=0,
        num_codes=num_codes,
        grid=tokenizer.grid(size["height"], size["width"]),
        dtype=code_dtype(num_codes).name,
        class_names=[],
        split=split,
        source=source,
        image=size,
        tokenizer_fingerprint=info.fingerprint,
        shards=[],
        shard_size=shard_size,
        flips=flips,
        made_with={
            "device": _device_name(next(tokenizer.parameters()).device),
            **{name: versions[name] for name in ("codegrid", "torch") if name in versions},
        },
    )


def _request(known: CodeManifest, image_set: ImageSet, images: ImageSplit) -> CodeManifest:
    """Return the manifest that is requested, as it is before anything is written."""
    return replace(
        known,
        total=len(images) * (2 if known.flips else 1),
        class_names=list(image_set.class_names),
        rows_sha256=rows_sha256(images),
    )


def _to_compare(requested: CodeManifest) -> dict[str, object]:
    """Return what every process has to be about to write; only the paths of the images may differ."""
    return {each.name: getattr(requested, each.name) for each in fields(CodeManifest) if each.name != "source"}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _progress(split: str, group: ProcessGroup) -> Progress:
    """Return the progress, which the main process alone shows."""
    return Progress(0, of_process(f"encoding {split}", group), shown=group.is_main)


@contextmanager
def _explain_interrupt(group: ProcessGroup, *, force: bool) -> Iterator[None]:
    """Print on Ctrl-C that finished shards are kept, and how to resume."""
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        if group.is_main:
            command = "the same command without --force" if force else "the same command"
            note(f"stopped; finished shards are kept, and {command} resumes")
        raise
