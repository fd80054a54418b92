"""Exports by several processes: each image exactly once, the bytes of one process, one line on failure, any kill.

Most run as threads that communicate as processes do; a few as torchrun starts them.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.codes import encoded_images, export, writer
from pipeline.codes.dataset import CodeDataset
from pipeline.codes.export import export_codes
from pipeline.codes.manifest import CodeManifest
from pipeline.errors import InputError
from pipeline.images.image_set import open_images
from pipeline.models import inference
from pipeline.runtime.folder_lock import only_writer
from pipeline.runtime.process_group import OtherProcessError, ProcessGroup, process_group
from tokenizer import VQVAE

from ..process_threads import run_in_threads
from ..support import brightness_tokenizer, digest_of, fill_with_cells, save_tokenizer
from ..training.training_runs import Killed
from .test_export import Deadline, intact_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("by_hand") / "tokenizer"
    save_tokenizer(folder, brightness_tokenizer(), grey_folder)
    return folder


class Exporters:
    """Runs `export_codes` in several threads, as processes of one group."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._own = threading.local()
        patch.setattr(export, "process_group", self._own_group)

    @contextmanager
    def _own_group(self) -> Iterator[ProcessGroup]:
        yield getattr(self._own, "group", ProcessGroup())

    def export(self, count: int, *arguments: Any, **options: Any) -> list[Any]:
        def work(group: ProcessGroup) -> CodeManifest:
            self._own.group = group
            return export_codes(*arguments, device="cpu", **options)

        return run_in_threads(count, work)


@pytest.fixture
def exporters(monkeypatch: pytest.MonkeyPatch) -> Exporters:
    """With blocks of 4 images, and without waiting for the disk."""
    monkeypatch.setattr(inference, "BLOCK", 4)
    monkeypatch.setattr(encoded_images, "BLOCK", 4)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return Exporters(monkeypatch)


# Process groups


def test_each_item_is_in_exactly_one_share_and_neighbours_stay_together() -> None:
    for count in range(1, 7):
        for n in range(20):
            shares = [ProcessGroup(rank, count).share(list(range(n))) for rank in range(count)]
            assert [item for share in shares for item in share] == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_alone() -> None:
    alone = ProcessGroup()
    assert (alone.is_main, alone.gather(3), alone.share([1, 2])) == (True, [3], [1, 2])
    assert alone.run_on_all(lambda: 1) == alone.run_on_main(lambda: 1) == alone.main_first(lambda: 1) == 1
    with pytest.raises(InputError, match="expected x, got y; z"):
        alone.run_on_all(lambda: _wrong("x"))


def _wrong(expected: str) -> int:
    raise InputError(expected=expected, got="y", do="z")


@pytest.mark.parametrize("wrong", [{0}, {1}, {1, 2}, {0, 1, 2}])
def test_a_failure_in_some_is_reported_by_the_main_process_alone(wrong: set[int]) -> None:
    def work(group: ProcessGroup) -> int:
        return group.run_on_all(lambda: _wrong(f"x{group.rank}") if group.rank in wrong else group.rank)

    outcomes = run_in_threads(3, work)
    assert str(outcomes[0]) == f"expected x{min(wrong)}, got y; z"
    for outcome in outcomes[1:]:
        assert isinstance(outcome, OtherProcessError)
        assert outcome.code == 1


def test_run_on_all_gives_each_its_own_result_and_run_on_main_gives_all_the_same() -> None:
    assert run_in_threads(3, lambda group: group.run_on_all(lambda: group.rank * 10)) == [0, 10, 20]
    done: list[int] = []
    assert run_in_threads(3, lambda group: group.run_on_main(lambda: done.append(group.rank) or "main")) == ["main"] * 3
    assert done == [0]
    outcomes = run_in_threads(2, lambda group: group.run_on_main(lambda: _wrong("x")))
    assert [type(outcome) for outcome in outcomes] == [InputError, OtherProcessError]


def test_main_first_runs_the_first_of_each_machine_before_its_others() -> None:
    done: list[int] = []

    def work(group: ProcessGroup) -> int:
        def action() -> int:
            if group.local_rank:
                assert {0, 3} <= set(done)
            done.append(group.rank)
            return group.rank

        return group.main_first(action)

    assert run_in_threads(6, work, machines=2) == list(range(6))
    assert sorted(done) == list(range(6))


