"""Whether samples show the digit that was requested, judged by a classifier trained on real MNIST.

    python -m benchmarks.digit_classifier --tokenizer DIR --prior DIR --data-root DIR

Trains a small convolutional network on the 60,000 training digits (2 epochs, about 40 s on two CPU cores), prints its
accuracy on the 10,000 real test digits, then on `--n` samples, equally many of each class.
"""

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pipeline import ImagePipeline, open_images
from pipeline.images.image_set import ImageSplit
from pipeline.images.preprocessing import to_float
from pipeline.training.schedule import DataOrder

EPOCHS, BATCH, LEARNING_RATE = 2, 128, 2e-3


def classifier() -> nn.Sequential:
    """Return a network: grey images [B,1,28,28] in [0,1] -> logits [B,10]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def train(model: nn.Module, digits: ImageSplit) -> None:
    """Train with Adam and a cosine schedule over EPOCHS."""
    order, steps = DataOrder(len(digits), BATCH, seed=0), EPOCHS * len(digits) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in tqdm(range(steps), desc="training the classifier", unit="step", dynamic_ncols=True):
        rows = order.batch(step)
        loss = F.cross_entropy(model(digits.batch(rows)), torch.from_numpy(digits.labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Return the digit [n] that each of the images [n,1,28,28] in [0,1] is taken for."""
    model.eval()
    return torch.cat([model(batch).argmax(dim=1) for batch in images.split(500)])


@click.command()
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--prior", type=click.Path(path_type=Path), required=True)
@click.option("--data-root", required=True, help="Folder of MNIST.")
@click.option("--n", default=1000, show_default=True, help="Samples, equally many of each digit.")
@click.option("--seed", default=0, show_default=True)
def main(tokenizer: Path, prior: Path, data_root: str, n: int, seed: int) -> None:
    """Print how many of n samples are recognised as the digit that was requested."""
    torch.manual_seed(0)
    digits = open_images("mnist", data_root=data_root, image_size=(28, 28), channels=1)
    model = classifier()
    train(model, digits.train)
    real = predictions(model, digits.test.batch(np.arange(len(digits.test)))).numpy() == digits.test.labels
    print(f"real test digits recognised: {real.mean():.2%} of {len(real):,}")

    pipeline = ImagePipeline.from_pretrained(tokenizer, prior)
    requested = pipeline.labels_for(n, [str(name) for name in pipeline.class_names])
    assert requested is not None
    images, _ = pipeline.sample(n, labels=requested, seed=seed)
    correct = predictions(model, to_float(images)) == requested
    each = ", ".join(f"{digit}: {float(correct[requested == digit].float().mean()):.0%}" for digit in range(10))
    print(f"samples recognised as the requested digit: {float(correct.float().mean()):.1%} of {n:,} ({each})")


if __name__ == "__main__":
    main()
