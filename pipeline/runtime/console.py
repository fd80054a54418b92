"""What the program prints: lines that no name, no encoding and no closed pipe can break.

Standard output takes what a command has to say (`say`), standard error the notes, warnings and errors (`note`). Both
print one line for each text they are given, above the line of progress if there is one, and neither raises. When nobody
reads standard output any more, as after `| head -1`, `say` records it: work that goes on for long asks `output_closed`
now and then, saves and leaves; a command that prints in a loop calls `check_output`; and `cli.main` calls it at the end
of every command. A reader of standard error who leaves changes nothing.
"""

import errno
import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn, Protocol, TextIO

from ..errors import InputError, printable

READER_GONE = {errno.EPIPE, errno.EINVAL, errno.EIO, errno.EBADF}  # EINVAL: on Windows; EIO: a terminal that was closed
CLOSED_STATUS = 128 + 13  # of a process that SIGPIPE ended


class StatusLine(Protocol):
    """A line at the end of a terminal that is drawn again and again, as that of a `Progress`."""

    def clear(self) -> None:
        """Remove the line."""

    def refresh(self) -> None:
        """Draw the line again."""


class OutputClosed(SystemExit):
    """Ends the program, without a message, because nobody reads standard output any more."""

    def __init__(self) -> None:
        super().__init__(CLOSED_STATUS)


_status_lines: list[StatusLine] = []  # on the terminal now
_process = (0, 1)  # the rank of this process and how many there are, if a launcher started several
_ends_at_once = False  # without what Python does at its end
_lost: OSError | None = None  # why a line on standard output was not written


def prepare_console() -> None:
    """Make standard output and error ready; the first thing that the program does.

    What an encoding lacks is escaped from now on, a stream that was closed from the start goes nowhere, and the
    warnings of the program's loggers are printed by `note`. Of several processes that torchrun or another launcher
    started, only that of rank 0 prints from now on, except by `report`.
    """
    global _lost, _process
    _lost, _process = None, _started_process()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    logger = logging.getLogger(__name__.partition(".")[0])
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())


def is_silent() -> bool:
    """Return whether another process prints what this one has to say."""
    return _process[0] > 0


def say(*lines: str) -> None:
    """Print each text as a line on standard output; what cannot be written is recorded, and raises nothing."""
    global _lost
    if not is_silent():
        _lost = _print(sys.stdout, lines) or _lost


def note(*lines: str) -> None:
    """Print each text as a line on standard error, if it can be written."""
    if not is_silent():
        _print(sys.stderr, lines)


def report(line: str) -> None:
    """Print an error on standard error, if it can be written, in every process: with its name, if `note` is silent."""
    rank, count = _process
    _print(sys.stderr, (f"process {rank + 1} of {count}: {line}" if is_silent() else line,))


def skip_the_end_of_python() -> None:
    """Let `exit_with` end this process at once.

    A process that has been in a group may hold threads of gloo which drop Python objects only now; where Python has
    ended before them, they abort the process, now and then, after all work is done.
    """
    global _ends_at_once
    _ends_at_once = True


def exit_with(status: int) -> NoReturn:
    """End the program with this status."""
    if _ends_at_once:
        exit_at_once(status)
    sys.exit(status)


def exit_at_once(status: int) -> NoReturn:
    """End the process without what Python does at its end, but with all that was printed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def output_closed() -> bool:
    """Return whether a line was not written because nobody reads standard output any more."""
    return _lost is not None and _lost.errno in READER_GONE


def record_closed(error: BrokenPipeError) -> None:
    """Record that nobody reads standard output, as another library found that writes to it."""
    global _lost
    _lost = error
    if sys.stdout is not None:
        _mute(sys.stdout)


def check_output() -> None:
    """Return if every line on standard output was written.

    Raises:
        OutputClosed: nobody reads it any more.
        InputError: it cannot be written for another reason, such as a full disk.
    """
    if output_closed():
        raise OutputClosed
    if _lost is not None:
        raise InputError(
            expected="standard output that can be written",
            got=_lost.strerror or str(_lost),
            do="send it to another place",
        )


def show_status(line: StatusLine) -> None:
    """Let `say` and `note` print above `line` from now on."""
    _status_lines.append(line)


def hide_status(line: StatusLine) -> None:
    """Undo `show_status`."""
    with suppress(ValueError):
        _status_lines.remove(line)


def end_status() -> None:
    """Remove every status line: the work that drew them has ended, perhaps by an error that still holds on to it."""
    while _status_lines:
        _status_lines.pop().clear()


def write_text(stream: TextIO | None, text: str) -> OSError | None:
    """Write `text` to standard output or error at once; return the error if that is impossible, and do not raise.

    After an error the stream goes nowhere, so that no later write fails, nor the last one, as the program ends.
    """
    if stream is None or stream.closed:
        return None
    try:
        stream.write(text)
        stream.flush()
    except UnicodeEncodeError:  # a stream that `prepare_console` has not seen; nothing of the text is written
        encoding = stream.encoding or "ascii"
        return write_text(stream, text.encode(encoding, "backslashreplace").decode(encoding))
    except OSError as error:
        _mute(stream)
        return error
    except RuntimeError:  # from the handler of a signal that came while the same stream was written: past its buffer
        with suppress(OSError, ValueError):
            os.write(stream.fileno(), text.encode("utf-8", "backslashreplace"))
    return None


def _started_process() -> tuple[int, int]:
    """Return the rank and the count of processes that a launcher put into the environment; 0 and 1 without one."""
    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not all(text.isascii() and text.isdigit() for text in (rank, count)) or int(count) < 2:
        return 0, 1
    return int(rank), int(count)


class _Notes(logging.Handler):
    """Prints the warnings of a logger by `note`."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def _print(stream: TextIO | None, lines: tuple[str, ...]) -> OSError | None:
    """Write lines above the status lines; return the error if that is impossible."""
    shown = [*_status_lines]
    for status in shown:
        status.clear()
    error = write_text(stream, "".join(f"{printable(line)}\n" for line in lines))
    for status in shown:
        status.refresh()
    return error


def _mute(stream: TextIO) -> None:
    """Send what else is written to a stream nowhere, together with what is still in its buffer."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
