"""Latents for a VAE to decode: of N(0,1), or of a Gaussian mixture fitted to the latents of the training images.

The first is the prior that the VAE was trained with. The second is the stronger baseline: the best prior for a trained
VAE is the aggregated posterior, the mean of q(z|x) over the images [1, eq. 5], and a mixture fitted to it after the
training draws better images than N(0,1) [2]. As the prior over codes is told the class, it is one mixture per class.

    latents = latents_of(model, images.train)
    drawn, labels = draw_mixture(fit_mixture(latents, components=10, seed=0), n=2000, seed=0)
    images = decode_latents(model, drawn)

Needs scikit-learn, which codegrid itself does not.

Legend: N images, n draws, L = D H W numbers of a latent grid, M mixture components, r main directions.

[1] Tomczak and Welling 2018, VAE with a VampPrior, arXiv:1705.07120
[2] Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4 (ex-post density)
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import InputError
from pipeline.images.image_set import ImageSplit
from pipeline.images.preprocessing import to_uint8
from pipeline.models.inference import in_blocks
from tokenizer import Baseline

MOST_DIRECTIONS = 100  # that have a mixture: the principal ones of the posterior means
SMALLEST_DEVIATION = 0.2  # of the means along such a direction; below, the posterior of any image is nearly N(0,1)
SMALLEST_VARIANCE = (
    0.1  # added to each direction of a component, where that of N(0,1) is 1; better on held-out rows than less
)
ITERATIONS, TOLERANCE = 20, 1e-2  # of expectation maximisation; nats per row


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latents of images, to fit a density to."""

    samples: np.ndarray  # float32 [N,L], one draw of the posterior of each image
    means: np.ndarray  # float32 [N,L], of the posteriors
    labels: np.ndarray  # int64 [N]; -1 where there is none
    shape: tuple[int, int, int]  # D, H, W


@dataclass(frozen=True, kw_only=True)
class ClassMixture:
    """The density of the latents of one class, in the rotated space of a `LatentMixture`."""

    weights: np.ndarray  # [M], sum 1
    means: np.ndarray  # [M,r]
    factors: np.ndarray  # [M,r,r], lower triangular: covariance = factor @ factor.T
    other_mean: np.ndarray  # [L-r], of the directions that are no main ones, each an independent Gaussian
    other_deviation: np.ndarray  # [L-r]

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        """Return rotated latents [n,L]."""
        component = random.choice(len(self.weights), size=n, p=self.weights)
        noise = random.standard_normal((n, self.means.shape[1]))
        main = self.means[component]
        for m in np.unique(component):
            main[component == m] += noise[component == m] @ self.factors[m].T
        other = self.other_mean + self.other_deviation * random.standard_normal((n, len(self.other_mean)))
        return np.concatenate([main, other], axis=1)


@dataclass(frozen=True, kw_only=True)
class LatentMixture:
    """A mixture for each class, in a space with the main directions of the posterior means first."""

    classes: dict[int, ClassMixture]  # by label; -1 alone where there are no labels
    centre: np.ndarray  # [L]
    directions: np.ndarray  # [L,L], orthonormal columns
    shape: tuple[int, int, int]  # D, H, W


def latents_of(model: Baseline, split: ImageSplit, *, seed: int = 0) -> Latents:
    """Return the latents of the images of a split: one posterior sample each, and the means.

    A density whose draws are to be decoded is fitted to the samples, not to the means: they are what the decoder was
    trained on, and what the aggregated posterior is made of. The density of the means is narrower, and has no width at
    all in a direction that the model does not use.

    Raises:
        ValueError: the model is no VAE.
    """
    if model.config.bottleneck != "vae":
        raise ValueError(f"latents_of: expected a model with the bottleneck 'vae', got {model.config.bottleneck!r}")
    outputs = in_blocks(model, model.encoder, lambda start, stop: split.batch(np.arange(start, stop)), len(split))
    generator, samples, means = torch.Generator().manual_seed(seed), [], []
    for output in outputs:  # [B,2D,H,W]
        mean, log_variance = output.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator)
        means.append(mean)
        samples.append(mean + (0.5 * log_variance).exp() * noise)
    depth, height, width = means[0].shape[1:]
    return Latents(
        samples=torch.cat(samples).flatten(1).numpy(),
        means=torch.cat(means).flatten(1).numpy(),
        labels=np.asarray(split.labels),
        shape=(depth, height, width),
    )


