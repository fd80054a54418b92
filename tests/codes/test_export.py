"""Exports: the same bytes however the work is divided, stopped and resumed; and no file of the user is touched."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.codes import encoded_images, export, manifest, writer
from pipeline.codes.dataset import CodeDataset
from pipeline.codes.export import export_codes
from pipeline.codes.manifest import read_manifest
from pipeline.codes.unfinished import holds_only_an_export
from pipeline.errors import InputError
from pipeline.images.holdout import held_out
from pipeline.images.image_set import ImageSplit, open_images
from pipeline.models import inference
from pipeline.models.inference import BLOCK
from pipeline.models.loading import load_tokenizer
from pipeline.runtime import atomic_files, progress
from pipeline.runtime.folder_lock import LOCK, only_writer
from tokenizer import VQVAE

from ..conftest import Codegrid, Trained
from ..support import (
    HEIGHT,
    WIDTH,
    brightness_tokenizer,
    cells_of,
    digest_of,
    fill_with_cells,
    save_tokenizer,
    torch_threads,
)
from ..training.training_runs import Killed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """170 RGB images of noise in two classes: the training split is more than two blocks."""
    folder, random = tmp_path_factory.mktemp("many") / "noise", np.random.default_rng(0)
    for number in range(170):
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("by_hand") / "tokenizer"
    save_tokenizer(folder, brightness_tokenizer(), grey_folder)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of 4 images, so that a few images are many blocks."""
    monkeypatch.setattr(inference, "BLOCK", 4)
    monkeypatch.setattr(encoded_images, "BLOCK", 4)
    return 4


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every block that an encoder saw."""
    seen: list[Tensor] = []
    lock, encode = threading.Lock(), VQVAE.encode

    def spy(model: VQVAE, images: Tensor) -> Tensor:
        with lock:
            seen.append(images.clone())
        return encode(model, images)

    monkeypatch.setattr(VQVAE, "encode", spy)
    return seen


def all_rows(folder: Path) -> tuple[bytes, bytes, list[str]]:
    dataset = CodeDataset(folder)
    codes = np.concatenate([shard.codes for shard in dataset.shards()])
    return codes.tobytes(), dataset.labels.tobytes(), list(dataset.names())


# However the work is divided


@pytest.mark.usefixtures("quick")
def test_batch_size_and_threads_change_no_byte_and_the_shard_size_no_row(
    tmp_path: Path, trained: Trained, many: Path
) -> None:
    rows = []
    for shard_size in (1, 3, 64, 1000):
        folders = []
        for batch_size, threads in ((256, 1), (1, 2), (7, 1), (64, 2), (1000, 1)):
            if shard_size < 64 and batch_size > 7:
                continue
            folders.append(tmp_path / f"{shard_size}-{batch_size}-{threads}")
            options = {"data": str(many), "shard_size": shard_size, "batch_size": batch_size}
            with torch_threads(threads):
                export_codes(trained.tokenizer, folders[-1], device="cpu", **options)  # type: ignore[arg-type]
        digests = [digest_of(folder) for folder in folders]
        assert {"manifest.json", "README.md"} < digests[0].keys()
        assert all(digest == digests[0] for digest in digests)
        rows.append(all_rows(folders[0]))
    assert all(each == rows[0] for each in rows)
    assert len(rows[0][2]) > 2 * BLOCK
    assert len(set(rows[0][0])) > 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize(("shard_size", "batch_size"), [(1, 64), (3, 1), (50, 7), (64, 64), (100, 128), (1000, 1000)])
def test_each_row_is_encoded_once_at_its_place_in_its_block(
    tmp_path: Path, trained: Trained, many: Path, encoded: list[Tensor], flips: bool, shard_size: int, batch_size: int
) -> None:
    """Row r is at place r % BLOCK of block r // BLOCK, so its neighbours are the same in every export."""
    images = open_images(str(many)).train
    pixels = images.batch(np.arange(len(images)))
    if flips:
        pixels = torch.cat([pixels, pixels.flip(-1)])
    options = {"data": str(many), "shard_size": shard_size, "batch_size": batch_size, "flips": flips}
    export_codes(trained.tokenizer, tmp_path / "codes", device="cpu", **options)  # type: ignore[arg-type]
    padded = torch.cat([pixels, torch.zeros(-len(pixels) % BLOCK, *pixels.shape[1:])])
    expected = sorted(block.numpy().tobytes() for block in padded.split(BLOCK))
    assert sorted(block.numpy().tobytes() for block in encoded) == expected


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("shard_size", [1, 5, 7, 1000])
def test_codes_that_depend_on_the_place_in_a_block_are_the_same_in_any_shards(
    tmp_path: Path, tokenizer: Path, small_blocks: int, shard_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most sensitive network possible: code k becomes k + place."""
    encode = VQVAE.encode

    def sensitive(model: VQVAE, images: Tensor) -> Tensor:
        assert len(images) == small_blocks
        return (encode(model, images) + torch.arange(len(images))[:, None, None]) % 16

    plain = export_codes(tokenizer, tmp_path / "plain", device="cpu")
    monkeypatch.setattr(VQVAE, "encode", sensitive)
    export_codes(tokenizer, tmp_path / "codes", shard_size=shard_size, device="cpu", batch_size=8)
    for row, ((codes, _), (known, _)) in enumerate(
        zip(CodeDataset(tmp_path / "codes"), CodeDataset(tmp_path / "plain"), strict=True)
    ):
        assert torch.equal(codes, (known + row % small_blocks) % 16)
    assert plain.count > 2 * small_blocks


# Mirrored images


@pytest.mark.usefixtures("quick", "small_blocks")
@pytest.mark.parametrize("shard_size", [1, 5, 1000])
def test_the_second_half_is_the_first_mirrored(
    tmp_path: Path, tokenizer: Path, grey_folder: Path, shard_size: int
) -> None:
    once = export_codes(tokenizer, tmp_path / "once", shard_size=shard_size, device="cpu")
    twice = export_codes(tokenizer, tmp_path / "twice", shard_size=shard_size, flips=True, device="cpu")
    assert (once.flips, twice.flips, twice.count) == (False, True, 2 * once.count)
    plain, flipped = CodeDataset(tmp_path / "once"), CodeDataset(tmp_path / "twice")
    names = list(flipped.names())
    assert names == 2 * list(plain.names())
    assert flipped.labels.tolist() == 2 * plain.labels.tolist()
    for row, name in enumerate(names):
        drawn = cells_of(grey_folder / name)
        np.testing.assert_array_equal(flipped[row][0], drawn if row < once.count else drawn[:, ::-1])


@pytest.mark.usefixtures("quick")
def test_mirrored_images_go_through_a_real_network(tmp_path: Path, trained: Trained, many: Path) -> None:
    """They are encoded, not their codes mirrored."""
    count = export_codes(trained.tokenizer, tmp_path / "codes", data=str(many), flips=True, device="cpu").count // 2
    images, model = open_images(str(many)).train, load_tokenizer(trained.tokenizer)
    by_hand = model.encode(torch.from_numpy(np.ascontiguousarray(images.images[..., ::-1])).float() / 255)
    found, _ = CodeDataset(tmp_path / "codes").batch(np.arange(2 * count))
    assert torch.equal(found[count:], by_hand)
    assert not torch.equal(found[count:], found[:count].flip(-1))


@pytest.mark.usefixtures("quick")
def test_an_image_and_its_mirror_image_are_on_one_side_of_the_split(tmp_path: Path, tokenizer: Path) -> None:
    """Also where the hashes choose no image, and one is held out nevertheless."""
    for count in (3, 200):
        images = fill_with_cells(tmp_path / f"images-{count}", [f"{i}.png" for i in range(count)])
        codes = tmp_path / f"codes-{count}"
        export_codes(tokenizer, codes, data=str(images), flips=True, device="cpu")
        held_out_mask = held_out(CodeDataset(codes).names())
        half = len(held_out_mask) // 2
        assert held_out_mask[:half].tolist() == held_out_mask[half:].tolist()
        assert 0 < held_out_mask.sum() < len(held_out_mask)


# Stopped and resumed


class Deadline:
    """Kills before the k-th operation on a file; half of what is being written then is written."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left = sys.maxsize
        self._lock = threading.Lock()
        write = atomic_files._write_flushed

        def half_written(path: Path, data: bytes) -> None:
            try:
                self.count_down()
            except Killed:
                write(path, data[: len(data) // 2])
                raise
            write(path, data)

        patch.setattr(atomic_files, "_write_flushed", half_written)
        patch.setattr(os, "replace", self._before(os.replace))
        patch.setattr(Path, "unlink", self._before(Path.unlink))
        patch.setattr(Path, "touch", self._before(Path.touch))

    def _before(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def late(*arguments: Any, **options: Any) -> Any:
            self.count_down()
            return action(*arguments, **options)

        return late

    def count_down(self) -> None:
        with self._lock:
            self.left -= 1
            if self.left < 0:
                raise Killed


@pytest.fixture
def deadline(quick: None, monkeypatch: pytest.MonkeyPatch) -> Deadline:
    return Deadline(monkeypatch)


def intact_shards(folder: Path) -> set[int]:
    """Return the first rows of the shards that count, after checking that all are as the manifest says."""
    if not (folder / "manifest.json").exists():
        assert not folder.exists() or all(path.name == "manifest.json.new" for path in folder.iterdir())
        return set()
    entries = list(read_manifest(folder).shards)
    for entry in entries:
        for name, digest in entry.files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    uncounted = [json.loads(path.read_bytes()) for path in folder.glob("shard-*.json")]
    return {entry.start for entry in entries} | {entry["start"] for entry in uncounted}


@pytest.fixture
def entries_written(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """The files of all entries that were ever written: their shards must count from then on."""
    entries: set[Path] = set()
    write = writer.write_atomic

    def noted(path: Path, data: bytes) -> None:
        write(path, data)
        entries.add(path)

    monkeypatch.setattr(writer, "write_atomic", noted)
    return entries


@pytest.fixture(params=[0.0, 1e9], ids=["counted at once", "counted at the end"])
def counting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "UPDATE_PAUSE", request.param)


@pytest.mark.usefixtures("counting")
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(
    tmp_path: Path,
    tokenizer: Path,
    small_blocks: int,
    deadline: Deadline,
    encoded: list[Tensor],
    entries_written: set[Path],
) -> None:
    """And encodes only what is missing."""
    options: dict[str, Any] = {"shard_size": 6, "device": "cpu", "to": "npz"}
    total = export_codes(tokenizer, tmp_path / "undisturbed", **options).count
    undisturbed = digest_of(tmp_path / "undisturbed")
    for moment in range(1000):
        deadline.left, out = moment, tmp_path / f"killed-{moment}"
        try:
            export_codes(tokenizer, out, **options)
            break
        except Killed:
            deadline.left = sys.maxsize
        counted = intact_shards(out)
        assert {6 * int(path.stem.removeprefix("shard-")) for path in entries_written if path.parent == out} <= counted
        missing = set(range(0, total, 6)) - counted
        blocks_left = {row // small_blocks for start in missing for row in range(start, min(start + 6, total))}
        encoded.clear()
        export_codes(tokenizer, out, **options)
        assert len(encoded) == len(blocks_left)
        assert digest_of(out) == undisturbed
        shutil.rmtree(out)
    assert moment > 40


@pytest.mark.usefixtures("counting", "small_blocks")
def test_killed_repeatedly(tmp_path: Path, tokenizer: Path, deadline: Deadline) -> None:
    """Each time a little later; every shard that once counted stays."""
    options: dict[str, Any] = {"shard_size": 4, "device": "cpu"}
    export_codes(tokenizer, tmp_path / "undisturbed", **options)
    out, before = tmp_path / "codes", set[int]()
    for moment in range(1000):
        deadline.left = moment
        try:
            export_codes(tokenizer, out, **options)
            break
        except Killed:
            deadline.left = sys.maxsize
        now = intact_shards(out)
        assert before <= now
        before = now
    deadline.left = sys.maxsize
    assert digest_of(out) == digest_of(tmp_path / "undisturbed")
    assert moment > 10


@pytest.mark.usefixtures("small_blocks")
def test_killed_while_it_replaces_an_older_export_with_force(
    tmp_path: Path, tokenizer: Path, deadline: Deadline
) -> None:
    options: dict[str, Any] = {"shard_size": 8, "device": "cpu"}
    older = export_codes(tokenizer, tmp_path / "older", shard_size=5, split="test", to="npz", device="cpu")
    export_codes(tokenizer, tmp_path / "undisturbed", **options)
    for moment in range(1000):
        deadline.left, out = moment, tmp_path / f"killed-{moment}"
        shutil.copytree(tmp_path / "older", out)
        try:
            export_codes(tokenizer, out, force=True, **options)
            break
        except Killed:
            deadline.left = sys.maxsize
        if (out / "manifest.json").exists() and read_manifest(out).split != older.split:
            intact_shards(out)
            export_codes(tokenizer, out, **options)  # as the message on Ctrl-C says
        else:
            if (out / "manifest.json").exists():
                intact_shards(out)
            export_codes(tokenizer, out, force=True, **options)
        assert digest_of(out) == digest_of(tmp_path / "undisturbed")
    assert moment > 20


@pytest.mark.usefixtures("quick", "small_blocks")
@pytest.mark.parametrize("name", ["codes-00001.npy", "labels-00000.npy", "names-00002.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "one bit"])
@pytest.mark.parametrize("tables", [None, "npz"])
def test_a_damaged_shard_is_found_and_written_again(
    tmp_path: Path, tokenizer: Path, name: str, damage: str, tables: str | None, encoded: list[Tensor]
) -> None:
    options: dict[str, Any] = {"shard_size": 4, "device": "cpu", "to": tables}
    out = tmp_path / "codes"
    export_codes(tokenizer, out, **options)
    intact, content = digest_of(out), bytearray((out / name).read_bytes())
    content[-1] ^= 1
    {
        "missing": (out / name).unlink,
        "cut short": lambda: (out / name).write_bytes(content[:-1]),
        "one bit": lambda: (out / name).write_bytes(content),
    }[damage]()
    encoded.clear()
    export_codes(tokenizer, out, **options)
    assert len(encoded) == 1
    assert digest_of(out) == intact


@pytest.mark.usefixtures("small_blocks")
def test_killed_while_a_damaged_shard_is_written_again(tmp_path: Path, tokenizer: Path, deadline: Deadline) -> None:
    options: dict[str, Any] = {"shard_size": 4, "device": "cpu"}
    export_codes(tokenizer, tmp_path / "intact", **options)
    for moment in range(1000):
        deadline.left, out = moment, tmp_path / f"killed-{moment}"
        shutil.copytree(tmp_path / "intact", out)
        (out / "codes-00001.npy").write_bytes(b"damaged")
        try:
            export_codes(tokenizer, out, **options)
            break
        except Killed:
            deadline.left = sys.maxsize
        if moment >= 2:  # the manifest that does not count it any more is written and in place
            intact_shards(out)
        export_codes(tokenizer, out, **options)
        assert digest_of(out) == digest_of(tmp_path / "intact")
    assert moment > 10


@pytest.mark.usefixtures("quick", "small_blocks")
def test_an_entry_whose_files_are_damaged_is_never_counted(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the entry of the last shard exists while the first shards are written."""
    options: dict[str, Any] = {"shard_size": 4, "device": "cpu"}
    export_codes(tokenizer, tmp_path / "intact", **options)
    manifest = read_manifest(tmp_path / "intact")
    out, last = tmp_path / "codes", manifest.shards[-1]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_shard", _killed)
        with pytest.raises(Killed):
            export_codes(tokenizer, out, **options)
    (out / f"shard-{len(manifest.shards) - 1:05d}.json").write_text(json.dumps(asdict(last)))
    monkeypatch.setattr(writer, "UPDATE_PAUSE", 0)
    counted = []
    write = writer.write_shard
    monkeypatch.setattr(writer, "write_shard", lambda *a, **b: counted.append(intact_shards(out)) or write(*a, **b))
    export_codes(tokenizer, out, **options)
    assert all(last.start not in starts for starts in counted)
    assert len(counted) == len(manifest.shards)
    assert digest_of(out) == digest_of(tmp_path / "intact")


def _killed(*arguments: Any, **options: Any) -> Any:
    raise Killed


@pytest.mark.usefixtures("quick", "small_blocks")
@pytest.mark.parametrize("to", [None, "npz"])
def test_a_finished_export_is_left_as_it_is(
    tmp_path: Path,
    tokenizer: Path,
    to: str | None,
    encoded: list[Tensor],
    codegrid: Codegrid,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["export-codes", "--tokenizer", tokenizer, "--out", tmp_path, "--shard-size", 4, "--device", "cpu"]
    assert codegrid(*command, *(["--to", to] if to else [])).status == 0
    before = digest_of(tmp_path)
    encoded.clear()
    monkeypatch.setattr(writer, "_statistics", _killed)  # another numpy might round them otherwise
    outcome = codegrid(*command)
    assert (outcome.status, encoded) == (0, [])
    count = read_manifest(tmp_path).count
    assert f"{count} of {count} grids exist already: {tmp_path}" in outcome.out
    assert digest_of(tmp_path) == before


# Signals


@pytest.mark.usefixtures("quick", "small_blocks")
@pytest.mark.parametrize("force", [False, True])
def test_ctrl_c_ends_with_130_and_says_how_to_resume(
    tmp_path: Path, tokenizer: Path, force: bool, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_codes(tokenizer, tmp_path / "undisturbed", shard_size=4, device="cpu")
    out = tmp_path / "codes"
    command = ["export-codes", "--tokenizer", tokenizer, "--out", out, "--shard-size", 4, "--device", "cpu"]
    with monkeypatch.context() as patch:
        encode, seen = VQVAE.encode, []

        def interrupted(model: VQVAE, images: Tensor) -> Tensor:
            seen.append(len(images))
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return encode(model, images)

        patch.setattr(VQVAE, "encode", interrupted)
        outcome = codegrid(*command, *(["--force"] if force else []))
    assert outcome.status == 130
    command_again = "the same command without --force" if force else "the same command"
    assert outcome.error_lines == [f"stopped; finished shards are kept, and {command_again} resumes"]
    assert 0 < len(intact_shards(out)) < len(list((tmp_path / "undisturbed").glob("codes-*")))
    assert codegrid(*command).status == 0
    assert digest_of(out) == digest_of(tmp_path / "undisturbed")


def test_a_process_killed_in_the_middle_and_run_again(tmp_path: Path, tokenizer: Path, codegrid: Codegrid) -> None:
    images = fill_with_cells(tmp_path / "images", [f"{i}.png" for i in range(200)])
    out, total = tmp_path / "codes", len(open_images(str(images)).train)
    options = ["--tokenizer", tokenizer, "--data", images, "--shard-size", 1, "--device", "cpu"]
    command = [sys.executable, "cli.py", "export-codes", "--out", out, *options]
    with subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (out / "codes-00003.npy").exists():
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 1 <= len(intact_shards(out)) < total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        assert codegrid("export-codes", "--out", out, *options).status == 0
        assert codegrid("export-codes", "--out", tmp_path / "undisturbed", *options).status == 0
    assert digest_of(out) == digest_of(tmp_path / "undisturbed")


# What is refused, and when


@pytest.mark.parametrize("data", [None, [1, 2], 5, {}])
def test_a_tokenizer_that_does_not_name_its_images(tmp_path: Path, tokenizer: Path, data: Any) -> None:
    """As a stranger's may; with --data it serves as well as any."""
    copy = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, copy)
    config = json.loads((copy / "config.json").read_bytes())
    images = config["training"].pop("data")
    del config["checksum"]
    if data is not None:
        config["training"]["data"] = data
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"the images it was trained on, got .*; name them with --data"):
        export_codes(copy, tmp_path / "codes", device="cpu")
    assert not (tmp_path / "codes").exists()
    assert export_codes(copy, tmp_path / "codes", data=images, device="cpu").complete


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_file_that_cannot_be_removed_is_named(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_codes(tokenizer, tmp_path / "codes", device="cpu")
    unlink = Path.unlink

    def refuses(path: Path, missing_ok: bool = False) -> None:
        if path.name == "labels-00000.npy":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuses)
    with pytest.raises(
        InputError, match=r"to remove .*labels-00000\.npy, .*, got Operation not permitted; name another"
    ):
        export_codes(tokenizer, tmp_path / "codes", device="cpu", force=True)


def no_images(*_: Any, **__: Any) -> Any:
    raise AssertionError("images were prepared before it was refused")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tokenizer", "codes with tokenizer fingerprint"),
        ("split", "codes with split train where this is test"),
        ("source", "codes with source"),
        ("flips", "codes with flips False where this is True"),
        ("shard size", "codes with shard size 4 where this is 5"),
        ("files", "a folder with files in it"),
        ("README", "a README.md that export-codes did not write"),
        ("damaged manifest", "expected the manifest of a code data set"),
        ("a file", "a folder that can be written"),
        ("below a file", "a folder that can be written"),
        ("another export", "another export that writes into it, process"),
    ],
)
def test_what_can_be_refused_is_refused_before_images_are_prepared(
    tmp_path: Path, tokenizer: Path, many: Path, what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, locks = tmp_path / "codes", ExitStack()
    options: dict[str, Any] = {"shard_size": 4}
    export_codes(tokenizer, out, device="cpu", **options)
    if what == "tokenizer":
        tokenizer = tmp_path / "other"
        save_tokenizer(tokenizer, brightness_tokenizer(17), many)
    elif what in ("files", "README"):
        shutil.rmtree(out)
        out.mkdir()
        (out / {"files": "notes.txt", "README": "README.md"}[what]).write_text("mine")
    elif what == "damaged manifest":
        (out / "manifest.json").write_text("{")
    elif what in ("a file", "below a file"):
        (tmp_path / "file").touch()
        out = tmp_path / "file" if what == "a file" else tmp_path / "file" / "codes"
    elif what == "another export":
        locks.enter_context(only_writer(out, "export"))
    else:
        changed = {"split": "test", "source": "glyphs", "flips": True, "shard size": 5}[what]
        options[{"source": "data", "shard size": "shard_size"}.get(what, what)] = changed
    monkeypatch.setattr(export, "images_of", no_images)
    with locks:
        before = digest_of(tmp_path)
        with pytest.raises(InputError, match=re.escape(message)):
            export_codes(tokenizer, out, device="cpu", **options)
        assert digest_of(tmp_path) == before


@pytest.mark.usefixtures("quick", "small_blocks")
def test_of_two_exports_into_one_folder_one_is_refused(
    tmp_path: Path, tokenizer: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the second requests the same or uses --force; the first is not disturbed."""
    out, command = tmp_path / "codes", ["export-codes", "--tokenizer", tokenizer, "--device", "cpu", "--out"]
    assert codegrid(*command, tmp_path / "alone").status == 0
    encode, outcomes, seen = VQVAE.encode, [], []

    def meanwhile(model: VQVAE, images: Tensor) -> Tensor:
        if not seen:
            seen.append(images)
            outcomes.extend(codegrid(*command, out, *options) for options in ([], ["--force"]))
        return encode(model, images)

    monkeypatch.setattr(VQVAE, "encode", meanwhile)
    export_codes(tokenizer, out, device="cpu")
    for outcome in outcomes:
        (line,) = outcome.error_lines
        assert outcome.status == 1
        assert f"got another export that writes into it, process {os.getpid()} on " in line
    assert len(outcomes) == 2
    assert digest_of(out) == digest_of(tmp_path / "alone")


@pytest.mark.usefixtures("quick")
def test_no_lock_is_left(tmp_path: Path, tokenizer: Path) -> None:
    """Not even one that a kill left."""
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / LOCK).write_text("{}")
    for force in (False, True):
        export_codes(tokenizer, tmp_path / "codes", device="cpu", force=force)
        assert not (tmp_path / "codes" / LOCK).exists()


@pytest.mark.usefixtures("quick")
def test_images_that_cannot_be_opened_leave_no_folder(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(InputError, match="which is neither"):
        export_codes(tokenizer, tmp_path / "deep" / "codes", data="no-such-source", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_entries_are_recognised_by_their_exact_name_and_a_damaged_one_does_not_count(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_codes(tokenizer, tmp_path / "intact", shard_size=4, device="cpu")
    out, intact = tmp_path / "codes", digest_of(tmp_path / "intact")
    export_two_shards(out, tokenizer, monkeypatch, shard_size=4)
    foreign = {"shard-notes.json": "mine", "shard-1.json": "{}"}
    for name, content in {**foreign, "shard-00002.json": "[", "shard-00003.json": '{"start": 12}'}.items():
        (out / name).write_text(content)
    export_codes(tokenizer, out, shard_size=4, device="cpu")
    assert {name: (out / name).read_text() for name in foreign} == foreign
    for name in foreign:
        (out / name).unlink()
    assert digest_of(out) == intact


def export_two_shards(out: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Write the first two shards of an export, then kill it."""
    with monkeypatch.context() as patch:
        write = writer.write_shard
        patch.setattr(writer, "write_shard", lambda *a, **b: write(*a, **b) if a[1] < 2 else _killed())
        with pytest.raises(Killed):
            export_codes(tokenizer, out, device="cpu", **options)
    assert not read_manifest(out).complete


@pytest.mark.usefixtures("quick", "small_blocks")
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("what", ["tokenizer", "split", "shard size", "flips", "names", "labels", "pixels", "source"])
def test_another_request_is_refused_and_touches_nothing(
    tmp_path: Path, tokenizer: Path, grey_folder: Path, what: str, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "images", tmp_path / "codes"
    shutil.copytree(grey_folder, images)
    options: dict[str, Any] = {"data": str(images), "shard_size": 4}
    if finished:
        export_codes(tokenizer, out, device="cpu", **options)
    else:
        export_two_shards(out, tokenizer, monkeypatch, **options)
    before, named = digest_of(out), what.replace(" ", "[ _]")
    if what == "tokenizer":
        tokenizer, named = tmp_path / "other", "tokenizer fingerprint"
        model = brightness_tokenizer()
        model.quantizer.set_codebook(model.quantizer.codebook.flip(0))
        save_tokenizer(tokenizer, model, images)
    elif what in ("split", "shard size", "flips"):
        options |= {"split": {"split": "test"}, "shard size": {"shard_size": 5}, "flips": {"flips": True}}[what]
    elif what == "source":
        images.rename(tmp_path / "moved")
        options["data"] = str(tmp_path / "moved")
    else:
        named = "rows sha256"
        _change_one(what, images, monkeypatch)
    with pytest.raises(InputError, match=rf"got codes with {named} .* where this is .*; .*--force to replace") as error:
        export_codes(tokenizer, out, device="cpu", **options)
    assert "\n" not in str(error.value)
    assert digest_of(out) == before
    export_codes(tokenizer, out, device="cpu", force=True, **options)
    export_codes(tokenizer, tmp_path / "new", device="cpu", **options)
    assert digest_of(out) == digest_of(tmp_path / "new")


def _change_one(what: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = images / open_images(str(images)).train.names[0]
    if what == "names":
        first.rename(first.with_name("0000.png"))
    elif what == "pixels":
        Image.fromarray(np.asarray(Image.open(first)) ^ 255).save(first)
    else:
        split_of = export.split_of

        def other_label(*arguments: Any) -> ImageSplit:
            images = split_of(*arguments)
            return replace(images, labels=np.where(np.arange(len(images)) == 3, -1, images.labels))

        monkeypatch.setattr(export, "split_of", other_label)


@pytest.mark.usefixtures("quick", "small_blocks")
def test_only_missing_shards_need_the_versions_that_wrote_the_others(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished, intact, damaged = (tmp_path / name for name in ("unfinished", "intact", "damaged"))
    export_two_shards(unfinished, tokenizer, monkeypatch, shard_size=4)
    for folder in (intact, damaged):
        export_codes(tokenizer, folder, shard_size=4, device="cpu")
    (damaged / "codes-00001.npy").unlink()
    before = digest_of(tmp_path)
    monkeypatch.setattr(export, "library_versions", lambda: {"codegrid": "0.1.0", "torch": "1.13"})
    for folder in (unfinished, damaged):
        with pytest.raises(InputError, match=r"codes with made with .*'torch': '.* where this is .*'torch': '1.13'"):
            export_codes(tokenizer, folder, shard_size=4, device="cpu")
    export_codes(tokenizer, intact, shard_size=4, device="cpu")
    assert digest_of(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "force", "message"),
    [
        *((name, False, "a folder with files in it") for name in ("notes.txt", "codes-00000.npy", "README.md.new")),
        *(("README.md", force, "README.md that export-codes did not write") for force in (False, True)),
        ("manifest.json", False, "Expecting value"),
    ],
)
def test_a_folder_of_the_user_is_refused(
    tmp_path: Path, tokenizer: Path, content: str, force: bool, message: str
) -> None:
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / content).write_text("mine")
    with pytest.raises(InputError, match=rf"expected .*, got .*{message}.*; "):
        export_codes(tokenizer, tmp_path / "users", device="cpu", force=force)
    assert digest_of(tmp_path / "users") == {content: hashlib.sha256(b"mine").hexdigest()}


@pytest.mark.usefixtures("quick")
def test_force_removes_what_an_export_writes_and_nothing_that_looks_like_it(tmp_path: Path, tokenizer: Path) -> None:
    export_codes(tokenizer, tmp_path / "new", device="cpu")
    out = tmp_path / "codes"
    export_codes(tokenizer, out, device="cpu", shard_size=3, to="npz")
    foreign = ["codes-mine.npy", "codes-00000-copy.npy", "names-old.json", "labels-1.npy", "notes.new", "commit.json"]
    for name in foreign:
        (out / name).write_text("mine")
    export_codes(tokenizer, out, device="cpu", force=True)
    assert all((out / name).read_text() == "mine" for name in foreign)
    for name in foreign:
        (out / name).unlink()
    assert digest_of(out) == digest_of(tmp_path / "new")


@pytest.mark.usefixtures("quick")
def test_a_readme_of_the_user_is_kept_though_an_export_began(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "codes"
    export_two_shards(out, tokenizer, monkeypatch, shard_size=4)
    (out / "README.md").write_text("mine")
    before = digest_of(out)
    for force in (False, True):
        with pytest.raises(InputError, match=r"README.md that export-codes did not write; name another folder"):
            export_codes(tokenizer, out, shard_size=4, device="cpu", force=force)
    assert digest_of(out) == before


@pytest.mark.usefixtures("quick")
def test_half_written_files_are_gone_at_the_end(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_codes(tokenizer, tmp_path / "undisturbed", shard_size=4, device="cpu")
    out = tmp_path / "codes"
    export_two_shards(out, tokenizer, monkeypatch, shard_size=4)
    for name in ("manifest.json", "README.md", "codes-00000.npy", "names-00009.json", "shard-00001.json", "codes.npz"):
        (out / f"{name}.new").write_text("half")
    export_codes(tokenizer, out, shard_size=4, device="cpu")
    assert digest_of(out) == digest_of(tmp_path / "undisturbed")


@pytest.mark.usefixtures("small_blocks")
def test_a_folder_holds_only_an_export_at_every_kill_until_something_else_is_in_it(
    tmp_path: Path, tokenizer: Path, deadline: Deadline
) -> None:
    assert holds_only_an_export(tmp_path / "codes")
    for moment in range(1000):
        deadline.left = moment
        try:
            export_codes(tokenizer, tmp_path / "codes", shard_size=4, to="npz", device="cpu")
            break
        except Killed:
            deadline.left = sys.maxsize
        assert holds_only_an_export(tmp_path / "codes")
    deadline.left = sys.maxsize
    assert moment > 10
    for name in ("notes.txt", "model.safetensors", "codes-1.npy", "codes"):
        (tmp_path / "codes" / name).touch()
        assert not holds_only_an_export(tmp_path / "codes")
        (tmp_path / "codes" / name).unlink()
    assert holds_only_an_export(tmp_path / "codes")


@pytest.mark.usefixtures("quick", "small_blocks")
@pytest.mark.parametrize(("what", "got"), [("MOST_SHARDS", "the number of shards"), ("MOST_CLASSES", "class names")])
def test_what_no_manifest_can_hold_is_refused_before_anything_is_encoded(
    tmp_path: Path, tokenizer: Path, encoded: list[Tensor], monkeypatch: pytest.MonkeyPatch, what: str, got: str
) -> None:
    monkeypatch.setattr(manifest, what, 2)
    with pytest.raises(InputError, match=rf"got .* as .*{got}.*; choose another --shard-size"):
        export_codes(tokenizer, tmp_path / "codes", shard_size=4, device="cpu")
    assert encoded == []
    assert not (tmp_path / "codes").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["manifest.json", "README.md", "codes-00000.npy", "shard-00001.json", "codes.npz.new"])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_in_the_place_of_a_file_is_refused_before_images_are_prepared(
    tmp_path: Path, tokenizer: Path, name: str, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "codes" / name / "mine").mkdir(parents=True)
    monkeypatch.setattr(export, "images_of", no_images)
    with pytest.raises(InputError, match=rf"expected a file or nothing at .*{name}, got a folder; move it away"):
        export_codes(tokenizer, tmp_path / "codes", device="cpu", force=force)
    assert (tmp_path / "codes" / name / "mine").is_dir()


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_an_export_into_a_folder_whose_name_is_no_unicode(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "\udce9"
    export_codes(tokenizer, out, shard_size=4, to="npz", device="cpu")
    export_codes(tokenizer, out, shard_size=4, device="cpu")
    export_codes(tokenizer, tmp_path / "e", shard_size=4, to="npz", device="cpu")
    assert digest_of(out) == digest_of(tmp_path / "e")


@pytest.mark.usefixtures("quick")
def test_the_progress_counts_images_and_shows_the_time(
    tmp_path: Path, trained: Trained, many: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_AFTER", 0.0)
    monkeypatch.setattr(progress, "NEXT_LINES_AFTER", 0.0)
    command = ["export-codes", "--tokenizer", trained.tokenizer, "--data", many, "--out", tmp_path / "codes"]
    outcome = codegrid(*command, "--shard-size", 50)
    count = read_manifest(tmp_path / "codes").count
    assert re.search(rf"encoding train: {count} of {count} images \(100 %\), [\d,]+ images/s, 0 s left\n$", outcome.err)
    assert outcome.error_lines == []
