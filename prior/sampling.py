"""Drawing grids of codes from a prior, position by position in raster order, at the cost of one forward pass.

Each sample has a random number of its own for each position, so a sample depends on the generator's state and on its
own index alone: not on how many are drawn with it, nor on how they are cut into parts that fit memory. Choosing a code
from logits is one pure function (`choose_codes`), the distribution it chooses from another (`code_probabilities`), and
the loop over the positions a third.

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
MOST_ACTIVATIONS = 2**28  # kept at a time, 1 GB in float32; more samples are drawn in parts


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
    first: int = 0,
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
        known: [n,H,W] codes to keep, -1 where the prior is to draw. A kept code acts on what comes after it alone;
            `complete_codes` also listens to those that come later.
        generator: the source of randomness, a CPU generator; torch's own by default.
        first: the index of the first sample: with generators in one state, drawing 8 and drawing 4, then 4 with
            `first=4`, give the same grids.
        on_row: called after each row with the number of finished rows, of H; if many samples are drawn in parts, the
            mean over all samples, rounded down.

    Raises:
        ValueError: an argument out of its range, or labels or `known` that do not fit.
    """
    check_grids(num_samples, grid)
    check_choice(temperature, top_k, top_p)
    prior.check_labels(labels, num_samples)
    device, height = next(prior.parameters()).device, grid[0]
    codes = start_codes(prior, num_samples, grid, known)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    at_once = most_at_once(prior, grid[1])
    with evaluating(prior), torch.inference_mode():
        for start in range(0, num_samples, at_once):
            part = codes[start : start + at_once]
            numbers = sample_numbers(seed + first + start, len(part), grid)
            some = None if labels is None else labels[start : start + at_once].to(device)
            rows = _draw(prior, part.to(device), numbers, some, temperature, top_k, top_p)
            for row, drawn in enumerate(rows):
                part[:, row] = drawn.cpu()
                if on_row is not None:
                    on_row((start * height + (row + 1) * len(part)) // num_samples)
    return codes.to(device)


def _draw(
    prior: GatedPixelCNN,
    codes: Tensor,
    numbers: Tensor,
    labels: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Iterator[Tensor]:
    """Draw the unknown ones of codes [n,H,W] in place; yields each row [n,W] when it is finished."""
    count, height, width = codes.shape
    chooser = torch.device("cpu") if codes.device.type == "mps" else codes.device  # which has no float64
    luck = numbers.to(chooser).unbind(dim=0)
    unknown = codes == UNKNOWN
    to_draw, to_keep = unknown.any(dim=0).tolist(), (~unknown).any(dim=0).tolist()
    network = IncrementalPrior(prior, count, width, labels)
    for row in range(height):
        network.start_row()
        for column in range(width):
            features = network.features(column)
            if to_draw[row][column]:
                logits = network.logits(features).to(chooser)
                number = luck[row * width + column]
                drawn = choose_codes(logits, number, temperature=temperature, top_k=top_k, top_p=top_p)
                drawn = drawn.to(codes.device)
                if to_keep[row][column]:
                    drawn = torch.where(unknown[:, row, column], drawn, codes[:, row, column])
                codes[:, row, column] = drawn
            else:
                drawn = codes[:, row, column]
            network.put(column, drawn)
        yield codes[:, row]


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
    ends = code_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p).cumsum(dim=1)
    below_1 = numbers.clamp_max(1 - 2**-52)  # whose product with the total cannot round up to it
    return torch.searchsorted(ends, (below_1 * ends[:, -1])[:, None], right=True).squeeze(1)


def code_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution [n,K] float64 that is drawn from: temperature, then top-k, then top-p of what is left [1]."""
    if temperature != 1:  # in float64 and from the largest logit: no temperature, however small, overflows
        logits = logits.double()
        logits = (logits - logits.amax(dim=1, keepdim=True)) / temperature
    probabilities = logits.softmax(dim=1).double()
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


def sample_numbers(seed: int, num_samples: int, grid: tuple[int, int]) -> Tensor:
    """One number in [0,1) for each position of each sample, [H W,n] float64; sample i has the stream of seed + i."""
    stream = torch.Generator()
    rows = [
        torch.rand(grid[0] * grid[1], dtype=torch.float64, generator=stream.manual_seed(seed + i))
        for i in range(num_samples)
    ]
    return torch.stack(rows, dim=1)


def most_at_once(prior: GatedPixelCNN, width: int) -> int:
    """How many grids of this width can be drawn at a time: those whose activations are MOST_ACTIVATIONS."""
    config = prior.config
    patch = (config.kernel_size // 2 + 1) * config.kernel_size  # of the vertical stack's input, that each layer keeps
    for_each = config.num_layers * width * config.channels * (2 + 1 + patch)
    return max(1, MOST_ACTIVATIONS // for_each)


def check_grids(num_samples: int, grid: tuple[int, int]) -> None:
    """Raise ValueError unless there is at least 1 sample, and 1 row and column."""
    if num_samples < 1 or min(grid) < 1:
        found = f"{num_samples} of {grid[0]}x{grid[1]}"
        raise ValueError(f"expected at least 1 sample and a grid of at least 1x1, got {found}")


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


def start_codes(prior: GatedPixelCNN, num_samples: int, grid: tuple[int, int], known: Tensor | None) -> Tensor:
    """Codes [n,H,W] on the CPU, a copy of `known` or all UNKNOWN. Raises ValueError if `known` does not fit."""
    if known is None:
        return torch.full((num_samples, *grid), UNKNOWN)
    if known.shape != (num_samples, *grid):
        raise ValueError(f"known: expected the shape {[num_samples, *grid]}, got {list(known.shape)}")
    num_codes = prior.config.num_codes
    if int(known.min()) < UNKNOWN or int(known.max()) >= num_codes:
        found = f"{int(known.min())} to {int(known.max())}"
        raise ValueError(f"known: expected codes from 0 to {num_codes - 1}, or -1, got {found}")
    return known.to("cpu", torch.int64, copy=True)
