"""Ctrl-C and SIGTERM end a run after the step in progress, once it is saved; a second Ctrl-C ends it at once."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn


class StopSignal:
    """Records within `with` whether the user (SIGINT) or the system (SIGTERM) asked to stop, in `requested`."""

    def __init__(self) -> None:
        self.received = 0  # the number of the signal
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Return whether a signal has come."""
        return self.received != 0

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit(self, message: str) -> NoReturn:
        """Print `message`, and end the program with its signal's status: 130 after SIGINT, 143 after SIGTERM."""
        print(f"\n{message}", file=sys.stderr)
        if self.received == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.received = number
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)
