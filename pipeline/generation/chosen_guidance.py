"""Which guidance suits a prior: as much as it takes until the prior recognises what it draws.

How far a prior follows its labels by itself depends on the images: digits are as good as always what they should be,
photographs are not. The prior can tell, for it is a classifier of codes (`prior/posterior.py`): at the plain prior it
gives its samples of CIFAR-10 their own label with a probability of .76, of MNIST .986. The smallest guidance that lifts
this to SURE is the default of `sample` for this prior. No image and no judge takes part.

Legend: n samples, C classes, H W grid of codes.
"""

import math
from dataclasses import dataclass

import torch

from prior import GatedPixelCNN, sample_codes
from prior.posterior import label_log_likelihoods
from prior.uniforms import seeded_generator

from ..runtime.progress import Progress

SCALES = (2.0, 3.0, 4.0)  # of guidance, the smallest that suits is taken; beyond 4 images lose variety for little
SURE = 0.999  # mean p(label | codes) of samples
FEWEST, MOST = 32, 512  # samples at each scale
MOST_POSITIONS = 2**15  # of all samples: 512 grids of 8x8


@dataclass(frozen=True, kw_only=True)
class ChosenGuidance:
    """The guidance that suits a prior, and how sure it was of its samples at each scale that was tried."""

    guidance: float
    recognised: dict[float, float]  # scale -> mean p(label | codes) of samples, in [0,1]

    @property
    def in_words(self) -> str:
        """What was found, in one line."""
        tried = ", ".join(f"{share:.2%} with {scale:g}" for scale, share in self.recognised.items())
        return f"guidance: the prior recognises {tried} of its samples, so {self.guidance:g} is the default of sample"


def choose_guidance(prior: GatedPixelCNN, grid: tuple[int, int], seed: int = 0) -> ChosenGuidance:
    """Choose the smallest of SCALES at which the prior takes its samples for what they should show.

    If there is none, the one at which it is surest.

    Costs the samples, and a forward pass over them for each class.

    Args:
        prior: with classes and label dropout.
        grid: (H, W) of a sample.
        seed: of the samples.
    """
    count = min(MOST, max(FEWEST, MOST_POSITIONS // math.prod(grid)))
    found: dict[float, float] = {}
    with Progress(len(SCALES) * count, "choosing the guidance", "sample") as bar:
        for tried, scale in enumerate(SCALES, start=1):
            found[scale] = recognised_share(prior, grid, count, scale, seed)
            bar.move_to(tried * count)
            if found[scale] >= SURE:
                break
    return ChosenGuidance(guidance=max(found, key=lambda scale: found[scale]), recognised=found)


def recognised_share(prior: GatedPixelCNN, grid: tuple[int, int], count: int, guidance: float, seed: int) -> float:
    """Return the mean p(label | codes) of samples, of all classes in turn, for the plain prior with equal classes."""
    labels = _labels(count, prior.config.num_classes)
    device = next(prior.parameters()).device
    codes = sample_codes(
        prior, count, grid, labels=labels.to(device), guidance=guidance, generator=seeded_generator(seed)
    )
    probabilities = label_log_likelihoods(prior, codes).softmax(dim=1)
    return float(probabilities[torch.arange(count), labels].mean())


def _labels(count: int, num_classes: int) -> torch.Tensor:
    """Return the labels of samples [n]: all classes in turn, or of more classes than samples evenly spaced ones."""
    rows = torch.arange(count)
    return rows % num_classes if num_classes <= count else rows * num_classes // count
