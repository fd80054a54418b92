"""verify-codes: an intact folder passes, any damage is reported with its file, and nothing is changed."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.codes.export import export_codes
from pipeline.codes.manifest import read_manifest
from pipeline.codes.tables import add_table
from pipeline.images.image_set import open_images
from pipeline.runtime import untrusted_files
from pipeline.runtime.folder_lock import LOCK

from ..conftest import Codegrid, Trained
from ..support import Outcome, brightness_tokenizer, digest_of, save_tokenizer
from ..training.training_runs import Killed
from .code_folders import CLASS_NAMES, FINGERPRINT, GRID, StoppedRows, random_rows, request, write_rows

Damage = Callable[[Path], object]


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    """10 grids in 3 shards, with tables of both formats."""
    write_rows(tmp_path / "codes", random_rows(10))
    add_table(tmp_path / "codes", "npz")
    add_table(tmp_path / "codes", "parquet")
    return tmp_path / "codes"


def check(codegrid: Codegrid, folder: Path, *options: object) -> Outcome:
    """Run verify-codes, which changes no byte and, if it fails, says so in one line."""
    before = digest_of(folder)
    outcome = codegrid("verify-codes", folder, *options)
    assert digest_of(folder) == before
    assert outcome.status == (0 if outcome.out.startswith("as its manifest says: ") else 1)
    assert sum(line.startswith("Error: ") for line in outcome.error_lines) == outcome.status
    return outcome


# Intact folders


@pytest.mark.parametrize("num_codes", [2, 256, 257, 65_536, 65_537])
@pytest.mark.parametrize("labelled", [True, False])
def test_an_intact_folder_passes(tmp_path: Path, codegrid: Codegrid, num_codes: int, labelled: bool) -> None:
    rows = random_rows(10, num_codes, labelled=labelled)
    write_rows(tmp_path, rows, request(rows, num_codes, flips=True))
    for to in (None, "npz", "parquet"):
        if to is not None:
            add_table(tmp_path, to)
        outcome = check(codegrid, tmp_path)
        assert outcome.status == 0
        assert outcome.out == f"as its manifest says: 10 grids by the tokenizer {FINGERPRINT}\n"


def test_a_real_export_passes_with_its_tokenizer(trained: Trained, codegrid: Codegrid) -> None:
    assert check(codegrid, trained.codes, "--tokenizer", trained.tokenizer).status == 0


# Damaged files


def flip_a_bit(position: float) -> Callable[[Path], None]:
    """Return a function that flips a bit of the byte at this share, 0 to 1, of a file."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[round(position * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return flip


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit(0), "has other bytes than when it was written"),
        (flip_a_bit(0.5), "has other bytes than when it was written"),
        (flip_a_bit(1), "has other bytes than when it was written"),
        (shorten, "has other bytes than when it was written"),
        (lengthen, "has other bytes than when it was written"),
        (Path.unlink, "is missing"),
        (make_a_folder, "cannot be read"),
    ],
)
@pytest.mark.parametrize(
    "name", ["codes-00001.npy", "labels-00002.npy", "names-00000.json", "codes.npz", "codes-00001.parquet"]
)
def test_a_file_of_other_bytes(intact: Path, codegrid: Codegrid, name: str, damage: Damage, message: str) -> None:
    damage(intact / name)
    outcome = check(codegrid, intact)
    assert outcome.status == 1
    assert outcome.out.startswith(f"{name} {message}")
    assert outcome.out.count("\n") == 1, "each file is named once"
    assert f"got {outcome.out.strip()}; " in outcome.error_lines[-1]


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", ".hidden", "codes-00003.npy", "codes-00003.parquet", "codes-00000.npy.new", "manifest.json.new"),
        *("README.md.new", "codes.npz.new", "shard-00000.json", "commit.json", "été 線"),
    ],
)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_file_that_is_not_of_the_data_set(intact: Path, codegrid: Codegrid, name: str, form: str) -> None:
    (intact / name).touch() if form == "file" else (intact / name).mkdir()
    outcome = check(codegrid, intact)
    assert (outcome.status, outcome.out) == (1, f"{name} is not of this data set\n")
    assert outcome.out.strip() in outcome.error_lines[-1]


