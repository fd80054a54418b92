"""Progress on standard error: on a terminal one line that is redrawn, in a file or a pipe plain lines at a calm rate.

encoding train: 12,800 of 50,000 images (26 %), 3,900 images/s, 10 s left
step 812 of 1,500 (54 %), loss 0.123, 512 codes in use, 3,900 images/s, 1:10 left
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from ..errors import printable
from .console import hide_status, is_silent, note, show_status, write_text

Item = TypeVar("Item")

REDRAWN_EVERY = 0.1  # seconds, on a terminal
FIRST_LINE_AFTER, NEXT_LINES_AFTER = 5.0, 15.0  # seconds, elsewhere; shorter work prints nothing
USUAL_COLUMNS = 80
RATE_OVER = 60.0  # seconds, the last of which the rate is the mean over


class Progress:
    """Counts what is done of long work and shows it, with the rate and the time left, within `with`.

    Nothing of it raises when standard error cannot be written.

    Args:
        total: how much there is to do, in units.
        description: what is done; without it the line starts with the unit.
        unit: what is counted, one of it.
        batch_size: how many items a unit is, if the rate is to be shown in items.
        item: what such an item is.
        shown: whether to show anything.
        clock: returns the time in seconds.

    Attributes:
        done: how much is done, in units.
        total: as above.
    """

    def __init__(
        self,
        total: int,
        description: str | None = None,
        unit: str = "image",
        *,
        batch_size: int | None = None,
        item: str = "image",
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done = total, 0.0
        self._description, self._unit = description, unit
        self._items, self._item = (1, unit) if batch_size is None else (batch_size, item)
        self._numbers = ""
        self._view: _TerminalLine | _PlainLines | None = None
        self._shown, self._clock = shown, clock
        self._rate = _Rate(clock(), 0)

    def __enter__(self) -> "Progress":
        self._rate = _Rate(self._clock(), self.done)
        if self._shown and not is_silent():
            self._view = _TerminalLine(self.line()) if _is_terminal() else _PlainLines(self._clock())
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view is not None:
            self._view.close()
            self._view = None

    def update(self, count: float = 1) -> None:
        """Count `count` further units as done."""
        self.move_to(self.done + count)

    def move_to(self, done: float) -> None:
        """Count `done` units as done in all."""
        self.done = done
        now = self._clock()
        self._rate.add(now, done)
        if self._view is not None and self._view.is_due(now):
            self._view.show(self)

    def start_at(self, done: float) -> None:
        """Count `done` units as done before; they count neither for the rate nor for the time left."""
        self.done = done
        self._rate = _Rate(self._clock(), done)

    def reset(self, total: int) -> None:
        """Start anew, with another total."""
        self.total = total
        self.start_at(0)

    def set_numbers(self, text: str) -> None:
        """Set what the line says between what is done and the rate, from its next update on."""
        self._numbers = text

    def line(self, width: int | None = None) -> str:
        """Return what is shown now; the numbers are cut short where the line would be longer than `width`."""
        before, numbers, after = printable(self._count()), printable(self._numbers), self._speed()
        if numbers and width is not None:
            numbers = _cut(numbers, width - len(", ".join([before, *after, ""])))
        return ", ".join(part for part in (before, numbers, *after) if part)

    def _count(self) -> str:
        """Return the first part of the line."""
        share = f" ({int(100 * self.done // self.total)} %)" if self.total else ""
        count = f"{int(self.done):,} of {self.total:,}"
        if self._description is None:
            return f"{self._unit} {count}{share}"
        return f"{self._description}: {count} {self._unit}{'' if self.total == 1 else 's'}{share}"

    def _speed(self) -> list[str]:
        """Return the last parts of the line: the rate and the time left, as far as they are known."""
        rate = self._rate.units_per_second
        if rate <= 0:
            return []
        left = max(0.0, self.total - self.done) / rate
        return [f"{_number(rate * self._items)} {self._item}s/s", f"{duration(left)} left"]


def with_progress(
    items: Iterable[Item],
    total: int,
    description: str,
    unit: str = "image",
    *,
    size: Callable[[Item], int] = lambda item: 1,
    shown: bool = True,
) -> Generator[Item, None, None]:
    """Yield `items`, with a `Progress` that counts each once the caller is done with it.

    Args:
        items: what is yielded.
        total: the sum of the sizes of all items.
        description: what is done.
        unit: what is counted, one of it.
        size: returns the size of an item, in that unit.
        shown: whether to show anything.
    """
    with Progress(total, description, unit, shown=shown) as progress:
        for item in items:
            yield item
            progress.update(size(item))


def duration(seconds: float) -> str:
    """Return a time in words: 10 s, 1:10 (minutes), 2:01:10 (hours)."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _cut(text: str, length: int) -> str:
    """Return a text of `length` at most, with dots in place of its end; nothing where there is no room for them."""
    if len(text) <= length:
        return text
    return f"{text[: length - 3]}..." if length > 3 else ""


def _number(rate: float) -> str:
    """Return a rate with two digits or more."""
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"


class _Rate:
    """The mean rate of the last RATE_OVER seconds: slow first steps are soon forgotten."""

    def __init__(self, now: float, done: float) -> None:
        self._points = deque([(now, done)])  # (seconds, units), at most one a second and then the last
        self._now, self._done = now, done

    @property
    def units_per_second(self) -> float:
        """The rate; 0 while it is not known."""
        seconds, done = self._points[0]
        return (self._done - done) / (self._now - seconds) if self._now > seconds else 0.0

    def add(self, now: float, done: float) -> None:
        """Record that `done` units are done at the time `now`."""
        self._now, self._done = now, done
        if now - self._points[-1][0] >= 1:
            self._points.append((now, done))
        while len(self._points) > 1 and now - self._points[1][0] >= RATE_OVER:
            self._points.popleft()


class _PlainLines:
    """Prints a line now and then."""

    def __init__(self, now: float) -> None:
        self._next = now + FIRST_LINE_AFTER

    def is_due(self, now: float) -> bool:
        """Return whether it is time for the next line, and if so count it as printed."""
        if now < self._next:
            return False
        self._next = now + NEXT_LINES_AFTER
        return True

    def show(self, progress: Progress) -> None:
        note(progress.line())

    def close(self) -> None:
        pass


class _Bar(tqdm):
    """A bar without the thread that redraws it now and then."""

    monitor_interval = 0


class _TerminalLine:
    """Draws the line with a bar after it, and removes both at the end."""

    def __init__(self, line: str) -> None:
        self._next = 0.0
        options = {"bar_format": "{desc} {bar:20}", "leave": False, "ncols": _columns()}
        self._bar = _Bar(desc=line, total=1, file=_Terminal(), **options)
        show_status(self._bar)

    def is_due(self, now: float) -> bool:
        """Return whether it is time to draw, and if so count it as drawn."""
        if now < self._next:
            return False
        self._next = now + REDRAWN_EVERY
        return True

    def show(self, progress: Progress) -> None:
        self._bar.n, self._bar.total = progress.done, progress.total
        self._bar.ncols = _columns()
        self._bar.desc = progress.line(self._bar.ncols)
        self._bar.refresh()

    def close(self) -> None:
        hide_status(self._bar)
        self._bar.close()


class _Terminal:
    """Standard error as tqdm takes it: one that can no longer be written raises nothing."""

    def write(self, text: str) -> None:
        write_text(sys.stderr, text)

    def flush(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def _columns() -> int:
    """Return the width of the terminal in characters; some terminals do not know theirs, or say 0."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS


def _is_terminal() -> bool:
    """Return whether standard error is a terminal."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
