"""Runs of the training commands under torchrun, and what their processes report (`watched_training.py`)."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import safetensors.torch
from torch import Tensor

from .watched_training import Watch

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Report:
    """What the processes of a run reported, each a list of lines, by rank."""

    lines: list[list[dict[str, Any]]]
    folder: Path

    def values(self, key: str, *, of: str = "step", rank: int = 0) -> list[float]:
        """Return the values of a key in those lines of a process that are about a "step", or about a "saved" one."""
        return [line[key] for line in self.lines[rank] if of in line]

    def losses(self) -> list[float]:
        """Return the loss of each step: the sum over the processes, as each counts by its share of the batch."""
        return [
            sum(parts)
            for parts in zip(*(self.values("loss", rank=rank) for rank in range(len(self.lines))), strict=True)
        ]

    def state(self, step: int) -> dict[str, Tensor]:
        """Return the weights and buffers after a step."""
        return safetensors.torch.load_file(self.folder / f"after-{step}.safetensors")


def run(folder: Path, name: str, arguments: str, *, processes: int = 1, restarts: int = 0, **watch: Any) -> Report:
    """Run a training command on some processes; `watch` is for `Watch`. Raise CalledProcessError if it fails."""
    reports = folder / f"{name}-reports"
    reports.mkdir()
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = ["-m", "benchmarks.watched_training", json.dumps(asdict(Watch(folder=str(reports), **watch)))]
    line = [sys.executable, "-m", *torchrun, "--max-restarts", str(restarts), *program, *arguments.split()]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    log = folder / f"{name}.log"
    with log.open("w") as file:
        found = subprocess.run([*line, "--device", "cpu"], cwd=ROOT, env=environment, stdout=file, stderr=file)
    if found.returncode:
        raise click.ClickException(f"{name}: {arguments}\n{log.read_text()[-3000:]}")
    lines = [(reports / f"rank-{rank}.jsonl").read_text().splitlines() for rank in range(processes)]
    return Report([[json.loads(line) for line in each] for each in lines], reports)
