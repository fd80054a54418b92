"""What can happen to a file: the kinds of damage, each a function that damages a file and says what it did."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

RUBBISH = [b"{", b"null", b"[]", b'"rubbish"', b'{"rubbish": [1, 2, 3]}', b"[1, 2]", b"\xff\xfe\x00", b"[" * 100_000]

Damage = Callable[[Path, Path | None, random.Random], str]  # (file, another valid file, random) -> what was done


def flip(path: Path, other: Path | None, random: random.Random) -> str:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    position, bit = random.randrange(len(data)), random.randrange(8)
    data[position] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {position:,} of {len(data):,} flipped"


def truncate(path: Path, other: Path | None, random: random.Random) -> str:
    """Cut the file short."""
    data = path.read_bytes()
    length = random.randrange(1, len(data))
    path.write_bytes(data[:length])
    return f"cut to {length:,} of {len(data):,} bytes"


def empty(path: Path, other: Path | None, random: random.Random) -> str:
    """Leave no byte."""
    path.write_bytes(b"")
    return "emptied"


def delete(path: Path, other: Path | None, random: random.Random) -> str:
    """Remove the file."""
    path.unlink()
    return "deleted"


def grow(path: Path, other: Path | None, random: random.Random) -> str:
    """Add bytes at the end."""
    count = random.choice((1, 7, 4096))
    with open(path, "ab") as file:
        file.write(random.randbytes(count))
    return f"{count:,} bytes added"


def zero(path: Path, other: Path | None, random: random.Random) -> str:
    """Set a stretch of bytes, or all of them, to zero: what a disk returns for a lost block."""
    data = path.read_bytes()
    first = random.choice((0, random.randrange(len(data))))
    path.write_bytes(data[:first] + bytes(len(data) - first))
    return f"zeros from byte {first:,} of {len(data):,}"


def folder(path: Path, other: Path | None, random: random.Random) -> str:
    """Put a folder in its place, empty or with a file."""
    path.unlink()
    path.mkdir()
    if random.random() < 0.5:
        (path / "file").write_bytes(b"a file of the user")
    return "replaced by a folder"


def rubbish(path: Path, other: Path | None, random: random.Random) -> str:
    """Put JSON that means nothing in its place, or what is no JSON."""
    content = random.choice(RUBBISH)
    path.write_bytes(content)
    return f"replaced by {content[:30]!r}"


def replace(path: Path, other: Path | None, random: random.Random) -> str:
    """Put another valid file of the same kind in its place; without one, one with its bytes in reverse."""
    if other is None:
        path.write_bytes(path.read_bytes()[::-1])
        return "its bytes reversed"
    shutil.copy(other, path)
    return f"replaced by the valid {'/'.join(other.parts[-3:])}"


DAMAGES: tuple[Damage, ...] = (flip, truncate, empty, delete, grow, zero, folder, rubbish, replace)
