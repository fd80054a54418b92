"""Checking JSON, which may come from a stranger, against the fields of a dataclass before anything is made of it.

The types of the fields are the schema: what is missing, of another type or no finite number is refused, and nothing is
converted. Ranges, and what fields say about each other, are for the dataclass itself to check (`__post_init__`).

    @dataclass
    class Entry:
        start: int
        files: dict[str, str]

    from_json(Entry, {"start": 0, "files": {"codes.npy": "5a..."}})  # Entry(start=0, files={...})
    from_json(Entry, {"start": "0", "files": {}})  # ValueError: the str '0' as start
"""

import dataclasses
import math
import reprlib
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

LONGEST = 100  # characters of a value that a message shows

_repr = reprlib.Repr()  # which stops early in what is long or deep
_repr.maxstring = _repr.maxlong = _repr.maxother = LONGEST


def from_json(cls: type[T], content: Any, what: str = "") -> T:
    """Return the instance of a dataclass that `content` describes, a JSON object with its fields as keys.

    Keys that are no fields are ignored, because a newer version may have added them.

    Args:
        cls: a dataclass whose fields are of int, float, str, bool, Literal, Any, other dataclasses, or of list, tuple,
            dict with keys of str, and unions of these; a tuple is a list in JSON.
        content: what `json.loads` returned.
        what: the place of `content` in the file, for messages, such as "shards[3]"; empty for the whole of it.

    Raises:
        ValueError: `content` is no such object; the message names the field and shows what it holds.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{_described(content)} in place of {what or 'an object with fields'}")
    hints, values = _hints(cls), {}  # type: ignore[arg-type]
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        place = f"{what}.{item.name}" if what else item.name
        if item.name in content:
            values[item.name] = checked(hints[item.name], content[item.name], place)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"no {place}")
    return cls(**values)


def checked(hint: Any, value: Any, what: str) -> Any:
    """Return `value`, which JSON gave, as the type `hint`. Raise ValueError if it is of another; True is no int."""
    outer, inner = get_origin(hint) or hint, get_args(hint)
    if outer is Any:
        return value
    if outer in (Union, UnionType):
        return _one_of(inner, value, what)
    if outer is Literal:
        return _required(value, what, any(type(value) is type(allowed) and value == allowed for allowed in inner))
    if outer is list or outer is tuple:
        return outer(_items(outer, inner, value, what))
    if outer is dict:
        _required(value, what, type(value) is dict)
        return {key: checked(inner[1], item, f"{what}[{short(key)}]") for key, item in value.items()}
    if dataclasses.is_dataclass(outer):
        return from_json(outer, value, what)  # type: ignore[arg-type]
    if outer is float:  # a whole number is one, too
        return _required(value, what, type(value) in (int, float) and math.isfinite(_as_float(value)))
    return _required(value, what, type(value) is (type(None) if outer is None else outer))


def short(value: Any) -> str:
    """Return `value` as a text of about LONGEST characters at most, for a message."""
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of the fields of a dataclass; finding them takes longer than checking an object."""
    return get_type_hints(cls)


def _items(outer: type, inner: tuple[Any, ...], value: Any, what: str) -> list[Any]:
    """Return the items of a JSON list, each of the type that `list[...]` or `tuple[...]` has in its place."""
    _required(value, what, type(value) is list)
    endless = outer is list or inner[-1] is Ellipsis
    hints = [inner[0]] * len(value) if endless else list(inner)
    _required(value, what, len(hints) == len(value))
    return [checked(hint, item, f"{what}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))]


def _one_of(hints: tuple[Any, ...], value: Any, what: str) -> Any:
    """Return `value` as the first of the types that it is of."""
    for hint in hints:
        try:
            return checked(hint, value, what)
        except ValueError as error:
            last = error
    raise last


def _required(value: Any, what: str, holds: bool) -> Any:
    if not holds:
        raise ValueError(f"{_described(value)} as {what}")
    return value


def _described(value: Any) -> str:
    """Return the type and the beginning of a value in words."""
    return f"the {type(value).__name__} {short(_repr.repr(value))}"


def _as_float(number: int | float) -> float:
    """Return a number as a float, infinity if it is too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf
