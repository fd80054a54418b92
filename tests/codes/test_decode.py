"""decode-codes: the images that the tokenizer decodes from its own codes, to the bit, in each of three formats."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.codes.dataset import CodeDataset
from pipeline.codes.decode import SHEET_IMAGES, decode_codes
from pipeline.codes.manifest import read_manifest, write_manifest
from pipeline.codes.shard import npy_bytes
from pipeline.errors import InputError
from pipeline.images import png_folder
from pipeline.images.image_set import open_images
from pipeline.images.png import save_grid
from pipeline.models.inference import BLOCK, reconstruct_images
from pipeline.models.loading import load_tokenizer
from pipeline.runtime.atomic_files import sha256

from ..conftest import Codegrid, Trained
from ..disks import failing_writes, full_disk_line
from ..support import CELL, LEVELS, STEP, brightness_tokenizer, digest_of, save_tokenizer
from ..training.training_runs import Killed
from .code_folders import GRID, random_rows, request, write_rows

OUTPUTS = ("out.npy", "out.png", "out")


def decode(trained: Trained, out: Path, *options: object) -> list[object]:
    command = ["decode-codes", trained.codes, "--tokenizer", trained.tokenizer, "--out", out]
    return [*command, "--device", "cpu", *options]


@pytest.fixture(scope="module")
def reconstructed(trained: Trained) -> np.ndarray:
    """The oracle: the same images encoded and decoded, uint8 [N,C,H',W']."""
    images = open_images(str(trained.images)).train
    found = reconstruct_images(load_tokenizer(trained.tokenizer), images.batch(np.arange(len(images)))).numpy()
    assert len(np.unique(found.reshape(len(found), -1), axis=0)) > 1
    return found


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More grids than a contact sheet or a block holds, and the tokenizer that shows each code as its brightness."""
    folder = tmp_path_factory.mktemp("many")
    rows = random_rows(2 * BLOCK + 3)
    info = save_tokenizer(folder / "tokenizer", brightness_tokenizer(), size=(CELL * GRID[0], CELL * GRID[1]))
    requested = replace(request(rows, shard_size=50), tokenizer_fingerprint=info.fingerprint)
    write_rows(folder / "codes", rows, requested)
    return folder


def by_eye(folder: Path) -> np.ndarray:
    """Return the images of `many`, made without a decoder: uint8 [N,1,H',W']."""
    codes = np.stack([codes.numpy() for codes, _ in CodeDataset(folder / "codes")])
    return (np.kron(codes, np.ones((1, CELL, CELL), dtype=np.int64)) * STEP).astype(np.uint8)[:, None]


def pixels(path: Path) -> np.ndarray:
    """Return the pixels [C,H',W'] of a PNG."""
    found = np.asarray(Image.open(path))
    return found[None] if found.ndim == 2 else found.transpose(2, 0, 1)


def assert_contact_sheet(path: Path, images: np.ndarray) -> None:
    expected = path.with_name("expected.png")
    save_grid(torch.from_numpy(images), expected)
    np.testing.assert_array_equal(pixels(path), pixels(expected))


# The images


@pytest.mark.parametrize("start", [0, 3, 10])
@pytest.mark.parametrize("n", [None, 1, 2, 1000])
def test_each_format_holds_the_images_of_reconstruct(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, reconstructed: np.ndarray, start: int, n: int | None
) -> None:
    expected = reconstructed[start:][:n]
    rows = ["--start", start, *([] if n is None else ["--n", n])]
    for name in OUTPUTS:
        outcome = codegrid(*decode(trained, tmp_path / name, *rows))
        assert (outcome.status, outcome.out) == (0, f"{len(expected)} images: {tmp_path / name}\n")
    found = np.load(tmp_path / "out.npy", allow_pickle=False)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [path.name for path in files] == [f"{start + i:05d}.png" for i in range(len(expected))]
    np.testing.assert_array_equal(np.stack([pixels(path) for path in files]), expected)
    assert_contact_sheet(tmp_path / "out.png", expected)
    assert {path.name for path in tmp_path.iterdir()} == {*OUTPUTS, "expected.png"}


def test_many_by_eye(tmp_path: Path, many: Path) -> None:
    """Through several blocks and shards; a contact sheet shows the first of them."""
    expected = by_eye(many)
    for start in (0, BLOCK - 1):
        out = tmp_path / f"{start}.npy"
        assert decode_codes(many / "codes", many / "tokenizer", out, start=start) == len(expected) - start
        np.testing.assert_array_equal(np.load(out, allow_pickle=False), expected[start:])
    assert decode_codes(many / "codes", many / "tokenizer", tmp_path / "a.PNG") == SHEET_IMAGES < len(expected)
    assert_contact_sheet(tmp_path / "a.PNG", expected[:SHEET_IMAGES])
    assert decode_codes(many / "codes", many / "tokenizer", tmp_path / "b.png", n=SHEET_IMAGES + 1) == SHEET_IMAGES + 1
    assert_contact_sheet(tmp_path / "b.png", expected[: SHEET_IMAGES + 1])


