"""The manifest of a code data set: what is accepted, also of the first version, and what contradicts itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.codes.manifest import CodeManifest, code_dtype, read_manifest, write_manifest
from pipeline.errors import InputError
from pipeline.runtime.sealed_json import sealed

EARLIER: dict[str, Any] = {  # as the first version wrote it
    "count": 5,
    "num_codes": 16,
    "grid": [4, 6],
    "dtype": "uint8",
    "class_names": ["disc", "été"],
    "split": "train",
    "source": "glyphs",
    "image": {"height": 8, "width": 12, "channels": 1},
    "tokenizer_fingerprint": "0" * 64,
    "shards": [
        {"count": 3, "files": {"codes-00000.npy": "a", "labels-00000.npy": "b", "names-00000.json": "c"}},
        {"count": 2, "files": {"codes-00001.npy": "d", "labels-00001.npy": "e", "names-00001.json": "f"}},
    ],
    "format_version": 1,
}


STARTED = [{**shard, "start": start} for shard, start in zip(EARLIER["shards"], (0, 3), strict=True)]


def read(folder: Path, content: Any) -> CodeManifest:
    (folder / "manifest.json").write_text(json.dumps(content), "utf-8")
    return read_manifest(folder)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = replace(
        read(tmp_path, EARLIER),
        total=7,
        shard_size=3,
        flips=True,
        rows_sha256="1" * 64,
        made_with={"device": "cpu"},
        statistics={"perplexity": 3.5},
        tables={"codes.npz": "2" * 64},
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert not manifest.complete


def test_a_manifest_of_the_first_version(tmp_path: Path) -> None:
    manifest = read(tmp_path, EARLIER)
    assert manifest.complete
    assert (manifest.grid, manifest.class_names) == ((4, 6), ["disc", "été"])
    assert (manifest.total, manifest.shard_size, manifest.flips, manifest.tables) == (None, None, False, {})


def test_shards_of_the_first_version_start_where_the_one_before_ends(tmp_path: Path) -> None:
    assert [(shard.start, shard.count) for shard in read(tmp_path, EARLIER).shards] == [(0, 3), (3, 2)]


def test_a_field_of_a_later_version_is_ignored(tmp_path: Path) -> None:
    assert read(tmp_path, {**EARLIER, "colour": "red"}) == read(tmp_path, EARLIER)


@pytest.mark.parametrize("name", [name for name in EARLIER if name != "format_version"])
def test_a_field_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"manifest.json, got no {name}; export the codes again"):
        read(tmp_path, {key: value for key, value in EARLIER.items() if key != name})


def with_files(*names: str) -> list[dict[str, Any]]:
    return [{"count": 5, "files": dict.fromkeys(names, "")}]


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"count": 4}, "a count of 4 over shards of 5 grids"),
        ({"count": 0, "shards": [{**EARLIER["shards"][0], "count": 0}]}, "0 as shards[0].count"),
        ({"count": 1, "shards": [{**EARLIER["shards"][0], "count": n} for n in (2, -1)]}, "-1 as shards[1].count"),
        ({"total": 4}, "4 as total, which is from 5 to "),
        ({"dtype": "uint16"}, "codes of uint16 for K = 16"),
        ({"num_codes": 257}, "codes of uint8 for K = 257"),
        ({"num_codes": 0}, "codes of uint8 for K = 0"),
        ({"dtype": "object"}, "codes of object"),
        ({"grid": [4]}, "the list [4] as grid"),
        ({"grid": [4, 0]}, "the grid"),
        ({"grid": [4.0, 6]}, "the float 4.0 as grid[0]"),
        ({"shards": with_files("../codes.npy", "l.npy", "n.json")}, "as shards[0].files"),
        ({"shards": with_files("c.npy", "/l.npy", "n.json")}, "as shards[0].files"),
        ({"shards": with_files("c.npy", "l.npy", "a/n.json")}, "as shards[0].files"),
        ({"shards": with_files("c.npy", "l.npy")}, "as shards[0].files"),
        ({"shards": with_files("c.npy", "..", "n.json")}, "as shards[0].files"),
        ({"shards": with_files("c.npy", "a\\l.npy", "n.json")}, "as shards[0].files"),
        ({"shards": with_files("c.npy", "\0", "n.json")}, "as shards[0].files"),
        ({"shards": with_files("c.npy", "\ud800", "n.json")}, "as shards[0].files"),
        ({"shards": with_files("c.npy", "", "n.json")}, "as shards[0].files"),
        ({"shards": [{"count": 5}]}, "no shards[0].files"),
        ({"shards": [{"files": EARLIER["shards"][0]["files"]}]}, "no shards[0].count"),
        ({"shards": [EARLIER["shards"][0], 5]}, "the int 5 in place of shards[1]"),
        ({"shards": [EARLIER["shards"][0], None]}, "the NoneType None in place of shards[1]"),
        ({"shards": [EARLIER["shards"][0], [EARLIER["shards"][1]]]}, "in place of shards[1]"),
        *(
            ({"shards": [EARLIER["shards"][0], {**EARLIER["shards"][1], name: value}]}, f"as shards[1].{name}")
            for name, value in [
                *(("count", value) for value in ("2", 2.0, True, None, [2], {"a": 2})),
                *(("start", value) for value in ("3", 3.0, True, None, [3])),
                *(("files", value) for value in (["a", "b", "c"], "abc", None, {"c.npy": 1, "l.npy": 2, "n.json": 3})),
                ("files", {"c.npy": ["d"], "l.npy": {}, "n.json": None}),
            ]
        ),
        ({"shards": [EARLIER["shards"][0], {**EARLIER["shards"][1], "start": -3}]}, "-3 as shards[1].start"),
        ({"shard_size": 0, "shards": STARTED}, "0 as shard_size"),
        ({"shard_size": -3, "shards": STARTED}, "-3 as shard_size"),
        ({"shard_size": 3}, "no shards[0].start"),
        ({"num_codes": 2**31 + 1, "dtype": "int32"}, "K = 2147483649"),
        ({"total": -5, "count": 0, "shards": []}, "-5 as total"),
        *(({"tables": {name: "0" * 64}}, "a table in the file") for name in ("../a", "..", "a/b", "a\\b", "", "\0")),
    ],
)
def test_a_manifest_that_contradicts_itself(tmp_path: Path, change: dict[str, Any], got: str) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, {**EARLIER, **change})
    assert str(error.value).startswith(f"expected the manifest of a code data set in {tmp_path / 'manifest.json'}, got")
    assert got in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("count", "5"), ("count", 5.0), ("num_codes", 16.0), ("split", None), ("source", 3), ("image", [8, 12, 1])],
        *[("class_names", None), ("class_names", "cat"), ("class_names", ["cat", 1]), ("tokenizer_fingerprint", 0)],
        *[("total", "5"), ("shards", {}), ("flips", None), ("tables", None), ("grid", {"a": 4, "b": 6})],
        *[(name, True) for name in ("count", "num_codes", "total", "statistics")],
        *[("grid", [True, 6]), ("flips", 1), ("rows_sha256", None), ("made_with", {"torch": 2})],
        *[("image", {"height": "8", "width": 12, "channels": 1}), ("image", {"height": 8, "width": 12})],
        *[("image", {"height": 8, "width": 12, "channels": True}), ("tables", {"codes.npz": 1}), ("tables", ["a"])],
        *[("statistics", {"perplexity": "3"}), ("statistics", {"perplexity": True}), ("statistics", [3.0])],
    ],
)
def test_a_field_of_another_type(tmp_path: Path, name: str, value: Any) -> None:
    named = name.replace("_", "[ _]")
    with pytest.raises(InputError, match=rf"manifest.json, got .*{named}.*; export the codes again"):
        read(tmp_path, {**EARLIER, name: value})


@pytest.mark.parametrize("value", ["3", 3.0, [3], True])
def test_a_shard_size_of_another_type(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match=rf"got the {type(value).__name__} .* as shard_size; export the codes again"):
        read(tmp_path, {**EARLIER, "shards": STARTED, "shard_size": value})


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"[]", b"\xff", b'{"grid": [2, 3], "count": 1}'])
def test_a_file_that_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"expected the manifest of a code data set .*; export the codes again"):
        read_manifest(tmp_path)


def test_another_format_version(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected format version 1 .*, got 2; use the version of codegrid"):
        read(tmp_path, {**EARLIER, "format_version": 2, "grid": "another thing now"})


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"format_version": 2, "count": "5"}, "expected format version 1"),
        ({"count": "5", "total": 4}, "the str '5' as count"),
        ({"total": 4}, "4 as total"),
        ({"source": "elsewhere"}, "another content than its checksum says"),
    ],
)
def test_what_is_wrong_is_named_in_the_order_of_what_it_explains(
    tmp_path: Path, change: dict[str, Any], got: str
) -> None:
    """In a manifest whose checksum is not its own, either."""
    (tmp_path / "manifest.json").write_bytes(sealed(EARLIER))
    content = json.loads((tmp_path / "manifest.json").read_bytes())
    assert read(tmp_path, content).count == 5
    with pytest.raises(InputError, match=got):
        read(tmp_path, {**content, **change})


@pytest.mark.parametrize(
    ("num_codes", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "int32")]
)
def test_the_smallest_type_that_holds_every_code(num_codes: int, dtype: str) -> None:
    assert code_dtype(num_codes) == np.dtype(dtype)
    assert np.iinfo(dtype).max >= num_codes - 1
