"""Ctrl-C, SIGTERM, SIGHUP and a terminal that closes, in processes of their own: saved, left, and with which status."""

import io
import json
import os
import pty
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import cli
from pipeline.generation import sample_folder
from pipeline.generation.image_pipeline import ImagePipeline
from pipeline.models import checkpoint
from pipeline.models.checkpoint import PREVIOUS, load_training, read_run
from pipeline.runtime import atomic_files, interrupts
from pipeline.runtime.atomic_files import COMMIT
from pipeline.runtime.interrupts import StopSignal
from pipeline.training import loop
from pipeline.training.prior_stage import PriorStage
from pipeline.training.tokenizer_stage import TokenizerStage

from ..conftest import Codegrid, Trained
from ..support import digest_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of another system")

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
STEPS = 6
Hook = Callable[[], object]


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    written: str  # to standard output and standard error


def send(*numbers: int) -> Hook:
    """Return a function that sends these signals to the process it runs in."""

    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def while_evaluating(patch: pytest.MonkeyPatch, act: Hook) -> None:
    """Make the second evaluation, after step 2, call `act` in its midst."""
    calls = []
    for stage in (TokenizerStage, PriorStage):

        def evaluate(self: object, real: Callable[..., object] = stage.evaluate) -> object:
            calls.append(1)
            found = real(self)
            if len(calls) == 2:
                act()
            return found

        patch.setattr(stage, "evaluate", evaluate)


def while_saving(patch: pytest.MonkeyPatch, act: Hook) -> None:
    """Make the second save, after step 2, call `act` when its first file is written and nothing is committed."""
    calls = []
    real = atomic_files._write_flushed

    def write(path: Path, data: bytes) -> None:
        real(path, data)
        calls.append(path.name)
        if path.name == f"{checkpoint.MODEL}.new" and calls.count(path.name) == 2:
            act()

    patch.setattr(atomic_files, "_write_flushed", write)
    patch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)


MOMENTS = {"evaluating": while_evaluating, "saving": while_saving}


def command_of(kind: str, trained: Trained, out: Path) -> list[str]:
    commands = {
        "tokenizer": ["train-tokenizer", "--data", str(trained.images), "--num-codes", "8", "--hidden-channels", "4"],
        "prior": ["train-prior", "--codes", str(trained.codes), "--channels", "4", "--num-layers", "1"],
    }
    return [*commands[kind], "--steps", str(STEPS), "--precision", "fp32", "--device", "cpu", "--out", str(out)]


def run_and_exit(arguments: list[str], prepare: Callable[[pytest.MonkeyPatch], None]) -> None:
    """Run the program in this process, a child, and end that with its status; with 99 if it raises."""
    status = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), "utf-8", write_through=True)  # type: ignore[arg-type]
            for descriptor in (1, 2)
        )
        prepare(pytest.MonkeyPatch())
        cli.main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        os._exit(status)


