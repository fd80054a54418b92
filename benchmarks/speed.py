"""What a training step costs, by precision, layout, optimizer and compilation; loading ahead; what a run would choose.

    python -m benchmarks.speed steps
    python -m benchmarks.speed compile
    python -m benchmarks.speed optimizers
    python -m benchmarks.speed loading
    python -m benchmarks.speed choice --steps 100000

The default tokenizer on random images of 32x32, the default prior on random codes of 8x8. Variants take turns, one step
each, after a burn-in; the table has the shortest step, the median, and the median of the ratios to the first variant of
the same round. Results: benchmarks/README.md.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from pipeline.images.image_set import ImageSplit
from pipeline.images.preprocessing import to_float
from pipeline.runtime.device import autocast, choose_device, compile_networks, product_dtype
from pipeline.runtime.optimizer import Optimizers
from pipeline.training.fastest import Candidate, StepTime, candidates_for, choose, measure
from pipeline.training.prefetch import Prefetcher
from pipeline.training.recipes import PriorSettings, TokenizerSettings
from pipeline.training.train_prior import network_config
from prior import GatedPixelCNN
from prior.objective import cross_entropy
from tokenizer import VQVAE, TokenizerConfig

from .timing import hardware, paired, ratio

STAGES = ("tokenizer", "prior")
RATE = 1e-4  # of the learning, low enough for any number of steps on noise

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, what it learns from, and how its steps are taken."""

    stage: str
    device: torch.device
    batch_size: int
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    optimizer: str = "muon"

    def model(self) -> tuple[nn.Module, Callable[[], Tensor]]:
        """Return the model, and a function that returns its loss for one and the same batch."""
        torch.manual_seed(0)
        if self.stage == "tokenizer":
            settings = TokenizerSettings()
            tokenizer = VQVAE(
                TokenizerConfig(
                    code_dim=settings.code_dim, commitment_weight=settings.commitment_weight, data_variance=0.06
                )
            ).to(self.device)
            images = torch.rand(self.batch_size, 3, 32, 32).to(self.device)
            return tokenizer, lambda: tokenizer(images).loss
        prior = GatedPixelCNN(network_config(PriorSettings(), num_codes=512, num_classes=10, grid=(8, 8)))
        prior = prior.to(self.device)
        codes = torch.randint(512, (self.batch_size, 8, 8)).to(self.device)
        labels = (torch.arange(self.batch_size) % 10).to(self.device)
        return prior, lambda: cross_entropy(prior(codes, labels), codes)

    def step(self) -> Step:
        """Return a function that takes a training step."""
        model, loss_of = self.model()
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compiled:
            networks = [model.encoder, model.decoder] if isinstance(model, VQVAE) else [model]
            compile_networks(*networks)
        optimizers = Optimizers(model, self.optimizer, RATE, dtype=product_dtype(self.device, self.precision))

        def step() -> None:
            model.train()
            with autocast(self.device, self.precision):
                loss = loss_of()
            optimizers.zero_grad()
            loss.backward()
            optimizers.step(RATE)

        return step


@click.group()
def cli() -> None:
    """Benchmarks of a training step."""
    print(hardware())


common = [
    click.option("--device", "device_name", default="auto", show_default=True),
    click.option("--batch-size", default=32, show_default=True),
    click.option("--rounds", default=30, show_default=True),
]