def test_a_table_that_the_manifest_does_not_name(intact: Path, codegrid: Codegrid) -> None:
    change_manifest(intact, tables={})
    assert check(codegrid, intact).out.splitlines() == [
        f"{name} is not of this data set"
        for name in ("codes-00000.parquet", "codes-00001.parquet", "codes-00002.parquet", "codes.npz")
    ]


def test_no_card(intact: Path, codegrid: Codegrid) -> None:
    (intact / "README.md").unlink()
    assert check(codegrid, intact).out == "README.md is missing\n"


# Wrong content whose hash is right


def replace_file(folder: Path, name: str, content: object) -> None:
    """Write an array, JSON or bytes as a shard's file, and its hash into the manifest."""
    if isinstance(content, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, content, allow_pickle=content.dtype == object)
        data = buffer.getvalue()
    else:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(data)
    shards = shards_of(folder)
    for shard in shards:
        if name in shard["files"]:
            shard["files"][name] = hashlib.sha256(data).hexdigest()
    change_manifest(folder, shards=shards)


def change_manifest(folder: Path, **fields: Any) -> None:
    """Change fields on purpose: without the checksum, as its error advises."""
    content = json.loads((folder / "manifest.json").read_text("utf-8"))
    content.pop("checksum", None)
    assert fields.keys() <= content.keys()
    (folder / "manifest.json").write_text(json.dumps({**content, **fields}), "utf-8")


def shards_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text("utf-8"))["shards"]
    return found


def with_one(value: int, dtype: type = np.uint8) -> np.ndarray:
    """Return the 4 grids of a shard, all zero but one code of row 2."""
    codes = np.zeros((4, *GRID), dtype)
    codes[2, 1, 3] = value
    return codes


ZEROS = np.zeros((4, *GRID), np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "codes-00001.npy",
            with_one(16),
            "holds codes from 0 to 16, where 0 to 15 is possible; first in row 2 of the file",
        ),
        ("codes-00001.npy", with_one(255), "holds codes from 0 to 255"),
        ("codes-00001.npy", ZEROS.astype(np.uint16), "is uint16 [4, 3, 5], in place of uint8 of the shape [4, 3, 5]"),
        ("codes-00001.npy", ZEROS.astype(np.int8), "is int8 [4, 3, 5]"),
        ("codes-00001.npy", ZEROS.transpose(0, 2, 1).copy(), "is uint8 [4, 5, 3]"),
        ("codes-00001.npy", np.asfortranarray(ZEROS), "is uint8 [4, 3, 5]"),
        ("codes-00001.npy", ZEROS[:3], "is uint8 [3, 3, 5]"),
        ("codes-00001.npy", ZEROS.reshape(4, -1), "is uint8 [4, 15]"),
        ("codes-00001.npy", b"no array", "is "),
        ("codes-00001.npy", b"", "is "),
        ("labels-00001.npy", np.array([0, 1, 3, 2]), "holds labels from 0 to 3, where -1 to 2 is possible"),
        ("labels-00001.npy", np.array([0, 1, -2, 2]), "holds labels from -2 to 2, where -1 to 2 is possible"),
        ("labels-00001.npy", np.zeros(4, np.int32), "is int32 [4], in place of int64 of the shape [4]"),
        ("labels-00001.npy", np.zeros(5, np.int64), "is int64 [5]"),
        ("labels-00001.npy", np.array([None] * 4), "is values of the type '|O', in place of"),
        ("names-00001.json", ["a", "b", "c"], "is 3 names for 4 grids, in place of"),
        ("names-00001.json", ["a", "b", "c", "d", "e"], "is 5 names for 4 grids, in place of"),
        ("names-00001.json", {"a": 1, "b": 2, "c": 3, "d": 4}, "is something else than a list of names"),
        ("names-00001.json", [1, 2, 3, 4], "is something else than a list of names"),
        ("names-00001.json", b'["a", "b"', "is "),
    ],
)
def test_wrong_content_whose_hash_is_right(
    intact: Path, codegrid: Codegrid, name: str, content: object, message: str
) -> None:
    replace_file(intact, name, content)
    outcome = check(codegrid, intact)
    assert outcome.status == 1
    assert outcome.out.startswith(f"{name} {message}")
    assert outcome.out.count("\n") == 1
    assert name in outcome.error_lines[-1]


