"""The subcommands of `python -m benchmarks.robustness`."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from ..timing import hardware
from . import damage, full_disk, fuzz, kills, process_kills, writers
from .verdicts import Tally
from .workspace import make_workspace

Measure = Callable[..., None]
PARTS: dict[str, tuple[Measure, int, str]] = {  # how it is measured, how often by default, and what is counted
    "kills": (kills.measure, 200, "SIGKILLs; a quarter as many signals, and some closed pipes, on top"),
    "processes": (process_kills.measure, 12, "kills of one of two processes, which torchrun starts again"),
    "damage": (damage.measure, 500, "damaged files, each read by every command that reads it"),
    "fuzz": (fuzz.measure, 20_000, "fuzzed files"),
    "full-disk": (full_disk.measure, 60, "amounts of room for each command, in pages and in files, at most"),
    "writers": (writers.measure, 30, "pairs of each command"),
}


@click.group()
def cli() -> None:
    """Kills, damaged and fuzzed files, full disks and second writers, counted in one table. Status 1 if any is wrong.

    The command line runs as a whole, on the CPU, with tiny networks; see the files of benchmarks/robustness/.
    """
    click.echo(hardware())


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of all subcommands."""
    command = click.option("--wrong", type=click.Path(path_type=Path), help="Write all wrong cases there, as JSON.")(
        command
    )
    command = click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="Processes.")(command)
    return click.option("--seed", default=0, show_default=True, help="Of everything random.")(command)


def _add(name: str) -> None:
    """Add the subcommand of one part."""
    _, default, counted = PARTS[name]

    @cli.command(name, help=f"Measure {name}.")
    @click.option("--n", default=default, show_default=True, help=f"How many {counted}.")
    @_options
    def one(n: int, seed: int, jobs: int, wrong: Path | None) -> None:
        _measure({name: n}, seed, jobs, wrong)


for _name in PARTS:
    _add(_name)


@cli.command("all")
@click.option("--share", default=1.0, show_default=True, help="Of the cases of each part.")
@_options
def everything(share: float, seed: int, jobs: int, wrong: Path | None) -> None:
    """Measure every part, as often as benchmarks/README.md says."""
    _measure({name: max(1, round(share * default)) for name, (_, default, _) in PARTS.items()}, seed, jobs, wrong)


def _measure(counts: dict[str, int], seed: int, jobs: int, wrong: Path | None) -> None:
    """Measure parts, each so often; print the table, and end with status 1 if a case was wrong."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="robustness-") as folder:
        workspace = make_workspace(Path(folder) / "workspace")
        for name, n in counts.items():
            begin = time.monotonic()
            PARTS[name][0](workspace, tally, n=n, seed=seed, jobs=jobs)
            click.echo(f"{name}: n = {n:,}, seed {seed}, {time.monotonic() - begin:.0f} s", err=True)
    click.echo(f"\n{tally.table()}")
    if wrong is not None:
        wrong.write_text(json.dumps(tally.to_json(), indent=1) + "\n", "utf-8")
    if tally.wrong:
        click.echo(f"\nwrong, by kind:\n{tally.summary()}")
        raise SystemExit(1)
