"""Ctrl-C, SIGTERM and SIGHUP end a run after the step in progress, once it is saved; another Ctrl-C ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from .console import note

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP, the end of the terminal
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Terminated(SystemExit):
    """Ends a command after SIGTERM or SIGHUP, with the status that a shell shows then: 143 or 129."""


@contextmanager
def ending_by_signal() -> Iterator[None]:
    """Raise Terminated within `with` where SIGTERM or SIGHUP would end the process, so that it can leave in order.

    Training, which saves first, handles them itself meanwhile (`StopSignal`). Ignored signals stay ignored.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        chosen = [number for number in SIGNALS if number != signal.SIGINT]
        before = {number: signal.signal(number, end) for number in chosen if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignal:
    """Records within `with` whether the user (SIGINT) or the system (SIGTERM, SIGHUP) asked to stop, in `requested`.

    Ctrl-C after that raises KeyboardInterrupt wherever the program is; SIGTERM and SIGHUP change nothing any more, for
    a terminal that closes sends SIGHUP twice (the system, and the shell that ends), and a system that shuts down sends
    SIGTERM and SIGHUP. Under nohup, which ignores SIGHUP, it stays ignored.
    """

    def __init__(self) -> None:
        self.received = 0  # the number of the signal
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Return whether a signal has come."""
        return self.received != 0

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit(self, message: str) -> NoReturn:
        """Print `message`, and end the program with its signal's status: 130 after SIGINT, 143 or 129 after the others.

        SIGINT is a KeyboardInterrupt, the others are a SystemExit.
        """
        note(message)
        if self.received != signal.SIGINT:
            raise SystemExit(128 + self.received)
        raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.received = number
            note("stopping after this step; press Ctrl-C again to stop at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
