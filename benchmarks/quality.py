"""Samples beside reconstructions and real images: of a VQ-VAE with its prior, of VAEs, and of sets damaged on purpose.

    python -m benchmarks.quality models --tokenizer DIR --prior DIR --vae DIR --vae DIR --samples 2000
    python -m benchmarks.quality damage --tokenizer DIR --prior DIR --samples 2000

`models` prints the numbers of `evaluate --samples` for the VQ-VAE with its prior, and the same numbers for each VAE:
its reconstructions, its draws from N(0,1), and its draws from a Gaussian mixture that is fitted to its latents of the
training images, one mixture a class (which takes scikit-learn). `damage` prints them for test images, samples and
codes that are damaged in known ways, so that one sees which number notices what.

Every figure is the mean over the seeds, each of which chooses the images and the samples, with half the range.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import numpy as np
from torch import Tensor

from pipeline import ImagePipeline
from pipeline.evaluation.comparison import Comparison, Pictures
from pipeline.evaluation.judge import Seen, TrainedJudge
from pipeline.evaluation.judge_cache import open_judge
from pipeline.evaluation.nearest_picture import NearestTraining
from pipeline.evaluation.picture_numbers import picture_numbers
from pipeline.evaluation.sample_quality import QualityOptions, SampleQuality
from pipeline.images.image_set import ImageSet
from pipeline.images.png import save_grid
from pipeline.models.inference import reconstruct_images
from pipeline.models.loading import images_of, load_trained_autoencoder
from tokenizer import Baseline

from .damaged_pictures import damaged_pictures
from .latent_mixture import decode_latents, draw_mixture, draw_standard_normal, fit_mixture, latents_of

COMPONENTS = 10  # of the mixture of each class
SHOWN = 64  # of each kind of samples, in a picture
COLUMNS = ("fd_own", "kid_own", "mind_own", "precision", "recall", "density", "coverage", "class_accuracy")

Row = tuple[str, Pictures]


class Table:
    """Collects the numbers of named sets of pictures over the seeds, and prints their means."""

    def __init__(self, images: ImageSet, *, with_nearest: bool = False) -> None:
        self.images = images
        self.judge: TrainedJudge | None = None
        self.rows: dict[str, list[dict[str, float]]] = {}
        self.columns = [*COLUMNS, *(["nearest_train"] if with_nearest else [])]
        self._training: Seen | None = None

    def add(self, comparison: Comparison, rows: Iterator[Row]) -> None:
        """Measure the pictures of one seed."""
        self.judge = self.judge or open_judge(self.images, comparison.class_names)
        reference = self.judge.look(comparison.training_images().images)
        for name, pictures in rows:
            seen = self.judge.look(pictures.images, name)
            numbers = picture_numbers(reference, seen, pictures.labels).to_json()
            if "nearest_train" in self.columns:
                self._training = self._training or self.judge.look(self.images.train.images)
                found = NearestTraining.of(pictures.images, seen.directions, self._training.directions)
                numbers["nearest_train"] = found.median
            self.rows.setdefault(name, []).append(numbers)

    def show(self) -> None:
        """Print the table."""
        assert self.judge is not None
        print(f"features of {self.judge.name}\n")
        print("| " + " | ".join(["", *self.columns]) + " |\n|" + "---|" * (len(self.columns) + 1))
        for name, seeds in self.rows.items():
            cells = [_cell([numbers[column] for numbers in seeds if column in numbers]) for column in self.columns]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _cell(values: Sequence[float]) -> str:
    """Return the mean of a number over the seeds and, if there are several, half its range."""
    if not values:
        return ""
    mean, half = float(np.mean(values)), (max(values) - min(values)) / 2
    return f"{mean:.3g}" + (f" ± {half:.1g}" if len(values) > 1 else "")


@click.group()
def main() -> None:
    """Measure pictures against real ones."""


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that both commands have."""
    for option in (
        click.option("--tokenizer", type=click.Path(path_type=Path), required=True),
        click.option("--prior", type=click.Path(path_type=Path), required=True),
        click.option("--samples", default=2000, show_default=True, help="Pictures of each kind."),
        click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True),
        click.option("--pictures", type=click.Path(path_type=Path), help="Folder for a contact sheet of each kind."),
    ):
        command = option(command)
    return command