def test_a_negative_code(tmp_path: Path, codegrid: Codegrid) -> None:
    """Where the type could hold one."""
    rows = random_rows(4, 65_537)
    write_rows(tmp_path, rows, request(rows, 65_537))
    replace_file(tmp_path, "codes-00000.npy", with_one(-1, np.int32))
    outcome = check(codegrid, tmp_path)
    assert outcome.out.startswith("codes-00000.npy holds codes from -1 to 0, where 0 to 65536 is possible")
    replace_file(tmp_path, "codes-00000.npy", with_one(65_536, np.int32))
    lines = check(codegrid, tmp_path).out.splitlines()
    assert [line[:14] for line in lines] == ["the statistics"] * 3, "K - 1 is a code"


def test_a_label_where_there_are_no_classes(tmp_path: Path, codegrid: Codegrid) -> None:
    write_rows(tmp_path, random_rows(4, labelled=False))
    replace_file(tmp_path, "labels-00000.npy", np.array([-1, -1, 0, -1]))
    outcome = check(codegrid, tmp_path)
    assert outcome.out.startswith("labels-00000.npy holds labels from -1 to 0")


# A wrong manifest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 9}, "a count of 9 over shards of 10 grids"),
        ({"total": 9}, "9 as total, which is from 10 to "),
        ({"total": 11}, "unfinished: 10 of 11 grids"),
        ({"num_codes": 8}, "codes-00000.npy holds codes from 0 to 15, where 0 to 7 is possible"),
        ({"num_codes": 300}, "codes of uint8 for K = 300"),
        ({"dtype": "uint16"}, "codes of uint16 for K = 16"),
        ({"grid": [5, 3]}, "codes-00000.npy is uint8 [4, 3, 5]"),
        ({"grid": [3]}, "the list [3] as grid"),
        ({"class_names": list(CLASS_NAMES[:2])}, "labels-00000.npy holds labels from -1 to 2"),
        ({"shard_size": 5}, "shard 0 holds rows 0 to 3, which is no shard of 5"),
        ({"format_version": 2}, "expected format version 1"),
        ({"shards": []}, "a count of 10 over shards of 0 grids"),
        ({"shard_size": 0}, "0 as shard_size"),
        ({"shard_size": -4}, "-4 as shard_size"),
        ({"rows_sha256": "0" * 63}, "rows_sha256"),
        ({"rows_sha256": "G" * 64}, "rows_sha256"),
        ({"tables": {"../codes.npz": "0" * 64}}, "a table in the file '../codes.npz'"),
    ],
)
def test_a_manifest_that_says_something_else(
    intact: Path, codegrid: Codegrid, fields: dict[str, Any], message: str
) -> None:
    change_manifest(intact, **fields)
    outcome = check(codegrid, intact)
    assert outcome.status == 1
    assert message in outcome.error_lines[-1]
    assert "manifest" in outcome.error_lines[-1]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"format_version": 1'])
def test_no_manifest_at_all(intact: Path, codegrid: Codegrid, content: bytes) -> None:
    (intact / "manifest.json").write_bytes(content)
    outcome = check(codegrid, intact)
    assert outcome.status == 1
    assert "manifest.json" in outcome.error_lines[-1]
    (intact / "manifest.json").unlink()
    assert "got no manifest.json" in check(codegrid, intact).error_lines[-1]


