"""Copies for other programs, read by those programs; and the card, whose numbers are numpy's and whose lines run."""

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from pyarrow import parquet

from pipeline.codes import tables
from pipeline.codes.card import CARD_MARK, card
from pipeline.codes.manifest import read_manifest
from pipeline.codes.tables import add_table, check_table
from pipeline.errors import InputError

from ..conftest import CLASS_NAMES as FOLDERS
from ..conftest import Codegrid
from ..support import brightness_tokenizer, digest_of, save_tokenizer
from ..training.training_runs import Killed
from .code_folders import CLASS_NAMES, FINGERPRINT, GRID, StoppedRows, random_rows, read_by_numpy, request, write_rows

Columns = dict[str, list[Any]]
Reader = Callable[[Path], Columns]

OTHERS_WARN = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _datasets_offline_and_in_temporary_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Before the first import of datasets, which reads its settings once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


def expected_columns(folder: Path, class_names: tuple[str, ...] = CLASS_NAMES) -> Columns:
    """Return the oracle: the shards, row by row."""
    rows, flips = read_by_numpy(folder), json.loads((folder / "manifest.json").read_text("utf-8"))["flips"]
    return {
        "codes": rows.all_codes.tolist(),
        "label": rows.all_labels.tolist(),
        "class_name": [None if label == -1 else class_names[label] for label in rows.all_labels],
        "name": rows.all_names,
        "flipped": [flips and row >= len(rows) / 2 for row in range(len(rows))],
    }


def by_pyarrow(folder: Path) -> Columns:
    shards = [parquet.read_table(path) for path in sorted(folder.glob("codes-*.parquet"))]
    return pyarrow.concat_tables(shards).to_pydict()


def by_pandas(folder: Path) -> Columns:
    table = pandas.concat([pandas.read_parquet(path) for path in sorted(folder.glob("codes-*.parquet"))])
    return {
        **{name: table[name].tolist() for name in ("label", "name", "flipped")},
        "codes": [[row.tolist() for row in grid] for grid in table["codes"]],
        "class_name": [None if pandas.isna(name) else name for name in table["class_name"]],
    }


def by_duckdb(folder: Path) -> Columns:
    with duckdb.connect() as connection:
        found = connection.execute("select * from read_parquet(?)", [str(folder / "codes-*.parquet")])
        names = [column[0] for column in found.description]
        return {name: list(values) for name, values in zip(names, zip(*found.fetchall(), strict=True), strict=True)}


def by_datasets(folder: Path) -> Columns:
    import datasets

    files = sorted(str(path) for path in folder.glob("codes-*.parquet"))
    found = datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder.with_name("cache")))
    return found["train"].to_dict()


# Tables


@OTHERS_WARN
@pytest.mark.parametrize("read", [by_pyarrow, by_pandas, by_duckdb, by_datasets])
@pytest.mark.parametrize(
    ("num_codes", "dtype", "labelled", "flips"),
    [(16, "uint8", True, True), (257, "uint16", False, False), (65_537, "int32", True, False)],
)
def test_other_programs_read_the_rows_of_the_shards(
    tmp_path: Path, read: Reader, num_codes: int, dtype: str, labelled: bool, flips: bool
) -> None:
    rows = random_rows(10, num_codes, labelled=labelled)
    write_rows(tmp_path / "codes", rows, request(rows, num_codes, flips=flips))
    add_table(tmp_path / "codes", "parquet")
    columns = expected_columns(tmp_path / "codes")
    assert read(tmp_path / "codes") == columns
    assert columns["codes"] == rows.all_codes.tolist()
    assert columns["flipped"] == [flips and row >= 5 for row in range(10)]
    files = sorted((tmp_path / "codes").glob("codes-*.parquet"))
    assert [parquet.read_metadata(path).num_rows for path in files] == [4, 4, 2]
    assert {str(parquet.read_schema(path).field("codes").type.value_type.value_type) for path in files} == {dtype}