def test_the_array_is_the_file_that_numpy_writes(tmp_path: Path, trained: Trained, reconstructed: np.ndarray) -> None:
    decode_codes(trained.codes, trained.tokenizer, tmp_path / "decoded.npy")
    np.save(tmp_path / "saved.npy", reconstructed, allow_pickle=False)
    assert (tmp_path / "decoded.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


# What is refused


@pytest.mark.parametrize("name", OUTPUTS)
def test_another_tokenizer(tmp_path: Path, trained: Trained, codegrid: Codegrid, name: str) -> None:
    """With both fingerprints, before anything is written."""
    other = save_tokenizer(tmp_path / "other", brightness_tokenizer())
    outcome = codegrid(*decode(trained, tmp_path / name, "--tokenizer", tmp_path / "other"))
    assert outcome.status == 1
    assert read_manifest(trained.codes).tokenizer_fingerprint in outcome.error_lines[-1]
    assert other.fingerprint in outcome.error_lines[-1]
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("beyond", [0, 1, 1000])
def test_a_start_beyond_the_end(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, reconstructed: np.ndarray, name: str, beyond: int
) -> None:
    start = len(reconstructed) + beyond
    outcome = codegrid(*decode(trained, tmp_path / name, "--start", start))
    line = f"Error: expected a --start from 0 to {len(reconstructed) - 1}, got {start}; choose another"
    assert (outcome.status, outcome.error_lines) == (1, [line])
    assert not (tmp_path / name).exists()


def test_a_start_before_the_first_row(tmp_path: Path, trained: Trained) -> None:
    """Which the command line does not accept at all."""
    with pytest.raises(InputError, match="got -1"):
        decode_codes(trained.codes, trained.tokenizer, tmp_path / "out.npy", start=-1)


def test_codes_of_which_none_is_written_yet(tmp_path: Path, many: Path) -> None:
    write_manifest(tmp_path, replace(read_manifest(many / "codes"), count=0, shards=[]))
    with pytest.raises(InputError, match="got none yet; run the same export-codes again"):
        decode_codes(tmp_path, many / "tokenizer", tmp_path / "out.npy")


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_exists_is_replaced_with_force_only(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, reconstructed: np.ndarray, name: str
) -> None:
    codegrid(*decode(trained, tmp_path / name, "--n", 2))
    before = digest_of(tmp_path)
    outcome = codegrid(*decode(trained, tmp_path / name, "--start", 5))
    assert outcome.status == 1
    assert "--force" in outcome.error_lines[-1]
    assert digest_of(tmp_path) == before
    assert codegrid(*decode(trained, tmp_path / name, "--start", 5, "--force")).status == 0
    if name == "out":
        rows = range(5, len(reconstructed))
        names = [*(f"{row:05d}.png" for row in rows), "decode.json"]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == names
    else:
        assert digest_of(tmp_path).keys() == before.keys()
        assert digest_of(tmp_path) != before


@pytest.fixture
def damaged(tmp_path: Path, many: Path) -> Path:
    """`many` with a code out of range, in the row before the last."""
    rows = random_rows(2 * BLOCK + 3)
    rows.all_codes[-2, 1, 1] = 200
    requested = request(rows, num_codes=256, shard_size=50)
    write_rows(tmp_path / "damaged", rows, requested)
    manifest = read_manifest(tmp_path / "damaged")
    fingerprint = read_manifest(many / "codes").tokenizer_fingerprint
    write_manifest(tmp_path / "damaged", replace(manifest, num_codes=16, tokenizer_fingerprint=fingerprint))
    return tmp_path / "damaged"


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_code_out_of_range(tmp_path: Path, many: Path, damaged: Path, codegrid: Codegrid, name: str) -> None:
    command = ["decode-codes", damaged, "--tokenizer", many / "tokenizer", "--out", tmp_path / name, "--device", "cpu"]
    outcome = codegrid(*command, "--n", 10_000)
    assert outcome.status == 1
    line = f"Error: expected codes from 0 to 15 in {damaged}, got 200; find the damaged shard with verify-codes"
    assert outcome.error_lines == [line]
    assert not list(tmp_path.glob("out.*"))
    assert codegrid(*command, "--n", 2 * BLOCK, "--force").status == 0, "the rows before it can be decoded"


def failing(after: int, error: BaseException) -> Callable[..., Iterator[Tensor]]:
    """Return a function for the place of `decode`, which yields `after` images and raises `error`."""

    def images(tokenizer: object, codes: object, count: int, *, folder: Path) -> Iterator[Tensor]:
        for _ in range(after):
            yield torch.zeros(1, 1, 6, 10, dtype=torch.uint8)
        raise error

    return images


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory"), Killed()])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failure_midway_leaves_the_old_array(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int
) -> None:
    """Or none; and no temporary file."""
    monkeypatch.setattr("pipeline.codes.decode.decode", failing(after, error))
    for old in (None, b"old"):
        if old is not None:
            (tmp_path / "out.npy").write_bytes(old)
        with pytest.raises(type(error)):
            decode_codes(many / "codes", many / "tokenizer", tmp_path / "out.npy", n=4, force=True)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"out.npy": old} if old else {})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
