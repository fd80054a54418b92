"""The folder of a training run: what it may do with what is there, checked before the work and cleared after it."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import CONFIG, MODEL, TRAINING, CheckpointInfo, read_info
from .errors import InputError
from .files import current
from .folders import check_free, check_writable, clear

LOGS = ("metrics.jsonl", "pictures/step-*.png")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run writes, and what it may do with what is there.

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


def saved_run(run: RunFolder, kind: str) -> CheckpointInfo | None:
    """Return the checkpoint to resume from, or None to start anew. Raises InputError if it is of another kind."""
    if not run.resume or not current(run.out, CONFIG).exists():
        return None
    return read_info(run.out, kind)


def check_run_folder(run: RunFolder, saved: CheckpointInfo | None) -> None:
    """Raise InputError unless the run may write into its folder: a new run needs an empty one, or `force`.

    To be called before any long work. Nothing changes, and a folder that is missing is still missing afterwards.
    What a run left that was killed before its first save may be replaced by `resume` alone.
    """
    missing = [folder for folder in (run.out, *run.out.parents) if not folder.exists()]
    try:
        if saved is not None:
            check_writable(run.out)
        else:
            unsaved = not any((run.out / name).exists() for name in (MODEL, TRAINING))
            check_free(run.out, force=run.force or (run.resume and unsaved), hint="--resume to continue or ")
    finally:
        for folder in missing:
            with suppress(OSError):  # it was not made, or somebody else uses it by now
                folder.rmdir()


def prepare_run_folder(run: RunFolder, saved: CheckpointInfo | None) -> None:
    """Make the folder and remove what an older run logged there, unless that run is resumed.

    To be called last, when nothing can be refused any more. The checkpoint of the older run stays until the first save
    of the new one replaces it.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    if saved is None:
        clear(run.out, LOGS)