def in_a_process(arguments: list[str], prepare: Callable[[pytest.MonkeyPatch], None]) -> Ended:
    """Run the program in a child and return how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        run_and_exit(arguments, prepare)
    os.close(writing)
    with open(reading, "rb") as file:
        written = file.read().decode("utf-8", "replace")
    return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written)


def step_of(folder: Path) -> int:
    return int(load_training(folder).values["step"])


# Saved, and left


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_a_signal_saves_and_leaves(
    trained: Trained, tmp_path: Path, kind: str, moment: str, number: signal.Signals
) -> None:
    """In the midst of an evaluation or a save; both are finished first."""
    command = command_of(kind, trained, tmp_path)
    ended = in_a_process(command, lambda patch: MOMENTS[moment](patch, send(number)))
    assert ended.status == STATUS[number], ended.written
    assert "stopped at step 2 and saved; --resume continues" in ended.written
    assert step_of(tmp_path) == 2
    assert checkpoint.is_intact(tmp_path, kind)
    assert not list(tmp_path.rglob("*.new"))
    assert in_a_process([*command, "--resume"], lambda patch: None).status == 0
    assert step_of(tmp_path) == STEPS


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("first", STATUS)
def test_another_ctrl_c_leaves_at_once(trained: Trained, tmp_path: Path, moment: str, first: signal.Signals) -> None:
    """Without a new save, and nothing is broken."""
    command = command_of("prior", trained, tmp_path)
    ended = in_a_process(command, lambda patch: MOMENTS[moment](patch, send(first, signal.SIGINT)))
    assert ended.status == 130, ended.written
    assert "saved" not in ended.written
    if moment == "saving":
        assert step_of(tmp_path) == 1
        assert checkpoint.is_intact(tmp_path, "prior")
    else:
        assert not (tmp_path / "config.json").exists()
    assert in_a_process([*command, "--resume"], lambda patch: None).status == 0
    assert step_of(tmp_path) == STEPS
    assert not list(tmp_path.rglob("*.new"))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("second", [signal.SIGHUP, signal.SIGTERM])
def test_the_other_signals_may_come_twice(
    trained: Trained, tmp_path: Path, moment: str, second: signal.Signals
) -> None:
    """A terminal that closes sends SIGHUP twice; a system that shuts down sends SIGTERM, then SIGHUP."""
    command = command_of("prior", trained, tmp_path)
    ended = in_a_process(command, lambda patch: MOMENTS[moment](patch, send(signal.SIGHUP, second, second)))
    assert (ended.status, step_of(tmp_path)) == (129, 2)


def test_under_nohup_sighup_stays_ignored(trained: Trained, tmp_path: Path) -> None:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        while_evaluating(patch, send(signal.SIGHUP))

    ended = in_a_process(command_of("prior", trained, tmp_path), prepare)
    assert (ended.status, step_of(tmp_path)) == (0, STEPS)


# A terminal that closes


def in_a_terminal(arguments: list[str], prepare: Callable[[pytest.MonkeyPatch, int], None]) -> int:
    """Run the program in a terminal of its own, close that when the child says so, and return its status.

    `prepare` gets the descriptor that the child writes a byte to.
    """
    reading, writing = os.pipe()
    child, terminal = pty.fork()
    if child == 0:
        run_and_exit(arguments, lambda patch: prepare(patch, writing))
    os.close(writing)
    os.set_blocking(terminal, False)
    os.set_blocking(reading, False)
    closed = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        for descriptor in (terminal, reading):
            try:
                told = os.read(descriptor, 2**16)
            except (BlockingIOError, OSError):
                continue
            if descriptor == reading and told and not closed:
                os.close(terminal)
                closed = True
        time.sleep(0.01)
    os.close(reading)
    return os.waitstatus_to_exitcode(status)


def closes(told: int, patch: pytest.MonkeyPatch, moment: str) -> None:
    """Let the terminal close at a moment, and wait until the signal has come."""
    received: list[int] = []
    real = StopSignal._receive

    def receive(self: StopSignal, number: int, frame: object) -> None:
        received.append(number)
        real(self, number, None)

    def act() -> None:
        os.write(told, b"!")
        while not received:
            time.sleep(0.01)

    patch.setattr(StopSignal, "_receive", receive)
    MOMENTS[moment](patch, act)


@pytest.mark.parametrize("moment", ["evaluating", "saving"])
@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_a_terminal_that_closes_saves_and_leaves(trained: Trained, tmp_path: Path, kind: str, moment: str) -> None:
    """From then on every write to it fails; none of them may keep the run from being saved."""
    command = command_of(kind, trained, tmp_path)
    status = in_a_terminal(command, lambda patch, told: closes(told, patch, moment))
    assert status == 129
    assert step_of(tmp_path) == 2
    assert checkpoint.is_intact(tmp_path, kind)


# The signal itself


class Interrupting(io.RawIOBase):
    """A standard error in whose writing a signal comes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.lines = descriptor, 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: object) -> int:
        self.lines += 1
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)
        return len(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("has_descriptor", [True, False])
def test_a_signal_while_standard_error_is_written_does_no_harm(
    has_descriptor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own buffer refuses to be written while it is being written, with a RuntimeError."""
    reading, writing = os.pipe()
    raw = Interrupting(writing)
    if not has_descriptor:
        monkeypatch.setattr(Interrupting, "fileno", io.RawIOBase.fileno)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(raw), write_through=True))
    with StopSignal() as stop:
        print("a line", file=sys.stderr, flush=True)
        assert stop.received == signal.SIGTERM
    assert raw.lines == 1
    os.close(writing)
    with open(reading, "rb") as file:
        found = file.read()
    assert (b"stopping after this step" in found) == has_descriptor
    monkeypatch.setattr(interrupts, "note", lambda text: print(text, file=sys.stderr, flush=True))
    with pytest.raises(RuntimeError, match="reentrant"), StopSignal():  # what the test would see otherwise
        print("a line", file=sys.stderr, flush=True)


def test_a_closed_standard_error_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, StopSignal() as stop:
        monkeypatch.setattr(sys, "stderr", closed)
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(SystemExit) as ended:
            stop.exit("stopped")
    assert ended.value.code == 129


def test_handlers_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in STATUS}
    with StopSignal() as stop:
        assert all(signal.getsignal(number) == stop._receive for number in STATUS)
        assert not stop.requested
    assert {number: signal.getsignal(number) for number in STATUS} == before


def test_a_kill_in_the_midst_of_a_save_leaves_the_save_before(trained: Trained, tmp_path: Path) -> None:
    """SIGKILL, which nothing handles, when the third save has renamed some of its files: readers see one save."""
    command = command_of("tokenizer", trained, tmp_path / "run")
    renames = 0

    def prepare(number: int) -> Callable[[pytest.MonkeyPatch], None]:
        def patched(patch: pytest.MonkeyPatch) -> None:
            real = os.replace
            calls: list[int] = []

            def replace(source: Path, target: Path) -> None:
                if Path(target).name in (COMMIT, *checkpoint_names()):
                    calls.append(1)
                    if len(calls) == number:
                        send(signal.SIGKILL)()
                real(source, target)

            patch.setattr("pipeline.runtime.atomic_files.os.replace", replace)
            patch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)

        return patched

    steps = []
    for number in range(12, 20):  # four renames of the first save, seven of each that keeps the one before
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert in_a_process(command, prepare(number)).status == -signal.SIGKILL
        renames += 1
        steps.append(read_run(tmp_path / "run", "tokenizer").training.values["step"])
    assert renames == 8
    assert set(steps) == {2, 3}
    assert steps == sorted(steps)
    assert in_a_process([*command, "--resume"], lambda patch: None).status == 0
    assert step_of(tmp_path / "run") == STEPS
    assert digest_of(tmp_path / "run" / PREVIOUS)


def checkpoint_names() -> tuple[str, str, str]:
    return checkpoint.MODEL, checkpoint.CONFIG, checkpoint.TRAINING


# Other commands


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_sampling_keeps_what_is_finished_after_any_signal(
    trained: Trained, tmp_path: Path, number: signal.Signals, status: int, codegrid: Codegrid
) -> None:
    """As after Ctrl-C: the record counts it, the lock is gone, and the handlers are what they were."""
    before, calls = signal.getsignal(number), []
    real = ImagePipeline.sample

    def sample(self: ImagePipeline, *arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(self, *arguments, **options)

    both = ["--tokenizer", trained.tokenizer, "--prior", trained.prior, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sample_folder.AT_ONCE, "cpu", 2)
        patch.setattr(ImagePipeline, "sample", sample)
        outcome = codegrid("sample", *both, "--n", 20, "--out", tmp_path / "out")
    assert outcome.status == status
    assert outcome.error_lines == [f"stopped: 4 of 20 images are in {tmp_path / 'out'}"]
    assert json.loads((tmp_path / "out" / "sample.json").read_text("utf-8"))["finished"] == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("codes.npy", "grid.png", "images", "sample.json")
    ]
    assert signal.getsignal(number) == before