def with_common(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that all have."""
    for option in common:
        command = option(command)
    return command


@cli.command()
@with_common
def steps(device_name: str, batch_size: int, rounds: int) -> None:
    """Time a step in either precision, layout and optimizer."""
    device = choose_device(device_name)
    for stage in STAGES:
        variants = {
            f"{precision}{', channels_last' if last else ''}{', adam alone' if optimizer == 'adam' else ''}": Workload(
                stage=stage,
                device=device,
                batch_size=batch_size,
                precision=precision,
                channels_last=last,
                optimizer=optimizer,
            )
            for precision in ("fp32", "bf16")
            for last, optimizer in ((False, "muon"), (True, "muon"), (False, "adam"))
        }
        show(stage, {name: each.step() for name, each in variants.items()}, device, rounds)


@cli.command("compile")
@with_common
def compile_command(device_name: str, batch_size: int, rounds: int) -> None:
    """Time a compiled step and the compilation itself, with nothing in its cache."""
    device = choose_device(device_name)
    for stage in STAGES:
        variants = {}
        for precision in ("fp32", "bf16"):
            work = partial(Workload, stage=stage, device=device, batch_size=batch_size, precision=precision)
            variants[precision], variants[f"{precision}, compiled"] = work().step(), work(compiled=True).step()
            start = time.perf_counter()
            with inductor_config.patch(force_disable_caches=True):
                variants[f"{precision}, compiled"]()
            print(f"{stage}, {precision}: the first compiled step took {time.perf_counter() - start:.1f} s", flush=True)
        show(stage, variants, device, rounds)


@cli.command()
@with_common
def optimizers(device_name: str, batch_size: int, rounds: int) -> None:
    """Time the optimizers alone: Muon in either precision, Adam fused and not."""
    device = choose_device(device_name)
    for stage in STAGES:
        model, loss_of = Workload(stage=stage, device=device, batch_size=batch_size).model()
        loss_of().backward()
        plain = torch.optim.Adam(model.parameters(), lr=RATE, fused=False)
        variants: dict[str, Step] = {
            "muon, fp32": partial(Optimizers(model, "muon", RATE).step, RATE),
            "muon, bf16": partial(Optimizers(model, "muon", RATE, dtype=torch.bfloat16).step, RATE),
            "adam": partial(Optimizers(model, "adam", RATE).step, RATE),
            "adam, not fused": lambda plain=plain: plain.step(),  # type: ignore[misc]
        }
        show(stage, variants, device, rounds)


@cli.command()
@with_common
def loading(device_name: str, batch_size: int, rounds: int) -> None:
    """Time a step of the tokenizer with its batch loaded in place, ahead by a thread, and not at all."""
    device = choose_device(device_name)
    images = np.random.default_rng(0).integers(0, 256, (20_000, 3, 32, 32)).astype(np.uint8)
    split = ImageSplit(images, np.zeros(len(images), dtype=np.int64), ("",) * len(images))
    last = 10 * rounds + 100

    def load(number: int) -> tuple[Tensor]:
        return (split.batch_uint8(np.random.default_rng(number).integers(0, len(split), batch_size)),)

    train = Workload(stage="tokenizer", device=device, batch_size=batch_size, precision="auto").step()
    sources = {ahead: Prefetcher(load, device, first=0, last=last, ahead=ahead) for ahead in (0, 1, 2)}
    numbers = {ahead: iter(range(last)) for ahead in sources}

    def step(ahead: int) -> None:
        to_float(sources[ahead].get(next(numbers[ahead]))[0])
        train()

    variants: dict[str, Step] = {"no loading": train} | {f"ahead {ahead}": partial(step, ahead) for ahead in sources}
    show("tokenizer", variants, device, rounds)
    for ahead, source in sources.items():
        print(f"ahead {ahead}: waited {1e3 * source.waited / (rounds + 5):.2f} ms a step")
        source.close()


@cli.command()
@with_common
@click.option("--steps", "length", default=100_000, show_default=True, help="Of the run.")
def choice(device_name: str, batch_size: int, rounds: int, length: int) -> None:
    """Print what a run of this length would choose, and what it took to find out."""
    device = choose_device(device_name)

    def time_steps(stage: str, candidate: Candidate) -> StepTime:
        work = Workload(
            stage=stage,
            device=device,
            batch_size=batch_size,
            precision=candidate.precision,
            compiled=candidate.compiled,
        )
        return measure(work.step(), device)

    for stage in STAGES:
        start = time.perf_counter()
        found = choose(candidates_for(device), partial(time_steps, stage), steps=length)
        print(f"{stage}: {found.in_words}; found in {time.perf_counter() - start:.0f} s", flush=True)


def show(stage: str, variants: dict[str, Step], device: torch.device, rounds: int) -> None:
    """Time the variants in turn and print the table."""
    times = paired(variants, device, rounds=rounds)
    first = next(iter(times.values()))
    print(f"\n| {stage} | shortest, ms | median, ms | ratio |\n|---|---|---|---|")
    for name, found in times.items():
        shortest, median = 1e3 * min(found), 1e3 * statistics.median(found)
        print(f"| {name} | {shortest:.1f} | {median:.1f} | {ratio(found, first):.3f} |", flush=True)


if __name__ == "__main__":
    cli()
