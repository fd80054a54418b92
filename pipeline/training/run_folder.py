"""The folder of a training run: checked before any long work, cleared only when nothing can be refused any more."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..codes.unfinished import holds_only_an_export
from ..errors import InputError
from ..models.checkpoint import (
    CONFIG,
    MODEL,
    PREVIOUS,
    TRAINING,
    DamagedError,
    SavedRun,
    has_checkpoint,
    read_info,
    read_run,
)
from ..models.decoders import decoder_folder
from ..runtime.atomic_files import COMMIT, committed
from ..runtime.filesystem import (
    check_only_files,
    check_subfolder,
    check_writable,
    kind_of,
    make_folder,
    names_in,
    remove_if_empty,
)
from ..runtime.folder_lock import LOCK
from ..runtime.output_paths import check_output_folder, remove_files
from ..runtime.restarts import JobMemory

LOG = "metrics.jsonl"
PICTURES = "pictures"  # subfolder of the previews
CODES = "codes"  # subfolder of the codes that train-prior exports
CHECKPOINT = (MODEL, CONFIG, TRAINING)
LOGS = re.compile(rf"{re.escape(LOG)}|{PICTURES}/step-([0-9]{{7}}|[1-9][0-9]{{7,}})(-codebook)?\.png")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Says where a run writes, and what it may do with existing files.

    Raises:
        InputError: `resume` and `force` are both set.
    """

    out: Path
    resume: bool = False
    force: bool = False
    device: str = "auto"  # where to compute: auto, cpu, cuda, cuda:1, mps

    def __post_init__(self) -> None:
        if self.resume and self.force:
            raise InputError(expected="--resume or --force", got="both", do="omit one")


def of_this_attempt(run: RunFolder) -> RunFolder:
    """Return the run as it is now; where torchrun has restarted it, it resumes what an earlier attempt saved.

    It resumes nothing that no attempt of this job began: what one refused, the next refuses, too.
    """
    memory, folder = JobMemory(), os.path.realpath(run.out)
    resumes = memory.knows(f"saved {folder}") or (memory.knows(f"begun {folder}") and not run.force)
    return replace(run, resume=True, force=False) if resumes else run


def note_save(folder: Path) -> None:
    """Note that the folder holds a save of this job of torchrun."""
    JobMemory().note(f"saved {os.path.realpath(folder)}")


def saved_run(run: RunFolder, kind: str) -> SavedRun | None:
    """Return the checkpoint to resume from, or None to start anew.

    Raises:
        InputError: it is damaged or of another kind, or the folder holds something that saving a checkpoint would
            replace and that no save wrote.
    """
    _check_files(run.out)
    _check_commit(run.out)
    if not run.resume or not has_checkpoint(run.out):
        return None
    return read_run(run.out, kind)


def check_run_folder(run: RunFolder, saved: SavedRun | None) -> None:
    """Raise InputError unless the run may write into its folder: a new run needs an empty one, or `force`.

    Whatever `force` and `resume` are, nothing but files may be in the places of files, and folders in those of folders.

    Call it before any long work; it makes and removes nothing. What is left of a run that was killed before its first
    save may be replaced with `resume` alone, and a run that was stopped while it exported its codes continues anyway.
    """
    _check_files(run.out)
    if saved is not None or (not run.force and _holds_only_codes(run.out)):
        check_writable(run.out)
        return
    unsaved = not any((run.out / name).exists() for name in (MODEL, TRAINING))
    check_output_folder(run.out, force=run.force or (run.resume and unsaved), hint="--resume to continue or ")


def prepare_run_folder(run: RunFolder, saved: SavedRun | None) -> None:
    """Make the folder and remove what an older run logged there and its save before the last, unless it is resumed.

    Call it last, when nothing can be refused any more. The last checkpoint of the older run stays until the first save
    of the new one replaces it.

    Raises:
        InputError: the folder cannot be made, or a file cannot be removed.
    """
    make_folder(run.out)
    JobMemory().note(f"begun {os.path.realpath(run.out)}")
    if saved is None:
        _remove_logs(run.out)


def check_decoder_folder(run: RunFolder) -> None:
    """Raise InputError unless a sharp decoder can be trained into the folder of this tokenizer, once that is trained.

    Call it before any long work; it makes and removes nothing.
    """
    folder = decoder_folder(run.out)
    if folder.is_symlink():
        raise InputError(
            expected=f"a folder or nothing at {folder}, where --sharp trains a decoder",
            got=kind_of(folder),
            do="remove the link, or omit --sharp and run train-decoder",
        )
    decoder_run = RunFolder(out=folder, resume=True)
    with suppress(DamagedError):  # of a decoder, which is replaced
        check_run_folder(decoder_run, saved_run(decoder_run, "decoder"))


def remove_decoder(tokenizer_folder: Path) -> None:
    """Remove the sharp decoder of an earlier tokenizer, if the folder holds one; other files stay where they are.

    One that a link leads to stays, too: it may be in use elsewhere.

    Raises:
        InputError: a file cannot be removed.
    """
    folder = decoder_folder(tokenizer_folder)
    if folder.is_symlink():
        return
    try:
        read_info(folder, "decoder")
        _check_commit(folder)
    except InputError:
        return
    _remove_logs(folder)
    for name in (MODEL, TRAINING, COMMIT, CONFIG):  # in this order, a kill leaves what is known as a decoder, or none
        remove_files(folder, {name}.__contains__, subfolder="")
    remove_if_empty([folder / PREVIOUS, folder / PICTURES, folder])


def _remove_logs(folder: Path) -> None:
    """Remove what a run logged, and its save before the last."""
    remove_files(folder, LOGS.fullmatch, subfolder=PICTURES)
    remove_files(folder, {f"{PREVIOUS}/{name}" for name in CHECKPOINT}.__contains__, subfolder=PREVIOUS)


def _holds_only_codes(folder: Path) -> bool:
    """Return whether nothing is in the folder but the codes that train-prior began to export."""
    return set(names_in(folder)) - {LOCK} == {CODES} and holds_only_an_export(folder / CODES)


def _check_files(folder: Path) -> None:
    """Raise InputError if something in the folder is not of the kind that a run writes under its name."""
    check_only_files(folder, (*CHECKPOINT, COMMIT, LOG))
    check_subfolder(folder / PICTURES, may_be_link=True)
    check_subfolder(folder / PREVIOUS, may_be_link=False)  # files are moved into it, which a link to a disk forbids
    check_only_files(folder / PREVIOUS, CHECKPOINT)


def _check_commit(folder: Path) -> None:
    """Raise InputError for a commit file that no save of a checkpoint wrote: the next save would replace it."""
    foreign = set(committed(folder)) - {*CHECKPOINT}
    if foreign:
        raise InputError(
            expected=f"no {COMMIT} in --out {folder} but that of a checkpoint",
            got="another",
            do="move it away or name another folder",
        )
