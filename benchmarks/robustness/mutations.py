"""Files as a stranger may have made them: valid in form and absurd in content, or with random bytes changed.

Each function returns the content of a file, mutated, and says what it did.
"""

import json
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from typing import Any

DEEP = "@deep@"  # stands for a list in a list in a list ..., which `json` itself cannot write
NESTING = 100_000
ABSURD: tuple[Any, ...] = (
    *(2**31, 2**31 - 1, 2**63, 10**12, 10**400, -1, 0, 1, 2, 1.5, 1e308, float("nan"), float("inf")),
    *(None, True, "", "x", "x" * 1_000_000, "\x1b[31mred\x07", "two\nlines", "\ud800", "\u202eright to left"),
    *(
        "/etc/passwd",
        "../x",
        "../" * 12 + "etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "a/b",
        ".",
        "..",
        "C:\\x",
        "nul\x00",
    ),
    *([], {}, [[]], ["x"], {"x": 1}, [1, 2, 3], [10**12, 10**12], DEEP),
)
DTYPES = ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X9", "f4", "")
DESCRS = (
    "|O",
    "<f8",
    "|i1",
    ">u2",
    "<i8",
    "|V1000000000",
    "<U1000000000",
    "|b1",
    "<M8[ns]",
    "O",
    "",
    "|u9",
    "x" * 5000,
)
SHAPES = (
    "(1000000000000,)",
    "(2147483648, 2147483648)",
    "(-1,)",
    "()",
    "(8, 4, 3, 1)",
    "(8, 4.5, 3)",
    "(8, 'x')",
    "8",
    "None",
)

Random = random.Random


def mutate_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    """Change, remove or insert bytes at random places."""
    kind = random.choice(("flip", "cut", "insert", "zero", "swap"))
    place = random.randrange(len(data))
    length = min(random.choice((1, 1, 8, 64, 4096)), len(data) - place)
    if kind == "cut":
        return data[:place], f"cut at byte {place:,}"
    changed = {
        "flip": bytes(byte ^ 1 << random.randrange(8) for byte in data[place : place + length]),
        "insert": random.randbytes(length) + data[place : place + length],
        "zero": bytes(length),
        "swap": data[place : place + length][::-1],
    }[kind]
    return data[:place] + changed + data[place + length :], f"{kind} of {length:,} bytes at {place:,}"


def mutate_json(data: bytes, random: Random) -> tuple[bytes, str]:
    """Replace one to three values by absurd ones, remove, rename or repeat keys."""
    content, done = mutate_value(json.loads(data), random)
    return dumped(content), done


def mutate_value(content: Any, random: Random) -> tuple[Any, str]:
    """Do the same to parsed JSON, in place where that is possible."""
    done = []
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(content))
        if not places:
            break
        parent, key = random.choice(places)
        kind = random.choice(("value",) * 6 + ("remove", "rename", "double"))
        if kind == "value" or isinstance(parent, list):
            value = _near(parent[key], random)
            done.append(f"{key}={str(value)[:40]!r}")
            parent[key] = value
        elif kind == "remove":
            done.append(f"without {key}")
            del parent[key]
        else:
            new = random.choice(("", "x", "/etc/passwd", "../x", "\x1b[2J", key + " ", "x" * 10_000))
            done.append(f"{kind} {key} as {new[:20]!r}")
            parent[new] = parent[key] if kind == "double" else parent.pop(key)
    if random.random() < 0.02:
        return deepcopy(random.choice(ABSURD)), "all of it"
    return content, ", ".join(done)


def dumped(content: Any) -> bytes:
    """Return JSON in UTF-8, with NaN and infinity as Python spells them."""
    text = json.dumps(content, ensure_ascii=True)
    return text.replace(f'"{DEEP}"', "[" * NESTING + "]" * NESTING).encode()


