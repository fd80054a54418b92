"""Slow, obvious counterparts of what the package does fast, and the small priors the tests ask about.

Legend: B batch, H W grid, K codes, C channels; a position is its number in raster order, row * W + column.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prior import GatedPixelCNN, PriorConfig, raster
from prior.incremental import IncrementalPrior
from prior.objective import grid_bits
from prior.uniforms import draw_seed, draw_uniforms

Grid = tuple[int, int]


def tiny_prior(*, seed: int = 0, **fields: Any) -> GatedPixelCNN:
    """A float64 prior in eval mode whose logits move by 1 or more with the codes before them: a fresh one's stay."""
    generator = torch.Generator().manual_seed(seed)
    small = {"num_codes": 5, "channels": 4, "num_layers": 3, "first_kernel_size": 5, "output_channels": 16}
    prior = GatedPixelCNN(PriorConfig(**{**small, **fields})).double().eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim == 4 else 1
            parameter.normal_(0, 2 / math.sqrt(fan_in) if parameter.ndim > 1 else 0.3, generator=generator)
    return prior


def positive_(prior: GatedPixelCNN, *, seed: int = 0) -> GatedPixelCNN:
    """Parameters above 0, about 1 / fan-in: with a positive input every path from input to output adds to the gradient,
    so a gradient of 0 means that there is no path, and nothing cancels by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim == 4 else 2
            parameter.uniform_(0.5, 1.5, generator=generator).div_(fan_in)
    return prior


class Given(nn.Module):
    """Stands in for the embedding of a prior: answers with `vectors` [B,H,W,C], a leaf to differentiate by."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self, codes: Tensor) -> Tensor:
        return self.vectors


def sizes_of_networks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list that the number of grids of each network is added to, from here on."""
    sizes: list[int] = []
    network = raster.IncrementalPrior

    def spy(prior: GatedPixelCNN, num_samples: int, *more: Any, **named: Any) -> IncrementalPrior:
        sizes.append(num_samples)
        return network(prior, num_samples, *more, **named)

    monkeypatch.setattr(raster, "IncrementalPrior", spy)
    return sizes


def reach(config: PriorConfig, grid: Grid) -> Tensor:
    """[H*W,H*W] bool: does output position `o` see input position `p`? Sets pushed through the kernels as drawn in [1].

    first layer           later layers          with radius r: 2r+1 columns wide
    v v v v v             . . . . .
    v v v v v             . v v v .             H' = horizontal kernel over H, and V' of the same position,
    h h o . .             . v v v .                  and (not in the first layer) H itself
                          . h o . .             V' = vertical kernel over V
    """
    height, width = grid
    vertical = horizontal = {(i, j): {(i, j)} for i in range(height) for j in range(width)}
    for index in range(config.num_layers):
        first = index == 0
        radius = (config.first_kernel_size if first else config.kernel_size) // 2
        rows, left = range(-radius, 0 if first else 1), range(-radius, 0 if first else 1)
        above = {
            (i, j): set().union(*(vertical.get((i + r, j + c), ()) for r in rows for c in range(-radius, radius + 1)))
            for i, j in vertical
        }
        horizontal = {
            (i, j): above[i, j].union(
                *(horizontal.get((i, j + c), ()) for c in left), () if first else horizontal[i, j]
            )
            for i, j in horizontal
        }
        if config.attends(index):  # each position then knows all codes before it
            order = [(i, j) for i in range(height) for j in range(width)]
            horizontal = {o: set(order[:number]) for number, o in enumerate(order)}
        vertical = above
    seen = torch.zeros(height * width, height * width, dtype=torch.bool)
    for (i, j), past in horizontal.items():
        for a, b in past:
            seen[i * width + j, a * width + b] = True
    return seen


def past(grid: Grid) -> Tensor:
    """[H*W,H*W] bool: all that output position `o` may see, the positions before it in raster order."""
    positions = torch.arange(math.prod(grid))
    return positions[None, :] < positions[:, None]


def probabilities_slowly(
    logits: Sequence[float], *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> list[float]:
    """What one position draws from: temperature, then top-k, then top-p, one plain step after the other."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    ranked = sorted(range(len(weights)), key=lambda code: -weights[code])[:top_k]
    total = sum(weights[code] for code in ranked)
    kept, mass = [], 0.0
    for code in ranked:
        if not kept or mass < (1 if top_p is None else top_p):
            kept.append(code)
            mass += weights[code] / total
    total = sum(weights[code] for code in kept)
    return [weights[code] / total if code in kept else 0.0 for code in range(len(weights))]


