"""The settings of a training run: what was given, what the resumed run was started with, and the defaults."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .checkpoint import CONFIG, TRAINING, CheckpointInfo, read_info
from .errors import InputError
from .files import current
from .folders import claim_folder

RUN_FILES = ("model.safetensors", CONFIG, TRAINING, "metrics.jsonl", "pictures")
MAY_CHANGE = frozenset({"steps", "precision", "data_root"})  # on --resume


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run writes, and what it may do with what is there."""

    out: Path
    resume: bool = False
    force: bool = False
    device: str = "auto"


Settings = TypeVar("Settings")


def saved_run(run: RunFolder, kind: str) -> CheckpointInfo | None:
    """The checkpoint to resume from, or None to start from nothing. Raises InputError if it is of another kind."""
    if not run.resume or not current(run.out, CONFIG).exists():
        return None
    return read_info(run.out, kind)


def claim_run(run: RunFolder, saved: CheckpointInfo | None) -> None:
    """Make the run folder ready: cleared for a new run, left alone for a resumed one. Raises InputError."""
    if saved is None:
        claim_folder(run.out, force=run.force or run.resume, ours=RUN_FILES, hint="--resume to continue or ")


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
        if name not in MAY_CHANGE and name in before and _plain(value) != _plain(before[name]):
            raise InputError(
                expected=f"--resume with {name.replace('_', '-')} {before[name]}, as the run was started",
                got=f"{value}",
                do="leave the option away, or start a new run with another --out",
            )
    return kind(**{**before, **chosen})


def recorded(settings: Any) -> dict[str, Any]:
    """The settings as `config.json` keeps them."""
    return {name: _plain(value) for name, value in asdict(settings).items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
