"""Code grids back to images: a picture of them, a PNG each, or one array."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import check_same_tokenizer
from .codes import CodeDataset
from .errors import InputError
from .folders import claim_file, claim_folder
from .inference import decode_codes as decode
from .loading import load_trained_tokenizer
from .pictures import save_grid, save_png

PICTURED = 64  # images in a picture, if not told otherwise


def decode_codes(
    folder: Path,
    tokenizer_folder: Path,
    out: Path,
    *,
    start: int = 0,
    n: int | None = None,
    device: str = "auto",
    force: bool = False,
) -> int:
    """Write the images of rows start .. start + n - 1 of a code data set, in their order; how many were written.

    Args:
        folder: what export-codes wrote.
        tokenizer_folder: the tokenizer that made the codes.
        out: FILE.png for one picture of all, FILE.npy for an array uint8 [n,C,H',W'], or a folder for a PNG each, named
            by row.
        start: first row.
        n: how many; by default all to the end, and for a picture at most PICTURED.
        device: where to compute.
        force: replace what is there.

    Raises:
        InputError: the codes, the tokenizer, the rows or `out` cannot be used.
    """
    codes = CodeDataset(folder)
    tokenizer = load_trained_tokenizer(tokenizer_folder, device)
    remedy = "name the tokenizer that made them"
    check_same_tokenizer(tokenizer.info.fingerprint, codes.manifest.tokenizer_fingerprint, f"codes in {folder}", remedy)
    kind = out.suffix.lower()
    _check_start(codes, start)
    left = len(codes) - start
    n = min(left, n if n is not None else PICTURED if kind == ".png" else left)
    if kind in (".png", ".npy"):
        claim_file(out, force=force)
    else:
        claim_folder(out, force=force, ours=("[0-9]*.png",))

    def rows(first: int, last: int) -> Tensor:
        return codes.batch(np.arange(start + first, start + last))[0]

    with tqdm(total=n, unit="image", desc="decoding", dynamic_ncols=True) as bar:
        images = _counted(decode(tokenizer.model, rows, n), bar)
        if kind == ".png":
            save_grid(torch.cat(list(images)), out)
        elif kind == ".npy":
            _write_array(images, n, out)
        else:
            _write_files(images, start, out)
    return n


def _counted(images: Iterator[Tensor], bar: "tqdm[None]") -> Iterator[Tensor]:
    for part in images:
        yield part
        bar.update(len(part))


def _check_start(codes: CodeDataset, start: int) -> None:
    if len(codes) == 0:
        raise InputError(
            expected=f"grids in {codes.where}", got="none yet", do="run the export-codes that began it again"
        )
    if not 0 <= start < len(codes):
        raise InputError(expected=f"a --start from 0 to {len(codes) - 1}", got=str(start), do="choose another")


def _write_array(images: Iterator[Tensor], n: int, out: Path) -> None:
    """Part by part into a file beside `out`, renamed once it is whole and on the disk; else nothing is left of it."""
    beside = out.with_name(f"{out.name}.new")
    try:
        with open(beside, "wb") as file:
            for index, part in enumerate(images):
                if index == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *part.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(part.numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)


def _write_files(images: Iterator[Tensor], start: int, out: Path) -> None:
    row = start
    for part in images:
        for image in part:
            save_png(image, out / f"{row:05d}.png")
            row += 1