def test_each_process_uses_a_gpu_of_its_own_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: None)
    assert [ProcessGroup(rank, 3, rank).device("auto") for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert ProcessGroup(5, 6, 1).device("cuda") == "cuda:1"
    assert ProcessGroup(1, 2, 1).device("cpu") == "cpu"
    assert ProcessGroup(1, 2, 1).device("cuda:0") == "cuda:0"
    assert ProcessGroup().device("auto") == "auto"


def test_without_torchrun_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as group:
        assert group == ProcessGroup()
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some schedulers leave it for a program that they start once
    monkeypatch.delenv("RANK", raising=False)
    with process_group() as group:
        assert group == ProcessGroup()


# An export by several processes


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize(("count", "shard_size"), [(2, 1), (2, 4), (3, 5), (3, 1000), (8, 6)])
def test_several_write_the_bytes_of_one(
    tmp_path: Path, tokenizer: Path, exporters: Exporters, count: int, shard_size: int, flips: bool
) -> None:
    """Also more processes than shards."""
    options: dict[str, Any] = {"shard_size": shard_size, "flips": flips, "to": "npz"}
    alone = export_codes(tokenizer, tmp_path / "alone", device="cpu", **options)
    manifests = exporters.export(count, tokenizer, tmp_path / "codes", **options)
    assert manifests == [alone] * count
    assert digest_of(tmp_path / "codes") == digest_of(tmp_path / "alone")


def test_no_shard_is_encoded_by_two(
    tmp_path: Path, tokenizer: Path, exporters: Exporters, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, images, encode = threading.Lock(), [], VQVAE.encode

    def spy(model: VQVAE, block: Tensor) -> Tensor:
        with lock:
            images.extend(image.numpy().tobytes() for image in block)
        return encode(model, block)

    monkeypatch.setattr(VQVAE, "encode", spy)
    count = exporters.export(2, tokenizer, tmp_path, shard_size=4)[0].count
    assert len(set(images) - {bytes(len(images[0]))}) == count
    assert len(images) == count + -count % 4


def test_any_of_two_killed_at_any_moment(
    tmp_path: Path, tokenizer: Path, exporters: Exporters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one reports that it is alone; then one process, or three, resume."""
    export_codes(tokenizer, tmp_path / "undisturbed", shard_size=3, device="cpu")
    monkeypatch.setattr(writer, "UPDATE_PAUSE", 0)
    monkeypatch.setattr(writer, "VISIBLE_WITHIN", 0)
    deadline = Deadline(monkeypatch)
    for moment in range(1000):
        deadline.left, out = moment, tmp_path / f"killed-{moment}"
        outcomes = exporters.export(2, tokenizer, out, shard_size=3)
        deadline.left = sys.maxsize
        if all(isinstance(outcome, CodeManifest) for outcome in outcomes):
            break
        assert {type(outcome) for outcome in outcomes} <= {Killed, InputError}
        assert Killed in map(type, outcomes)
        intact_shards(out)
        resumed = exporters.export(1 + moment % 3, tokenizer, out, shard_size=3)
        assert {type(outcome) for outcome in resumed} == {CodeManifest}
        assert digest_of(out) == digest_of(tmp_path / "undisturbed")
    assert moment > 40


@pytest.mark.parametrize("what", ["tokenizer fingerprint", "rows sha256", "made with"])
def test_processes_that_would_write_different_things_are_refused(
    tmp_path: Path, tokenizer: Path, exporters: Exporters, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with another copy of the tokenizer or of the images, or another version of torch."""
    request, lock, calls = export._request, threading.Lock(), []

    def other(*arguments: Any) -> CodeManifest:
        requested = request(*arguments)
        with lock:
            calls.append(1)
            different: Any = {"torch": "1.13"} if what == "made with" else "other"
            return replace(requested, **{what.replace(" ", "_"): different}) if len(calls) == 2 else requested

    monkeypatch.setattr(export, "_request", other)
    outcomes = exporters.export(3, tokenizer, tmp_path / "codes")
    assert [type(outcome) for outcome in outcomes] == [InputError, OtherProcessError, OtherProcessError]
    assert f"expected the same {what} in every process" in str(outcomes[0])
    assert not (tmp_path / "codes").exists()


def test_a_shard_of_another_machine_that_does_not_appear(
    tmp_path: Path, tokenizer: Path, exporters: Exporters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --out folders that have one path and are not the same."""
    monkeypatch.setattr(writer, "VISIBLE_WITHIN", 0)
    write = writer.write_atomic

    def elsewhere(path: Path, data: bytes) -> None:
        write(path if path.name != "shard-00001.json" else tmp_path / "elsewhere" / path.name, data)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_atomic", elsewhere)
        outcomes = exporters.export(2, tokenizer, tmp_path / "codes", shard_size=4)
    assert [type(outcome) for outcome in outcomes] == [InputError, OtherProcessError]
    assert "give them one --out folder that all machines share" in str(outcomes[0])


def test_a_wrong_option_is_reported_once(tmp_path: Path, tokenizer: Path, exporters: Exporters) -> None:
    outcomes = exporters.export(2, tokenizer, tmp_path / "codes", to="csv")
    assert [type(outcome) for outcome in outcomes] == [InputError, OtherProcessError]
    assert "expected npz or parquet as --to, got csv" in str(outcomes[0])
    assert not (tmp_path / "codes").exists()


def test_a_folder_that_another_export_writes_is_reported_once(
    tmp_path: Path, tokenizer: Path, exporters: Exporters
) -> None:
    """The processes of one export are one writer."""
    with only_writer(tmp_path / "codes", "export"):
        outcomes = exporters.export(3, tokenizer, tmp_path / "codes")
    assert [type(outcome) for outcome in outcomes] == [InputError, OtherProcessError, OtherProcessError]
    assert "another export that writes into it" in str(outcomes[0])
    assert not (tmp_path / "codes").exists()


# As torchrun starts them


def torchrun(count: int, *command: object, **options: Any) -> "subprocess.Popen[str]":
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*start, "cli.py", "export-codes", *map(str, command), "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_torchrun_one_killed_then_two_resume(tmp_path: Path, tokenizer: Path) -> None:
    images = fill_with_cells(tmp_path / "images", [f"{i}.png" for i in range(500)])
    out, undisturbed = tmp_path / "codes", tmp_path / "undisturbed"
    command = ["--tokenizer", tokenizer, "--data", images, "--shard-size", 2, "--out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        count = export_codes(tokenizer, undisturbed, data=str(images), shard_size=2, device="cpu").count
    with torchrun(2, *command, out) as both:
        while both.poll() is None and not (out / f"codes-{count // 4 + 3:05d}.npy").exists():
            time.sleep(0.002)  # until the second process has written a shard
        os.kill(_worker(both.pid, 1), signal.SIGKILL)
        both.communicate(timeout=60)
    assert both.returncode == 1
    done = intact_shards(out)
    assert 1 <= len(done) < -(-count // 2)
    with torchrun(2, *command, out) as resumed:
        printed, errors = resumed.communicate(timeout=60)
    assert (resumed.returncode, printed.count(f"{count:,} grids of 4x6 codes")) == (0, 1), errors
    assert digest_of(out) == digest_of(undisturbed)
    names = list(CodeDataset(out).names())
    assert len(set(names)) == len(names) == count == len(open_images(str(images)).train)


def _worker(torchrun_pid: int, rank: int) -> int:
    """Return the id of the process of this rank. Skip the test where the system does not tell it."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == torchrun_pid and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:  # ended meanwhile, or another user's
            continue
    raise AssertionError(f"no process of rank {rank}")


def test_torchrun_reports_an_error_once(tmp_path: Path) -> None:
    with torchrun(2, "--tokenizer", tmp_path / "nosuch", "--out", tmp_path / "codes") as failing:
        _, errors = failing.communicate(timeout=60)
    assert failing.returncode == 1
    lines = [line for line in errors.splitlines() if "Error: expected" in line]
    assert lines == [
        f"Error: expected a tokenizer checkpoint in {tmp_path / 'nosuch'}, got no such folder; "
        "run train-tokenizer or name another"
    ]
    assert not (tmp_path / "codes").exists()
