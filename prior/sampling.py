"""Drawing grids of codes from a prior, position by position in raster order, at the cost of one forward pass.

Each sample has a random number of its own for each position, so a sample depends on the generator's state and on its
own index alone: not on how many are drawn with it. Choosing a code from logits is one pure function (`choose_codes`),
the distribution it chooses from another (`code_probabilities`), and the loop over the positions a third.

Legend: n samples, H W grid, K codes.

[1] Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv:1904.09751 (top-p)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .incremental import IncrementalPrior
from .model import GatedPixelCNN

UNKNOWN = -1  # in `known`: a position that the prior is to draw


@torch.no_grad()
def sample_codes(
    prior: GatedPixelCNN,
    num_samples: int,
    grid: tuple[int, int],
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_row: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw codes [n,H,W] int64, on the prior's device.

    Args:
        prior: drawn from in `eval()` mode, whatever mode it is in; that mode is restored.
        num_samples: n, at least 1.
        grid: (H, W).
        labels: [n], for a prior with classes.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes of each position.
        top_p: keep the fewest most likely codes that hold this much probability together; in (0, 1].
        known: [n,H,W] codes to keep, -1 where the prior is to draw.
        generator: the source of randomness, a CPU generator; torch's own by default.
        on_row: called with the number of finished rows after each.

    Raises:
        ValueError: an argument out of its range, or labels or `known` that do not fit.
    """
    height, width = grid
    if num_samples < 1 or height < 1 or width < 1:
        raise ValueError(
            f"expected at least 1 sample and a grid of at least 1x1, got {num_samples} of {height}x{width}"
        )
    check_choice(temperature, top_k, top_p)
    prior.check_labels(labels, num_samples)
    device = next(prior.parameters()).device
    labels = None if labels is None else labels.to(device)
    codes = _start(prior, num_samples, grid, known)
    to_draw = (codes == UNKNOWN).any(dim=0).tolist()
    chooser = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    numbers = sample_numbers(num_samples, grid, generator).to(chooser)
    codes = codes.to(device)
    with evaluating(prior):
        network = IncrementalPrior(prior, num_samples, width, labels)
        for row in range(height):
            network.start_row()
            for column in range(width):
                features = network.features(column)
                if to_draw[row][column]:
                    logits, number = network.logits(features).to(chooser), numbers[:, row, column]
                    drawn = choose_codes(logits, number, temperature=temperature, top_k=top_k, top_p=top_p)
                    kept = codes[:, row, column]
                    codes[:, row, column] = torch.where(kept == UNKNOWN, drawn.to(device), kept)
                network.put(column, codes[:, row, column])
            if on_row is not None:
                on_row(row + 1)
    return codes


def choose_codes(
    logits: Tensor,
    numbers: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The code [n] that `numbers` [n] in [0,1) fall on, the probabilities of `logits` [n,K] laid end to end."""
    if temperature == 0:
        return logits.argmax(dim=1)
    probabilities = code_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    ends = probabilities.cumsum(dim=1)
    targets = numbers.to(ends.dtype)[:, None] * ends[:, -1:]
    chosen = torch.searchsorted(ends, targets, right=True).squeeze(1)
    last_possible = probabilities.shape[1] - 1 - (probabilities.flip(1) > 0).int().argmax(dim=1)
    return torch.minimum(chosen, last_possible)


def code_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution [n,K] float64 that is drawn from: temperature, then top-k, then top-p of what is left [1]."""
    below_best = logits.double() - logits.double().amax(dim=1, keepdim=True)
    probabilities = (below_best / temperature).softmax(dim=1)
    if top_k is None and top_p is None:
        return probabilities
    ordered, order = probabilities.sort(dim=1, descending=True, stable=True)  # of equals, the lowest code first
    if top_k is not None:
        ordered[:, top_k:] = 0
    if top_p is not None:
        before = ordered.cumsum(dim=1) - ordered  # the first is always kept: nothing stands before it
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(dim=1, keepdim=True), 0)
    ordered = ordered / ordered.sum(dim=1, keepdim=True)
    return torch.zeros_like(ordered).scatter_(1, order, ordered)


def sample_numbers(num_samples: int, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """One number in [0,1) for each position of each sample, [n,H,W] float64; sample i has its own stream."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    stream = torch.Generator()
    rows = [torch.rand(grid, dtype=torch.float64, generator=stream.manual_seed(seed + i)) for i in range(num_samples)]
    return torch.stack(rows)


def check_choice(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless temperature >= 0, top_k >= 1 and 0 < top_p <= 1."""
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected above 0 and at most 1, got {top_p}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in `eval()` mode for the duration, then in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _start(prior: GatedPixelCNN, num_samples: int, grid: tuple[int, int], known: Tensor | None) -> Tensor:
    if known is None:
        return torch.full((num_samples, *grid), UNKNOWN)
    if known.shape != (num_samples, *grid):
        raise ValueError(f"known: expected the shape {[num_samples, *grid]}, got {list(known.shape)}")
    num_codes = prior.config.num_codes
    if int(known.min()) < UNKNOWN or int(known.max()) >= num_codes:
        found = f"{int(known.min())} to {int(known.max())}"
        raise ValueError(f"known: expected codes from 0 to {num_codes - 1}, or -1, got {found}")
    return known.long().clone()
