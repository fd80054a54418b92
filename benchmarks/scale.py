"""What training on many processes costs, and how nearly it computes the same. See docs/scale.md.

    python -m benchmarks.scale wire
    python -m benchmarks.scale ranks
    python -m benchmarks.scale restart
    python -m benchmarks.scale cadence
    python -m benchmarks.scale images

Each runs the training commands under torchrun on this machine, on the CPU, with one thread a process. Processes that
share cores show bytes and rounding, but no speed-up. Linux only.
"""

import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import click
from torch import Tensor

from .timing import hardware
from .watched_runs import Report, run
from .wire import Wire, on_a_ring, share, wires

SMALL_TOKENIZER = "--hidden-channels 32 --residual-channels 16 --num-residual-layers 2 --num-codes 128"
SMALL_PRIOR = "--channels 16 --num-layers 4"
LARGE_TOKENIZER = "--num-residual-layers 6 --residual-channels 64"  # as in pipeline/training/recipes.py
LARGE_PRIOR = "--channels 96 --dropout .2"
BURN_IN = 5  # steps
STEP_TIMES = (0.01, 0.1)  # seconds of computing a step
SPEEDS = (10, 100)  # Gbit/s
FAILURES = {"hour": 3600.0, "day": 86400.0, "week": 7 * 86400.0}  # mean seconds between two


@click.group()
def cli() -> None:
    """What training on many processes costs."""
    print(hardware())


@contextmanager
def table(header: Sequence[str]) -> Iterator[Callable[[Sequence[str]], None]]:
    """Print a table in Markdown: its header, and each row that is added within `with`."""

    def add(row: Sequence[str]) -> None:
        print(f"| {' | '.join(row)} |", flush=True)

    print()
    add(header)
    print("|---" * len(header) + "|")
    yield add


@cli.command()
@click.option("--steps", default=20, show_default=True, help="Measured, between two processes.")
@click.option("--processes", default=8, show_default=True, help="For the shares of a step.")
def wire(steps: int, processes: int) -> None:
    """Bytes a step, computed and measured, and the share of a step that they take."""
    measured = _measured_bytes(steps)
    header = ["stage", "gradients", "statistics", "agreement", "sent by each of 2", "measured", "sent by each of many"]
    with table(header) as add:
        for each in wires():
            sent = f"{measured[each.name]:,.0f}" if each.name in measured else "-"
            sizes = [f"{size:,}" for size in (each.gradients, each.statistics, each.agreement)]
            add([each.name, *sizes, f"{on_a_ring(each.total, 2):,.0f}", sent, f"{2 * each.total:,}"])
    cases = list(product(STEP_TIMES, SPEEDS))
    print(f"\nshare of a step, {processes} processes: nothing hidden / gradients hidden behind the backward pass")
    with table(["stage", *[f"{1e3 * seconds:.0f} ms, {speed} Gbit/s" for seconds, speed in cases]]) as add:
        for each in wires():
            add([each.name, *[_shares(each, processes, speed, seconds) for seconds, speed in cases]])


def _measured_bytes(steps: int) -> dict[str, float]:
    """Return the bytes that a process sent in a step: the median over the steps, the mean of two processes."""
    with tempfile.TemporaryDirectory() as at:
        lines = {
            "tokenizer": f"train-tokenizer --out {at}/t --steps {steps}",
            "decoder": f"train-decoder --tokenizer {at}/t --steps {steps}",
            "prior": f"train-prior --tokenizer {at}/t --out {at}/p --steps {steps}",
        }
        reports = {name: run(Path(at), name, line, processes=2) for name, line in lines.items()}
    return {
        name: statistics.fmean(statistics.median(report.values("sent", rank=rank)) for rank in range(2))
        for name, report in reports.items()
    }


def _shares(stage: Wire, processes: int, gigabits: float, seconds: float) -> str:
    """Return the share of a step of all bytes, and of those alone that cannot travel during the backward pass."""
    return " / ".join(f"{share(size, processes, gigabits, seconds):.2%}" for size in (stage.total, stage.visible))


