"""What training on many processes costs, and how nearly it computes the same. See docs/scale.md.

    python -m benchmarks.scale wire
    python -m benchmarks.scale ranks
    python -m benchmarks.scale restart
    python -m benchmarks.scale cadence
    python -m benchmarks.scale images

Each runs the training commands under torchrun on this machine, on the CPU, with a thread for each process
(`watched_training.py`). Processes that share cores show bytes and rounding, but no speed-up. Linux only.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import safetensors.torch
from torch import Tensor, nn

from pipeline.training.recipes import LARGE_PRIOR, LARGE_TOKENIZER, PriorSettings, TokenizerSettings
from pipeline.training.train_prior import network_config
from prior import GatedPixelCNN
from tokenizer import VQVAE, TokenizerConfig
from tokenizer.discriminator import Discriminator

from .timing import hardware
from .watched_training import Watch

ROOT = Path(__file__).parents[1]
GBIT = 1e9 / 8  # bytes a second
AGREEMENT = 64  # bytes: four numbers, each with a flag, in float64 (`SharedSteps.agree`)
SMALL_TOKENIZER = "--hidden-channels 32 --residual-channels 16 --num-residual-layers 2 --num-codes 128 --code-dim 8"
SMALL_PRIOR = "--channels 16 --num-layers 4"
LARGE = {
    "train-tokenizer": "--num-residual-layers 6 --residual-channels 64",
    "train-prior": "--channels 96 --dropout .2",
}
BURN_IN = 5  # steps


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


@click.group()
def cli() -> None:
    """What training on many processes costs."""
    print(hardware())


# Bytes


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What a step of a stage exchanges, in bytes that are added up over the processes (all-reduced)."""

    name: str
    gradients: int  # float32
    statistics: int = 0  # of the codebook, or of the balance of a decoder's losses, float64
    agreement: int = AGREEMENT

    @property
    def visible(self) -> int:
        """Those that cannot travel while gradients are computed."""
        return self.statistics + self.agreement

    @property
    def total(self) -> int:
        return self.gradients + self.visible

    def share(self, size: int, processes: int, gigabits: float, step: float) -> float:
        """Return the share of a step's time that `size` bytes take on a ring, where computing takes `step` seconds."""
        seconds = on_a_ring(size, processes) / (gigabits * GBIT)
        return seconds / (seconds + step)


def on_a_ring(size: int, processes: int) -> float:
    """Return the bytes that each process sends, and receives, to add up `size` bytes over all."""
    return 2 * (processes - 1) / processes * size


def wires() -> list[Wire]:
    """Return the stages with the default settings and with those of the large recipes, for images of 32x32 and 3."""
    return [
        _tokenizer_wire("tokenizer", TokenizerSettings()),
        _decoder_wire(),
        _prior_wire("prior", PriorSettings()),
        _tokenizer_wire("tokenizer, large", LARGE_TOKENIZER),
        _prior_wire("prior, large", LARGE_PRIOR),
    ]


def _tokenizer_config(settings: TokenizerSettings) -> TokenizerConfig:
    names = ("num_codes", "code_dim", "hidden_channels", "num_residual_layers", "residual_channels", "downsample")
    return TokenizerConfig(in_channels=3, **{name: getattr(settings, name) for name in names})


def _tokenizer_wire(name: str, settings: TokenizerSettings) -> Wire:
    config = _tokenizer_config(settings)
    return Wire(
        name=name, gradients=4 * parameters(VQVAE(config)), statistics=8 * config.num_codes * (config.code_dim + 1)
    )


def _decoder_wire() -> Wire:
    config = _tokenizer_config(TokenizerSettings())
    decoder = VQVAE(config).decoder
    balance = 8 * (2 * decoder.last_layer.numel() + 1)
    return Wire(
        name="decoder", gradients=4 * (parameters(decoder) + parameters(Discriminator(config))), statistics=balance
    )


def _prior_wire(name: str, settings: PriorSettings) -> Wire:
    return Wire(
        name=name,
        gradients=4 * parameters(GatedPixelCNN(network_config(settings, num_codes=512, num_classes=10, grid=(8, 8)))),
    )


