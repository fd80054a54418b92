"""The cost of sampling against one forward pass, and the quality of a prior for its minutes of training.

    python -m benchmarks.sampling speed
    python -m benchmarks.sampling prior --codes CODES.npz [--recipe NAME ...]
    python -m benchmarks.sampling reach

Results: benchmarks/README.md. `speed` and `reach` need no training. `prior` trains each recipe on fixed code grids
(arrays train_codes, train_labels, test_codes, test_labels) and measures bits per code on the complete test split once,
with the weights that were best on rows held out of the training split.
"""

import math
import statistics
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.likelihood import measure_prior
from pipeline.images.holdout import held_out
from pipeline.models.checkpoint import CheckpointInfo
from pipeline.models.loading import load_prior
from pipeline.runtime.device import choose_device
from pipeline.training.loop import run_training
from pipeline.training.loop_settings import LoopSettings
from pipeline.training.prior_stage import PriorStage
from pipeline.training.recipes import LARGE_PRIOR, PriorSettings
from pipeline.training.train_prior import network_config
from prior import GatedPixelCNN, PriorConfig, sample_codes

from .timing import hardware, paired, ratio

LAYERS = 15  # of the network that speed is measured on: 64 channels, K = 512
ONE_PIXEL = {"height": 1, "width": 1, "channels": 1}  # of images that nobody has: a checkpoint names their size
GUIDANCE = 3  # any but 0 and 1 costs the same

RECIPES = {
    "default": PriorSettings(),
    "adam": PriorSettings(optimizer="adam"),
    "no attention": PriorSettings(attention_every=0),
    "no dropout": PriorSettings(dropout=0),
    "no label dropout": PriorSettings(label_dropout=0),
    "large": LARGE_PRIOR,
}


class Arrays:
    """Holds grids from arrays, as the stage of the prior takes them."""

    def __init__(self, codes: np.ndarray, labels: np.ndarray) -> None:
        self.codes, self.labels = torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.codes[indices], self.labels[indices]

    def names(self) -> list[str]:
        return [str(row) for row in range(len(self.codes))]


@click.group()
def cli() -> None:
    """Benchmarks of the prior."""
    print(hardware())


@cli.command()
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option("--attention-every", default=0, show_default=True, help="Layers.")
def speed(device_name: str, attention_every: int) -> None:
    """Compare sampling with one forward pass of the same batch, and with one for every position, in float32."""
    device = choose_device(device_name)
    torch.manual_seed(0)
    config = PriorConfig(
        num_codes=512, num_classes=10, num_layers=LAYERS, attention_every=attention_every, label_dropout=0.1
    )
    model = GatedPixelCNN(config).to(device).eval()
    print("| samples, grid | forward pass | sampling | sampling / forward | guided / plain | forwards / sampling |")
    print("|---|---|---|---|---|---|")
    for count, side in ((64, 8), (64, 32), (1, 32)):
        codes = torch.randint(512, (count, side, side), device=device)
        labels = torch.arange(count, device=device) % 10
        draw = partial(sample_codes, model, count, (side, side), labels=labels)
        steps = {
            "forward": partial(forward, model, codes, labels),
            "sampling": draw,
            "guided": partial(draw, guidance=GUIDANCE),
        }
        times = paired(steps, device, burn_in=1, rounds=9 if count * side < 2048 else 5)
        once = statistics.median(times["forward"])
        slow = ratio([side * side * seconds for seconds in times["forward"]], times["sampling"])
        print(
            f"| {count}, {side}x{side} | {once:.3f} s | {statistics.median(times['sampling']):.3f} s "
            f"| {ratio(times['sampling'], times['forward']):.2f} | {ratio(times['guided'], times['sampling']):.2f} "
            f"| {slow:.0f} |",
            flush=True,
        )
    print("the last column is computed: one forward pass for each position, as measured, over the time of sampling")


@torch.inference_mode()
def forward(model: GatedPixelCNN, codes: Tensor, labels: Tensor) -> Tensor:
    """Run one teacher-forced pass over the batch."""
    return model(codes, labels)


@cli.command("prior")
@click.option("--codes", "path", type=click.Path(path_type=Path), required=True, help="An .npz of code grids.")
@click.option("--recipe", "recipes", multiple=True, default=["default"], type=click.Choice(list(RECIPES)))
@click.option("--steps", default=8_000, show_default=True)
@click.option("--threads", type=int, help="[default: torch's own]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("checkpoints/benchmark"), show_default=True)
def prior_command(path: Path, recipes: list[str], steps: int, threads: int | None, out: Path) -> None:
    """Train recipes on fixed code grids and measure them on the test split."""
    if threads:
        torch.set_num_threads(threads)
    arrays, device = np.load(path), choose_device("auto")
    train = Arrays(arrays["train_codes"], arrays["train_labels"])
    test = Arrays(arrays["test_codes"], arrays["test_labels"])
    print("| recipe | steps | minutes | bits per code, test split | parameters |\n|---|---|---|---|---|")
    for name in recipes:
        settings = replace(RECIPES[name], steps=steps)
        counts = {"num_codes": int(train.codes.max()) + 1, "num_classes": int(train.labels.max()) + 1}
        config = network_config(settings, **counts, grid=(train.codes.shape[1], train.codes.shape[2]))
        torch.manual_seed(settings.seed)
        model = GatedPixelCNN(config).to(device)
        stage = PriorStage(model, train, held_out([str(i) for i in range(len(train.codes))]))
        folder, start = out / f"{path.stem}-{name.replace(' ', '-')}", time.perf_counter()
        run(stage, config, settings, folder, device)
        minutes = (time.perf_counter() - start) / 60
        batches = np.array_split(np.arange(len(test.codes)), math.ceil(len(test.codes) / 250))
        bits = measure_prior(load_prior(folder).to(device), (test.batch(rows) for rows in batches))
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"| {name} | {steps:,} | {minutes:.1f} | {bits:.3f} | {count:,} |", flush=True)


def run(stage: PriorStage, config: PriorConfig, settings: PriorSettings, folder: Path, device: torch.device) -> None:
    """Train as `train-prior` does; the weights that were best on held-out rows are saved in `folder`."""
    info = CheckpointInfo(
        kind="prior",
        config=asdict(config),
        step=0,
        class_names=[str(label) for label in range(config.num_classes)],
        preprocessing=ONE_PIXEL,
        training=asdict(settings),
    )
    loop = LoopSettings.from_settings(settings, device, keep_best=True)
    run_training(stage, info, loop, folder)


@cli.command()
def reach() -> None:
    """Count the past positions that can influence the output at row 8, column 6 of a 13x13 grid, by the Jacobian."""
    torch.manual_seed(0)
    model = GatedPixelCNN(PriorConfig(num_codes=8, channels=8, num_layers=12)).double().eval()
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: embedded.append(output.requires_grad_()))
    logits = model(torch.zeros(1, 13, 13, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(logits[0, :, 8, 6].square().sum(), embedded[0])
    seen = gradient[0].abs().sum(dim=-1) > 0
    order = torch.arange(169).view(13, 13)
    print(f"past positions that reach it: {int((seen & (order < 8 * 13 + 6)).sum())} of {8 * 13 + 6}")
    print(f"present and future positions that do: {int((seen & (order >= 8 * 13 + 6)).sum())}")


if __name__ == "__main__":
    cli()
