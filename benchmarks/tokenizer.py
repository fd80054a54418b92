"""The quality of the tokenizer's design at equal budget, its speed, and its memory. See benchmarks/README.md.

    python -m benchmarks.tokenizer quality --data DIR [--recipe NAME ...] [--seed 0 --seed 1 --seed 2]
    python -m benchmarks.tokenizer speed
    python -m benchmarks.tokenizer memory

`quality` trains each recipe for 10,000 steps of 32 images and measures it on the complete test split every 1,000
steps; nothing is chosen on these numbers. `speed` takes paired rounds, every variant once a round, after a burn-in, and
prints the median of each round's ratio. `pip install vector-quantize-pytorch` to compare with it.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from pipeline.images.image_set import ImageSet, open_images
from pipeline.models.checkpoint import CheckpointInfo
from pipeline.runtime.device import autocast, choose_device, compile_networks, manual_seed, product_dtype
from pipeline.runtime.optimizer import Optimizers
from pipeline.training.loop import run_training
from pipeline.training.loop_settings import LoopSettings
from pipeline.training.recipes import LARGE_TOKENIZER, TokenizerSettings
from pipeline.training.stage import Evaluation
from pipeline.training.tokenizer_stage import TokenizerStage, evaluate_autoencoder
from pipeline.training.train_tokenizer import config_for
from tokenizer import VQVAE, QuantizerOutput, TokenizerConfig
from tokenizer.quantizer import nearest_codes

from .timing import hardware, paired, peak_memory, ratio

RECIPES = {
    "default": TokenizerSettings(),
    "large": LARGE_TOKENIZER,
    "adam": TokenizerSettings(optimizer="adam"),
    "adam lr 1e-3": TokenizerSettings(optimizer="adam", lr=1e-3),
    "lr 1.5e-3": TokenizerSettings(lr=1.5e-3),
    "lr 6e-3": TokenizerSettings(lr=6e-3),
    "beta 0.25": TokenizerSettings(commitment_weight=0.25),
    "D 16": TokenizerSettings(code_dim=16),
    "D 4": TokenizerSettings(code_dim=4),
    "no revival": TokenizerSettings(),
    "gradient codebook": TokenizerSettings(codebook_update="gradient"),
}
BEYOND_SETTINGS: dict[str, dict[str, Any]] = {"no revival": {"revival_threshold": 0.0}}  # fields of TokenizerConfig


class EvaluatedOnTest(TokenizerStage):
    """Stage one as train-tokenizer runs it, but evaluated on the complete test split."""

    def __init__(self, model: VQVAE, images: ImageSet) -> None:
        super().__init__(model, images.train)
        self.test = images.test
        self.evaluations: list[dict[str, float]] = []

    def evaluate(self) -> Evaluation:
        evaluation = evaluate_autoencoder(self.model, self.test)
        self.evaluations.append(evaluation.numbers)
        return evaluation


@click.group()
def cli() -> None:
    """Benchmarks of the tokenizer."""
    print(hardware())


@cli.command()
@click.option("--data", required=True, help="Images with a test split, as train-tokenizer takes them.")
@click.option("--recipe", "recipes", multiple=True, default=["default"], type=click.Choice(list(RECIPES)))
@click.option("--seed", "seeds", multiple=True, type=int, default=[0], show_default=True)
@click.option("--steps", default=10_000, show_default=True)
@click.option("--threads", type=int, help="[default: torch's own]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("checkpoints/benchmark"), show_default=True)
def quality(data: str, recipes: list[str], seeds: list[int], steps: int, threads: int | None, out: Path) -> None:
    """Train recipes and measure them on the test split."""
    if threads:
        torch.set_num_threads(threads)
    images, device = open_images(data), choose_device("auto")
    print(
        "| recipe | seed | nmse at 2k / 5k / 10k steps | perplexity | codes used | minutes |\n|---|---|---|---|---|---|"
    )
    for name in recipes:
        for seed in seeds:
            settings = replace(RECIPES[name], steps=steps, seed=seed)
            config = replace(config_for(settings, images), **BEYOND_SETTINGS.get(name, {}))
            manual_seed(seed)
            stage = EvaluatedOnTest(VQVAE(config).to(device), images)
            folder, start = out / f"{name.replace(' ', '-')}-{seed}", time.perf_counter()
            train(stage, config, settings, folder)
            minutes = (time.perf_counter() - start) / 60
            (folder / "test.json").write_text(json.dumps(stage.evaluations, indent=1))
            last = stage.evaluations[-1]
            errors = " / ".join(f"{stage.evaluations[i]['nmse']:.4f}" for i in (1, 4, 9))
            usage = f"{last['perplexity']:.0f} | {last['codes_used']}"
            print(f"| {name} | {seed} | {errors} | {usage} | {minutes:.1f} |", flush=True)


def train(stage: EvaluatedOnTest, config: TokenizerConfig, settings: TokenizerSettings, folder: Path) -> None:
    """Train as `train-tokenizer` does, with ten evaluations over the run, the last at its end."""
    info = CheckpointInfo(
        kind="tokenizer", config=asdict(config), step=0, class_names=[], preprocessing={}, training=asdict(settings)
    )
    loop = LoopSettings.from_settings(settings, stage.device, evaluations=10)
    run_training(stage, info, loop, folder)


@cli.command()
@click.option("--batch-size", default=128, show_default=True)
@click.option("--device", "device_name", default="auto", show_default=True)
def speed(batch_size: int, device_name: str) -> None:
    """Time a training step: with codegrid's quantizer, none, and others; by precision, layout and compilation."""
    device = choose_device(device_name)
    for precision in ("fp32", "bf16"):
        variants = {"identity": Identity(), "codegrid": None} | peers(device)
        steps = {name: stepper(device, precision, batch_size, quantizer) for name, quantizer in variants.items()}
        times = paired(steps, device)
        print(f"\nquantizer, {precision}, batch {batch_size}: seconds a step, ratio to the identity")
        for name, found in times.items():
            print(f"  {name:>28}  {statistics.median(found):.4f}  {ratio(found, times['identity']):.3f}")
    step_variants: dict[str, Callable[[], None]] = {"fp32": stepper(device, "fp32", batch_size)}
    for precision in ("fp32", "bf16"):
        step_variants[f"{precision} channels_last"] = stepper(device, precision, batch_size, channels_last=True)
        step_variants[f"{precision} compile"] = stepper(device, precision, batch_size, compiled=True)
    step_variants |= {
        "bf16": stepper(device, "bf16", batch_size),
        "bf16 adam": stepper(device, "bf16", batch_size, optimizer="adam"),
    }
    times = paired(step_variants, device)
    print(f"\na complete step, batch {batch_size}: images/s, ratio to plain fp32")
    for name, found in times.items():
        print(f"  {name:>28}  {batch_size / statistics.median(found):6.0f}  {1 / ratio(found, times['fp32']):.2f}")


