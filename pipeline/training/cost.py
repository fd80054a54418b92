"""What a run is going to take, estimated from its first steps, so that nobody waits to find out."""

import time
from collections.abc import Callable

FIRST, LAST = 5, 20  # steps of this process that are timed; before, caches fill and networks compile
SHORTEST = 120.0  # seconds; a run that is over sooner needs no estimate


class CostEstimate:
    """Times the first steps of this process.

    Args:
        remaining: steps that this process is to take.
        total: steps of the whole run, those before a resume included.
        clock: seconds, in place of the real one.
    """

    def __init__(self, remaining: int, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.remaining, self.total, self._clock = remaining, total, clock
        self._taken, self._start = 0, 0.0

    def after_step(self) -> str | None:
        """Count one step. Return the estimate as a line after step LAST, if the rest takes longer than SHORTEST."""
        self._taken += 1
        if self._taken == FIRST:
            self._start = self._clock()
        if self._taken != LAST:
            return None
        return self._line((self._clock() - self._start) / (LAST - FIRST))

    def _line(self, seconds_per_step: float) -> str | None:
        left = (self.remaining - LAST) * seconds_per_step
        if left < SHORTEST:
            return None
        line = f"about {duration(left)} to go, evaluations aside"
        fewer = two_digits(self.total - self.remaining // 2)
        saved = (self.total - fewer) * seconds_per_step
        return f"{line}; --steps {fewer} would be {duration(left - saved)}" if 0 < saved < left else line


def duration(seconds: float) -> str:
    """Return a time in words: "50 seconds", "34 minutes", "2.5 hours", "3.1 days"."""
    for size, unit, digits in ((86_400, "days", 1), (3_600, "hours", 1), (60, "minutes", 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} seconds"


def two_digits(number: int) -> int:
    """Return a positive number rounded to two digits: 1,234 becomes 1,200."""
    scale = 10 ** max(0, len(str(number)) - 2)
    return round(number / scale) * scale
