"""Code data sets of a stranger: read correctly, or refused in one line.

Either way the memory is bounded, and no file outside the folder is opened.
"""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.codes.dataset import CodeDataset
from pipeline.codes.hashes import HashedFile
from pipeline.codes.manifest import MOST_SHARDS, read_manifest
from pipeline.codes.shard import map_npy, npy_bytes, read_names
from pipeline.codes.tables import add_table
from pipeline.codes.verify import verify_codes
from pipeline.codes.writer import write_codes
from pipeline.errors import InputError
from pipeline.runtime.atomic_files import sha256
from pipeline.runtime.process_group import ProcessGroup

from ..disks import without_waiting_for_the_disk  # noqa: F401 (a fixture of this module)
from ..mutations import IRREGULAR, mutated_bytes, mutated_json, watched
from ..support import digest_of
from .code_folders import GRID, random_rows, read_by_numpy, request, write_rows

MOST_MEMORY = 2**24  # bytes; the numbers in the files ask for up to 10^400
ROWS = random_rows(10)
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="pipes and links")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 grids in 3 shards and a table; the first reading is done, which imports modules."""
    folder = tmp_path_factory.mktemp("strangers") / "codes"
    write_rows(folder, ROWS)
    add_table(folder, "npz")
    use(folder)
    return folder


def content_of(folder: Path) -> Any:
    """Return the JSON of an intact manifest, without the checksum that would refuse every change of it."""
    content = json.loads((folder / "manifest.json").read_bytes())
    del content["checksum"]
    return content


def use(folder: Path) -> None:
    """Read everything in the ways that training, decoding and verify-codes do; what comes back is what numpy reads."""
    dataset = CodeDataset(folder)
    dataset.check_files()
    entries = dataset.manifest.shards
    stored = [np.load(folder / next(iter(entry.files))) for entry in entries]
    np.testing.assert_array_equal(
        dataset.batch(np.arange(len(dataset)))[0], np.concatenate([ROWS.all_codes[:0], *stored])
    )
    assert len(list(dataset.names())) == len(dataset.labels) == len(dataset)


def refused(action: Callable[[], object]) -> str | None:
    """Return the line of the InputError that `action` raises, None if it raises nothing."""
    line = None
    try:
        with redirect_stderr(io.StringIO()):
            action()
    except InputError as error:
        line = str(error)
    assert line is None or ("\n" not in line and len(line) < 2_000)
    return line


def check_bounds(folder: Path, action: Callable[[], object], memory: int = MOST_MEMORY) -> str | None:
    """Return what `refused` does, after checking that little memory was taken and no file outside `folder` opened."""
    with watched() as seen:
        line = refused(action)
    assert seen.peak < memory
    assert {path for path in seen.opened if not path.is_relative_to(folder)} <= {Path(os.devnull)}
    return line


# The manifest


@given(data=st.data())
@settings(max_examples=250)
def test_any_manifest(folder: Path, data: st.DataObject) -> None:
    path = folder / "manifest.json"
    intact = path.read_bytes()
    try:
        path.write_bytes(data.draw(mutated_json(content_of(folder)) | mutated_bytes(intact)))
        check_bounds(folder, lambda: use(folder))
        printed = io.StringIO()
        with redirect_stdout(printed):
            check_bounds(folder, lambda: verify_codes(folder))
        assert not CONTROL.search(printed.getvalue())
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("num_codes", [2**31, 2**25])
def test_a_k_that_the_files_cannot_have_takes_no_memory(tmp_path: Path, num_codes: int) -> None:
    """Reading, verifying, and resuming, which counts the statistics."""
    rows = random_rows(10, 65_537)
    write_rows(tmp_path, rows, request(rows, 65_537))
    change(tmp_path, num_codes=num_codes)
    assert check_bounds(tmp_path, lambda: list(CodeDataset(tmp_path).shards())) is None
    assert check_bounds(tmp_path, lambda: verify_codes(tmp_path)) is None
    change(tmp_path, statistics={})
    assert check_bounds(tmp_path, lambda: write_rows(tmp_path, rows, request(rows, num_codes))) is None
    assert check_bounds(tmp_path, lambda: verify_codes(tmp_path)) is None


def change(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    content.pop("checksum", None)
    (folder / "manifest.json").write_text(json.dumps({**content, **fields}))


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"num_codes": 10**12}, "K = 1000000000000"),
        ({"grid": [2**31, 2**31]}, "the grid [2147483648, 2147483648]"),
        ({"grid": [10**400, 1]}, "the grid [1000"),
        ({"grid": [-3, -5]}, "the grid [-3, -5]"),
        ({"image": {"height": 10**12, "width": 1, "channels": 1}}, "the image [1000000000000, 1]"),
        ({"image": {"height": 6_000, "width": 10, "channels": 1}}, "the image [6000, 10] for the grid [3, 5]"),
        ({"image": {"height": 6, "width": 0, "channels": 1}}, "the image [6, 0]"),
        ({"image": {"height": 6, "width": 10, "channels": 10**12}}, "the image {'height': 6"),
        ({"total": 2**62}, "as total"),
        ({"total": 10**9, "shard_size": 1}, f"as the number of shards, which is from 0 to {MOST_SHARDS:,}"),
        ({"shard_size": 2**62}, "as shard_size"),
        ({"class_names": ["a"] * (2**20 + 1)}, "as the number of class names"),
        ({"statistics": {"perplexity": float("nan")}}, "the number NaN"),
        ({"tables": {"nul.npz": "0" * 64}}, "a table in the file 'nul.npz'"),
        ({"format_version": 10**400}, "1000"),
    ],
)
def test_numbers_that_no_data_set_has(tmp_path: Path, folder: Path, fields: dict[str, Any], got: str) -> None:
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    change(tmp_path, **fields)
    line = refused(lambda: read_manifest(tmp_path))
    assert line is not None
    assert got in line
    assert str(tmp_path / "manifest.json") in line


def test_a_file_of_two_shards(tmp_path: Path, folder: Path) -> None:
    """Each byte is read once, whatever a manifest says."""
    copy = tmp_path / "codes"
    shutil.copytree(folder, copy)
    shards = content_of(folder)["shards"]
    change(copy, shards=[shards[0], {**shards[0], "start": 4}, shards[2]])
    for action in (lambda: CodeDataset(copy), lambda: verify_codes(copy)):
        assert (line := refused(action)) is not None
        assert "codes-00000.npy" in line


def test_a_manifest_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(2**36)  # sparse
    line = check_bounds(tmp_path, lambda: read_manifest(tmp_path))
    assert line is not None
    assert "68,719,476,736 bytes, more than" in line


def test_a_manifest_whose_checksum_is_not_its_own(folder: Path, tmp_path: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(data.replace(b'"here | there"', b'"here | where"'))
    line = refused(lambda: read_manifest(tmp_path))
    assert line is not None
    assert "another content than its checksum says (if it was changed on purpose: remove checksum)" in line


def test_a_changed_manifest_without_a_checksum_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    change(tmp_path, source="elsewhere")
    assert read_manifest(tmp_path).source == "elsewhere"


# Names


@given(data=st.data())
@settings(max_examples=100)
def test_any_names(folder: Path, data: st.DataObject) -> None:
    valid = [f"été/{row} 線.png" for row in range(4)]
    content = data.draw(mutated_json(valid) | mutated_bytes(json.dumps(valid).encode()))
    path = folder / "names-any"
    path.write_bytes(content)
    try:
        found: list[str] = []
        line = check_bounds(folder, lambda: found.extend(read_names(HashedFile(path, sha256(content)), 4)))
        assert (line is None) == (len(found) == 4)
        assert found in ([], json.loads(content) if found else [])
        other = refused(lambda: read_names(HashedFile(path, "0" * 64), 4))
        assert other is not None
        assert str(path) in other
    finally:
        path.unlink()


def test_names_longer_than_names_are_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "names", "wb") as file:
        file.truncate(2**36)  # sparse
    line = check_bounds(tmp_path, lambda: read_names(HashedFile(tmp_path / "names", ""), 4))
    assert line is not None
    assert "more than the" in line


# Headers of .npy files

ARRAY = np.arange(30, dtype=np.uint8).reshape(2, 3, 5)
DESCRS = ["'|u1'", "'|O'", "'<u2'", "'<i3'", "'(2,3)u1'", "[('a', '<i4'), ('b', '|O')]", "('|u1', (1000000000,))"]
SHAPES = [
    "(2, 3, 5)",
    "(2147483648, 2147483648, 4)",
    "(-2, -3, 5)",
    "(2, 3, 5",
    "((2, 3), 5)",
    "(30,)",
    "()",
    "(2.0, 3, 5)",
]
OTHERS = [
    "'a': 1",
    "'fortran_order': True",
    "'fortran_order': 1",
    "'a': " + "(" * 400,
    "'a': " + "-" * 400,
    "'a': b'\\xff'",
]


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Draw a .npy file with a header that looks like one."""
    parts = [
        f"'descr': {draw(st.sampled_from(DESCRS))}",
        draw(st.sampled_from(["'fortran_order': False", *OTHERS])),
        f"'shape': {draw(st.sampled_from(SHAPES))}",
    ]
    text = "{" + ", ".join(parts) + ", }"
    if draw(st.booleans()):
        text = draw(st.sampled_from(["[" * 500, "{" * 90_000, text * 3, "", "\0" * 118, text + "\n" * 60]))
    version = draw(st.sampled_from([1, 1, 1, 2, 3, 4, 0]))
    length = draw(st.sampled_from([len(text), len(text), len(text), len(text) + 1, 0, 2**31 - 1])) % (
        2**16 if version == 1 else 2**32
    )
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2 if version == 1 else 4, "little") + text.encode()


