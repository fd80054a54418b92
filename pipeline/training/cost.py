"""How long a run is going to take, estimated from its first steps, so that nobody waits to find out."""

import time
from collections.abc import Callable

FIRST, LAST = 5, 20  # steps of this process that are timed; before, caches fill and networks compile
SHORTEST = 120.0  # seconds; a run that is over sooner needs no estimate


class CostEstimate:
    """Times the first steps of this process.

    Args:
        steps: of the whole run.
        clock: seconds, in place of the real one.
    """

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self._clock = steps, clock
        self._taken, self._start = 0, 0.0

    def after_step(self, step: int) -> str | None:
        """Count a step of this process, after which the run, with those before a resume, has taken `step`.

        Returns:
            The estimate as a line, once LAST steps are counted, if the rest takes longer than SHORTEST; else None.
        """
        self._taken += 1
        if self._taken == FIRST:
            self._start = self._clock()
        if self._taken != LAST:
            return None
        return self._line(step, (self._clock() - self._start) / (LAST - FIRST))

    def _line(self, step: int, seconds_per_step: float) -> str | None:
        """Return the estimate, and what half as many steps would take; None if the rest is short."""
        left = (self.steps - step) * seconds_per_step
        if left < SHORTEST:
            return None
        line = f"about {duration(left)} to go, evaluations aside"
        fewer = two_digits((self.steps + step) // 2)
        if not step < fewer < self.steps:
            return line
        return f"{line}; --steps {fewer} would be {duration((fewer - step) * seconds_per_step)}"


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