@cli.command()
def memory() -> None:
    """Print the peak memory of quantizing 65,536 vectors of 64 dimensions against 65,536 codes, above that before."""
    vectors, codebook = torch.randn(65_536, 64), torch.randn(65_536, 64)
    nearest_codes(vectors[:64], codebook[:64])
    before = peak_memory()
    start = time.perf_counter()
    nearest_codes(vectors, codebook)
    seconds = time.perf_counter() - start
    print(f"{peak_memory() - before:.0f} MiB above the peak before, {seconds:.1f} s")


class Identity(nn.Module):
    """No quantizer: returns the vectors as they are."""

    def forward(self, z: Tensor) -> QuantizerOutput:
        zero = z.new_zeros(())
        codes = torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.int64, device=z.device)
        return QuantizerOutput(vectors=z, codes=codes, loss=zero, commitment_loss=zero, codebook_loss=zero)


class Peer(nn.Module):
    """vector-quantize-pytorch in place of codegrid's quantizer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor) -> QuantizerOutput:
        vectors, codes, loss = self.layer(z.float())
        return QuantizerOutput(vectors=vectors, codes=codes, loss=loss, commitment_loss=loss, codebook_loss=loss)


def peers(device: torch.device) -> dict[str, nn.Module]:
    """Return the quantizers of other libraries that are installed, set to do the same work."""
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        print("vector-quantize-pytorch is not installed; omitted")
        return {}
    config = TokenizerConfig()
    options: dict[str, Any] = {"dim": config.code_dim, "codebook_size": config.num_codes, "decay": config.ema_decay}
    layer = VectorQuantize(**options, kmeans_init=True, threshold_ema_dead_code=2, accept_image_fmap=True)
    return {"vector-quantize-pytorch": Peer(layer.to(device))}


def stepper(
    device: torch.device,
    precision: str,
    batch_size: int,
    quantizer: nn.Module | None = None,
    *,
    channels_last: bool = False,
    compiled: bool = False,
    optimizer: str = "muon",
) -> Callable[[], None]:
    """Return a function that takes one training step of the default network on noise of 32x32 pixels."""
    torch.manual_seed(0)
    model = VQVAE(TokenizerConfig(data_variance=0.06)).to(device)
    if quantizer is not None:
        model.quantizer = quantizer  # type: ignore[assignment]
    images = torch.rand(batch_size, 3, 32, 32, device=device)
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    if compiled:
        compile_networks(model.encoder, model.decoder)
    optimizers = Optimizers(model, optimizer, 1e-4, dtype=product_dtype(device, precision))

    def step() -> None:
        model.train()
        with autocast(device, precision):
            loss = model(images).loss
        optimizers.zero_grad()
        loss.backward()
        optimizers.step(1e-4)

    return step


if __name__ == "__main__":
    cli()