@given(data=headers().map(lambda header: header + ARRAY.tobytes()) | mutated_bytes(npy_bytes(ARRAY)))
@settings(max_examples=250)
def test_any_header(folder: Path, data: bytes) -> None:
    """What is mapped is what numpy reads from it; numpy is asked only then."""
    path = folder / "any.npy"
    path.write_bytes(data)
    try:
        found: list[np.ndarray] = []
        line = check_bounds(folder, lambda: found.append(map_npy(path, ARRAY.shape, ARRAY.dtype)), 2**18)
        assert (line is None) == bool(found)
        for array in found:
            np.testing.assert_array_equal(array, np.load(path))
    finally:
        path.unlink()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("shape", [(2, 3, 5), (6,), (1, 1, 1)])
def test_the_headers_that_numpy_writes(
    tmp_path: Path, version: tuple[int, int], dtype: type, shape: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    with open(tmp_path / "array.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=version)
    np.testing.assert_array_equal(map_npy(tmp_path / "array.npy", shape, array.dtype), array)


# Entries of an unfinished export, and what a resumed one finds


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """All shards written, none counted: a manifest of no grids, and the entries in their files."""
    out = tmp_path_factory.mktemp("unfinished") / "codes"
    shutil.copytree(folder, out)
    shards = content_of(out)["shards"]
    change(out, shards=[], count=0, statistics={}, tables={})
    for name in ("README.md", "codes.npz"):
        (out / name).unlink()
    for index, shard in enumerate(shards):
        (out / f"shard-{index:05d}.json").write_text(json.dumps(shard))
    return out


def check_resumes(copy: Path) -> None:
    """Check that the same request writes what is missing, and that its manifest can be read."""
    write_rows(copy, ROWS)
    assert read_manifest(copy).complete
    found = read_by_numpy(copy)
    np.testing.assert_array_equal(found.all_codes, ROWS.all_codes)
    assert found.all_names == ROWS.all_names
    assert not list(copy.glob("shard-*.json"))


@given(data=st.data())
@settings(max_examples=80)
def test_any_entry(unfinished: Path, data: st.DataObject) -> None:
    """It counts, or its shard is written again; an export is never stuck."""
    name = data.draw(st.sampled_from(["shard-00000.json", "shard-00001.json", "shard-00002.json"]))
    valid = json.loads((unfinished / name).read_bytes())
    content = data.draw(mutated_json(valid) | mutated_bytes((unfinished / name).read_bytes()))
    copy = unfinished.parent / "copy"
    shutil.copytree(unfinished, copy)
    try:
        (copy / name).write_bytes(content)
        assert check_bounds(copy, lambda: check_resumes(copy)) is None
    finally:
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "rubbish",
    [
        {"start": 1},
        {"start": 4},
        {"start": -4},
        {"start": 12},
        {"start": 2**62},
        {"count": 3},
        {"count": 10**12},
        {"count": 0},
        {"files": {"codes-00001.npy": "0", "labels-00001.npy": "0", "names-00001.json": "0"}},
        {"files": {"../codes-00000.npy": "0", "/etc/passwd": "0", "names-00000.json": "0"}},
        {"files": {}},
        None,
    ],
)
def test_an_entry_that_is_not_of_its_shard_is_written_again(
    tmp_path: Path, unfinished: Path, rubbish: dict[str, Any] | None
) -> None:
    copy = tmp_path / "codes"
    shutil.copytree(unfinished, copy)
    path = copy / "shard-00000.json"
    path.write_text("" if rubbish is None else json.dumps({**json.loads(path.read_bytes()), **rubbish}))
    check_resumes(copy)
    write_rows(tmp_path / "new", ROWS)
    assert digest_of(copy) == digest_of(tmp_path / "new")


def test_an_entry_beyond_the_end(tmp_path: Path, unfinished: Path) -> None:
    copy = tmp_path / "codes"
    shutil.copytree(unfinished, copy)
    (copy / "shard-00003.json").write_text(
        json.dumps({"start": 12, "count": 4, "files": {name.format(3): "" for name in ("codes-{:05d}.npy",)}})
    )
    check_resumes(copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("codes-00001.npy", npy_bytes(np.full((4, *GRID), 16, np.uint8))),
        ("codes-00001.npy", npy_bytes(np.zeros((4, 5, 3), np.uint8))),
        ("labels-00001.npy", npy_bytes(np.full(4, 3))),
        ("names-00001.json", b"[]"),
    ],
)
def test_an_entry_whose_files_hold_something_else_is_written_again(
    tmp_path: Path, unfinished: Path, name: str, content: bytes
) -> None:
    """Though their hashes are right."""
    copy = tmp_path / "codes"
    shutil.copytree(unfinished, copy)
    (copy / name).write_bytes(content)
    entry = json.loads((copy / "shard-00001.json").read_bytes())
    entry["files"][name] = sha256(content)
    (copy / "shard-00001.json").write_text(json.dumps(entry))
    check_resumes(copy)


