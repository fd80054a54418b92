"""A process that is lost ends the others soon, and one of them says so; one that is only busy, or done, ends nobody."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.runtime.process_group import process_group

from .processes import QUICK, Ended, Group, needs_signals, ready, run_processes


def errors(ended: list[Ended]) -> list[str]:
    """The lines of errors that all printed, by rank. Torch prints its stack where the store dies amid a question."""
    return [line for process in ended for line in process.printed.splitlines() if "Error: " in line]


def compute_until_lost(rank: int) -> None:
    with process_group() as group:
        group.wait()
        ready(rank)
        while True:
            group.maxima([1.0])


def wait_without_each_other(rank: int) -> None:
    """As where NCCL hangs: no connection tells anything."""
    with process_group() as group:
        group.wait()
        ready(rank)
        time.sleep(1000)


@needs_signals
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_noticed_at_once_and_told_once(tmp_path: Path, victim: int) -> None:
    group = Group(tmp_path, 3, compute_until_lost)
    group.kill(victim, signal.SIGKILL)
    ended = group.ended()
    assert [process.status for process in ended] == [-9 if rank == victim else 1 for rank in range(3)]
    (line,) = errors(ended)
    assert "Error: expected all 3 processes to continue, got " in line
    assert " lost (" in line


@needs_signals
@pytest.mark.parametrize("work", [compute_until_lost, wait_without_each_other])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_process_is_missed_by_its_silence(tmp_path: Path, victim: int, work: object) -> None:
    """Process 0 hosts the store, which stops with it."""
    group = Group(tmp_path, 3, work)  # type: ignore[arg-type]
    group.kill(victim, signal.SIGSTOP)
    ended = group.ended(without=victim)
    assert [ended[rank].status for rank in range(3) if rank != victim] == [1, 1]
    (line,) = errors(ended)
    lost = "no answer from the machine of process 1 of 3" if victim == 0 else "no sign of life from process 3 of 3"
    assert f"Error: expected all 3 processes to continue, got {lost} on {os.uname().nodename} for 2 s; run the" in line


@needs_signals
def test_a_group_that_is_stopped_as_a_whole_continues(tmp_path: Path) -> None:
    group = Group(tmp_path, 2, finish)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in range(2):
            group.kill(rank, number)
        time.sleep(2 * QUICK["LOST_AFTER"] if number == signal.SIGSTOP else 0)
    (tmp_path / "finish").touch()
    ended = group.ended()
    assert [(process.status, process.printed) for process in ended] == [(0, "")] * 2


def finish(rank: int) -> None:
    with process_group() as group:
        group.wait()
        ready(rank)
        while not Path("finish").exists():
            time.sleep(0.01)
        group.wait()


def fail(rank: int) -> None:
    with process_group() as group:
        group.wait()
        if rank == 1:
            raise InputError(expected="an image", got="a hole", do="mend it")
        group.maxima([1.0])


def fail_unseen(rank: int) -> None:
    with process_group() as group:
        group.wait()
        if rank == 1:
            raise KeyError("mine")
        time.sleep(1000)


def fail_in_main(rank: int) -> None:
    with process_group() as group:
        group.wait()
        if rank == 0:
            raise ValueError("mine")
        group.maxima([1.0])


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (fail, "process 2 of 3: Error: expected an image, got a hole; mend it"),
        (fail_unseen, "process 2 of 3: Error: KeyError: 'mine' (--debug shows where)"),
        (fail_in_main, "Error: mine"),
    ],
)
def test_a_process_that_fails_prints_its_own_error_and_ends_all(tmp_path: Path, work: object, line: str) -> None:
    ended = run_processes(tmp_path, 3, work)  # type: ignore[arg-type]
    assert [process.status for process in ended] == [1, 1, 1]
    assert errors(ended) == [line]


@needs_signals
def test_a_process_that_a_signal_ends_is_named_by_another(tmp_path: Path) -> None:
    group = Group(tmp_path, 3, compute_until_lost)
    group.kill(1, signal.SIGTERM)
    ended = group.ended()
    # It is in a collective at that moment, or not: then it may see the others leave before its own signal.
    assert [process.status for process in ended] == [1, 143, 1]
    (line,) = errors(ended)
    assert f"got a signal that ended process 2 of 3 on {os.uname().nodename}; run the same" in line


def be_busy(rank: int) -> None:
    with process_group() as group:
        matrix = torch.ones(1500, 1500)
        until = time.monotonic() + 2 * QUICK["LOST_AFTER"]
        while rank == 1 and time.monotonic() < until:
            torch.linalg.eigvalsh(matrix)  # long, and one call
        group.wait()


def test_a_busy_process_is_not_missed(tmp_path: Path) -> None:
    ended = run_processes(tmp_path, 2, be_busy)
    assert [(process.status, process.printed) for process in ended] == [(0, "")] * 2
