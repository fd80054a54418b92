"""The settings of a training run: what was given, what the resumed run was started with, and the defaults."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .checkpoint import CONFIG, MODEL, TRAINING, CheckpointInfo, read_info
from .errors import InputError
from .files import COMMIT, current
from .folders import check_free, remove_files
from .sources import IMAGE_SOURCES

PICTURES = "pictures"
LOGS = re.compile(rf"metrics\.jsonl|{PICTURES}/step-([0-9]{{7}}|[1-9][0-9]{{7,}})(-codebook)?\.png")
MAY_CHANGE = frozenset(
    {"steps", "precision", "compile", "data_root", "tokenizer"}
)  # on --resume; fingerprints tell tokenizers
PATHS = frozenset({"data", "codes"})


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run writes, and what it may do with what is there."""

    out: Path
    resume: bool = False
    force: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.resume and self.force:
            raise InputError(expected="--resume or --force", got="both", do="leave one away")


Settings = TypeVar("Settings")


def saved_run(run: RunFolder, kind: str) -> CheckpointInfo | None:
    """Return the checkpoint to resume from, or None to start from nothing.

    Raises:
        InputError: it is of another kind, or the folder holds what a save of a checkpoint would replace.
    """
    _check_commit(run.out)
    if not run.resume or not current(run.out, CONFIG).exists():
        return None
    return read_info(run.out, kind)


def claim_run(run: RunFolder, saved: CheckpointInfo | None) -> None:
    """Make the run folder; a new run needs an empty one or --force. What it holds stays. Raises InputError.

    What a run left that was killed before its first save may be replaced by --resume alone.
    """
    if saved is None:
        unsaved = not any((run.out / name).exists() for name in (MODEL, TRAINING))
        check_free(run.out, force=run.force or (run.resume and unsaved), hint="--resume to continue or ")


def _check_commit(folder: Path) -> None:
    """Raise InputError for a commit file that no save of a checkpoint wrote: the next save would replace it."""
    try:
        names = json.loads((folder / COMMIT).read_bytes())
    except OSError:
        return
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(name in (MODEL, CONFIG, TRAINING) for name in names):
        raise InputError(
            expected=f"no {COMMIT} in --out {folder} but that of a checkpoint",
            got="another",
            do="move it away or name another folder",
        )


def clear_run(run: RunFolder, saved: CheckpointInfo | None) -> None:
    """Remove what an older run logged, unless it is resumed; called last, when nothing can be refused any more.

    Its checkpoint stays until the first save of the new run takes its place.
    """
    if saved is None:
        remove_files(run.out, LOGS.fullmatch, subfolder=PICTURES)


def settle(kind: type[Settings], given: Mapping[str, Any], saved: CheckpointInfo | None) -> Settings:
    """What was given, else what the resumed run has, else the default. None counts as not given.

    Raises:
        InputError: a setting that a resumed run cannot change differs from what it was started with.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if saved is None:
        return kind(**chosen)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    before = {name: value for name, value in saved.training.items() if name in known}
    for name, value in chosen.items():
        if name not in MAY_CHANGE and name in before and not _same(name, value, before[name]):
            raise InputError(
                expected=f"--resume with {name.replace('_', '-')} {before[name]}, as the run was started",
                got=f"{value}",
                do="leave the option away, or start a new run with another --out",
            )
    changed = {name: value for name, value in chosen.items() if name in MAY_CHANGE or name not in before}
    return kind(**{**before, **changed})


def recorded(settings: Any) -> dict[str, Any]:
    """The settings as `config.json` keeps them."""
    return {name: _plain(value) for name, value in asdict(settings).items()}


def _same(name: str, given: Any, before: Any) -> bool:
    """Whether two values of a setting mean the same; of paths, that both lead to one place."""
    if name in PATHS and before is not None and not any(value in IMAGE_SOURCES for value in (given, before)):
        given, before = _places(given), _places(before)
    return bool(_plain(given) == _plain(before))


def _places(paths: str | Sequence[str]) -> list[str]:
    """One path or several, absolute."""
    return [os.path.abspath(os.path.expanduser(path)) for path in ([paths] if isinstance(paths, str) else paths)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
