"""The settings of a run: the user's overrides, else what the resumed run was started with, else the defaults.

Settings are frozen dataclasses (`recipes.py`); the metadata of a field says whether --resume may change it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar

from ..errors import InputError

CHANGEABLE = {"changeable": True}  # metadata of a field that --resume may change
PATH = {"path": True}  # metadata of a field that holds a path, several, or the name of an image source

Settings = TypeVar("Settings")


def resolve(
    settings_class: type[Settings], overrides: Mapping[str, Any], started_with: Mapping[str, Any] | None
) -> Settings:
    """Return the settings of a run.

    Args:
        settings_class: the dataclass of the settings, with the defaults.
        overrides: fields of `settings_class` that the user chose; None counts as not chosen.
        started_with: the recorded settings of the run to resume; None for a new run.

    Raises:
        InputError: an override differs from what the resumed run was started with, and may not.
    """
    chosen = {name: value for name, value in overrides.items() if value is not None}
    if started_with is None:
        return settings_class(**chosen)
    metadata = {field.name: field.metadata for field in fields(settings_class)}  # type: ignore[arg-type]
    before = {name: value for name, value in started_with.items() if name in metadata}
    fixed = {name for name in before if not metadata[name].get("changeable")}
    for name in (name for name in chosen if name in fixed):
        same = _same_path if metadata[name].get("path") else _same
        if not same(chosen[name], before[name]):
            raise _conflict(name, chosen[name], before[name])
    return settings_class(**{**before, **{name: value for name, value in chosen.items() if name not in fixed}})


def recorded(settings: Any) -> dict[str, Any]:
    """Return the settings as `config.json` keeps them."""
    return {name: _as_json(value) for name, value in asdict(settings).items()}


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
