"""Each file of a data set, damaged: training, decoding, verifying and resuming name it, or nothing changes."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.codes.dataset import CodeDataset
from pipeline.codes.decode import decode_codes
from pipeline.codes.export import export_codes
from pipeline.codes.manifest import read_manifest
from pipeline.codes.verify import verify_codes
from pipeline.errors import InputError

from ..disks import without_waiting_for_the_disk  # noqa: F401 (a fixture of this module)
from ..mutations import DAMAGES
from ..support import brightness_tokenizer, digest_of, save_tokenizer
from .code_folders import Rows, read_by_numpy

SHARD = 6  # grids; the export has 3 shards
TABLES = ["codes.npz"]
SHARDS = [
    f"{stem}-{index:05d}.{end}"
    for stem, end in (("codes", "npy"), ("labels", "npy"), ("names", "json"))
    for index in range(3)
]
FILES = ["manifest.json", "README.md", *TABLES, *SHARDS]
CASES = [(damage, seed) for damage in DAMAGES for seed in range(4 if damage == "one bit" else 1)]


@dataclass(frozen=True)
class Export:
    """An intact export, its tokenizer, and what is read from it."""

    folder: Path
    tokenizer: Path
    rows: Rows
    images: bytes  # decoded


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path) -> Export:
    folder = tmp_path_factory.mktemp("damage")
    save_tokenizer(folder / "tokenizer", brightness_tokenizer(), grey_folder)
    export_codes(folder / "tokenizer", folder / "codes", shard_size=SHARD, to="npz", device="cpu")
    decode_codes(folder / "codes", folder / "tokenizer", folder / "images.npy", device="cpu")
    assert {path.name for path in (folder / "codes").iterdir()} == {*FILES}
    rows = read_by_numpy(folder / "codes")
    return Export(folder / "codes", folder / "tokenizer", rows, (folder / "images.npy").read_bytes())


@pytest.fixture
def damaged(tmp_path: Path, export: Export, name: str, damage: str, seed: int) -> Path:
    """A copy of the export with the one file damaged."""
    shutil.copytree(export.folder, tmp_path / "codes")
    DAMAGES[damage](tmp_path / "codes" / name, np.random.default_rng([seed, FILES.index(name)]))
    return tmp_path / "codes"


def named(name: str, action: Callable[[], object]) -> bool:
    """Return whether `action` raises an InputError, which must name the file in one line."""
    line = None
    try:
        action()
    except InputError as error:
        line = str(error)
    assert line is None or (name in line and "\n" not in line)
    return line is not None


each_damage = pytest.mark.parametrize(("damage", "seed"), CASES)


@pytest.mark.parametrize("name", FILES)
@each_damage
def test_training(damaged: Path, export: Export, name: str) -> None:
    """What train-prior does before the first step; or, without the check, at the steps."""

    def read(check: bool) -> None:
        dataset = CodeDataset(damaged)
        if check:
            dataset.check_files()
        codes, labels = dataset.batch(np.arange(len(dataset)))
        assert list(dataset.names()) == export.rows.all_names
        np.testing.assert_array_equal(codes, export.rows.all_codes)
        np.testing.assert_array_equal(labels, export.rows.all_labels)

    assert named(name, lambda: read(True)) == named(name, lambda: read(False)) >= (name in SHARDS)


@pytest.mark.parametrize("name", FILES)
@each_damage
def test_decoding(tmp_path: Path, damaged: Path, export: Export, name: str) -> None:
    """It needs no names, which it does not read."""
    out = tmp_path / "images.npy"
    if not named(name, lambda: decode_codes(damaged, export.tokenizer, out, device="cpu")):
        assert not name.startswith(("codes-", "labels-"))
        assert out.read_bytes() == export.images


@pytest.mark.parametrize("name", FILES)
@each_damage
def test_verifying(damaged: Path, name: str, damage: str) -> None:
    """Only a changed card has no hash, and a bit that changes the key of a checksum changes nothing."""
    if not named(name, lambda: verify_codes(damaged)):
        assert name == "README.md" or (name, damage) == ("manifest.json", "one bit")


@pytest.mark.parametrize("name", FILES)
@each_damage
def test_resuming(damaged: Path, export: Export, name: str, damage: str) -> None:
    """Shards and the card are written again; a manifest or a file that cannot be replaced is named."""
    what = {("manifest.json", "removed"): "a folder with files in it"}.get((name, damage), name)
    again = {"shard_size": SHARD, "to": "npz", "device": "cpu"}
    if named(what, lambda: export_codes(export.tokenizer, damaged, **again)):  # type: ignore[arg-type]
        assert name in ("manifest.json", "README.md") or damage == "a folder"
    else:
        assert damage != "a folder"
        assert {**digest_of(damaged), "manifest.json": ""} == {**digest_of(export.folder), "manifest.json": ""}
        assert read_manifest(damaged) == read_manifest(export.folder)