@cli.command()
@click.option("--after", default=300, show_default=True, help="Steps that one process trains first.")
@click.option("--steps", default=50, show_default=True, help="Compared after 1, 10 and so many.")
@click.option("--batch-size", default=64, show_default=True, help="Of all processes.")
@click.option("--precision", default="fp32", show_default=True)
@click.option("--processes", "counts", multiple=True, type=int, default=(2, 4, 8), show_default=True)
def ranks(after: int, steps: int, batch_size: int, precision: str, counts: Sequence[int]) -> None:
    """How far runs on several processes are from the run on one, and how far with a codebook of each process' own.

    All continue one run, for in its first steps a codebook collapses and comes alive again: any rounding changes that.
    """
    states = [after + 1, after + 10, after + steps]
    loop = f"--batch-size {batch_size} --precision {precision}"
    columns = [
        f"{what}, {step - after}" for what in ("code, median", "codes apart", "weights", "loss") for step in states
    ]
    with tempfile.TemporaryDirectory() as at, table(["run, steps", *columns]) as add:
        lines = {
            "tokenizer": f"train-tokenizer {SMALL_TOKENIZER} {loop} --out {at}/tokenizer",
            "prior": f"train-prior {SMALL_PRIOR} {loop} --tokenizer {at}/tokenizer --out {at}/prior",
        }
        for stage, line in lines.items():
            run(Path(at), stage, f"{line} --steps {after}")

            def continued(count: int, name: str, stage: str = stage, **watch: bool) -> Report:
                copy = shutil.copytree(Path(at) / stage, Path(at) / name)
                again = f"train-{stage} --out {copy} --resume --steps {after + steps}"
                return run(Path(at), f"run-{name}", again, processes=count, states=states, **watch)

            one = continued(1, f"{stage}-1")
            for count in counts:
                found = continued(count, f"{stage}-{count}")
                add([f"{stage}, {count} processes", *_distances(one, found, states)])
            if stage == "tokenizer":
                found = continued(2, "local", local_codebook=True)
                add(["tokenizer, 2 processes, each with its own codebook", *_distances(one, found, states)])


