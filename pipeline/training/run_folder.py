"""The folder of a training run: checked before any long work, cleared only when nothing can be refused any more."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..models.checkpoint import CONFIG, MODEL, TRAINING, SavedRun, has_checkpoint, read_run
from ..runtime.atomic_files import COMMIT, committed
from ..runtime.output_paths import check_output_folder, check_writable, remove_files

PICTURES = "pictures"  # subfolder of the previews
LOGS = re.compile(rf"metrics\.jsonl|{PICTURES}/step-([0-9]{{7}}|[1-9][0-9]{{7,}})(-codebook)?\.png")


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


def saved_run(run: RunFolder, kind: str) -> SavedRun | None:
    """Return the checkpoint to resume from, or None to start anew.

    Raises:
        InputError: it is damaged or of another kind, or the folder holds a foreign file that saving a checkpoint would
            replace.
    """
    _check_commit(run.out)
    if not run.resume or not has_checkpoint(run.out):
        return None
    return read_run(run.out, kind)


def check_run_folder(run: RunFolder, saved: SavedRun | None) -> None:
    """Raise InputError unless the run may write into its folder: a new run needs an empty one, or `force`.

    Call it before any long work; it makes and removes nothing. What is left of a run that was killed before its first
    save may be replaced with `resume` alone.
    """
    if saved is not None:
        check_writable(run.out)
        return
    unsaved = not any((run.out / name).exists() for name in (MODEL, TRAINING))
    check_output_folder(run.out, force=run.force or (run.resume and unsaved), hint="--resume to continue or ")


def prepare_run_folder(run: RunFolder, saved: SavedRun | None) -> None:
    """Make the folder and remove what an older run logged there, unless that run is resumed.

    Call it last, when nothing can be refused any more. The checkpoint of the older run stays until the first save of
    the new one replaces it.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    if saved is None:
        remove_files(run.out, LOGS.fullmatch, subfolder=PICTURES)


def _check_commit(folder: Path) -> None:
    """Raise InputError for a commit file that no save of a checkpoint wrote: the next save would replace it."""
    foreign = set(committed(folder)) - {MODEL, CONFIG, TRAINING}
    if foreign:
        raise InputError(
            expected=f"no {COMMIT} in --out {folder} but that of a checkpoint",
            got="another",
            do="move it away or name another folder",
        )