@main.command()
@_shared
@click.option("--vae", "vaes", type=click.Path(path_type=Path), multiple=True)
def models(
    tokenizer: Path, prior: Path, samples: int, seeds: Sequence[int], pictures: Path | None, vaes: Sequence[Path]
) -> None:
    """Compare the VQ-VAE and its prior with VAEs."""
    pipeline = ImagePipeline.from_pretrained(tokenizer, prior, decoder="plain")
    images = images_of(pipeline.tokenizer_info)
    baselines = [_Vae(folder, images) for folder in vaes]
    table = Table(images)
    for seed in seeds:
        quality = SampleQuality(pipeline, images, QualityOptions(samples=samples, seed=seed), "auto")
        rows = _model_rows(quality, baselines, seed)
        table.add(quality.comparison, shown(rows, pictures if seed == seeds[0] else None))
    table.show()


def _model_rows(quality: SampleQuality, vaes: Sequence["_Vae"], seed: int) -> Iterator[Row]:
    """Yield the pictures of every model."""
    columns = quality.columns()
    count = len(columns["test"].images)
    yield "real test images", columns["test"]
    yield "VQ-VAE, reconstructions", columns["reconstructions"]
    yield "VQ-VAE, PixelCNN prior", columns["samples"]
    for vae in vaes:
        yield f"{vae.name}, reconstructions", vae.reconstructed(columns["test"])
        yield f"{vae.name}, N(0,1)", vae.from_normal(count, seed)
        yield f"{vae.name}, mixture", vae.from_mixture(count, seed)


def shown(rows: Iterator[Row], folder: Path | None) -> Iterator[Row]:
    """Yield the rows, and write the first pictures of each as a contact sheet into `folder`."""
    for name, pictures in rows:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_grid(pictures.images[:SHOWN], folder / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}.png", columns=8)
        yield name, pictures


class _Vae:
    """A trained VAE, with the mixture that is fitted to its latents."""

    def __init__(self, folder: Path, images: ImageSet) -> None:
        self.model = load_trained_autoencoder(folder, "auto").model
        assert isinstance(self.model, Baseline)
        self.name = f"VAE ({self.model.config.likelihood})"
        latents = latents_of(self.model, images.train)
        self.shape = latents.shape
        self.mixture = fit_mixture(latents, COMPONENTS, seed=0)

    def reconstructed(self, test: Pictures) -> Pictures:
        return Pictures(images=reconstruct_images(self.model, test.images), labels=test.labels)

    def from_normal(self, count: int, seed: int) -> Pictures:
        return self._decoded(draw_standard_normal(count, self.shape, seed)[0], None)

    def from_mixture(self, count: int, seed: int) -> Pictures:
        latents, labels = draw_mixture(self.mixture, count, seed)
        return self._decoded(latents, labels.numpy() if int(labels.min()) >= 0 else None)

    def _decoded(self, latents: Tensor, labels: np.ndarray | None) -> Pictures:
        assert isinstance(self.model, Baseline)
        return Pictures(images=decode_latents(self.model, latents), labels=labels)


@main.command()
@_shared
def damage(tokenizer: Path, prior: Path, samples: int, seeds: Sequence[int], pictures: Path | None) -> None:
    """Show which number notices what."""
    pipeline = ImagePipeline.from_pretrained(tokenizer, prior, decoder="plain")
    images = images_of(pipeline.tokenizer_info)
    table = Table(images, with_nearest=True)
    for seed in seeds:
        rows = damaged_pictures(pipeline, images, samples, seed)
        table.add(Comparison.of(images, samples, seed), shown(rows, pictures if seed == seeds[0] else None))
    table.show()


if __name__ == "__main__":
    main()
