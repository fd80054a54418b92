"""Test images, samples and codes that are damaged in known ways, to see which number notices what."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from pipeline import ImagePipeline
from pipeline.evaluation.comparison import Pictures
from pipeline.evaluation.sample_quality import QualityOptions, SampleQuality
from pipeline.images.image_set import ImageSet
from pipeline.images.preprocessing import to_float
from pipeline.models.inference import encode_images
from prior import SamplingParameters

BLURS = (0.5, 1.0)  # pixels
TEMPERATURES = (0.7, 1.3)


def damaged_pictures(
    pipeline: ImagePipeline, images: ImageSet, samples: int, seed: int
) -> Iterator[tuple[str, Pictures]]:
    """Yield named pictures, `samples` of each kind: undamaged ones first."""

    def measurement(**options: Any) -> SampleQuality:
        return SampleQuality(pipeline, images, QualityOptions(samples=samples, seed=seed, **options), "auto")

    plain, random = measurement().columns(), np.random.default_rng(seed)
    test, sampled = plain["test"], plain["samples"]
    yield "test images", test
    for deviation in BLURS:
        blurred = gaussian_blur(test.images, [7, 7], [deviation, deviation])
        yield f"test images, blurred by {deviation:g} pixels", Pictures(images=blurred, labels=test.labels)
    yield "reconstructions", plain["reconstructions"]
    yield "samples", sampled
    for temperature in TEMPERATURES:
        parameters = SamplingParameters(temperature=temperature)
        yield f"samples, temperature {temperature:g}", measurement(parameters=parameters).samples()
    if images.class_names:
        yield "samples, one class", measurement(labels=(pipeline.class_names[0],)).samples()
    yield from _wrong_codes(pipeline, test, random)
    rows = np.sort(random.permutation(len(images.train))[:samples])
    training = torch.from_numpy(np.array(images.train.images[rows]))
    labels = images.train.labels[rows] if images.class_names else None
    yield "training images as samples", Pictures(images=training, labels=labels)
    half = sampled.images.clone()
    half[::2] = training[::2]
    yield "samples, every other one a training image", Pictures(images=half, labels=None)


def _wrong_codes(
    pipeline: ImagePipeline, test: Pictures, random: np.random.Generator
) -> Iterator[tuple[str, Pictures]]:
    """Yield what the decoder makes of the codes of test images in other places, and of codes drawn one by one."""
    images: Tensor = test.images
    batches = encode_images(pipeline.tokenizer, lambda start, stop: to_float(images[start:stop]), len(images))
    codes = torch.cat(list(batches))
    order = torch.from_numpy(random.permutation(codes[0].numel()))
    shuffled = codes.flatten(1)[:, order].view_as(codes)
    yield "codes in other places", Pictures(images=pipeline.decode(shuffled), labels=test.labels)
    chosen = torch.from_numpy(random.integers(codes.numel(), size=codes.numel()))
    drawn = pipeline.decode(codes.flatten()[chosen].view_as(codes))
    yield "codes drawn from their histogram", Pictures(images=drawn, labels=test.labels)
