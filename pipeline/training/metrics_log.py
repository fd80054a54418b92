"""The log of a run, `metrics.jsonl` with one JSON object a line, and the mean losses between two lines."""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.atomic_files import write_atomic
from ..runtime.process_group import ProcessGroup


class MetricsLog:
    """Appends {"step", "part", "seconds", numbers ...}; a number that is not finite is written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, in seconds, the time before a resume included."""
        return round(time.monotonic() - self._started, 3)

    def write(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        """Append one line about the data of `split`, "train" or "held_out"; its key in the file is "part"."""
        values = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = (json.dumps({"step": step, "part": split, "seconds": self.seconds, **values}) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                while line:  # a disk that is nearly full takes a part without an error
                    line = line[file.write(line) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(end)  # no half of a line, which the next one would continue
                raise

    def resume(self, step: int, seconds: float | None) -> None:
        """Continue after `step`, with the clock at `seconds`, or with None at the seconds of the last line."""
        self.drop_after(step)
        self._started = time.monotonic() - (self._last_seconds() if seconds is None else seconds)

    def drop_after(self, step: int) -> None:
        """Remove what was logged after `step` and a line cut short by a kill: a resumed run repeats those steps."""
        if not self.path.exists():
            return
        kept = [line for line in self._lines() if _number(line, "step", math.inf) <= step]
        write_atomic(self.path, b"".join(line + b"\n" for line in kept))

    def _last_seconds(self) -> float:
        """Return the seconds of the last line, 0 without one."""
        return max((_number(line, "seconds", 0.0) for line in self._lines()), default=0.0)

    def _lines(self) -> list[bytes]:
        """Return the lines of the log, none if there is no log."""
        return self.path.read_bytes().splitlines() if self.path.exists() else []


class RunningMeans:
    """Holds the sums of the losses of the steps since their means were last taken.

    Where processes share the batches, those of this process, each weighted by its share of the batch.
    """

    def __init__(self) -> None:
        self.count = 0  # steps
        self.sums: dict[str, Tensor] = {}  # scalars, on the device of the losses

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count the scalar losses of one step; no CPU-GPU sync."""
        self.sums = {
            name: self.sums.get(name, torch.zeros_like(loss)) + loss.detach() for name, loss in losses.items()
        }  # in the order of the losses, which that of a file is not
        self.count += 1

    def take(self, group: ProcessGroup) -> dict[str, float]:
        """Return the means over the batches of all processes, each of which calls this, and start anew."""
        means = {name: float(total) / self.count for name, total in self.sums_of_all(group).items()}
        self.count, self.sums = 0, {}
        return means

    def sums_of_all(self, group: ProcessGroup) -> dict[str, Tensor]:
        """Return the sums over all processes, each of which calls this."""
        if group.count == 1 or not self.sums:
            return self.sums
        names = sorted(self.sums)  # each process has read them from a file in an order of its own
        totals = group.sums(torch.stack([self.sums[name].double() for name in names]))
        by_name = dict(zip(names, totals, strict=True))
        return {name: by_name[name].to(own.dtype) for name, own in self.sums.items()}

    def load(self, count: int, sums: Mapping[str, Tensor]) -> None:
        """Continue with these sums over `count` steps."""
        self.count, self.sums = count, dict(sums)


def _number(line: bytes, name: str, default: float) -> float:
    """Return a number of a line, `default` for a line that was cut short, is no line of a log, or has no such number.

    Numbers in a log are finite and not negative.
    """
    try:
        number = float(json.loads(line)[name])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return default
    return number if 0 <= number < math.inf else default
