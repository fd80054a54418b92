"""The time and memory of the metrics of two sets of features. See benchmarks/README.md.

    python -m benchmarks.metrics_speed
    python -m benchmarks.metrics_speed --rows 2000 --dims 64

Features are normal noise, float32. Each metric runs once in a process of its own, so that the peak memory is its own;
what a process holds before, with torch and the features, is in the table too.
"""

import multiprocessing
import time
from collections.abc import Callable
from functools import partial

import click
import torch

from pipeline.evaluation.distances import frechet_distance, kernel_distance, sliced_wasserstein
from pipeline.evaluation.feature_sets import Features
from pipeline.evaluation.neighbours import nearest, precision_recall_density_coverage

from .timing import hardware, peak_memory

METRICS: dict[str, Callable[[Features, Features], object]] = {
    "frechet_distance": frechet_distance,
    "kernel_distance": kernel_distance,
    "sliced_wasserstein": sliced_wasserstein,
    "precision_recall_density_coverage": precision_recall_density_coverage,
    "nearest": nearest,
}


@click.command()
@click.option("--rows", default=10_000, show_default=True, help="Of both sets.")
@click.option("--dims", multiple=True, type=int, default=[64, 2048], show_default=True)
@click.option("--threads", type=int, help="[default: torch's own]")
def cli(rows: int, dims: list[int], threads: int | None) -> None:
    """Print the seconds and the peak memory of each metric."""
    print(hardware())
    print("| rows x dimensions | metric | seconds | MiB before | MiB at peak |\n|---|---|---|---|---|")
    for columns in dims:
        total = 0.0
        for name in METRICS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, before, peak = pool.apply(partial(measure, name, rows, columns, threads))
            total += seconds
            print(f"| {rows:,} x {columns:,} | {name} | {seconds:.1f} | {before:.0f} | {peak:.0f} |", flush=True)
        print(f"| {rows:,} x {columns:,} | all | {total:.1f} | | |", flush=True)


def measure(name: str, rows: int, columns: int, threads: int | None) -> tuple[float, float, float]:
    """Return the seconds of a metric, and the MiB of this process before it and at its peak."""
    if threads:
        torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    before, start = peak_memory(), time.perf_counter()
    METRICS[name](a, b)
    return time.perf_counter() - start, before, peak_memory()


if __name__ == "__main__":
    cli()