def draw_standard_normal(n: int, shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Return latents float32 [n,D,H,W] of N(0,1), and their labels int64 [n], all -1: they are of no class."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)), torch.full((n,), -1)


def fit_mixture(latents: Latents, components: int, seed: int) -> LatentMixture:
    """Fit a Gaussian mixture of `components` with full covariances to the latents of each class.

    In the principal directions of the posterior means that the model uses, at most MOST_DIRECTIONS; in all others each
    class has an independent Gaussian per direction. Over all directions a component has more parameters than rows: it
    is worse on held-out ones.

    Raises:
        InputError: scikit-learn is not installed.
        ValueError: a class has fewer rows than components, or fewer than 2.
    """
    labels, rows = np.unique(latents.labels, return_counts=True)
    if rows.min() < max(components, 2):
        raise ValueError(f"fit_mixture: expected at least {max(components, 2)} rows of a class, got {rows.min()}")
    centre = latents.means.mean(axis=0, dtype=np.float64)
    covariance = np.cov(latents.means, rowvar=False, dtype=np.float64)
    variances, directions = np.linalg.eigh(np.atleast_2d(covariance))
    directions = directions[:, ::-1]  # eigh gives the smallest first
    main = int(np.clip((variances > SMALLEST_DEVIATION**2).sum(), 1, MOST_DIRECTIONS))
    fitted = {}
    for label in tqdm(labels.tolist(), desc="fitting mixtures", unit="class", leave=False):
        rotated = (latents.samples[latents.labels == label] - centre) @ directions  # [rows,L]
        fitted[label] = _fit_class(rotated, main, components, seed)
    return LatentMixture(classes=fitted, centre=centre, directions=directions, shape=latents.shape)


def draw_mixture(mixture: LatentMixture, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return latents float32 [n,D,H,W] of the mixtures, and their labels int64 [n], the classes in turn."""
    random, known = np.random.default_rng(seed), np.array(sorted(mixture.classes))
    labels = known[np.arange(n) % len(known)]
    rotated = np.empty((n, len(mixture.centre)))
    for label in known:
        chosen = labels == label
        rotated[chosen] = mixture.classes[int(label)].draw(int(chosen.sum()), random)
    latents = rotated @ mixture.directions.T + mixture.centre
    return torch.from_numpy(latents.astype(np.float32)).reshape(n, *mixture.shape), torch.from_numpy(labels)


def decode_latents(model: Baseline, latents: Tensor) -> Tensor:
    """Return the images uint8 [n,C,H',W'] of latents [n,D,H,W]."""
    return torch.cat(
        list(in_blocks(model, lambda z: to_uint8(model.decode(z)), lambda i, j: latents[i:j], len(latents)))
    )


def _fit_class(rotated: np.ndarray, directions: int, components: int, seed: int) -> ClassMixture:
    """Fit the density of the rotated latents [rows,L] of one class, the first `directions` of which have a mixture."""
    main, other = np.split(rotated, [directions], axis=1)
    mixture = _gaussian_mixture()(
        components,
        covariance_type="full",
        reg_covar=SMALLEST_VARIANCE,
        max_iter=ITERATIONS,
        tol=TOLERANCE,
        random_state=seed,
    ).fit(main)
    return ClassMixture(
        weights=mixture.weights_ / mixture.weights_.sum(),
        means=mixture.means_,
        factors=np.linalg.cholesky(mixture.covariances_),
        other_mean=other.mean(axis=0),
        other_deviation=other.std(axis=0),
    )


def _gaussian_mixture() -> type:
    """Return scikit-learn's class. Raise InputError if it is not installed."""
    try:
        from sklearn.mixture import GaussianMixture  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise InputError(
            expected="scikit-learn, for the mixture of this benchmark", got="none", do="pip install scikit-learn"
        ) from None
    return GaussianMixture  # type: ignore[no-any-return,unused-ignore]