@pytest.mark.parametrize("after", [1, 3])
def test_a_failure_midway_keeps_the_images_that_are_finished(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int
) -> None:
    """And the record counts them, so that they and no others are replaced."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.codes.decode.decode", failing(after, error))
        with pytest.raises(type(error)):
            decode_codes(many / "codes", many / "tokenizer", out, start=2, n=4)
    names = [f"{row:05d}.png" for row in range(2, 2 + after)]
    assert sorted(path.name for path in out.iterdir()) == [*names, "decode.json"]
    record = json.loads((out / "decode.json").read_text("utf-8"))
    fingerprint = read_manifest(many / "codes").tokenizer_fingerprint
    assert record == {"start": 2, "n": 4, "finished": after, "tokenizer_fingerprint": fingerprint} | {
        "decoder_fingerprint": None
    }
    (out / "00005.png").write_bytes(b"mine")
    decode_codes(many / "codes", many / "tokenizer", out, start=0, n=1, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "00005.png", "decode.json"]


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_a_failure_before_the_first_image_leaves_all_as_it_was(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
) -> None:
    decode_codes(many / "codes", many / "tokenizer", tmp_path / "old" / name, n=3)
    before = digest_of(tmp_path)
    monkeypatch.setattr("pipeline.codes.decode.decode", failing(0, error))
    for folder in ("old", "deep/in/new"):
        with pytest.raises(type(error)):
            decode_codes(many / "codes", many / "tokenizer", tmp_path / folder / name, n=2, force=True)
    assert digest_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_no_images_are_refused(tmp_path: Path, many: Path) -> None:
    """Which the command line does not accept at all."""
    for name in OUTPUTS:
        with pytest.raises(ValueError, match="n: expected at least 1 image, got 0"):
            decode_codes(many / "codes", many / "tokenizer", tmp_path / name, n=0)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_130(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.codes.decode.decode", failing(1, KeyboardInterrupt()))
    outcome = codegrid(*decode(trained, tmp_path / "out.npy"))
    assert (outcome.status, list(tmp_path.iterdir())) == (130, [])


# Destinations


@pytest.mark.parametrize("name", ["x.jpg", "x.json", "x.NPZ"])
def test_a_format_that_decode_codes_does_not_write(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, name: str
) -> None:
    """Unless it is a folder that exists."""
    outcome = codegrid(*decode(trained, tmp_path / name))
    line = f"a folder, FILE.png or FILE.npy as --out, got {tmp_path / name}, which looks like a file of another format"
    assert outcome.error_lines == [f"Error: expected {line}; name one of them, such as {tmp_path / 'x.png'}"]
    assert outcome.status == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).mkdir()
    assert codegrid(*decode(trained, tmp_path / name, "--n", 2)).status == 0
    assert len(list((tmp_path / name).glob("*.png"))) == 2


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("count", [1, 10**6], ids=["once", "from then on"])
def test_a_write_that_fails_leaves_no_half(tmp_path: Path, many: Path, name: str, count: int) -> None:
    """Each write; a folder keeps the images before it, which its record counts, and a file is the old one."""
    out, rows, kept = tmp_path / "deep" / name, 4, []

    def act() -> None:
        decode_codes(many / "codes", many / "tokenizer", out, start=2, n=rows, force=True)

    for first in itertools.count():
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)
        if name != "out":
            out.parent.mkdir()
            out.write_bytes(b"old")
        with failing_writes(first, count) as writes:
            refused = full_disk_line(act)
        assert refused == (first < len(writes))
        if not refused:
            break
        if name != "out":
            assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == {name: b"old"}
        elif out.exists():
            finished = json.loads((out / "decode.json").read_text("utf-8"))["finished"]
            names = [*(f"{row:05d}.png" for row in range(2, 2 + finished)), "decode.json"]
            assert sorted(path.name for path in out.iterdir()) == names
            kept.append(finished)
    # in a folder: the record, the reserved space, the images, the record
    assert len(writes) == (rows + 3 if name == "out" else 1)
    assert kept == ([1, 2, 3] if name == "out" and count == 1 else [])


def test_an_array_whose_writes_fail(tmp_path: Path, many: Path) -> None:
    """On a device without space, whose error comes with the write and not with the flush to the disk."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    real = open

    def full(path: object, *arguments: Any, **options: Any) -> Any:
        return real("/dev/full" if str(path).endswith("out.npy.new") else path, *arguments, **options)  # type: ignore[call-overload]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", full)
        line = r"expected to write .*out.npy \([0-9,]+ bytes\), got No space left on device; free space"
        with pytest.raises(InputError, match=line):
            decode_codes(many / "codes", many / "tokenizer", tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == []


def test_of_two_into_one_folder_the_second_is_refused(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --force; the first is not disturbed."""
    write, refusals = png_folder.save_png, []

    def act() -> None:
        decode_codes(many / "codes", many / "tokenizer", tmp_path / "out", n=3, force=True)

    def meanwhile(image: Tensor, path: Path) -> None:
        if not refusals:
            with pytest.raises(InputError) as refused:
                act()
            refusals.append(str(refused.value))
        write(image, path)

    monkeypatch.setattr(png_folder, "save_png", meanwhile)
    act()
    assert f"{tmp_path / 'out'} for this decoding run alone, got another decoding run that writes" in refusals[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"{row:05d}.png" for row in range(3)),
        "decode.json",
    ]


@pytest.mark.parametrize(
    ("changes", "intact"),
    [
        ({}, True),
        ({"finished": 0}, True),
        *(({"start": start}, False) for start in (-5, 10**12, 10**400, "2", 2.0, True, None, [2])),
        *(({"n": n}, False) for n in (10**12, 10**400, -1, "2", None, 1)),
        *(({"finished": finished}, False) for finished in (10**12, -1, "2", None)),
    ],
)
def test_a_record_of_absurd_numbers_is_none(
    tmp_path: Path, many: Path, changes: dict[str, object], intact: bool
) -> None:
    """So that no file that it may seem to name is replaced."""
    out = tmp_path / "out"
    decode_codes(many / "codes", many / "tokenizer", out, start=2, n=2)
    record = json.loads((out / "decode.json").read_text("utf-8"))
    (out / "decode.json").write_text(json.dumps(record | changes))
    before = digest_of(out)
    if intact:
        decode_codes(many / "codes", many / "tokenizer", out, n=1, force=True)
        assert sorted(path.name for path in out.iterdir()) == ["00000.png", "decode.json"]
    else:
        with pytest.raises(InputError, match=r"got decode\.json; move it away"):
            decode_codes(many / "codes", many / "tokenizer", out, n=1, force=True)
        assert digest_of(out) == before


def test_grids_that_are_not_those_of_the_tokenizer(tmp_path: Path, many: Path) -> None:
    """A manifest with the right fingerprint and twice the rows a grid; the images would have another size."""
    shutil.copytree(many / "codes", tmp_path / "codes")
    manifest = read_manifest(tmp_path / "codes")
    height, width = manifest.grid
    shards = []
    for entry in manifest.shards:
        name = next(iter(entry.files))
        content = npy_bytes(np.zeros((entry.count, 2 * height, width), np.uint8))
        (tmp_path / "codes" / name).write_bytes(content)
        shards.append(replace(entry, files={**entry.files, name: sha256(content)}))
    write_manifest(tmp_path / "codes", replace(manifest, grid=(2 * height, width), shards=shards))
    with pytest.raises(InputError, match=rf"grids of {height}x{width}, .*, got {2 * height}x{width}; name the"):
        decode_codes(tmp_path / "codes", many / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codes_that_the_tokenizer_does_not_know(tmp_path: Path, many: Path) -> None:
    """A manifest with the right fingerprint and a larger K."""
    shutil.copytree(many / "codes", tmp_path / "codes")
    manifest = read_manifest(tmp_path / "codes")
    write_manifest(tmp_path / "codes", replace(manifest, num_codes=LEVELS + 1))
    with pytest.raises(InputError, match=rf"out of {LEVELS}, as the tokenizer has, got {LEVELS + 1}; name the"):
        decode_codes(tmp_path / "codes", many / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()
