"""The cost of exporting, resuming and reading code data sets. See benchmarks/README.md.

    python -m benchmarks.codes export --tokenizer DIR --data SOURCE
    python -m benchmarks.codes killed --tokenizer DIR --data SOURCE
    python -m benchmarks.codes sizes
    python -m benchmarks.codes read --grids 10_000_000
    python -m benchmarks.codes sparse --grids 1_000_000_000

`export` and `killed` need a trained tokenizer; `sizes` encodes noise with an untrained one. `read` writes random codes
as export-codes writes grids; the grids of `sparse` are zero and take no room on most disks.
"""

import hashlib
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.codes.dataset import CodeDataset
from pipeline.codes.export import BATCH, SHARD_SIZE, export_codes
from pipeline.codes.manifest import MANIFEST, CodeManifest, ShardEntry, code_dtype, read_manifest, write_manifest
from pipeline.codes.writer import write_codes
from pipeline.models.inference import in_blocks
from pipeline.models.loading import images_of, load_trained_tokenizer
from pipeline.runtime.process_group import ProcessGroup
from pipeline.training.prior_stage import PriorStage
from pipeline.training.stage import Batch
from prior import GatedPixelCNN, PriorConfig
from tokenizer import VQVAE, TokenizerConfig

from .timing import hardware, paired, ratio

CPU = torch.device("cpu")

source_options = [
    click.option("--tokenizer", type=click.Path(path_type=Path), required=True),
    click.option("--data", help="Images; by default what the tokenizer was trained on."),
]