@given(data=st.data())
@settings(max_examples=80)
def test_any_manifest_of_an_export_to_resume(folder: Path, data: st.DataObject) -> None:
    """It is refused, or what is missing is written; never is a manifest written that cannot be read again."""
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    try:
        (copy / "manifest.json").write_bytes(data.draw(mutated_json(content_of(folder))))
        check_bounds(copy, lambda: check_resumes(copy))
    finally:
        shutil.rmtree(copy)


# Folders, pipes and devices

FILES = ["manifest.json", "codes-00001.npy", "labels-00000.npy", "names-00002.json", "codes.npz", "README.md"]


@posix_only
@pytest.mark.parametrize("what", IRREGULAR)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_never_opened(tmp_path: Path, folder: Path, name: str, what: str) -> None:
    copy = tmp_path / "codes"
    shutil.copytree(folder, copy)
    IRREGULAR[what](copy / name)
    used = check_bounds(copy, lambda: use(copy))
    assert (used is None) == (name in ("codes.npz", "README.md"))
    for action in (verify_codes, write_again, write_with_force):
        line = check_bounds(copy, lambda action=action: action(copy))  # type: ignore[misc]
        assert line is not None
        assert name in line
    assert used is None or name in used


def write_again(folder: Path) -> None:
    write_rows(folder, ROWS)