def _distances(one: Report, other: Report, steps: Sequence[int]) -> list[str]:
    """Return how far two runs are apart after each step.

    The median code; the share of codes that are apart by more than 1 %; the worst tensor of weights; the worst loss.
    """
    pairs = [(one.state(step), other.state(step)) for step in steps]
    codes = [_apart(a["quantizer.codebook"], b["quantizer.codebook"]) for a, b in pairs if "quantizer.codebook" in a]
    weights = [
        max(float(_apart(a[name][None], b[name][None])) for name in a if "quantizer" not in name) for a, b in pairs
    ]
    gaps = [abs(a - b) / abs(a) for a, b in zip(one.losses(), other.losses(), strict=True)]
    medians = [f"{float(each.median()):.1e}" for each in codes] or ["-"] * len(steps)
    shares = [f"{float((each > 0.01).float().mean()):.1%}" for each in codes] or ["-"] * len(steps)
    worst = [max(gaps[: step - steps[0] + 1]) for step in steps]
    return [*medians, *shares, *[f"{number:.1e}" for number in [*weights, *worst]]]


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Return |a - b| / |a| of each row of a and b, [rows,...], in the Euclidean norm."""
    a, b = a.double().reshape(len(a), -1), b.double().reshape(len(b), -1)
    return (a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-12)


@cli.command()
@click.option("--rounds", default=3, show_default=True)
def restart(rounds: int) -> None:
    """Seconds from the kill of one process of two to the first step of the next attempt."""
    with table(
        ["round", "from the kill to the end of the imports", "to the end of the first step", "steps done twice"]
    ) as add:
        for number in range(1, rounds + 1):
            with tempfile.TemporaryDirectory() as at:
                line = f"train-tokenizer --steps 60 --out {at}/out"
                report = run(Path(at), "run", line, processes=2, restarts=1, kill_after=40, save_every=1.0)
            killed = next(each["time"] for each in report.lines[-1] if each.get("killed"))
            again = [each for each in report.lines[0] if each["attempt"] == 1]
            began, first = again[0]["began"], next(each for each in again if "step" in each)
            add([f"{number}", f"{began - killed:.1f} s", f"{first['time'] - killed:.1f} s", f"{41 - first['step']}"])


@cli.command()
@click.option("--steps", default=12, show_default=True, help="Each of which is saved.")
@click.option("--restart-seconds", default=8.0, show_default=True, help="As `restart` measured.")
def cadence(steps: int, restart_seconds: float) -> None:
    """What a save costs, and the share of the time that is lost with a save every minute and at the best cadence."""
    saves = _seconds_of_saves(steps)
    with table(["what is saved", "a save, median", "fastest", "slowest"]) as add:
        for name, found in saves.items():
            add([name, *[f"{seconds:.3f} s" for seconds in (statistics.median(found), min(found), max(found))]])
    with table(["what is saved", "a failure every", "best cadence", "lost at the best", "lost at every 60 s"]) as add:
        for (name, found), (words, between) in product(saves.items(), FAILURES.items()):
            save = statistics.median(found)
            best = math.sqrt(2 * save * between)
            lost = [lost_share(every, save, restart_seconds, between) for every in (best, 60.0)]
            add([name, words, f"{best:.0f} s", *[f"{share:.2%}" for share in lost]])


def lost_share(every: float, save: float, restart_seconds: float, between: float) -> float:
    """Return the share of the time that is lost to saves, restarts and steps done twice, to first order.

    It is least at every = sqrt(2 save between) (Young 1974, doi:10.1145/361147.361115).

    Args:
        every: seconds of steps between two saves.
        save: seconds that one takes.
        restart_seconds: from a failure to the next step.
        between: mean seconds between two failures.
    """
    return save / every + (every / 2 + restart_seconds) / between


def _seconds_of_saves(steps: int) -> dict[str, list[float]]:
    """Return how long the saves of each stage took in a run of one process, without the first, which replaces none."""
    with tempfile.TemporaryDirectory() as at:
        lines = {
            "tokenizer": f"train-tokenizer --out {at}/t",
            "prior": f"train-prior --tokenizer {at}/t --out {at}/p",
            "tokenizer, large": f"train-tokenizer --out {at}/lt {LARGE_TOKENIZER}",
            "prior, large": f"train-prior --codes {at}/p/codes --out {at}/lp {LARGE_PRIOR}",
        }
        reports = {name: run(Path(at), name, f"{line} --steps {steps}", save_every=0) for name, line in lines.items()}
    return {name: report.values("seconds", of="saved")[1:] for name, report in reports.items()}


@cli.command()
@click.option("--steps", default=60, show_default=True, help="Measured.")
@click.option("--processes", "counts", multiple=True, type=int, default=(1, 8, 64, 512), show_default=True)
def images(steps: int, counts: Sequence[int]) -> None:
    """Hours for 10^9 images, each once, at the images a second of one process here, divided by the processes."""
    with tempfile.TemporaryDirectory() as at:
        lines = {
            "tokenizer": f"train-tokenizer --out {at}/t --steps {steps}",
            "prior": f"train-prior --tokenizer {at}/t --out {at}/p --steps {steps}",
        }
        reports = {name: run(Path(at), name, line) for name, line in lines.items()}
    hours = [f"hours, {count} processes" for count in counts]
    with table(["stage", "a step of 32, fastest", "median", "slowest", "images/s of the fastest", *hours]) as add:
        for name, report in reports.items():
            found = report.values("seconds")[BURN_IN:]
            times = [f"{1e3 * each:.0f} ms" for each in (min(found), statistics.median(found), max(found))]
            rate = 32 / min(found)  # the others are slowed by whatever else runs here
            add([name, *times, f"{rate:,.0f}", *[f"{1e9 / rate / count / 3600:,.1f}" for count in counts]])


if __name__ == "__main__":
    cli()
