"""Of several candidates for each image, keep the one that the prior itself takes for its label most surely.

A prior with classes is a classifier of what it draws: p(label | codes) = p(codes | label) / sum of p(codes | l) over
the labels l, of the plain prior, whatever the candidates were drawn with. With a share s, image i has the candidates
floor(i / s) to floor((i + 1) / s) - 1, numbered on from those of the images before it:

    s = 0.4    candidate  0 1 | 2 3 4 | 5 6 | 7 8 9
               image        0 |     1 |   2 |     3

So an image depends on its index and the share alone, not on how many are drawn with it. This is rejection sampling by a
classifier [1, section 3.3], but for the classifier: here it is the prior, no other network.

Legend: n images, N candidates of all of them, C classes, H W grid of codes.

[1] Razavi et al. 2019, Generating Diverse High-Fidelity Images with VQ-VAE-2, arXiv:1906.00446
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from prior import GatedPixelCNN
from prior.posterior import label_log_likelihoods

from ..errors import InputError

MOST_CANDIDATES = 10**6  # of an image; beyond, the share is a slip


def check_share(keep_best: float) -> None:
    """Raise ValueError for a share that is not in (0, 1], or so small that nobody waits for its candidates."""
    if not 0 < keep_best <= 1:
        raise ValueError(f"keep_best: expected a share above 0 and at most 1, got {keep_best}")
    if keep_best * MOST_CANDIDATES < 1:
        raise ValueError(f"keep_best: expected at most {MOST_CANDIDATES:,} candidates an image, got 1 / {keep_best}")


def check_kept_by_label(keep_best: float, labels: Tensor | None, without: str) -> None:
    """Raise InputError if candidates are to be compared by their labels and have none; `without` says what lacks them.

    Raises:
        ValueError: a share out of its range.
    """
    check_share(keep_best)
    if keep_best < 1 and labels is None:
        raise InputError(
            expected=f"images with labels, of which --keep-best {keep_best:g} keeps those most surely of their class",
            got=without,
            do="omit --keep-best",
        )


@dataclass(frozen=True)
class Candidates:
    """The candidates of n images in a row.

    Raises:
        ValueError: a share out of its range.
    """

    first_image: int
    num_images: int  # n
    keep_best: float  # share, in (0, 1]

    def __post_init__(self) -> None:
        check_share(self.keep_best)

    @property
    def first(self) -> int:
        """The number of the first candidate."""
        return self._start_of(self.first_image)

    @property
    def total(self) -> int:
        """How many candidates there are, N."""
        return self._start_of(self.first_image + self.num_images) - self.first

    def counts(self) -> Tensor:
        """Return how many candidates each image has, int64 [n], 1 or more."""
        starts = [self._start_of(self.first_image + i) for i in range(self.num_images + 1)]
        return torch.tensor(starts).diff()

    def spread(self, values: Tensor) -> Tensor:
        """Return values [n,...] of the images as those of their candidates, [N,...]."""
        return values.repeat_interleave(self.counts().to(values.device), dim=0)

    def choose(self, prior: GatedPixelCNN, codes: Tensor, labels: Tensor | None) -> Tensor:
        """Return the codes [n,H,W] of the best candidate of each image, the first of equally good ones.

        The cost is that of C forward passes over the candidates of images that have more than one.

        Args:
            prior: with classes if an image has more than one candidate.
            codes: of the candidates, [N,H,W].
            labels: of the images, [n]; not looked at if each has one candidate.
        """
        counts = self.counts()
        if labels is None or self.total == self.num_images:
            return codes
        scores = torch.zeros(self.total, dtype=torch.float64)
        compared = torch.nonzero(self.spread(counts) > 1)[:, 0]
        scores[compared] = label_log_odds(
            label_log_likelihoods(prior, codes[compared.to(codes.device)]), self.spread(labels.cpu())[compared]
        )
        best = torch.stack([group.argmax() for group in scores.split(counts.tolist())])
        return codes[(counts.cumsum(0) - counts + best).to(codes.device)]

    def _start_of(self, image: int) -> int:
        """Return floor(image / share), of the decimal number that the share was written as: floats would round."""
        return int(image // Fraction(repr(float(self.keep_best))))


def label_log_odds(log_likelihoods: Tensor, labels: Tensor) -> Tensor:
    """Return ln(p / (1 - p)) [N] of p = p(label | codes), from ln p(codes | label) [N,C] and labels [N].

    It rises with p, also where p rounds to 1, as that of most large grids does.
    """
    own = log_likelihoods.gather(1, labels[:, None])
    others = log_likelihoods.scatter(1, labels[:, None], -torch.inf)
    return own[:, 0] - others.logsumexp(dim=1)