def parameters(model: nn.Module) -> int:
    """Return how many numbers of a model are learned by gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@cli.command()
@click.option("--steps", default=20, show_default=True, help="Measured, between two processes.")
@click.option("--processes", default=8, show_default=True, help="For the shares of a step.")
def wire(steps: int, processes: int) -> None:
    """Bytes a step, computed and measured, and the share of a step that they take."""
    found = wires()
    print(
        "\n| stage | gradients | statistics | agreement | sent of 2, computed | measured | sent of many |\n"
        + "|---" * 7
        + "|"
    )
    measured = _measured_bytes(steps)
    for each in found:
        sent = f"{measured[each.name]:,.0f}" if each.name in measured else "-"
        print(
            f"| {each.name} | {each.gradients:,} | {each.statistics:,} | {each.agreement} | "
            f"{on_a_ring(each.total, 2):,.0f} | {sent} | {2 * each.total:,} |"
        )
    cases = [(step, gigabits) for step in (0.01, 0.1) for gigabits in (10, 100)]
    print(f"\n{processes} processes, share of a step: all after it / gradients hidden behind it\n")
    print("| stage | " + " | ".join(f"{1e3 * step:.0f} ms, {gigabits} Gbit/s" for step, gigabits in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for each in found:
        shares = [
            f"{each.share(each.total, processes, gigabits, step):.2%} / {each.share(each.visible, processes, gigabits, step):.3%}"
            for step, gigabits in cases
        ]
        print(f"| {each.name} | " + " | ".join(shares) + " |", flush=True)


def _measured_bytes(steps: int) -> dict[str, float]:
    """Return the bytes that a process sent in a step: the median over the steps, the mean of two processes."""
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        runs = {
            name: run(folder, name, arguments, processes=2)
            for name, arguments in (
                ("tokenizer", f"train-tokenizer --out {folder}/t --steps {steps}"),
                ("decoder", f"train-decoder --tokenizer {folder}/t --steps {steps}"),
                ("prior", f"train-prior --tokenizer {folder}/t --out {folder}/p --steps {steps}"),
            )
        }
        return {
            name: statistics.fmean(statistics.median(report.values("sent", rank=rank)) for rank in range(2))
            for name, report in runs.items()
        }


# The same results


@cli.command()
@click.option("--steps", default=50, show_default=True)
@click.option("--batch-size", default=64, show_default=True, help="Of all processes.")
@click.option("--precision", default="fp32", show_default=True)
@click.option("--processes", "counts", multiple=True, type=int, default=(2, 4, 8), show_default=True)
def ranks(steps: int, batch_size: int, precision: str, counts: Sequence[int]) -> None:
    """How far runs on several processes are from the run on one, and how far with a codebook of each process' own."""
    states = sorted({1, 10, steps})
    loop = f"--steps {steps} --batch-size {batch_size} --precision {precision}"
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        tokenizer = f"train-tokenizer {SMALL_TOKENIZER} {loop} --out {folder}"
        prior = f"train-prior {SMALL_PRIOR} {loop} --tokenizer {folder}/t1 --codes {folder}/p1/codes --out {folder}"
        one = run(folder, "tokenizer-1", f"{tokenizer}/t1", states=states)
        first = prior.replace(f"--codes {folder}/p1/codes ", "")  # which exports them
        one_prior = run(folder, "prior-1", f"{first}/p1", states=states)
        print(
            "\n| run | "
            + " | ".join(f"{what}, step {step}" for what in ("codebook", "weights", "loss") for step in states)
            + " |"
        )
        print("|---" * (1 + 3 * len(states)) + "|")
        for count in counts:
            found = run(folder, f"tokenizer-{count}", f"{tokenizer}/t{count}", processes=count, states=states)
            print(f"| tokenizer, {count} processes | {_distances(one, found, states)} |", flush=True)
        local = run(folder, "local", f"{tokenizer}/local", processes=2, states=states, local_codebook=True)
        print(f"| tokenizer, 2 processes, each with its own codebook | {_distances(one, local, states)} |", flush=True)
        for count in counts:
            found = run(folder, f"prior-{count}", f"{prior}/p{count}", processes=count, states=states)
            print(f"| prior, {count} processes | {_distances(one_prior, found, states)} |", flush=True)


def _distances(one: Report, other: Report, steps: Sequence[int]) -> str:
    """Return the columns of a row of the table: codebook, the worst of the weights, the worst loss so far."""
    pairs = [(one.state(step), other.state(step)) for step in steps]
    codebook = [
        relative(a["quantizer.codebook"], b["quantizer.codebook"]) if "quantizer.codebook" in a else None
        for a, b in pairs
    ]
    weights = [max(relative(a[name], b[name]) for name in a if not name.startswith("quantizer.")) for a, b in pairs]
    gaps = [abs(a - b) / abs(a) for a, b in zip(one.losses(), other.losses(), strict=True)]
    losses = [max(gaps[:step]) for step in steps]
    return " | ".join("-" if number is None else f"{number:.1e}" for number in [*codebook, *weights, *losses])