@pytest.mark.parametrize("name", ["start", "count", "files"])
@pytest.mark.parametrize("value", ["missing", "4", 4.0, True, None, [4], {"codes-00001.npy": 4}])
def test_a_shard_whose_entry_is_not_one(intact: Path, codegrid: Codegrid, name: str, value: Any) -> None:
    shards = shards_of(intact)
    if value == "missing":
        del shards[1][name]
    else:
        shards[1][name] = value
    change_manifest(intact, shards=shards)
    outcome = check(codegrid, intact)
    assert outcome.status == 1
    assert name in outcome.error_lines[-1]
    assert "shards[1]" in outcome.error_lines[-1]
    assert "Traceback" not in outcome.err
    assert "--debug" not in outcome.error_lines[-1], "not an unexpected error"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("codes_used", 15), ("perplexity", 3.5), ("perplexity", 1e308), ("entropy_bits_per_code", -1)],
        ("perplexity", None),
    ],
)
def test_statistics_that_the_codes_do_not_have(
    intact: Path, codegrid: Codegrid, name: str, value: float | None
) -> None:
    statistics = json.loads((intact / "manifest.json").read_text("utf-8"))["statistics"]
    actual = statistics.pop(name)
    if value is not None:
        statistics[name] = value
    change_manifest(intact, statistics=statistics)
    outcome = check(codegrid, intact)
    assert outcome.out == f"the statistics say {name} {value}, the codes have {actual}\n"


def test_statistics_that_another_machine_rounded_differently(intact: Path, codegrid: Codegrid) -> None:
    statistics = json.loads((intact / "manifest.json").read_text("utf-8"))["statistics"]
    change_manifest(intact, statistics={**statistics, "perplexity": statistics["perplexity"] * (1 + 1e-14)})
    assert check(codegrid, intact).status == 0


def test_a_finished_export_without_statistics(intact: Path, codegrid: Codegrid) -> None:
    """As a kill just before they are counted leaves it."""
    change_manifest(intact, statistics={})
    assert check(codegrid, intact).out == "the statistics are missing; the same export-codes adds them\n"


def test_statistics_are_not_compared_with_damaged_codes(intact: Path, codegrid: Codegrid) -> None:
    replace_file(intact, "codes-00001.npy", with_one(16))
    assert check(codegrid, intact).out.count("\n") == 1


# The images that the codes were made of


@pytest.mark.parametrize("change", [None, "pixel", "name", "label", "one more"])
def test_the_images_are_compared_if_they_are_named(
    tmp_path: Path, grey_folder: Path, codegrid: Codegrid, change: str | None
) -> None:
    images, codes = tmp_path / "images", tmp_path / "codes"
    shutil.copytree(grey_folder, images)
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), images)
    export_codes(tmp_path / "tokenizer", codes, device="cpu", shard_size=8, flips=True)
    manifest = read_manifest(codes)
    first = images / open_images(str(images)).train.names[0]
    {
        None: lambda: None,
        "pixel": lambda: Image.fromarray(np.asarray(Image.open(first)) ^ 1).save(first),
        "name": lambda: first.rename(first.with_name("0000.png")),
        "label": lambda: (images / "disc").rename(images / "zzz"),
        "one more": lambda: [shutil.copy(first, first.with_name(f"copy-{i}.png")) for i in range(4)],
    }[change]()
    outcome = check(codegrid, codes, "--data", images)
    if change is None:
        assert (outcome.status, manifest.count) == (0, 2 * len(open_images(str(images)).train))
    elif change == "one more":
        assert re.fullmatch(rf"the codes are of {manifest.count // 2} images, .* has \d+\n", outcome.out)
    else:
        assert outcome.out.startswith(f"rows_sha256 is {manifest.rows_sha256}, the names, labels and pixels of")
    assert check(codegrid, codes).status == 0, "unless they are named"


def test_images_cannot_be_compared_with_codes_that_do_not_say_of_which(intact: Path, codegrid: Codegrid) -> None:
    outcome = check(codegrid, intact, "--data", "glyphs")
    assert "expected a manifest that names the rows_sha256" in outcome.error_lines[-1]
    assert outcome.out == ""


def test_a_data_root_needs_data(intact: Path, codegrid: Codegrid) -> None:
    assert "--data-root" in check(codegrid, intact, "--data-root", intact).error_lines[-1]


# The lock of an export that is running


def test_the_lock_of_an_export_is_not_foreign(intact: Path, codegrid: Codegrid) -> None:
    """Whether its process still runs or was killed."""
    (intact / LOCK).write_text("{}")
    assert check(codegrid, intact).status == 0


def test_shards_in_another_order(intact: Path, codegrid: Codegrid) -> None:
    first, second, last = shards_of(intact)
    change_manifest(intact, shards=[second, first, last])
    assert check(codegrid, intact).out.splitlines() == [
        "shard 0 starts at row 4 in place of 0",
        "shard 1 starts at row 0 in place of 4",
    ]


