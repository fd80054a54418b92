"""Another, better classifier than the judge of `evaluate --samples`: does it recognise the samples, too?

    python -m benchmarks.second_opinion --tokenizer DIR --prior DIR --guidance 3 --guidance 4

It is a judge of another seed that is trained more than twice as long, on every image and its mirror image, and looks at
both (so it is for photographs, not for letters). It has had no part in anything: nobody chose a decoder, a default or a
sample by it. Prints the share of real test images, of their reconstructions and of samples that it recognises as their
class, by the decoder that `--decoder` names.
"""

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from pipeline import ImagePipeline
from pipeline.evaluation.comparison import Pictures
from pipeline.evaluation.judge import accuracy_of
from pipeline.evaluation.judge_network import Judge
from pipeline.evaluation.judge_training import TrainingImages, train_judge
from pipeline.evaluation.sample_quality import QualityOptions, SampleQuality
from pipeline.images.image_set import ImageSet
from pipeline.images.preprocessing import to_float
from pipeline.models.decoders import DecoderChoice
from pipeline.models.inference import in_blocks
from pipeline.models.loading import images_of
from prior import SamplingParameters

SEED = 1  # the judge has 0
STEPS = 6_000  # of 128 images, where the judge takes 2,500


@click.command()
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--prior", type=click.Path(path_type=Path), required=True)
@click.option("--decoder", "decoders", multiple=True, default=("plain", "sharp"), show_default=True)
@click.option("--samples", default=2000, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option("--guidance", "scales", type=float, multiple=True, default=(1, 2, 3, 4), show_default=True)
@click.option("--steps", default=STEPS, show_default=True, help="Of the training of the classifier.")
@click.option("--classifier", type=click.Path(path_type=Path), help="File to keep the trained classifier in.")
def main(
    tokenizer: Path,
    prior: Path,
    decoders: Sequence[DecoderChoice],
    samples: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    steps: int,
    classifier: Path | None,
) -> None:
    """Measure how many samples another classifier recognises."""
    pipelines = {name: ImagePipeline.from_pretrained(tokenizer, prior, decoder=name) for name in decoders}
    images = images_of(next(iter(pipelines.values())).tokenizer_info)
    network = trained_classifier(images, steps, classifier)
    _show(f"all {len(images.test):,} real test images", [_recognised(network, images.test.images, images.test.labels)])
    for name, pipeline in pipelines.items():
        plain = [_quality(pipeline, images, samples, seed, 1.0).reconstructions() for seed in seeds]
        _show(f"{name} decoder, reconstructions", [_of(network, pictures) for pictures in plain])
        for scale in scales:
            drawn = [_quality(pipeline, images, samples, seed, scale).samples() for seed in seeds]
            _show(f"{name} decoder, S = {scale:g}", [_of(network, pictures) for pictures in drawn])


def trained_classifier(images: ImageSet, steps: int, file: Path | None) -> Judge:
    """Return the classifier, read from `file` or trained, and written there."""
    train = images.train
    mirrored = np.concatenate([train.images, train.images[..., ::-1]])
    labels = np.concatenate([train.labels, train.labels])
    data = TrainingImages(images=mirrored, labels=labels, num_classes=len(images.class_names))
    if file is not None and file.exists():
        network = Judge(data.config)
        network.load_state_dict(safetensors.torch.load_file(file))
        return network.eval()
    network = train_judge(data, seed=SEED, device=torch.device("cpu"), description="training a classifier", steps=steps)
    if file is not None:
        safetensors.torch.save_file(network.state_dict(), file)
    return network


def _quality(pipeline: ImagePipeline, images: ImageSet, samples: int, seed: int, scale: float) -> SampleQuality:
    options = QualityOptions(samples=samples, seed=seed, parameters=SamplingParameters(guidance=scale))
    return SampleQuality(pipeline, images, options, "auto")


def _of(network: Judge, pictures: Pictures) -> float:
    assert pictures.labels is not None
    return _recognised(network, pictures.images, pictures.labels)


def _recognised(network: Judge, images: np.ndarray | Tensor, labels: np.ndarray) -> float:
    """Return the share of images uint8 [n,C,H,W] that are taken for their class, by them and their mirror images."""

    def compute(block: Tensor) -> Tensor:
        logits: Tensor = network.head(network(to_float(block))) + network.head(network(to_float(block.flip(3))))
        return logits.argmax(dim=1)

    found = in_blocks(network, compute, lambda start, stop: torch.as_tensor(np.array(images[start:stop])), len(images))
    return accuracy_of(torch.cat(list(found)).numpy(), labels)


def _show(name: str, shares: Sequence[float]) -> None:
    """Print the mean over the seeds, and half the range."""
    print(f"{name:>40}  {np.mean(shares):.1%} ± {(max(shares) - min(shares)) / 2:.1%}", flush=True)


if __name__ == "__main__":
    main()