def relative(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |a|, in the Euclidean norm."""
    return float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-12))


# Failures


@cli.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--command", "name", default="train-tokenizer", show_default=True)
def restart(rounds: int, name: str) -> None:
    """Seconds from the kill of one process of two to the first step of the next attempt."""
    print("\n| round | to the new start | to the first step | steps done twice |\n|---|---|---|---|")
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as at:
            line = f"{name} --steps 60 --out {at}/out"
            report = run(Path(at), "run", line, processes=2, restarts=1, kill_after=40, save_every=1.0)
        killed = next(each["time"] for each in report.lines[-1] if each.get("killed"))
        began = next(each["began"] for each in report.lines[0] if each["attempt"] == 1)
        first = next(each for each in report.lines[0] if each["attempt"] == 1 and "step" in each)
        print(
            f"| {number + 1} | {began - killed:.1f} s | {first['time'] - killed:.1f} s | {41 - first['step']} |",
            flush=True,
        )


@cli.command()
@click.option("--steps", default=12, show_default=True, help="Each of which is saved.")
@click.option("--restart-seconds", default=15.0, show_default=True, help="As `restart` measured.")
def cadence(steps: int, restart_seconds: float) -> None:
    """What a save costs, and the share of time that is lost at our cadence and at the best one."""
    saves = _seconds_of_saves(steps)
    print("\n| what is saved | a save | least | most |\n|---|---|---|---|")
    for name, seconds in saves.items():
        print(f"| {name} | {statistics.median(seconds):.3f} s | {min(seconds):.3f} s | {max(seconds):.3f} s |")
    print(f"\n{restart_seconds:.0f} s for a restart\n")
    print(
        "| what is saved | a failure every | best cadence | lost at the best | lost at every 60 s |\n|---|---|---|---|---|"
    )
    for name, seconds in saves.items():
        save = statistics.median(seconds)
        for words, between in (("hour", 3600), ("day", 86400), ("week", 7 * 86400)):
            best = math.sqrt(2 * save * between)
            lost = [lost_share(every, save, restart_seconds, between) for every in (best, 60.0)]
            print(f"| {name} | {words} | {best:.0f} s | {lost[0]:.3%} | {lost[1]:.3%} |")


def lost_share(every: float, save: float, restart_seconds: float, between: float) -> float:
    """Return the share of the time that is lost to saves, restarts and steps done twice, to first order.

    Args:
        every: seconds of steps between two saves.
        save: seconds that one takes.
        restart_seconds: from a failure to the next step.
        between: mean seconds between two failures.
    """
    return save / every + (every / 2 + restart_seconds) / between


def _seconds_of_saves(steps: int) -> dict[str, list[float]]:
    """Return how long the saves of each stage took in a run of one process, but for the first, which replaces nothing."""
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        lines = {
            "tokenizer": f"train-tokenizer --out {folder}/t",
            "prior": f"train-prior --tokenizer {folder}/t --out {folder}/p",
            "tokenizer, large": f"train-tokenizer --out {folder}/lt {LARGE['train-tokenizer']}",
            "prior, large": f"train-prior --codes {folder}/p/codes --out {folder}/lp {LARGE['train-prior']}",
        }
        reports = {name: run(folder, name, f"{line} --steps {steps}", save_every=0.0) for name, line in lines.items()}
        return {name: report.values("seconds", of="saved")[1:] for name, report in reports.items()}


# A billion images


@cli.command()
@click.option("--steps", default=60, show_default=True, help="Measured.")
@click.option("--devices", multiple=True, type=int, default=(1, 8, 64, 512), show_default=True)
def images(steps: int, devices: Sequence[int]) -> None:
    """Hours for 10^9 images, each once, at the images a second that one process has here, divided by the devices."""
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        reports = {
            "tokenizer": run(folder, "tokenizer", f"train-tokenizer --out {folder}/t --steps {steps}"),
            "prior": run(folder, "prior", f"train-prior --tokenizer {folder}/t --out {folder}/p --steps {steps}"),
        }
    print(
        "\n| stage | a step of 32 | fastest, slowest | images/s | "
        + " | ".join(f"hours, {count} devices" for count in devices)
        + " |"
    )
    print("|---" * (4 + len(devices)) + "|")
    for name, report in reports.items():
        seconds = report.values("seconds")[BURN_IN:]
        rate = 32 / statistics.median(seconds)
        hours = " | ".join(f"{1e9 / rate / count / 3600:,.0f}" for count in devices)
        print(
            f"| {name} | {1e3 * statistics.median(seconds):.0f} ms | {1e3 * min(seconds):.0f}, {1e3 * max(seconds):.0f} ms | "
            f"{rate:,.0f} | {hours} |"
        )


if __name__ == "__main__":
    cli()