def test_a_shard_that_is_named_twice(intact: Path, codegrid: Codegrid) -> None:
    """In place of another, so that all counts are right."""
    first, _, last = shards_of(intact)
    change_manifest(intact, shards=[first, first, last])
    assert "got the file codes-00000.npy 2 times" in check(codegrid, intact).error_lines[-1]


def test_rows_that_overlap(intact: Path, codegrid: Codegrid) -> None:
    first, second, last = shards_of(intact)
    change_manifest(intact, shards=[first, {**second, "start": 3}, last])
    assert "shard 1 holds rows 3 to 6, which is no shard of 4" in check(codegrid, intact).out


# Unfinished codes, and those of another tokenizer


@pytest.mark.parametrize("stopped_at", [0, 4, 8])
def test_an_export_that_was_stopped(tmp_path: Path, codegrid: Codegrid, stopped_at: int) -> None:
    """It is unfinished and nothing else, whatever was being written."""
    rows = random_rows(10)
    with pytest.raises(Killed):
        write_rows(tmp_path, StoppedRows(**vars(rows), stop_at=stopped_at))
    (tmp_path / "codes-00002.npy.new").touch()
    outcome = check(codegrid, tmp_path)
    count = read_manifest(tmp_path).count
    assert count <= stopped_at
    assert outcome.status == 1
    assert outcome.out == f"unfinished: {count} of 10 grids; the same export-codes resumes\n"
    (tmp_path / "notes.txt").touch()
    assert check(codegrid, tmp_path).out.splitlines()[1:] == ["notes.txt is not of this data set"]
    (tmp_path / "notes.txt").unlink()
    write_rows(tmp_path, rows)
    assert check(codegrid, tmp_path).status == 0


def test_codes_of_another_tokenizer(tmp_path: Path, intact: Path, codegrid: Codegrid) -> None:
    other = save_tokenizer(tmp_path / "other", brightness_tokenizer())
    outcome = check(codegrid, intact, "--tokenizer", tmp_path / "other")
    assert outcome.status == 1
    assert FINGERPRINT in outcome.error_lines[-1]
    assert other.fingerprint in outcome.error_lines[-1]
    change_manifest(intact, tokenizer_fingerprint=other.fingerprint)
    assert check(codegrid, intact, "--tokenizer", tmp_path / "other").status == 0


# The error


def test_all_problems_are_printed_and_the_first_are_named_in_the_error(intact: Path, codegrid: Codegrid) -> None:
    for i in range(4):
        (intact / f"foreign-{i}").touch()
    for i in range(3):
        shorten(intact / f"codes-0000{i}.npy")
    outcome = check(codegrid, intact)
    names = [line.split()[0] for line in outcome.out.splitlines()]
    assert names == [*(f"codes-0000{i}.npy" for i in range(3)), *(f"foreign-{i}" for i in range(4))]
    error = outcome.error_lines[-1]
    assert [name in error for name in names] == [True] * 5 + [False] * 2
    assert "; and 2 more; export the codes again" in error


def test_a_file_is_hashed_chunk_by_chunk(intact: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted_files, "READ_AT_ONCE", 7)
    assert check(codegrid, intact).status == 0
    size = (intact / "codes-00001.npy").stat().st_size
    flip_a_bit(1)(intact / "codes-00001.npy")
    assert f"({size:,} bytes, another SHA-256)" in check(codegrid, intact).out


def test_codes_of_the_first_version(tmp_path: Path, codegrid: Codegrid) -> None:
    """Their manifest holds less, they have no card, and their shards may be of any size."""
    write_rows(tmp_path, random_rows(7))
    shards = [{"count": shard["count"], "files": shard["files"]} for shard in shards_of(tmp_path)]
    change_manifest(tmp_path, shard_size=None, total=None, statistics={}, shards=shards)
    (tmp_path / "README.md").unlink()
    assert check(codegrid, tmp_path).status == 0
    shorten(tmp_path / "codes-00001.npy")
    assert check(codegrid, tmp_path).out.startswith("codes-00001.npy has other bytes")
