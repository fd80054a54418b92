"""What guidance buys and what it costs: the numbers of `evaluate --samples` over S, and a picture over S.

    python -m benchmarks.guidance --tokenizer DIR --prior DIR --samples 2000
    python -m benchmarks.guidance --tokenizer DIR --prior DIR --guidance 3 --temperature 1 --temperature 0.9
    python -m benchmarks.guidance --tokenizer DIR --prior DIR --decoder plain --decoder sharp

Every combination of the options is measured with the same random numbers, and every decoder draws the same codes; the
first rows are real test images and, for each decoder, their reconstructions, whose error is printed. What is said about
samples compares them with training images, by a judge that was trained on the training part: a default may be chosen by
it, no test image is looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import click
from PIL import Image

from pipeline import ImagePipeline
from pipeline.evaluation.comparison import Pictures
from pipeline.evaluation.sample_quality import QualityOptions, SampleQuality
from pipeline.images.captions import below, beside, sheet_of, text_line
from pipeline.images.png import png_bytes, thumbnail
from pipeline.models.decoders import DecoderChoice
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
@click.option(
    "--decoder", "decoders", multiple=True, default=("auto",), show_default=True, help="auto, plain or sharp."
)
@click.option("--picture", type=click.Path(path_type=Path), help="FILE.png of the same samples over S.")
def main(
    tokenizer: Path,
    prior: Path,
    samples: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    decoders: Sequence[DecoderChoice],
    picture: Path | None,
) -> None:
    """Measure samples over the scale of guidance."""
    pipelines = [ImagePipeline.from_pretrained(tokenizer, prior, decoder=decoder) for decoder in decoders]
    chosen = [
        SamplingParameters(guidance=s, temperature=t, top_p=None if p == 1 else p)
        for s, t, p in product(scales, temperatures, top_ps)
    ]
    if picture is not None:
        picture.write_bytes(png_bytes(picture_over(pipelines, chosen)))
    images = images_of(pipelines[0].tokenizer_info)
    table = Table(images)
    for seed in seeds:
        plain = [
            SampleQuality(pipeline, images, QualityOptions(samples=samples, seed=seed), "auto")
            for pipeline in pipelines
        ]
        table.add(plain[0].comparison, _rows(plain, chosen))
    table.show()


def _rows(plain: Sequence[SampleQuality], chosen: Sequence[SamplingParameters]) -> Iterator[Row]:
    """Yield the pictures of every row of the table; `plain` has the measurement of each pipeline without guidance."""
    yield "real test images", plain[0].comparison.test_images()
    for quality in plain:
        name, reconstructions = decoder_of(quality.pipeline), quality.reconstructions()
        yield f"{name}: reconstructions", reconstructions
        print(f"{name}: {in_numbers(quality, reconstructions)}", flush=True)
        for parameters in chosen:
            options = replace(quality.options, parameters=parameters)
            measured = SampleQuality(quality.pipeline, quality.comparison.images, options, "auto")
            yield f"{name}: {in_words(parameters)}", measured.samples()


def decoder_of(pipeline: ImagePipeline) -> str:
    """Return which decoder draws the pictures."""
    return f"{pipeline.trained_tokenizer.decoder} decoder"


def in_numbers(quality: SampleQuality, reconstructions: Pictures) -> str:
    """Return the error of the reconstructions of the test images."""
    numbers = quality.error_of(reconstructions)
    return f"nmse {numbers.nmse:.4f}, PSNR {numbers.psnr:.2f} dB (seed {quality.options.seed})"


def in_words(parameters: SamplingParameters) -> str:
    """Return what the samples were drawn with."""
    extra = [] if parameters.temperature == 1 else [f"temperature {parameters.temperature:g}"]
    extra += [] if parameters.top_p is None else [f"top-p {parameters.top_p:g}"]
    return ", ".join([f"S = {parameters.guidance:g}", *extra])


def picture_over(pipelines: Sequence[ImagePipeline], chosen: Sequence[SamplingParameters]) -> Image.Image:
    """Return a picture with a band of samples for each choice: the same classes and random numbers in each."""
    return sheet_of([_band(pipeline, parameters) for pipeline, parameters in product(pipelines, chosen)])


def _band(pipeline: ImagePipeline, parameters: SamplingParameters) -> Image.Image:
    images = pipeline.sample(SHOWN, seed=0, **asdict(parameters)).images.numpy()
    half = SHOWN // 2
    rows = [beside([thumbnail(image) for image in images[start : start + half]]) for start in (0, half)]
    return below([text_line(f"{decoder_of(pipeline)}, {in_words(parameters)}"), *rows])


if __name__ == "__main__":
    main()
