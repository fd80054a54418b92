"""The command line, run in a forked copy of this process: a case costs milliseconds and not the seconds of importing.

What a run sees is what a process of its own sees: its folder, environment, signals, standard output and error. Output
goes into files, as with `> out 2> err`, or standard output into a pipe that can be closed. Linux only.
"""

import gc
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch._dynamo  # which the first optimizer imports, in a second
from PIL import Image

import cli
import pipeline.codes.decode
import pipeline.codes.export
import pipeline.codes.verify
import pipeline.compression.rate
import pipeline.evaluation.evaluate
import pipeline.evaluation.reconstruction_picture
import pipeline.generation.sample_folder
import pipeline.training.loop
import pipeline.training.train_prior
import pipeline.training.train_tokenizer  # like the others, imported once for all copies

HANG = 60.0  # seconds after which a command counts as one that never ends
GROWTH = 4 * 2**30  # bytes of addresses that a run may take in addition; what asks for more gets a MemoryError
_POLL = 0.002  # seconds
_SIGNALS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,  # which a shell may have set to be ignored
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


torch.set_num_threads(1)  # before any computation: a forked copy has no other threads
Image.init()


@dataclass(frozen=True)
class Ended:
    """What a run of the command line left behind."""

    arguments: tuple[str, ...]
    status: int  # the exit status; -n if signal n ended it
    out: str
    err: str
    hung: bool = False  # it was killed after HANG seconds

    @property
    def errors(self) -> list[str]:
        """The lines that begin with "Error:" on standard error."""
        return [line for line in self.err.replace("\r", "\n").splitlines() if line.startswith("Error:")]

    @property
    def raw(self) -> bool:
        """Whether it printed a traceback, or an error that was not written for the user."""
        raw = ("Traceback (most recent", "Exception ignored", "(--debug shows where)", "Segmentation fault")
        return any(text in self.err for text in raw)

    def shown(self, length: int = 1500) -> str:
        """Return the command, its status and the last characters of what it printed."""
        end = "hung" if self.hung else f"status {self.status}"
        return f"codegrid {' '.join(self.arguments)}  [{end}]\n{self.out[-length // 3 :]}{self.err[-length:]}"


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where and how the command line runs."""

    folder: Path  # the working directory
    environment: Mapping[str, str] = field(default_factory=dict)
    save_every: float | None = None  # seconds between two saves of a training; None: as the program has it
    pipe: bool = False  # standard output is a pipe that `Program.close_output` closes


class Program:
    """A run of the command line that has begun."""

    def __init__(self, arguments: Sequence[str | Path], surroundings: Surroundings) -> None:
        self.arguments = tuple(map(str, arguments))
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (open until `wait`)
        ready, told = os.pipe()
        self._reader, writer = os.pipe() if surroundings.pipe else (-1, self._out.fileno())
        gc.freeze()  # so that the copy touches fewer pages
        self.pid = os.fork()
        if self.pid == 0:
            for unused in {ready, self._reader} - {-1}:
                os.close(unused)
            _run(self.arguments, surroundings, writer, self._err.fileno(), told)
        if surroundings.pipe:
            os.close(writer)
        os.close(told)
        os.read(ready, 1)  # from now on signals find the program's own handlers
        os.close(ready)
        self.began = time.monotonic()

    def signal(self, number: int) -> None:
        """Send a signal, unless the program has ended and `wait` has said so."""
        os.kill(self.pid, number)

    def catches(self, number: int) -> bool:
        """Return whether the program has a handler of its own for a signal at this moment."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (number - 1) & 1)

    def close_output(self) -> None:
        """Close the pipe that standard output goes into, as `| head -1` does."""
        os.close(self._reader)
        self._reader = -1

    def ends_within(self, seconds: float) -> bool:
        """Return whether the program ends before so many seconds have passed; wait for either."""
        deadline = time.monotonic() + seconds
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL)
        return True

    def wait(self, seconds: float = HANG) -> Ended:
        """Wait until the program ends, or kill it after so many seconds; return what it left."""
        hung = not self.ends_within(seconds)
        if hung:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if self._reader >= 0:
            self.close_output()
        out, err = (_content(file) for file in (self._out, self._err))
        return Ended(self.arguments, status, out, err, hung)


def run(arguments: Sequence[str | Path], surroundings: Surroundings) -> Ended:
    """Run the command line to its end."""
    return Program(arguments, surroundings).wait()


def limit_memory(growth: int) -> None:
    """Let this process take no more than `growth` bytes of addresses in addition to those it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + growth,) * 2)


def _content(file: IO[bytes]) -> str:
    """Return all that was written into a file, and close it."""
    with file:
        file.seek(0)
        return file.read().decode("utf-8", "backslashreplace")


def _run(arguments: Sequence[str], surroundings: Surroundings, out: int, err: int, told: int) -> NoReturn:
    """Run the command line in this process, the forked one, and end it."""
    status = 1
    try:
        _enter(surroundings, out, err)
        os.write(told, b".")
        os.close(told)
        cli.main(list(arguments))
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt as interrupt:
        status = 128 + signal.SIGINT
        trace = interrupt.__traceback__
        if trace is not None and trace.tb_next is not None:  # the command began, and let it out
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        _ignore_signals()  # the command has ended, and with it what a signal means
        os._exit(_flushed(status))


def _enter(surroundings: Surroundings, out: int, err: int) -> None:
    """Make this process what a new one is: its folder, environment, streams and signals."""
    os.chdir(surroundings.folder)
    os.environ.update(surroundings.environment)
    if surroundings.save_every is not None:
        pipeline.training.loop.SAVE_EVERY_SECONDS = surroundings.save_every
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    limit_memory(GROWTH)
    for number, handler in _SIGNALS.items():
        signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _flushed(status: int) -> int:
    """Write what is left of standard output, as Python does at its end; return the exit status."""
    try:
        sys.stdout.flush()
        return status
    except OSError:
        print("Exception ignored while flushing standard output", file=sys.stderr)
        return 120
