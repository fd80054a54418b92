"""Samples by several processes: the folder of one, whatever happens, and nothing said twice.

Most run as threads that communicate as processes do; one as torchrun starts them.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.generation import sample_folder
from pipeline.generation.image_pipeline import ImagePipeline, Sampled
from pipeline.generation.sample_folder import SampleOptions, sample_in_batches, sample_to_folder
from pipeline.images import png_folder
from pipeline.images.png import save_png
from pipeline.runtime.folder_lock import LOCK, only_writer
from pipeline.runtime.process_group import OtherProcessError, ProcessGroup
from pipeline.runtime.progress import Progress

from ..conftest import Codegrid, Trained
from ..disks import failing_writes
from ..process_threads import run_in_threads
from ..support import ROOT, digest_of


@pytest.fixture(autouse=True)
def _three_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 3)


def sample(pipeline: ImagePipeline, options: SampleOptions, out: Path, count: int, *, force: bool = False) -> list[Any]:
    return run_in_threads(count, lambda group: sample_to_folder(pipeline, options, out, force=force, group=group))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("n", [1, 3, 8, 10])
@pytest.mark.parametrize("keep_best", [1.0, 0.4])
def test_the_folder_is_that_of_one_process(
    tmp_path: Path, labelled: ImagePipeline, count: int, n: int, keep_best: float
) -> None:
    """Fewer batches than processes, as many, and more; with candidates, a batch holds fewer images."""
    options = SampleOptions(n=n, labels=("ring", "2"), seed=4, keep_best=keep_best)
    sample_to_folder(labelled, options, tmp_path / "alone")
    assert sample(labelled, options, tmp_path / "out", count) == [tmp_path / "out" / "grid.png"] * count
    assert digest_of(tmp_path / "out") == digest_of(tmp_path / "alone")
    assert not (tmp_path / "out" / LOCK).exists()


def test_each_batch_is_sampled_by_one_process_and_they_take_turns(
    labelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, drawn = ImagePipeline.sample, dict[int, tuple[int, str]]()

    def spy(self: ImagePipeline, n: int, *, first: int, **options: Any) -> Sampled:
        assert first not in drawn
        drawn[first] = n, threading.current_thread().name
        return real(self, n, first=first, **options)

    monkeypatch.setattr(ImagePipeline, "sample", spy)

    def work(group: ProcessGroup) -> list[torch.Tensor]:
        threading.current_thread().name = f"rank {group.rank}"
        found = sample_in_batches(labelled, SampleOptions(n=10, seed=4), None, Progress(10, "sampling"), group)
        return [batch.codes for batch in found]

    outcomes = run_in_threads(2, work)
    assert drawn == {0: (3, "rank 0"), 3: (3, "rank 1"), 6: (3, "rank 0"), 9: (1, "rank 1")}
    expected = real(labelled, 10, seed=4).codes.split(3)
    for found in outcomes:
        assert all(map(torch.equal, found, expected))


def test_the_progress_of_the_main_process_is_that_of_all(labelled: ImagePipeline) -> None:
    class Recorded(Progress):
        def move_to(self, done: float) -> None:
            seen.append(done)

    seen = list[float]()

    def work(group: ProcessGroup) -> None:
        bar = (Recorded if group.is_main else Progress)(10, "sampling")
        list(sample_in_batches(labelled, SampleOptions(n=10), None, bar, group))

    run_in_threads(2, work)
    assert seen == [1.5, 3, 4.5, 6, 7, 8, 9, 10]  # of a grid of four rows; two batches of three, then of three and one


def interrupt(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Ctrl-C as the images from number `first` on are sampled, by whichever process."""
    real = ImagePipeline.sample

    def interrupted(self: ImagePipeline, n: int, **options: Any) -> Sampled:
        if options["first"] == first:
            raise KeyboardInterrupt
        return real(self, n, **options)

    monkeypatch.setattr(ImagePipeline, "sample", interrupted)


