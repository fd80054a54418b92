"""The settings of a run: the user's overrides, else what the resumed run was started with, else the defaults.

Settings are frozen dataclasses (`recipes.py`); the metadata of a field says whether --resume may change it, and the
types of the fields are what a checkpoint, which may be a stranger's, is checked against.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar, get_type_hints

from ..errors import InputError
from ..runtime.schema import checked, short

CHANGEABLE = {"changeable": True}  # metadata of a field that --resume may change
PATH = {"path": True}  # metadata of a field that holds a path, several, or the name of an image source
LARGEST_BATCH = 2**20  # items

Settings = TypeVar("Settings")


def resolve(
    settings_class: type[Settings], overrides: Mapping[str, Any], started_with: Mapping[str, Any] | None
) -> Settings:
    """Return the settings of a run.

    Args:
        settings_class: the dataclass of the settings, with the defaults.
        overrides: fields of `settings_class` that the user chose; None counts as not chosen, and so does a precision of
            "auto" where a run is resumed.
        started_with: the recorded settings of the run to resume; None for a new run.

    Raises:
        InputError: an override differs from what the resumed run was started with, and may not; or what is recorded
            are no settings of a run.
        ValueError: a setting is out of its range.
    """
    chosen = {name: value for name, value in overrides.items() if value is not None}
    if started_with is None:
        return settings_class(**chosen)
    if chosen.get("precision") == "auto":
        del chosen["precision"]  # what it came to is recorded
    metadata = {field.name: field.metadata for field in fields(settings_class)}  # type: ignore[arg-type]
    before = _recorded_before(settings_class, started_with)
    fixed = {name for name in before if not metadata[name].get("changeable")}
    for name in (name for name in chosen if name in fixed):
        same = _same_path if metadata[name].get("path") else _same
        if not same(chosen[name], before[name]):
            raise _conflict(name, chosen[name], before[name])
    return settings_class(**{**before, **{name: value for name, value in chosen.items() if name not in fixed}})


def recorded(settings: Any) -> dict[str, Any]:
    """Return the settings as `config.json` keeps them."""
    return {name: _as_json(value) for name, value in asdict(settings).items()}


def _recorded_before(settings_class: type, started_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a run was started with. Raise InputError if they are none.

    Those that an older version did not record, or that this one does not know, are missing.
    """
    hints = get_type_hints(settings_class)
    try:
        before = {
            name: checked(hints[name], value, f"training.{name}")
            for name, value in started_with.items()
            if name in hints
        }
        settings_class(**before)
    except ValueError as error:
        raise no_settings(error) from None
    return before


def no_settings(error: ValueError) -> InputError:
    """Return the error for what is recorded and cannot be the settings of a run."""
    return InputError(
        expected="the settings of a training run in the config.json of --out",
        got=str(error),
        do="restore the folder from a copy, or train again with --force",
    )


def check_shared(settings: Any) -> None:
    """Raise ValueError if a setting that all trainings have is out of its range; the message names it."""
    _require(settings.steps is None or settings.steps >= 1, settings, "steps", "at least 1")
    _require(1 <= settings.batch_size <= LARGEST_BATCH, settings, "batch_size", f"from 1 to {LARGEST_BATCH:,}")
    most = settings.batch_size
    _require(1 <= settings.accumulate <= most, settings, "accumulate", f"from 1 to batch_size, which is {most:,}")
    _require(0 < settings.lr < math.inf, settings, "lr", "a finite number above 0")
    _require(settings.seed >= 0, settings, "seed", "0 or more")
    _require(settings.precision in ("auto", "fp32", "bf16"), settings, "precision", "auto, fp32 or bf16")
    _require(settings.optimizer in ("muon", "adam"), settings, "optimizer", "muon or adam")


def _require(holds: bool, settings: Any, name: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {allowed}, got {short(getattr(settings, name))}")


def _conflict(name: str, override: Any, before: Any) -> InputError:
    """Return the error for an override that a resumed run cannot take."""
    return InputError(
        expected=f"--resume with {name.replace('_', '-')} {before}, as the run was started",
        got=f"{override}",
        do="omit the option, or start a new run with another --out",
    )


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are the same once `config.json` has kept them."""
    return bool(_as_json(one) == _as_json(other))


def _same_path(one: Any, other: Any) -> bool:
    """Return whether two paths, or lists of paths, lead to the same places; the name of an image source is no path."""
    from ..images.image_set import IMAGE_SOURCES  # imports numpy

    if other is None or any(value in IMAGE_SOURCES for value in (one, other)):
        return _same(one, other)
    return _absolute(one) == _absolute(other)


def _absolute(paths: str | Sequence[str]) -> list[str]:
    """Return one path or several as a list of absolute ones."""
    return [os.path.abspath(os.path.expanduser(path)) for path in ([paths] if isinstance(paths, str) else paths)]


def _as_json(value: Any) -> Any:
    """Return a value as JSON gives it back: a tuple becomes a list."""
    return list(value) if isinstance(value, tuple) else value
