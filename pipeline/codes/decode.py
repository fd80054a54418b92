"""Decoding a code data set into images: a contact sheet, a PNG each, or one array."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..images.png import save_grid
from ..images.png_folder import ImageFolder, is_count, read_record, written_count
from ..models.decoders import DecoderChoice, check_choice
from ..models.inference import decode_codes as decode
from ..models.loading import TrainedTokenizer, load_trained_tokenizer
from ..runtime.atomic_files import open_atomic, to_json
from ..runtime.filesystem import looks_like_file
from ..runtime.folder_lock import only_writer
from ..runtime.output_paths import OutputFiles, check_output_file, check_output_folder
from ..runtime.progress import with_progress
from .dataset import CodeDataset
from .made_by import check_made_by

SHEET_IMAGES = 64  # in a contact sheet, by default
RECORD = "decode.json"


@dataclass(frozen=True, kw_only=True)
class DecodeRecord:
    """The content of RECORD in a folder of decoded images; its fields are the keys."""

    start: int  # the first row
    n: int  # rows to decode
    finished: int  # rows of them that are written; 0 until the run ends
    tokenizer_fingerprint: str  # of the tokenizer that made the codes and decoded them
    decoder_fingerprint: str | None = None  # of the sharp decoder, if that decoded them; older versions do not say


def decode_codes(
    folder: Path,
    tokenizer_folder: Path,
    out: Path,
    *,
    start: int = 0,
    n: int | None = None,
    device: str = "auto",
    decoder: DecoderChoice = "auto",
    force: bool = False,
) -> int:
    """Write the images of rows start .. start + n - 1 of a code data set, in their order; return how many.

    Args:
        folder: what export-codes wrote.
        tokenizer_folder: the tokenizer that made the codes.
        out: FILE.png for a contact sheet, FILE.npy for an array uint8 [n,C,H',W'], or a folder for a PNG each, named by
            row, and a record of which rows they are.
        start: first row.
        n: how many; by default all to the end, and for a contact sheet at most SHEET_IMAGES.
        device: where to compute.
        decoder: "plain", "sharp", or "auto", the sharp one if there is one.
        force: replace the file, or in a folder what its record names; a file that it does not name is kept, and
            refused if it is in the way.

    Raises:
        InputError: the codes, the tokenizer, its decoder, the rows or `out` cannot be used, another run writes into the
            folder, the decoder gives NaN or infinity, or an image cannot be written; in a folder, those before it are
            kept.
        ValueError: another `decoder`, or `n` below 1.
    """
    check_choice(decoder)
    codes = CodeDataset(folder)
    _check_start(codes, start)
    suffix, remaining = out.suffix.lower(), len(codes) - start
    n = min(remaining, n if n is not None else SHEET_IMAGES if suffix == ".png" else remaining)
    if n < 1:
        raise ValueError(f"n: expected at least 1 image, got {n}")
    load = partial(load_trained_tokenizer, tokenizer_folder, device, decoder=decoder)  # once `out` is checked
    if suffix in (".png", ".npy"):
        check_output_file(out, force=force)
        _decode(codes, load(), out, start, n)
        return n
    _check_folder_name(out)
    with only_writer(out, "decoding run"):  # what the folder holds is checked where no other run can change it
        check_output_folder(out, force=force, written=_files(start, n), earlier=_earlier(out))
        _decode(codes, load(), out, start, n)
    return n


def _decode(codes: CodeDataset, tokenizer: TrainedTokenizer, out: Path, start: int, n: int) -> None:
    """Write the images, to a place that was checked."""
    check_made_by(codes, tokenizer, "name the tokenizer that made them")

    def rows(first: int, last: int) -> Tensor:
        return codes.batch(np.arange(start + first, start + last))[0]

    record = DecodeRecord(
        start=start,
        n=n,
        finished=0,
        tokenizer_fingerprint=tokenizer.info.fingerprint,
        decoder_fingerprint=None if tokenizer.decoder_info is None else tokenizer.decoder_info.fingerprint,
    )
    decoded = decode(tokenizer.model, rows, n, folder=tokenizer.decoder_folder)
    with closing(with_progress(decoded, n, "decoding", size=len)) as images:
        if out.suffix.lower() == ".png":
            save_grid(torch.cat(list(images)), out)
        elif out.suffix.lower() == ".npy":
            _write_array(images, n, out)
        else:
            _write_folder(images, out, record)


def _check_folder_name(out: Path) -> None:
    """Raise InputError if `out` is not there yet and has the name of a file."""
    if looks_like_file(out):
        raise InputError(
            expected="a folder, FILE.png or FILE.npy as --out",
            got=f"{out}, which looks like a file of another format",
            do=f"name one of them, such as {out.with_suffix('.png')}",
        )


def _check_start(codes: CodeDataset, start: int) -> None:
    """Raise InputError unless there is a row `start`."""
    if len(codes) == 0:
        raise InputError(
            expected=f"grids in {codes.location}", got="none yet", do="run the same export-codes again, which resumes"
        )
    if not 0 <= start < len(codes):
        raise InputError(expected=f"a --start from 0 to {len(codes) - 1}", got=str(start), do="choose another")


def _write_array(images: Iterator[Tensor], n: int, out: Path) -> None:
    """Write an array batch by batch; `out` is complete or as it was. Raise InputError if it cannot be written."""
    first = next(images)
    with open_atomic(out, n * first[0].numel()) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, *first.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in chain([first], images):
            file.write(batch.numpy().tobytes())


def _write_folder(images: Iterator[Tensor], out: Path, record: DecodeRecord) -> None:
    """Write a PNG each; those that are written before a failure are kept, and the record counts them."""

    def content(finished: int) -> bytes:
        return to_json(asdict(replace(record, finished=finished)))

    with ImageFolder(out, _files(record.start, record.n), _earlier(out), content) as folder:
        try:
            for batch in images:
                folder.add(batch)
        finally:
            if folder.written:
                folder.close(folder.written)


def _files(start: int, n: int) -> OutputFiles:
    """Return the files of rows start .. start + n - 1."""
    return OutputFiles(record=RECORD, numbered="{:05d}.png", indices=range(start, start + n))


def _earlier(folder: Path) -> list[OutputFiles]:
    """Return what an earlier run wrote into `folder`, if its record is there."""
    content = read_record(folder / RECORD)
    required = {field.name for field in fields(DecodeRecord) if field.default is MISSING}
    if content is None or not required <= content.keys():
        return []
    start, count = content["start"], written_count(content["finished"], content["n"])
    return [_files(start, count)] if is_count(start) and count is not None else []
