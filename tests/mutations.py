"""Damaged and hostile files made from valid ones, for the tests of every reader of files that may be a stranger's.

@given(data=mutated_json(content))  # bytes of JSON, one to three values of which are others
@given(data=mutated_bytes(valid))  # one to three changes of bytes
@pytest.mark.parametrize("damage", DAMAGES)  # DAMAGES[damage](path, random) changes a file in place

with watched() as seen:
    read(path)
assert seen.peak < 2**20  # bytes
assert all(name.is_relative_to(folder) for name in seen.opened)
"""

import copy
import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

DEEP = 12_000  # lists inside each other: more than any reader follows, and short enough for Hypothesis to show

# Texts that `json.dumps` does not write, by the string that stands for each in a value.
_RAW = {"<deep list>": "[" * DEEP + "]" * DEEP, "<infinity>": "1e999", "<many digits>": "9" * 5_000}

NUMBERS = [2**31, 2**63, 10**12, 10**400, -1, 0, 1, 1e308, 0.5, float("nan"), float("inf"), "<infinity>"]
PATHS = ["/etc/passwd", "../x", "/dev/zero", "..", "a/b", "C:\\x", "", "\0", "x" * 10_000]
TEXTS = ["\x1b[2J\r\n", "\ud800", "été 線 🎈", "<many digits>"]
OTHERS = [None, True, False, [], {}, [[]] * 100, {"a": {"b": [1]}}, "<deep list>"]


# JSON


@st.composite
def mutated_json(draw: st.DrawFn, content: Any) -> bytes:
    """Draw JSON like `content`, in which one to three values or keys are changed, removed or repeated."""
    whole = [copy.deepcopy(content)]
    for _ in range(draw(st.integers(1, 3))):
        if places := _places(whole):
            container, key = draw(st.sampled_from(places))
            _CHANGES[draw(st.sampled_from(list(_CHANGES)))](draw, container, key)
    return json_bytes(whole[0]) if whole else b""


def json_bytes(content: Any) -> bytes:
    """Return `content` as JSON, with the texts that stand for others put in."""
    text = json.dumps(content)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key or index) inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((value, key), *_places(item))]


def _replace(draw: st.DrawFn, container: Any, key: Any) -> None:
    container[key] = copy.deepcopy(draw(st.sampled_from([*NUMBERS, *PATHS, *TEXTS, *OTHERS])))


def _shift(draw: st.DrawFn, container: Any, key: Any) -> None:
    """Change a number by a little; replace anything else."""
    if type(container[key]) is int:
        container[key] += draw(st.integers(-3, 3))
    else:
        _replace(draw, container, key)


def _remove(draw: st.DrawFn, container: Any, key: Any) -> None:
    del container[key]


def _rename(draw: st.DrawFn, container: Any, key: Any) -> None:
    """Give a value another key; repeat the item of a list."""
    if isinstance(container, dict):
        container[draw(st.sampled_from([*PATHS, *TEXTS]))] = container.pop(key)
    else:
        container.append(copy.deepcopy(container[key]))


_CHANGES: dict[str, Callable[[st.DrawFn, Any, Any], None]] = {
    "replace": _replace,
    "replace as often again": _replace,
    "shift": _shift,
    "remove": _remove,
    "rename": _rename,
}


# Bytes


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw bytes like `data`, with one to three changes: bits, bytes, cuts, insertions, runs of zeros."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 16))
        bit = bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) if data else b""
        data = draw(
            st.sampled_from(
                [
                    data[:at] + bit + data[at + 1 :],
                    data[:at] + draw(st.sampled_from([b"\0", b"\xff", b"(", b"[", b"9", b'"', b"\n"])) + data[at + 1 :],
                    data[:at],
                    data[:at] + data[at + length :],
                    data[:at] + draw(st.binary(max_size=16)) + data[at:],
                    data[:at] + bytes(length) + data[at + length :],
                    data[:at] + b"\xff" * length + data[at + length :],
                    data[:at] + data[at : at + length] * 100 + data[at:],
                ]
            )
        )
    return data


# Files


def _flip_a_bit(path: Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    path.write_bytes(data)


def _cut_short(path: Path, random: np.random.Generator) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: random.integers(1, len(data))])


def _empty(path: Path, random: np.random.Generator) -> None:
    path.write_bytes(b"")


def _remove_file(path: Path, random: np.random.Generator) -> None:
    path.unlink()


def _make_a_folder(path: Path, random: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "one bit": _flip_a_bit,
    "cut short": _cut_short,
    "emptied": _empty,
    "removed": _remove_file,
    "a folder": _make_a_folder,
}


def _make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_to(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return link


# What hangs, or reads without end, whoever opens it. Not on Windows.
IRREGULAR: dict[str, Callable[[Path], None]] = {
    "a pipe": _make_a_pipe,
    "a link to a device": _link_to("/dev/zero"),
    "a link to a folder": _link_to("/"),
    "a link to itself": lambda path: _link_to(path.name)(path),
}


# Watching a reader


@dataclass
class Seen:
    """What happened inside `watched`."""

    opened: set[Path] = field(default_factory=set)  # absolute paths of the files that Python opened
    peak: int = 0  # bytes that Python and numpy had allocated at most, beyond those before


_watching: list[Seen] = []
_hooks: list[Callable[..., None]] = []


@contextmanager
def watched() -> Iterator[Seen]:
    """Note which files are opened, and how much memory Python and numpy take, for the duration of `with`."""
    if not _hooks:  # a hook cannot be removed
        _hooks.append(_note_open)
        sys.addaudithook(_note_open)
    seen = Seen()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
        seen.peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching and isinstance(arguments[0], (str, bytes)):
        path = Path(os.path.abspath(os.fsdecode(arguments[0])))
        if path.suffix not in (".py", ".pyc"):  # of modules that are imported on first use
            _watching[-1].opened.add(path)