def write_with_force(folder: Path) -> None:
    write_codes(folder, request(ROWS), ROWS, ProcessGroup(), force=True)


@posix_only
def test_links_to_files_are_followed(tmp_path: Path, folder: Path) -> None:
    """People keep shards on other disks."""
    copy = tmp_path / "codes"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    use(copy)
    assert refused(lambda: verify_codes(copy)) is None


@posix_only
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("there", [False, True], ids=["link to nothing", "link to a file"])
@pytest.mark.parametrize("name", ["manifest.json", "codes-00001.npy", "shard-00001.json", "README.md"])
def test_nothing_is_written_through_a_link(
    tmp_path: Path, unfinished: Path, name: str, there: bool, force: bool
) -> None:
    """A file is written under its temporary name first."""
    copy, target = tmp_path / "codes", tmp_path / "of the user"
    shutil.copytree(unfinished, copy)
    if there:
        target.write_bytes(b"mine")
    (copy / f"{name}.new").symlink_to(target)
    line = refused(lambda: write_codes(copy, request(ROWS), ROWS, ProcessGroup(), force=force))
    assert line is not None
    assert f"{name}.new" in line
    assert (target.read_bytes() == b"mine") if there else not target.exists()


# What is printed


@posix_only
def test_names_of_files_cannot_act_on_the_terminal(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "codes"
    shutil.copytree(folder, copy)
    (copy / "\x1b[31m\rred\n").touch()
    assert refused(lambda: verify_codes(copy)) is not None
    assert capsys.readouterr().out == "\\x1b[31m\\rred\\n is not of this data set\n"