def with_source(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name a tokenizer and images."""
    for option in reversed(source_options):
        command = option(command)
    return command


@click.group()
def cli() -> None:
    """Benchmarks of code data sets."""
    print(hardware())


@cli.command()
@with_source
@click.option("--n", default=20_000, show_default=True, help="Images of the training split.")
@click.option("--rounds", default=3, show_default=True)
def export(tokenizer: Path, data: str | None, n: int, rounds: int) -> None:
    """Images a second: export-codes against the encoder alone on the same batches, in one run."""
    trained = load_trained_tokenizer(tokenizer, "cpu")
    model, images = trained.model, images_of(trained.info, data=data)
    count = min(n, len(images.train))
    floats = images.train.batch(np.arange(count))

    def alone() -> None:
        with torch.no_grad():
            for batch in floats.split(BATCH):
                model.encoder(batch)

    def alone_in_blocks() -> None:
        for _ in in_blocks(model, model.encoder, lambda start, stop: floats[start:stop], count, batch_size=BATCH):
            pass

    def complete_export() -> None:
        with tempfile.TemporaryDirectory() as folder:
            export_codes(tokenizer, Path(folder) / "codes", data=data, device="cpu")

    actions = {"alone": alone, "in blocks": alone_in_blocks, "export": complete_export}
    times = paired(actions, CPU, burn_in=1, rounds=rounds)
    counts = {"alone": count, "in blocks": count, "export": len(images.train)}
    print("| what | images/s | against the encoder alone |\n|---|---|---|")
    for name, description in {
        "alone": f"encoder alone, batches of {BATCH} in memory, all threads on a batch",
        "in blocks": "encoder alone, in blocks, one thread each",
        "export": "export-codes: read, encode, search, hash, write; opening included",
    }.items():
        each = [seconds / counts[name] for seconds in times[name]]
        reference = [seconds / count for seconds in times["alone"]]
        print(f"| {description} | {1 / statistics.median(each):,.0f} | {1 / ratio(each, reference):.2f} |")


@cli.command()
@with_source
@click.option("--kills", default=10, show_default=True, help="At most this many.")
@click.option("--shard-size", default=2_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def killed(tokenizer: Path, data: str | None, kills: int, shard_size: int, seed: int) -> None:
    """Kill exports at random moments, and run two processes: are the bytes those of an undisturbed run?"""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["export-codes", "--tokenizer", str(tokenizer), "--shard-size", str(shard_size), "--device", "cpu"]
        arguments += ["--data", data] if data else []
        undisturbed, interrupted, shared = (Path(folder) / name for name in ("undisturbed", "interrupted", "shared"))
        undisturbed_time = timed(lambda: run([sys.executable, "cli.py", *arguments, "--out", str(undisturbed)]))
        print(f"undisturbed: {undisturbed_time:.1f} s, {count_of(undisturbed):,} grids")
        done = 0
        for _ in range(kills):
            process = start([sys.executable, "cli.py", *arguments, "--out", str(interrupted)])
            try:
                process.wait(timeout=generator.uniform(0.3, 1) * undisturbed_time)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            done += 1
            print(f"kill {done}: {count_of(interrupted):,} grids are kept")
        last = timed(lambda: run([sys.executable, "cli.py", *arguments, "--out", str(interrupted)]))
        print(f"the last run: {last:.1f} s; after {done} kills {verdict(undisturbed, interrupted)}")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "cli.py"]
        both = timed(lambda: run([*torchrun, *arguments, "--out", str(shared)]))
        print(f"two processes: {both:.1f} s; {verdict(undisturbed, shared)}")


@cli.command()
@click.option("--n", default=4_096, show_default=True, help="Images of 32x32; of larger ones fewer.")
def sizes(n: int) -> None:
    """Images a second for images of 32, 64 and 128 pixels, four to a code, with the default network."""
    model = VQVAE(TokenizerConfig()).eval()
    for side in (32, 64, 128):
        count = n * 32**2 // side**2
        floats = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))

        def encode(floats: Tensor = floats) -> None:
            for _ in in_blocks(model, model.encode, lambda start, stop: floats[start:stop], len(floats)):
                pass

        encode()
        rates = sorted(count / timed(encode) for _ in range(3))
        print(f"{side}x{side} pixels, {side // 4}x{side // 4} codes: {rates[1]:,.0f} images/s")


@cli.command()
@click.option("--grids", default=1_000_000_000, show_default=True)
def sparse(grids: int) -> None:
    """Open and gather more 8x8 grids than the disk has room for."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest = write_sparse(folder, grids)
        size = (folder / MANIFEST).stat().st_size
        print(f"{grids:,} grids in {len(manifest.shards):,} shards, a manifest of {size:,} bytes")
        torch.set_num_threads(1)
        dataset = open_timed(folder, verify=False)
        generator = np.random.default_rng(0)
        batches = [generator.integers(0, len(dataset), 16_384) for _ in range(4)]

        def once() -> None:
            for rows in batches:
                dataset.batch(rows)

        once()  # so that the pages are in memory
        print(f"random batches of 16,384, pages in memory: {len(batches) * 16_384 / timed(once):,.0f} grids/s")


def write_sparse(folder: Path, grids: int) -> CodeManifest:
    """Write a data set of zeros: headers, then nothing, which most file systems do not store. Return its manifest."""
    shards = []
    for index, first in enumerate(range(0, grids, SHARD_SIZE)):
        count = min(SHARD_SIZE, grids - first)
        arrays = {"codes": ((count, 8, 8), np.uint16), "labels": ((count,), np.int64)}
        names = {f"names-{index:05d}.json": "0" * 64}
        for stem, (shape, dtype) in arrays.items():
            np.lib.format.open_memmap(folder / f"{stem}-{index:05d}.npy", "w+", dtype, shape)
        files = {f"{stem}-{index:05d}.npy": "0" * 64 for stem in arrays}
        shards.append(ShardEntry(first, count, files | names))
    manifest = replace(random_manifest(grids, 512, 8), count=grids, shards=shards)
    write_manifest(folder, manifest)
    return manifest


@cli.command()
@click.option("--grids", default=10_000_000, show_default=True)
@click.option("--num-codes", default=512, show_default=True)
@click.option("--side", default=8, show_default=True, help="Of a grid.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the codes there.  [default: a temporary one]")
def read(grids: int, num_codes: int, side: int, folder: Path | None) -> None:
    """Measure an export of random codes: time, memory, sizes; then opening, gathering, loaders, a step of a prior."""
    with tempfile.TemporaryDirectory() as temporary:
        out = folder or Path(temporary) / "codes"
        write_random(out, grids, num_codes, side)
        torch.set_num_threads(1)
        dataset = open_timed(out)
        gather(dataset)
        loaders(dataset)
        waiting(dataset)


class RandomRows:
    """Random codes with labels and names, in place of encoded images."""

    def __init__(self, count: int, num_codes: int, side: int) -> None:
        self.count, self.num_codes, self.side = count, num_codes, side

    def __len__(self) -> int:
        return self.count

    def codes(self, start: int, stop: int) -> np.ndarray:
        shape = (stop - start, self.side, self.side)
        return np.random.default_rng(start).integers(0, self.num_codes, shape, dtype=code_dtype(self.num_codes))

    def labels(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop) % 10

    def names(self, start: int, stop: int) -> Sequence[str]:
        return [f"{row % 10}/{row:08d}.png" for row in range(start, stop)]


def random_manifest(grids: int, num_codes: int, side: int) -> CodeManifest:
    """Return the manifest to request for random rows."""
    return CodeManifest(
        count=0,
        total=grids,
        num_codes=num_codes,
        grid=(side, side),
        dtype=code_dtype(num_codes).name,
        class_names=[str(digit) for digit in range(10)],
        split="train",
        source="random codes",
        image={"height": 4 * side, "width": 4 * side, "channels": 3},
        tokenizer_fingerprint="0" * 64,
        shards=[],
        shard_size=SHARD_SIZE,
    )


def write_random(folder: Path, grids: int, num_codes: int, side: int) -> None:
    """Write a data set of random rows; print time, memory and sizes."""
    requested = random_manifest(grids, num_codes, side)
    before = peak()
    seconds = timed(lambda: write_codes(folder, requested, RandomRows(grids, num_codes, side), ProcessGroup()))
    print(f"{grids:,} random grids of {side}x{side}, K = {num_codes}: written in {seconds:.1f} s,")
    print(f"  {peak() - before:,.0f} MB above {before:,.0f} MB before, {len(list(folder.iterdir())):,} files")
    for pattern in ("codes-*.npy", "labels-*.npy", "names-*.json", "manifest.json"):
        print(f"  {pattern:14} {sum(path.stat().st_size for path in folder.glob(pattern)):15,} bytes")


def open_timed(folder: Path, *, verify: bool = True) -> CodeDataset:
    """Return the data set, checked; print the time, memory and open files that opening takes, and the time to check."""
    before, files = private(), open_files()
    seconds = timed(lambda: CodeDataset(folder, verify=verify))
    dataset = CodeDataset(folder, verify=verify)
    print(f"opened in {seconds * 1e3:.0f} ms, {private() - before:.1f} MB, {open_files() - files} files held open")
    if verify:
        print(f"every file compared with its SHA-256 in {timed(dataset.check_files):.1f} s")
    return dataset


def gather(dataset: CodeDataset) -> None:
    """Measure random batches on one core, with all pages in memory."""
    generator = np.random.default_rng(0)
    epoch = generator.permutation(len(dataset))
    before = private()

    def one_epoch() -> None:
        for rows in np.array_split(epoch, max(1, len(epoch) // 4096)):
            dataset.batch(rows)

    seconds = timed(one_epoch)
    print(f"an epoch in random batches of 4,096: {seconds:.1f} s, {private() - before:+.1f} MB private")
    print(f"  ({mapped():,.0f} MB of mapped pages are counted to this process; the system reclaims them)")
    for size in (32, 256, 1024, 4096, 16384):
        batches = [generator.integers(0, len(dataset), size) for _ in range(max(10, 500_000 // size))]

        def once(batches: list[np.ndarray] = batches) -> None:
            for rows in batches:
                dataset.batch(rows)

        rates = sorted(len(batches) * size / timed(once) for _ in range(5))
        print(f"  random batches of {size:6,}: {rates[2]:12,.0f} grids/s ({rates[0]:,.0f} to {rates[-1]:,.0f})")


def loaders(dataset: CodeDataset) -> None:
    """Measure the private memory that a worker of a DataLoader takes."""
    for method in ("fork", "spawn"):
        used: list[float] = []
        loader = DataLoader(
            _WithMemory(dataset), batch_size=4096, num_workers=2, multiprocessing_context=method, collate_fn=list
        )
        seconds = timed(lambda used=used, loader=loader: used.extend(_maxima(loader)))  # type: ignore[misc]
        print(f"DataLoader, 2 workers, {method}: {len(dataset) / seconds:,.0f} grids/s; private memory of a worker:")
        print(f"  {used[0]:.0f} MB at the first batches, {used[1]:.0f} MB at the last")


class _WithMemory(torch.utils.data.Dataset[float]):
    """Fetches the rows of a batch in the worker, and returns the private memory of that process in their place."""

    def __init__(self, dataset: CodeDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[float]:
        self.dataset.batch(np.asarray(indices))
        return [private()]


def _maxima(loader: "DataLoader[float]") -> Iterator[float]:
    """Yield the largest value of the first and that of the last ten batches."""
    found = [float(batch[0]) for batch in loader]
    yield max(found[:10])
    yield max(found[-10:])


def waiting(dataset: CodeDataset) -> None:
    """Measure the share of a step of the default prior that fetching its batch takes."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = PriorConfig(num_codes=dataset.manifest.num_codes, num_classes=10)
    stage = PriorStage(GatedPixelCNN(config), dataset, np.arange(len(dataset)) % 20 == 0)
    generator = np.random.default_rng(0)

    def fetch() -> None:
        dataset.batch(stage.train_rows[generator.integers(0, stage.num_items, 32)])

    def step() -> None:
        indices = generator.integers(0, stage.num_items, 32)
        stage.losses(Batch(indices, torch.arange(32), stage.load(indices)))["loss"].backward()

    times = paired({"fetch": fetch, "step": step}, CPU)
    fetching, stepping = (statistics.median(times[name]) for name in ("fetch", "step"))
    print(f"a step of the default prior (batch 32, forward and backward): {stepping * 1e3:.1f} ms,")
    print(f"  of which fetching the batch {fetching * 1e3:.2f} ms ({fetching / stepping:.2%})")


def start(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def count_of(folder: Path) -> int:
    """Return how many grids the manifest counts, 0 without one."""
    return read_manifest(folder).count if (folder / MANIFEST).exists() else 0


def verdict(expected: Path, folder: Path) -> str:
    """Return whether two folders hold the same files, in words."""
    first, second = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in compared.iterdir()}
        for compared in (expected, folder)
    )
    return "every file is the same" if first == second else "the files DIFFER"


def timed(action: Callable[[], object]) -> float:
    """Return how long `action` takes, in seconds."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def peak() -> float:
    """Return the most memory that this process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def private() -> float:
    """Return the memory of this process alone, in MB (Linux)."""
    return _status("RssAnon")


def mapped() -> float:
    """Return the size of the mapped pages of files that are in memory, in MB (Linux)."""
    return _status("RssFile")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


if __name__ == "__main__":
    cli()
