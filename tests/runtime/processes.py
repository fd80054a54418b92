"""Starts real processes of one group, as a launcher does, each of which runs a function of a test module."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import cli
from pipeline.runtime import heartbeat
from pipeline.runtime.console import prepare_console

METHODS = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
QUICK = {"BEAT_EVERY": 0.2, "LOST_AFTER": 1.5, "TICK": 0.05}  # seconds, of the heartbeat
WITHIN = 60.0  # seconds, in which all must end

if "forkserver" in METHODS:
    CONTEXT.set_forkserver_preload(["pipeline.runtime.process_group", "tests.runtime.processes"])

needs_signals = pytest.mark.skipif(os.name == "nt", reason="needs the signals of POSIX")

Work = Callable[[int], None]  # of the rank; the status of the process is 0 if it returns


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a process left behind."""

    status: int  # negative if a signal ended it
    printed: str  # on standard error
    said: str  # on standard output


class Group:
    """Processes that are running."""

    def __init__(self, folder: Path, count: int, work: Work) -> None:
        self.folder = folder
        port = free_port()
        self.processes: list[BaseProcess] = [
            CONTEXT.Process(target=_run, args=(work, folder, rank, count, port)) for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int, number: int) -> None:
        """Send a signal to one process, once it asks for that by `ready`."""
        until = time.monotonic() + WITHIN
        while not (self.folder / f"ready-{rank}").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(self.processes[rank].pid or 0, number)

    def ended(self, *, without: int | None = None) -> list[Ended]:
        """Return what all left behind once they have ended; a process that is stopped is then killed."""
        until = time.monotonic() + WITHIN
        for rank, process in enumerate(self.processes):
            if rank != without:
                process.join(max(0, until - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert hanging == [] if without is None else hanging == [without]
        return [
            Ended(
                status=process.exitcode or 0,
                printed=(self.folder / f"stderr-{rank}").read_text(),
                said=(self.folder / f"stdout-{rank}").read_text(),
            )
            for rank, process in enumerate(self.processes)
        ]


def run_processes(folder: Path, count: int, work: Work) -> list[Ended]:
    """Run `work` in so many processes of one group until all have ended."""
    return Group(folder, count, work).ended()


def ready(rank: int) -> None:
    """Tell the test that this process is where `Group.kill` may act."""
    Path(f"ready-{rank}").touch()


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def _run(work: Work, folder: Path, rank: int, count: int, port: int) -> None:
    """Be the program of one process."""
    os.chdir(folder)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, os.fdopen(number, "w"))
    variables = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    for name, seconds in QUICK.items():
        setattr(heartbeat, name, seconds)
    cli.run_command = lambda arguments: work(rank)  # so that errors end and print as those of a command
    prepare_console()
    cli.main([])