@OTHERS_WARN
@pytest.mark.parametrize("split", ["train", "test"])
def test_datasets_finds_the_table_and_its_split_by_the_card(tmp_path: Path, split: str) -> None:
    """Though the folder holds arrays and JSON too."""
    import datasets

    rows = random_rows(6)
    write_rows(tmp_path / "codes", rows, request(rows, split=split))
    add_table(tmp_path / "codes", "npz")
    add_table(tmp_path / "codes", "parquet")
    found = datasets.load_dataset(str(tmp_path / "codes"), cache_dir=str(tmp_path / "cache"))
    assert list(found) == [split]
    assert found[split].to_dict() == expected_columns(tmp_path / "codes")


@pytest.mark.parametrize(
    ("num_codes", "labelled", "flips"), [(16, True, True), (257, False, False), (65_537, True, False)]
)
def test_numpy_reads_the_npz(tmp_path: Path, num_codes: int, labelled: bool, flips: bool) -> None:
    rows = random_rows(10, num_codes, labelled=labelled)
    manifest = write_rows(tmp_path, rows, request(rows, num_codes, flips=flips))
    add_table(tmp_path, "npz")
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as found:
        assert set(found) == {"codes", "labels", "names", "class_names", "flipped"}
        stored = read_by_numpy(tmp_path)
        np.testing.assert_array_equal(found["codes"], stored.all_codes)
        np.testing.assert_array_equal(found["labels"], stored.all_labels)
        assert (found["codes"].dtype, found["labels"].dtype) == (manifest.dtype, np.int64)
        assert found["names"].tolist() == stored.all_names == rows.all_names
        assert found["class_names"].tolist() == (list(CLASS_NAMES) if labelled else [])
        assert found["flipped"].tolist() == [flips and row >= 5 for row in range(10)]


