"""Sampling grids of codes from a prior, position by position in raster order, at the cost of one forward pass.

A sample depends on the generator's state and on its own index alone (`uniforms.py`): not on how many are drawn with
it, nor on how they are divided into batches that fit memory. Choosing a code from logits is one pure function
(`choosing.py`), the loop over the positions another (`raster.py`).

Legend: n samples, H W grid, K codes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from .choosing import SamplingParameters
from .model import GatedPixelCNN
from .raster import UNKNOWN, Raster
from .uniforms import draw_seed, draw_uniforms

MOST_ACTIVATIONS = 2**28  # kept at a time, 1 GB in float32; more samples are drawn in batches


def sample_codes(
    prior: GatedPixelCNN,
    num_samples: int,
    grid: tuple[int, int],
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    precision: str = "fp32",
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
    first: int = 0,
    on_row: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw codes [n,H,W] int64, on the prior's device.

    Args:
        prior: used in `eval()` mode, whatever mode it is in; that mode is restored.
        num_samples: n, at least 1.
        grid: (H, W).
        labels: [n], for a prior with classes.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes of each position.
        top_p: keep the fewest most likely codes that hold this much probability together; in (0, 1].
        guidance: s, 0 or more: logits u + s (c - u), of c with the label and u without, before temperature and the cuts
            (`guided_logits`). 1 is the prior as it is, 0 ignores the labels; any other costs about twice as much. Only
            1 is possible for a prior that was trained without label dropout.
        precision: fp32, or bf16, which is faster for many samples where the processor multiplies in bfloat16. It draws
            other samples from nearly the same distribution: a code's probabilities move by .001 in the mean (total
            variation, benchmarks/README.md).
        known: [n,H,W] codes to keep, -1 where the prior is to draw. Only what comes after a known code in raster order
            is conditioned on it; `complete_codes` conditions what comes before it too.
        generator: the source of randomness, a CPU generator; torch's own by default.
        first: the index of the first sample: with generators in one state, drawing 8 and drawing 4, then 4 with
            `first=4`, give the same grids.
        on_row: called after each row with the number of finished rows, of H; if many samples are drawn in batches, the
            mean over all samples, rounded down.

    Raises:
        ValueError: an argument out of its range, or labels or `known` that do not fit.
    """
    parameters = SamplingParameters(
        temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, precision=precision
    )
    check_grids(num_samples, grid)
    prior.check_labels(labels, num_samples)
    check_guidance(prior, guidance)
    codes = start_codes(prior, num_samples, grid, known)
    seed = draw_seed(generator) + first

    def begin(batch: Tensor) -> Raster:
        uniforms = draw_uniforms((seed + batch).tolist(), math.prod(grid))
        return Raster(prior, codes[batch], uniforms, None if labels is None else labels[batch], parameters)

    labels = None if labels is None else labels.cpu()
    with evaluating(prior), torch.inference_mode():
        at_once = max(1, most_at_once(prior, grid) // parameters.predictions)
        draw_in_batches(begin, codes, torch.arange(num_samples), at_once, FinishedRows(codes, on_row))
    return codes.to(next(prior.parameters()).device)


class Drawing(Protocol):
    """Grids that are being drawn: a `Raster`, or the particles of a filter."""

    def draw_row(self, row: int) -> None:
        """Draw the next row."""

    def result(self) -> Tensor:
        """Return the finished codes [n,H,W]."""


class FinishedRows:
    """Tells `on_row` how many rows are finished in the mean over all grids of codes [n,H,W]."""

    def __init__(self, codes: Tensor, on_row: Callable[[int], None] | None) -> None:
        self.num_grids, self.on_row, self.finished = len(codes), on_row, 0

    def add(self, count: int) -> None:
        """Count one more row of `count` grids."""
        self.finished += count
        if self.on_row is not None:
            self.on_row(self.finished // self.num_grids)


def draw_in_batches(
    begin: Callable[[Tensor], Drawing], codes: Tensor, chosen: Tensor, at_once: int, finished_rows: FinishedRows
) -> None:
    """Draw the grids at indices `chosen` of codes [n,H,W] in place, `at_once` at a time.

    Args:
        begin: starts a batch, given its indices.
        codes: on the CPU.
        chosen: indices, on the CPU; there may be none.
        at_once: grids in a batch.
        finished_rows: is told of every row.
    """
    for start in range(0, len(chosen), at_once):
        batch = chosen[start : start + at_once]
        drawing = begin(batch)
        for row in range(codes.shape[1]):
            drawing.draw_row(row)
            finished_rows.add(len(batch))
        codes[batch] = drawing.result().cpu()


def most_at_once(prior: GatedPixelCNN, grid: tuple[int, int]) -> int:
    """Return how many grids (H, W) the network can run over at a time, for MOST_ACTIVATIONS in all."""
    config, (height, width) = prior.config, grid
    rows = config.kernel_size // 2 + 1  # of the vertical stack's input, that each layer keeps
    for_each = config.num_layers * width * config.channels * (2 + rows)
    if config.num_attending:  # keys and values of all positions, of one layer twice while a row is added
        for_each += (config.num_attending + 1) * height * width * 2 * config.channels
    return max(1, MOST_ACTIVATIONS // for_each)


def check_grids(num_samples: int, grid: tuple[int, int]) -> None:
    """Raise ValueError unless there is at least 1 sample, and 1 row and column."""
    if num_samples < 1 or min(grid) < 1:
        found = f"{num_samples} of {grid[0]}x{grid[1]}"
        raise ValueError(f"expected at least 1 sample and a grid of at least 1x1, got {found}")


def check_guidance(prior: GatedPixelCNN, guidance: float) -> None:
    """Raise ValueError unless the prior can follow this guidance."""
    if guidance != 1 and prior.config.label_dropout == 0:
        raise ValueError(f"guidance: expected 1, for this prior was trained without label dropout, got {guidance}")


def start_codes(prior: GatedPixelCNN, num_samples: int, grid: tuple[int, int], known: Tensor | None) -> Tensor:
    """Return codes [n,H,W] on the CPU, a copy of `known` or all UNKNOWN. Raise ValueError if `known` does not fit."""
    if known is None:
        return torch.full((num_samples, *grid), UNKNOWN)
    if known.shape != (num_samples, *grid):
        raise ValueError(f"known: expected the shape {[num_samples, *grid]}, got {list(known.shape)}")
    num_codes = prior.config.num_codes
    if int(known.min()) < UNKNOWN or int(known.max()) >= num_codes:
        found = f"{int(known.min())} to {int(known.max())}"
        raise ValueError(f"known: expected codes from 0 to {num_codes - 1}, or -1, got {found}")
    return known.to("cpu", torch.int64, copy=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into `eval()` mode for the duration, then back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
