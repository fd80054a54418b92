"""`metrics.jsonl`: one JSON object a line, appended while a run goes on."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from .files import write_atomic


class MetricsLog:
    """Appends {"step", "part", "seconds", numbers ...}; a number that is not finite is written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()

    def write(self, step: int, part: str, numbers: Mapping[str, float]) -> None:
        """Append one line. `part` is the data it is about: "train" or "held_out"."""
        values = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = {"step": step, "part": part, "seconds": round(time.monotonic() - self.started, 3), **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def drop_after(self, step: int) -> None:
        """Forget what was logged after `step` and a line cut short by a kill: a resumed run does those steps again."""
        if not self.path.exists():
            return
        kept = [f"{line}\n" for line in self.path.read_text("utf-8").splitlines() if _step_of(line) <= step]
        write_atomic(self.path, "".join(kept).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