@pytest.mark.parametrize("to", ["npz", "parquet"])
def test_the_same_codes_give_the_same_bytes(tmp_path: Path, to: str) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / name, random_rows(6))
        add_table(tmp_path / name, to)
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b")
    if to == "npz":
        with zipfile.ZipFile(tmp_path / "a" / "codes.npz") as archive:
            assert {item.date_time for item in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    """As Python reads a file name of other bytes; Parquet holds Unicode only."""
    rows = random_rows(4)
    rows.all_names[2] = "caf\udce9/2.png"
    requested = replace(request(rows), class_names=["disc", "caf\udce9", "線"])
    write_rows(tmp_path, rows, requested)
    add_table(tmp_path, "npz")
    add_table(tmp_path, "parquet")
    found = by_pyarrow(tmp_path)
    assert found["name"] == [*rows.all_names[:2], "caf?/2.png", rows.all_names[3]]
    assert found["class_name"] == [None, "disc", "caf?", "線"]
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as arrays:
        assert arrays["names"].tolist() == rows.all_names
    assert "1. caf\\xe9\n" in (tmp_path / "README.md").read_text("utf-8")


def test_a_shard_is_written_before_the_next_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the memory for one shard is enough."""
    write_rows(tmp_path, random_rows(10))
    events = []

    def record(name: str) -> None:
        original = getattr(tables, name)

        def call(*arguments: Any) -> Any:
            events.append(name)
            return original(*arguments)

        monkeypatch.setattr(tables, name, call)

    record("open_shard")
    record("write_atomic")
    add_table(tmp_path, "parquet")
    assert events == ["open_shard", "write_atomic"] * 3


def test_a_long_shard_is_written_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(12)
    write_rows(tmp_path, rows, request(rows, shard_size=7, flips=True))
    monkeypatch.setattr(tables, "ROW_GROUP", 3 * GRID[0] * GRID[1])
    add_table(tmp_path, "parquet")
    metadata = parquet.read_metadata(tmp_path / "codes-00000.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 3, 1]
    assert by_pyarrow(tmp_path) == expected_columns(tmp_path)


def test_a_grid_larger_than_a_group_is_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, random_rows(2))
    monkeypatch.setattr(tables, "ROW_GROUP", 1)
    add_table(tmp_path, "parquet")
    assert by_pyarrow(tmp_path) == expected_columns(tmp_path)


# Tables by the command


@pytest.fixture
def exported(tmp_path: Path, grey_folder: Path, codegrid: Codegrid) -> Path:
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder)
    assert codegrid(*export(tmp_path / "codes")).status == 0
    return tmp_path / "codes"


def export(out: Path, *options: object) -> list[object]:
    command = ["export-codes", "--tokenizer", out.with_name("tokenizer"), "--out", out]
    return [*command, "--shard-size", 7, "--device", "cpu", *options]


def forbid_encoding(patch: pytest.MonkeyPatch) -> None:
    def encode(*arguments: object, **options: object) -> None:
        raise AssertionError("an image is encoded")

    patch.setattr("pipeline.codes.encoded_images.encode_images", encode)


def test_a_table_is_added_to_finished_codes(
    exported: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_encoding(monkeypatch)
    before = digest_of(exported)
    for to, suffixes in (("npz", {".npz"}), ("parquet", {".npz", ".parquet"})):
        assert codegrid(*export(exported, "--to", to)).status == 0
        named = read_manifest(exported).tables
        assert {Path(name).suffix for name in named} == suffixes
        assert list(named) == sorted(named)
        for name, digest in named.items():
            assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    after = digest_of(exported)
    changed = {"manifest.json", "README.md"}
    assert {name: after[name] for name in before.keys() - changed} == {
        name: before[name] for name in before.keys() - changed
    }
    assert after.keys() - before.keys() == set(named)
    found = by_pyarrow(exported)
    assert found == expected_columns(exported, FOLDERS)
    assert found["class_name"] == [name.partition("/")[0] for name in found["name"]]
    assert codegrid("verify-codes", exported).status == 0
    codegrid(*export(exported))
    assert digest_of(exported) == after, "tables are kept when none is requested"
    assert codegrid("verify-codes", exported).status == 0


def test_a_damaged_table_is_found_and_written_again(exported: Path, codegrid: Codegrid) -> None:
    codegrid(*export(exported, "--to", "parquet"))
    path = exported / "codes-00001.parquet"
    intact = path.read_bytes()
    path.write_bytes(intact[:-1])
    outcome = codegrid("verify-codes", exported)
    assert outcome.status == 1
    assert "codes-00001.parquet has other bytes" in outcome.err
    assert codegrid(*export(exported, "--to", "parquet")).status == 0
    assert path.read_bytes() == intact


def test_without_pyarrow_nothing_is_begun(exported: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.codes.tables.find_spec", lambda name: None)
    out = exported.with_name("other")
    outcome = codegrid(*export(out, "--to", "parquet"))
    assert outcome.status == 1
    assert outcome.error_lines == [
        "Error: expected the library pyarrow for --to parquet, got none; pip install 'codegrid[parquet]'"
    ]
    assert not out.exists()
    assert codegrid(*export(exported, "--to", "npz")).status == 0


def test_codes_too_many_for_an_npz(exported: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch) -> None:
    size = read_by_numpy(exported).all_codes.nbytes
    before = digest_of(exported)
    monkeypatch.setattr(tables, "LARGEST_NPZ", size - 1)
    outcome = codegrid(*export(exported, "--to", "npz"))
    assert (outcome.status, digest_of(exported)) == (1, before)
    limit = f"expected at most {size - 1:,} bytes of codes for --to npz, got {size:,}; use --to parquet"
    assert outcome.error_lines[-1] == f"Error: {limit}"
    monkeypatch.setattr(tables, "LARGEST_NPZ", size)
    assert codegrid(*export(exported, "--to", "npz")).status == 0


def test_a_request_is_refused_before_anything_is_written() -> None:
    """The size follows from the request alone, whatever is written of it."""
    rows = random_rows(10)
    requested = replace(request(rows), total=2**40)
    check_table("parquet", requested)
    with pytest.raises(InputError, match="use --to parquet"):
        check_table("npz", requested)


def test_no_such_format(tmp_path: Path) -> None:
    write_rows(tmp_path, random_rows(2))
    with pytest.raises(InputError, match="expected npz or parquet as --to, got csv"):
        add_table(tmp_path, "csv")


# The card


def facts_of(text: str) -> dict[str, str]:
    """Return the table of the card."""
    return dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", text, re.MULTILINE))


@pytest.mark.parametrize(("num_codes", "bits"), [(2, 1), (16, 4), (17, 5), (256, 8), (257, 9), (65_537, 17)])
def test_the_numbers_of_the_card_are_those_of_numpy(tmp_path: Path, num_codes: int, bits: int) -> None:
    rows = random_rows(10, num_codes)
    write_rows(tmp_path, rows, request(rows, num_codes, split="test"))
    text, codes = (tmp_path / "README.md").read_text("utf-8"), read_by_numpy(tmp_path).all_codes
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    entropy = -(shares * np.log2(shares)).sum()
    assert facts_of(text) == {
        "grids": "10, of the test split of here \\| there",
        "grid": f"3x5 codes, each from 0 to {num_codes - 1:,} (K = {num_codes:,})",
        "images": "6x10 pixels, grey",
        "mirrored": "no",
        "stored as": f"{codes.dtype}, {codes.nbytes:,} bytes",
        "packed": f"{bits * math.prod(GRID) / 8:,.1f} bytes an image, at {bits} bits per code",
        "entropy": f"{entropy:.3f} bits per code (order 0)",
        "codes in use": f"{len(counts):,}, perplexity {2**entropy:.1f}",
        "tokenizer": f"fingerprint (SHA-256 of its model.safetensors) {FINGERPRINT}",
        "made with": "device cpu, torch 2",
    }
    assert "Classes, by label:\n\n0. disc\n1. été\n2. 線\n" in text
    assert "The number of such pairs is 3." in text


def test_a_card_without_labels_or_tables_names_none(tmp_path: Path) -> None:
    write_rows(tmp_path, random_rows(5, labelled=False))
    text = (tmp_path / "README.md").read_text("utf-8")
    assert text.startswith(CARD_MARK)
    assert not re.search(r"Classes|\.npz|parquet", text)


def test_a_card_of_mirrored_images_says_where_they_are(tmp_path: Path) -> None:
    rows = random_rows(6)
    write_rows(tmp_path, rows, request(rows, flips=True))
    text = (tmp_path / "README.md").read_text("utf-8")
    assert facts_of(text)["mirrored"] == "rows from 3 on are those before them, mirrored left to right"


@OTHERS_WARN
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_python_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    """Each block by itself, in the folder."""
    rows = random_rows(6)
    write_rows(tmp_path, rows, request(rows, split=split))
    add_table(tmp_path, "parquet")
    add_table(tmp_path, "npz")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text("utf-8"), re.DOTALL)
    scopes: list[dict[str, Any]] = [{} for _ in blocks]
    for block, scope in zip(blocks, scopes, strict=True):
        exec(compile(block, "README.md", "exec"), scope)
    by_numpy, by_codegrid, datasets, npz = scopes
    np.testing.assert_array_equal(by_numpy["codes"], rows.all_codes[:4])
    np.testing.assert_array_equal(by_numpy["labels"], rows.all_labels[:4])
    assert isinstance(by_numpy["codes"], np.memmap)
    assert by_codegrid["codes"].dtype == torch.int64
    np.testing.assert_array_equal(by_codegrid["codes"], rows.all_codes[0])
    assert by_codegrid["label"] == rows.all_labels[0]
    assert datasets["rows"].to_dict() == expected_columns(tmp_path)
    assert str(datasets["rows"].split) == split
    np.testing.assert_array_equal(npz["codes"], rows.all_codes)


def test_a_card_is_written_once_all_grids_are(tmp_path: Path) -> None:
    rows = random_rows(10)
    with pytest.raises(Killed):
        write_rows(tmp_path, StoppedRows(**vars(rows), stop_at=8))
    assert not (tmp_path / "README.md").exists()
    manifest = write_rows(tmp_path, rows)
    assert (tmp_path / "README.md").read_text("utf-8") == card(manifest) == card(read_manifest(tmp_path))


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_readme_of_the_user_is_kept(tmp_path: Path, exported: Path, codegrid: Codegrid, force: list[str]) -> None:
    for out in (tmp_path / "new", exported):
        out.mkdir(exist_ok=True)
        (out / "README.md").write_text("# My own words, é\n", "utf-8")
        before = digest_of(out)
        outcome = codegrid(*export(out, *force))
        assert outcome.status == 1
        assert "README.md" in outcome.error_lines[-1]
        assert digest_of(out) == before


def test_an_earlier_card_is_replaced(exported: Path, codegrid: Codegrid) -> None:
    intact = (exported / "README.md").read_bytes()
    (exported / "README.md").write_bytes(intact + b"\nSomething added.\n")
    assert codegrid(*export(exported)).status == 0
    assert (exported / "README.md").read_bytes() == intact
