"""The command line in this very process, again and again, which is made safe to read anything.

Memory is limited, a load that takes too long is ended, and every opened file is noticed.
"""

import io
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import cli

from .program import Ended, limit_memory
from .workspace import Command, Workspace

ENDLESS = 10.0  # seconds after which a load is ended
ADDRESSES = 2 * 2**30  # bytes of addresses that it may take; threads reserve many and use few
SYSTEM_FILES = ("/usr", "/proc", "/dev/null", "/dev/urandom", "/sys/devices/system/cpu")
ROOT = Path(cli.__file__).parent


class SafeProcess:
    """This process, made safe to read anything, and what reading did."""

    def __init__(self, allowed: tuple[Path, ...]) -> None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print there; the program's own lines are kept
        limit_memory(ADDRESSES)
        signal.signal(signal.SIGALRM, _end)
        self.opened: list[str] = []  # files outside the folder, in the last run
        places = (*allowed, ROOT, sys.prefix, sys.base_prefix, *SYSTEM_FILES)
        self._allowed = tuple(os.path.join(str(place), "") for place in places)
        self._out, self._err = io.BytesIO(), io.BytesIO()
        sys.stdout = io.TextIOWrapper(self._out, encoding="utf-8")
        sys.stderr = io.TextIOWrapper(self._err, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        sys.addaudithook(self._audit)

    def run(self, workspace: Workspace, command: Command) -> tuple[Ended, int]:
        """Run a command; return what it left, and the bytes of memory that it took at its peak."""
        surroundings, line = workspace.surroundings(), workspace.line(command)
        os.chdir(surroundings.folder)
        os.environ.update(surroundings.environment)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        self.opened.clear()
        status, hung = _main(line)
        grown = _resident("VmHWM") - before
        sys.stdout.flush()
        return Ended(tuple(line), status, _taken(self._out), _taken(self._err), hung), grown

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            allowed = os.path.join(path, "").startswith(self._allowed)
            if not allowed and os.path.exists(path):  # a resumed run tries the paths in its config
                self.opened.append(path)


class _Endless(BaseException):
    """Raised in a load that takes too long."""


def _end(number: int, frame: FrameType | None) -> None:
    raise _Endless


def _main(line: list[str]) -> tuple[int, bool]:
    """Run the command line in this process; return its exit status, and whether it had to be ended."""
    signal.setitimer(signal.ITIMER_REAL, ENDLESS)
    try:
        cli.main(line)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1, False
    except _Endless:
        return -signal.SIGALRM, True
    except BaseException:
        traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 1, False


def _taken(buffer: io.BytesIO) -> str:
    """Return what was written into a buffer, and empty it."""
    text = buffer.getvalue().decode("utf-8", "backslashreplace")
    buffer.seek(0)
    buffer.truncate()
    return text


def _resident(name: str) -> int:
    """Return the resident memory of this process in bytes: VmRSS, or VmHWM for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