@pytest.mark.parametrize("by", [0, 1])
def test_ctrl_c_keeps_the_finished_turns(
    tmp_path: Path,
    labelled: ImagePipeline,
    by: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In either process, of which the other one is lost; the folder is as if no more had been requested."""
    sample_to_folder(labelled, SampleOptions(n=6, seed=4), tmp_path / "fewer")
    interrupt(monkeypatch, 6 + 3 * by)
    outcomes = sample(labelled, SampleOptions(n=20, seed=4), tmp_path / "out", 2)
    assert isinstance(outcomes[by], KeyboardInterrupt)
    assert isinstance(outcomes[1 - by], InputError)
    fewer, out = digest_of(tmp_path / "fewer"), digest_of(tmp_path / "out")
    assert fewer.pop("sample.json") != out.pop("sample.json")
    assert out == fewer
    assert json.loads((tmp_path / "out" / "sample.json").read_text("utf-8"))["finished"] == 6
    assert capsys.readouterr().err == ("" if by else f"stopped: 6 of 20 images are in {tmp_path / 'out'}\n")


def test_ctrl_c_in_the_first_turn_writes_nothing(
    tmp_path: Path, labelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 3)
    sample(labelled, SampleOptions(n=20), tmp_path / "new" / "out", 2)
    assert not (tmp_path / "new").exists()


def one_line(outcomes: list[Any]) -> str:
    """Assert that the main process alone says what is wrong; return it."""
    assert [type(outcome) for outcome in outcomes] == [InputError] + [OtherProcessError] * (len(outcomes) - 1)
    return str(outcomes[0])


def test_a_full_disk_ends_all_with_one_line_and_keeps_the_finished_batches(
    tmp_path: Path, labelled: ImagePipeline
) -> None:
    with failing_writes(1 + 1 + 4):  # the record, the reserved space, four of the images
        line = one_line(sample(labelled, SampleOptions(n=20), tmp_path / "out", 3))
    assert "No space left on device" in line
    assert len(np.load(tmp_path / "out" / "codes.npy")) == 3


def test_a_decoder_of_nan_in_one_process_ends_all_with_one_line(
    tmp_path: Path, labelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ImagePipeline.sample

    def broken(self: ImagePipeline, n: int, **options: Any) -> Sampled:
        if options["first"] == 9:
            raise InputError(expected="finite pixels", got="NaN", do="train it again")
        return real(self, n, **options)

    monkeypatch.setattr(ImagePipeline, "sample", broken)
    line = one_line(sample(labelled, SampleOptions(n=20), tmp_path / "out", 2))
    assert line == "expected finite pixels, got NaN; train it again"
    assert len(np.load(tmp_path / "out" / "codes.npy")) == 6


def test_what_is_refused_is_said_once_and_changes_nothing(tmp_path: Path, labelled: ImagePipeline) -> None:
    out = tmp_path / "out"
    sample_to_folder(labelled, SampleOptions(n=2), out)
    before = digest_of(tmp_path)
    assert "use --force" in one_line(sample(labelled, SampleOptions(n=4), out, 2))
    unknown = SampleOptions(n=4, labels=("nosuch",))
    assert "nosuch" in one_line(sample(labelled, unknown, out, 3, force=True))
    with only_writer(out, "sampling run"):
        assert "another sampling run" in one_line(sample(labelled, SampleOptions(n=4), out, 2, force=True))
    assert digest_of(tmp_path) == before


def test_processes_with_different_priors_are_refused(
    tmp_path: Path, labelled: ImagePipeline, colour: ImagePipeline
) -> None:
    def work(group: ProcessGroup) -> Path:
        return sample_to_folder(
            colour if group.rank == 1 else labelled, SampleOptions(n=4), tmp_path / "o", group=group
        )

    line = one_line(run_in_threads(3, work))
    assert line.startswith("expected the same tokenizer in every process, got ")
    assert not (tmp_path / "o").exists()


def test_only_the_main_process_writes(tmp_path: Path, labelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    writers = set[str]()

    def spy(image: torch.Tensor, path: Path) -> None:
        writers.add(threading.current_thread().name)
        save_png(image, path)

    monkeypatch.setattr(png_folder, "save_png", spy)
    monkeypatch.setattr(sample_folder, "save_grid", lambda images, path, columns: spy(images[0], path))

    def work(group: ProcessGroup) -> None:
        threading.current_thread().name = f"rank {group.rank}"
        sample_to_folder(labelled, SampleOptions(n=10), tmp_path / "out", group=group)

    run_in_threads(3, work)
    assert writers == {"rank 0"}


# The commands


@pytest.mark.parametrize(("rank", "writes"), [(0, True), (1, False)])
def test_one_process_alone_completes_and_reconstructs(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch, rank: int, writes: bool
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    picture = sorted(trained.images.rglob("*.png"))[0]
    both = ["--tokenizer", trained.tokenizer, "--device", "cpu", "--n", 2]
    completed, reconstructed = tmp_path / "completed", tmp_path / "reconstructed.png"
    outcomes = [
        codegrid("complete", *both, "--prior", trained.prior, "--image", picture, "--keep", "top", "--out", completed),
        codegrid("reconstruct", *both, "--out", reconstructed),
    ]
    assert [(outcome.status, bool(outcome.out)) for outcome in outcomes] == [(0, writes)] * 2
    assert completed.exists() == reconstructed.exists() == writes


def test_torchrun_samples_the_bytes_of_one_process_and_says_it_once(
    tmp_path: Path, trained: Trained, colour: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The "--" is for torchrun, which takes the --n of a command for a beginning of its own options."""
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 64)
    sample_to_folder(colour, SampleOptions.of(n=100, seed=3), tmp_path / "alone")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--", "cli.py"]
    both = ["--tokenizer", trained.tokenizer, "--prior", trained.prior, "--device", "cpu"]
    command = [*start, "sample", *both, "--n", 100, "--seed", 3, "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"100 new images: {tmp_path / 'out' / 'grid.png'}\n"), done.stderr
    assert digest_of(tmp_path / "out") == digest_of(tmp_path / "alone")
