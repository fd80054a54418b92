"""What guidance buys and what it costs: the numbers of `evaluate --samples` over S, and a picture over S.

    python -m benchmarks.guidance --tokenizer DIR --prior DIR --samples 2000
    python -m benchmarks.guidance --tokenizer DIR --prior DIR --guidance 3 --temperature 1 --temperature 0.9

Every combination of the options is measured with the same random numbers; the first rows are real test images and their
reconstructions. What is said about samples compares them with training images, by a judge that was trained on the
training part: a default may be chosen by it, no test image is looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import click
from PIL import Image

from pipeline import ImagePipeline
from pipeline.evaluation.sample_quality import QualityOptions, SampleQuality
from pipeline.images.captions import below, beside, sheet_of, text_line
from pipeline.images.png import png_bytes, thumbnail
from pipeline.models.loading import images_of
from prior import SamplingParameters

from .quality import Row, Table

SHOWN = 20  # samples of each S in the picture


@click.command()
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--prior", type=click.Path(path_type=Path), required=True)
@click.option("--samples", default=2000, show_default=True, help="Pictures of each kind.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option("--guidance", "scales", type=float, multiple=True, default=(1, 1.5, 2, 3, 4, 5), show_default=True)
@click.option("--temperature", "temperatures", type=float, multiple=True, default=(1.0,), show_default=True)
@click.option("--top-p", "top_ps", type=float, multiple=True, default=(1.0,), show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), help="FILE.png of the same samples over S.")
def main(
    tokenizer: Path,
    prior: Path,
    samples: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    picture: Path | None,
) -> None:
    """Measure samples over the scale of guidance."""
    pipeline = ImagePipeline.from_pretrained(tokenizer, prior)
    chosen = [
        SamplingParameters(guidance=s, temperature=t, top_p=None if p == 1 else p)
        for s, t, p in product(scales, temperatures, top_ps)
    ]
    if picture is not None:
        picture.write_bytes(png_bytes(picture_over(pipeline, chosen)))
    images = images_of(pipeline.tokenizer_info)
    table = Table(images)
    for seed in seeds:
        quality = SampleQuality(pipeline, images, QualityOptions(samples=samples, seed=seed), "auto")
        table.add(quality.comparison, _rows(pipeline, quality, chosen, seed))
    table.show()


def _rows(
    pipeline: ImagePipeline, plain: SampleQuality, chosen: Sequence[SamplingParameters], seed: int
) -> Iterator[Row]:
    """Yield the pictures of every row of the table."""
    yield "real test images", plain.comparison.test_images()
    yield "reconstructions", plain.reconstructions()
    for parameters in chosen:
        options = QualityOptions(samples=plain.options.samples, seed=seed, parameters=parameters)
        yield in_words(parameters), SampleQuality(pipeline, plain.comparison.images, options, "auto").samples()


def in_words(parameters: SamplingParameters) -> str:
    """Return what the samples were drawn with."""
    extra = [] if parameters.temperature == 1 else [f"temperature {parameters.temperature:g}"]
    extra += [] if parameters.top_p is None else [f"top-p {parameters.top_p:g}"]
    return ", ".join([f"S = {parameters.guidance:g}", *extra])


def picture_over(pipeline: ImagePipeline, chosen: Sequence[SamplingParameters]) -> Image.Image:
    """Return a picture with a band of samples for each choice: the same classes and random numbers in each."""
    return sheet_of([_band(pipeline, parameters) for parameters in chosen])


def _band(pipeline: ImagePipeline, parameters: SamplingParameters) -> Image.Image:
    images = pipeline.sample(SHOWN, seed=0, **asdict(parameters)).images.numpy()
    half = SHOWN // 2
    rows = [beside([thumbnail(image) for image in images[start : start + half]]) for start in (0, half)]
    return below([text_line(in_words(parameters)), *rows])


if __name__ == "__main__":
    main()