def mutate_safetensors(data: bytes, random: Random) -> tuple[bytes, str]:
    """Change the header: its length, the types, shapes and places of tensors, the metadata; or the numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = random.choice(("tensor", "tensor", "json", "metadata", "length", "numbers", "order"))
    if kind == "length":
        wrong = random.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1, 100_000_001))
        return struct.pack("<Q", wrong) + data[8:], f"a header of {wrong:,} bytes"
    if kind == "numbers":
        pattern = random.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x00\x00\x00"))
        return data[: 8 + length] + (pattern * (len(body) // 4 + 1))[: len(body)], f"all numbers {pattern.hex()}"
    if kind == "json":
        header, done = mutate_value(header, random)
    elif kind == "metadata":
        done = _mutate_metadata(header, random)
    elif kind == "order":
        names = [name for name in header if name != "__metadata__"]
        first, second = random.choice(names), random.choice(names)
        header[first], header[second], done = header[second], header[first], f"{first} and {second} swapped"
    else:
        done = _mutate_tensor(header, random)
    text = dumped(header)
    return struct.pack("<Q", len(text)) + text + body, done


def mutate_npy(data: bytes, random: Random) -> tuple[bytes, str]:
    """Change the header of a .npy file: type, order, shape, its text, its version, its length."""
    start = data.index(b"{")
    stop = data.index(b"\n", start)
    text, body = data[start:stop].decode("latin1").rstrip(), data[stop + 1 :]
    kind = random.choice(("descr", "shape", "order", "text", "version", "length"))
    if kind == "version":
        version = random.choice((b"\x00\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09", b"\xff\xff"))
        return data[:6] + version + data[8:], f"version {version.hex()}"
    if kind == "length":
        wrong = random.choice((0, 1, 10, 0xFFFF, len(data) % 0xFFFF))
        return data[:8] + struct.pack("<H", wrong) + data[10:], f"a header of {wrong} bytes"
    changed = _mutate_npy_text(text, kind, random)
    header = changed.encode("utf-8", "surrogatepass") + b"\n"
    if len(header) < 2**16:
        return data[:8] + struct.pack("<H", len(header)) + header + body, f"the header {changed[:80]}"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + body, f"the header {changed[:80]}"


def _mutate_npy_text(text: str, kind: str, random: Random) -> str:
    """Return the dictionary of a .npy header with another type, shape or order, or something else in its place."""
    fields = text.split("'shape':")
    if kind == "shape" and len(fields) == 2:
        return f"{fields[0]}'shape': {random.choice(SHAPES)}, }}"
    if kind == "descr":
        before, _, rest = text.partition("'descr': ")
        return f"{before}'descr': {random.choice(DESCRS)!r},{rest.partition(',')[2]}"
    if kind == "order":
        return text.replace("False", random.choice(("True", "None", "0", "'x'", "[]")))
    return random.choice(
        ("{", "{}", "[]", "(" * 9_000, "9" * 50_000, "{'descr': 1}", "\x00", text * 2, "-" * 9_000 + "1", "x.y")
    )


def _near(value: Any, random: Random) -> Any:
    """Return an absurd value, or one that is close to the right one."""
    if isinstance(value, int) and random.random() < 0.3:
        return random.choice(
            (value + 1, value - 1, -value, 2 * value, str(value)[:20] + ".0", str(value % 10**9), [value])
        )
    if isinstance(value, str) and random.random() < 0.3:
        return random.choice((value.upper(), value[:-1], value + "x", [value], value[::-1]))
    return deepcopy(random.choice(ABSURD))


def _places(content: Any) -> "list[tuple[Any, Any]]":
    """Return (parent, key) of every value in parsed JSON, at any depth."""
    found: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        parent = waiting.pop()
        if isinstance(parent, (dict, list)):
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            found += [(parent, key) for key in keys]
            waiting += [parent[key] for key in keys]
    return found


def _mutate_tensor(header: dict[str, Any], random: Random) -> str:
    """Change the type, the shape or the place of one tensor."""
    name = random.choice([name for name in header if name != "__metadata__"])
    entry, key = header[name], random.choice(("dtype", "shape", "data_offsets"))
    before = entry[key]
    if key == "dtype":
        entry[key] = random.choice(DTYPES)
    elif random.random() < 0.5:
        entry[key] = [_near(number, random) for number in before] or [2**31]
    else:
        entry[key] = random.choice((before[::-1], [10**12] * len(before), [], [*before, 1], [0, 0], [2**63, 2**63 + 4]))
    return f"{key} of {name} {str(entry[key])[:40]}"


def _mutate_metadata(header: dict[str, Any], random: Random) -> str:
    """Change the JSON in the metadata of a training state; a file of weights alone has none, and gets some."""
    metadata = header.setdefault("__metadata__", {"values": "{}"})
    key = random.choice(sorted(metadata))
    try:
        content, done = mutate_value(json.loads(metadata[key]), random)
        metadata[key] = dumped(content).decode()
    except ValueError:
        metadata[key] = done = str(random.choice(ABSURD))
    return f"metadata {key}: {done}"


MUTATE: dict[str, Callable[[bytes, Random], tuple[bytes, str]]] = {
    ".json": mutate_json,
    ".safetensors": mutate_safetensors,
    ".npy": mutate_npy,
}
