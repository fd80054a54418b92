"""What the time of a run is used for: steps, and what keeps them waiting."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Kind = Literal["waiting", "evaluating", "saving"]  # for data; pictures included; checkpoints. The rest are steps

KINDS: tuple[Kind, ...] = get_args(Kind)
_IN_WORDS = {"waiting": "waiting for data", "evaluating": "evaluating and pictures", "saving": "saving"}


class TimeUse:
    """Counts the time since it was made, by kind.

    On a GPU, which works through a queue, a kind begins with what is left in it: a few steps at most.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._start = clock, clock()
        self._seconds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)

    @contextmanager
    def of(self, kind: Kind) -> Iterator[None]:
        """Count the time within `with` as that of a kind; what is counted inside as another is not counted twice.

        Raises:
            ValueError: there is no such kind.
        """
        _check(kind)
        start, inside = self._clock(), self._counted
        try:
            yield
        finally:
            self._seconds[kind] += self._clock() - start - (self._counted - inside)

    def add(self, kind: Kind, seconds: float) -> None:
        """Count time that was measured elsewhere, outside of any `of`. Raises ValueError as `of` does."""
        _check(kind)
        self._seconds[kind] += seconds

    @property
    def seconds(self) -> float:
        """The time so far."""
        return self._clock() - self._start

    def share(self, kind: Kind) -> float:
        """Return the share of the time so far, 0 to 1, that is of a kind. Raises ValueError as `of` does."""
        _check(kind)
        passed = self.seconds
        return min(1.0, self._seconds[kind] / passed) if passed > 0 else 0.0

    def numbers(self) -> dict[str, float]:
        """Return the shares for the log: {"waiting_share": ..., "evaluating_share": ..., "saving_share": ...}."""
        return {f"{kind}_share": self.share(kind) for kind in KINDS}

    def line(self) -> str:
        """Return the line for the end of a run."""
        shares = {kind: round(100 * self.share(kind), 1) for kind in KINDS}
        lost = ", ".join(f"{shares[kind]:.1f} % {_IN_WORDS[kind]}" for kind in KINDS)
        return f"time: {100 - sum(shares.values()):.1f} % training, {lost}"

    @property
    def _counted(self) -> float:
        """The seconds that have a kind."""
        return sum(self._seconds.values())


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
