"""Slow counterparts of completion: conditional distributions by enumeration, and a particle filter in plain steps.

Legend: m particles of a grid, H W grid, K codes.
"""

import math
import random
from bisect import bisect_right
from functools import reduce
from itertools import accumulate, chain, product

import torch
from torch import Tensor

from prior import GatedPixelCNN

from .oracles import Grid, all_grids, count, logits_slowly


def marked(grid: Grid, marks: dict[tuple[int, int], int]) -> Tensor:
    known = torch.full(grid, -1)
    for place, code in marks.items():
        known[place] = code
    return known


def conditional(
    prior: GatedPixelCNN, known: Tensor, label: Tensor | None = None, guidance: float = 1.0
) -> tuple[Tensor, float]:
    """p_s(grid | known) of every grid there is, and p_s(known), under the guidance s."""
    grid = (known.shape[0], known.shape[1])
    everything, joint = all_grids(prior, grid, label, guidance)
    fits = ((everything == known) | (known == -1)).flatten(1).all(dim=1)
    share = torch.tensor(joint, dtype=torch.float64) * fits
    return share / share.sum(), float(share.sum())


def distance(drawn: Tensor, share: Tensor) -> float:
    """Total variation between what was drawn and what should be: 0 the same, 1 nothing in common."""
    counts = torch.tensor(count(drawn, 3), dtype=torch.float64)
    return float((counts / counts.sum() - share).abs().sum() / 2)


@torch.no_grad()
def law_of_the_filter(
    prior: GatedPixelCNN, known: Tensor, num_particles: int, label: Tensor | None = None, guidance: float = 1.0
) -> Tensor:
    """The probability of every grid when, of m grids drawn independently, one is chosen by its weight, by enumeration.

    It holds where nothing is weighed after a resampling, for systematic resampling alone changes no probability. A
    weight is the probability of the known codes given what is before them.
    """
    grid = (known.shape[0], known.shape[1])
    everything, joint = all_grids(prior, grid, label, guidance)
    fits = ((everything == known) | (known == -1)).flatten(1).all(dim=1)
    logits = logits_slowly(prior, everything, None if label is None else label.expand(len(everything)), guidance)
    each = logits.log_softmax(dim=1).gather(1, everything[:, None])[:, 0]  # log p of each code
    weights = torch.where(known == -1, 0.0, each).flatten(1).sum(dim=1).exp()
    drawn = torch.where(known == -1, each, 0.0).flatten(1).sum(dim=1).exp() * fits
    law = torch.zeros(len(joint), dtype=torch.float64)
    possible = torch.nonzero(fits)[:, 0].tolist()
    for particles in product(possible, repeat=num_particles):
        chance, total = drawn[list(particles)].prod(), weights[list(particles)].sum()
        for particle in particles:
            law[particle] += chance * weights[particle] / total
    return law


@torch.no_grad()
def code_shares(
    prior: GatedPixelCNN, grid: Grid, label: int | None = None, guidance: float = 1.0
) -> list[list[list[list[float]]]]:
    """The probabilities [K] of each position [H,W] of every grid there is, in the order of `all_grids`."""
    everything, _ = all_grids(prior, grid, None if label is None else torch.tensor(label))
    labels = None if label is None else torch.full((len(everything),), label)
    logits = logits_slowly(prior, everything, labels, guidance)
    return logits.double().softmax(dim=1).permute(0, 2, 3, 1).tolist()


def filtered_slowly(
    shares_of: list[list[list[list[float]]]], known: Tensor, num_particles: int, random: random.Random
) -> list[list[int]]:
    """One completion by a particle filter in plain steps, with random numbers of its own, by `code_shares`."""
    height, width = known.shape
    particles, weights = [known.clamp_min(0).tolist() for _ in range(num_particles)], [1.0] * num_particles
    for row in range(height):
        shares = [weight / sum(weights) for weight in weights]
        if row > 0 and 1 / sum(share**2 for share in shares) < num_particles / 2:
            places, offset = list(accumulate(shares)), random.random()
            chosen = [bisect_right(places, (i + offset) / num_particles) for i in range(num_particles)]
            particles = [[list(codes) for codes in particles[min(i, num_particles - 1)]] for i in chosen]
            weights = [1.0] * num_particles
        for column in range(width):
            for i, particle in enumerate(particles):
                shares, code = shares_of[number_of(particle, 3)][row][column], int(known[row, column])
                if code == -1:
                    particle[row][column] = random.choices(range(len(shares)), shares)[0]
                else:
                    weights[i] *= shares[code]
    return random.choices(particles, weights)[0]


def number_of(grid: list[list[int]], num_codes: int) -> int:
    """The place of a grid in the order of `all_grids`."""
    return reduce(lambda number, code: number * num_codes + code, chain(*grid), 0)


def two_sample_tail(one: list[int], other: list[int]) -> float:
    """How probable it is that two samples of one law differ this much or more: the tail of chi-square, 8 degrees."""
    assert len(one) == len(other) == 9
    a, b = sum(one), sum(other)
    x = sum((i * (b / a) ** 0.5 - j * (a / b) ** 0.5) ** 2 / (i + j) for i, j in zip(one, other, strict=True) if i + j)
    return math.exp(-x / 2) * sum((x / 2) ** i / math.factorial(i) for i in range(4))