def choose_slowly(logits: Sequence[float], number: float, *, temperature: float = 1.0, **cut: Any) -> int:
    """The first code whose share, laid end to end after those before it, passes `number`."""
    if temperature == 0:
        return max(range(len(logits)), key=lambda code: logits[code])
    shares = probabilities_slowly(logits, temperature=temperature, **cut)
    possible = [code for code, share in enumerate(shares) if share > 0]
    return next((code for code, end in enumerate(accumulate(shares)) if end > number), possible[-1])


def logits_slowly(prior: GatedPixelCNN, codes: Tensor, labels: Tensor | None, guidance: float = 1.0) -> Tensor:
    """[B,K,H,W]: u + s (c - u), c with the labels and u without, each by a forward pass of its own."""
    conditional = prior(codes, labels)
    if guidance == 1:
        return conditional
    unconditional = prior(codes, torch.full((len(codes),), -1))
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def sample_slowly(
    prior: GatedPixelCNN,
    num_samples: int,
    grid: Grid,
    *,
    labels: Tensor | None = None,
    known: Tensor | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    **choice: Any,
) -> Tensor:
    """`sample_codes` with the whole network run on the whole grid at every position, and nothing remembered."""
    numbers = stream_of(seed, num_samples, grid)
    unknown = torch.full((num_samples, *grid), -1) if known is None else known
    codes = torch.zeros(num_samples, *grid, dtype=torch.long)
    for row in range(grid[0]):
        for column in range(grid[1]):
            logits = logits_slowly(prior, codes, labels, guidance)
            for sample in range(num_samples):
                code = int(unknown[sample, row, column])
                if code == -1:
                    number = float(numbers[sample, row, column])
                    code = choose_slowly(logits[sample, :, row, column].tolist(), number, **choice)
                codes[sample, row, column] = code
    return codes


@torch.no_grad()
def all_grids(
    prior: GatedPixelCNN, grid: Grid, labels: Tensor | None = None, guidance: float = 1.0
) -> tuple[Tensor, list[float]]:
    """Every grid there is, in the order of its codes, and the probability of each."""
    num_codes = prior.config.num_codes
    everything = torch.tensor(list(product(range(num_codes), repeat=math.prod(grid)))).view(-1, *grid)
    labels = None if labels is None else labels.expand(len(everything))
    logits = logits_slowly(prior, everything, labels, guidance)
    return everything, torch.exp2(-grid_bits(logits, everything)).tolist()


def count(drawn: Tensor, num_codes: int) -> list[int]:
    """How often each grid was drawn, in the order of `all_grids`."""
    places = num_codes ** torch.arange(drawn[0].numel() - 1, -1, -1)
    numbers = (drawn.flatten(1) * places).sum(dim=1)
    return torch.bincount(numbers, minlength=num_codes ** len(places)).tolist()


def chi_square_tail(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """How probable counts this far from `probabilities`, or further, are: the tail of chi-square.

    For an even number of degrees of freedom d it is closed: exp(-x/2) * sum of (x/2)^i / i! for i < d/2.
    """
    degrees = len(counts) - 1
    assert degrees % 2 == 0
    assert len(counts) == len(probabilities)
    total = sum(counts)
    x = sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, probabilities, strict=True))
    return math.exp(-x / 2) * sum((x / 2) ** i / math.factorial(i) for i in range(degrees // 2))


def tail_of_common_grids(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """`chi_square_tail` with the rarest grids taken together: they are expected 10 times or more, as is each other one.

    Chi-square is no law for what is expected less often. There are as many of them as leave an odd number of cells.
    """
    ranked = sorted(zip(probabilities, counts, strict=True), reverse=True)
    common = [p * sum(counts) >= 10 for p, _ in ranked].count(True)
    while common % 2 or sum(p for p, _ in ranked[common:]) * sum(counts) < 10:
        common -= 1
    assert common >= 2
    rest = ranked[common:]
    cells = [*ranked[:common], (sum(p for p, _ in rest), sum(n for _, n in rest))]
    return chi_square_tail([n for _, n in cells], [p for p, _ in cells])


def stream_of(seed: int, num_samples: int, grid: Grid) -> Tensor:
    """The numbers [n,H,W] that `sample_codes` draws by, given `generator(seed)`."""
    first = draw_seed(generator(seed))
    return draw_uniforms(range(first, first + num_samples), math.prod(grid)).view(num_samples, *grid)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
