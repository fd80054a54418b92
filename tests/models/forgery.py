"""Checkpoints of a stranger who knows the format: whatever they hold, every hash fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import InputError
from pipeline.models.checkpoint import CONFIG, MODEL, TRAINING
from pipeline.runtime.atomic_files import sha256
from pipeline.runtime.sealed_json import sealed

from ..mutations import json_bytes

Header = dict[str, Any]
Result = TypeVar("Result")


def result_or_line(act: Callable[[], Result], errors: tuple[type[Exception], ...] = (InputError,)) -> Result | str:
    """Return what `act` returns, or the one short line of the error that it raises."""
    try:
        return act()
    except errors as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 2000
    return line


def config_of(folder: Path) -> dict[str, Any]:
    """Return the content of `config.json` without its checksum."""
    content: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    del content["checksum"]
    return content


def write_config(folder: Path, content: Any) -> None:
    """Write `config.json`; with a checksum that fits, if the content can have one."""
    try:
        data = sealed(json.loads(json_bytes(content)))
    except (TypeError, ValueError, RecursionError):
        data = json_bytes(content)
    (folder / CONFIG).write_bytes(data)


def change(folder: Path, **fields: Any) -> None:
    """Change fields of `config.json`, "a.b" for the field b of a; the value `DELETED` removes one."""
    content = config_of(folder)
    for path, value in fields.items():
        *outer, name = path.split("__")
        place = content
        for key in outer:
            place = place[key]
        if value is DELETED:
            del place[name]
        else:
            place[name] = value
    write_config(folder, content)


DELETED = object()


def write_model(folder: Path, data: bytes) -> None:
    """Write `model.safetensors`, and its fingerprint."""
    (folder / MODEL).write_bytes(data)
    change(folder, fingerprint=sha256(data))


def write_training(folder: Path, data: bytes) -> None:
    """Write `training.safetensors`, and its hash."""
    (folder / TRAINING).write_bytes(data)
    change(folder, training_sha256=sha256(data))


def split_file(data: bytes) -> tuple[Header, bytes]:
    """Return the header and the numbers of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join_file(header: Any, numbers: bytes) -> bytes:
    """Return a safetensors file with this header: JSON, or bytes that need not be any."""
    encoded = header if isinstance(header, bytes) else json_bytes(header)
    return len(encoded).to_bytes(8, "little") + encoded + numbers


def write_sparse(folder: Path, start: bytes, size: int) -> None:
    """Write a `model.safetensors` of `size` bytes that takes no space: `start`, and zeros."""
    with open(folder / MODEL, "wb") as file:
        file.write(start)
        file.truncate(size)
