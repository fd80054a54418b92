"""Drawing the rest of grids of which some codes are known.

A PixelCNN draws each code from those before it in raster order. Where all known codes come first (the top of a picture
is kept), keeping them is all there is to do, and exact. A known code that comes later says something about what is
drawn before it, and the prior cannot look ahead; so several candidates are drawn of each grid, each is weighted by
the probability it gave to the known codes it met, and after every row the unlikely ones give way to copies of the
likely (sequential importance resampling [1]). With more candidates the result comes closer to the exact conditional
distribution; with one, later codes are kept but not listened to.

Legend: n grids, m candidates of each, H W grid, K codes.

[1] Doucet and Johansen 2009, A Tutorial on Particle Filtering and Smoothing, section 3.4
"""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor

from .incremental import IncrementalPrior
from .model import GatedPixelCNN
from .sampling import (
    UNKNOWN,
    check_choice,
    check_grids,
    choose_codes,
    evaluating,
    most_at_once,
    sample_numbers,
    start_codes,
)

OTHER, ANOTHER = 1 << 61, 1 << 60  # bits that tell streams of random numbers apart


def complete_codes(
    prior: GatedPixelCNN,
    known: Tensor,
    *,
    candidates: int = 32,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    first: int = 0,
    on_row: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw the unknown codes of grids [n,H,W]: codes int64 [n,H,W], the known ones unchanged.

    Args:
        prior: drawn from in `eval()` mode.
        known: [n,H,W] codes, -1 where the prior is to draw.
        candidates: m, at least 1, of each grid; one is enough, and used, where all known codes come first.
        labels: for a prior with classes: [n], or [n,m] to let the known codes choose among labels too.
        temperature: as in `sample_codes`. The weights are the prior's own probabilities, whatever this is.
        top_k: as in `sample_codes`.
        top_p: as in `sample_codes`.
        generator: the source of randomness, a CPU generator; torch's own by default.
        first: the index of the first grid, as in `sample_codes`.
        on_row: as in `sample_codes`.

    Raises:
        ValueError: an argument out of its range, or labels or `known` that do not fit.
    """
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    if known.ndim != 3:
        raise ValueError(f"known: expected codes [n,H,W], got the shape {list(known.shape)}")
    count, height, width = known.shape
    check_grids(count, (height, width))
    check_choice(temperature, top_k, top_p)
    codes = start_codes(prior, count, (height, width), known)
    several = known_after_unknown(codes)
    if labels is None or labels.ndim == 1:
        prior.check_labels(labels, count)
        each_label = None if labels is None else repeat(labels, "n -> n m", m=candidates)
    else:
        if labels.shape != (count, candidates):
            raise ValueError(f"labels: expected [n] or [n,m] = {[count, candidates]}, got {list(labels.shape)}")
        prior.check_labels(labels.flatten(), labels.numel())
        each_label, several = labels, torch.ones_like(several)

    seed = int(torch.randint(2**62, (1,), generator=generator))
    finished = 0
    for rows, m in ((torch.nonzero(~several)[:, 0], 1), (torch.nonzero(several)[:, 0], candidates)):
        at_once = max(1, most_at_once(prior, width) // m)
        for part in (rows[start : start + at_once] for start in range(0, len(rows), at_once)):
            # One candidate draws what `sample_codes` would; several take other streams, m for each grid.
            streams = [seed + first + row if m == 1 else OTHER ^ (seed + (first + row) * m) for row in part.tolist()]
            some = None if each_label is None else each_label[part.to(each_label.device), :m]
            grids = _Candidates(prior, codes[part], m, some, streams)
            with evaluating(prior), torch.inference_mode():
                for row in range(height):
                    grids.draw_row(row, temperature, top_k, top_p)
                    if on_row is not None:
                        on_row((finished * height + (row + 1) * len(part)) // count)
                chosen = grids.choose()
            codes[part] = chosen.cpu()
            finished += len(part)
    return codes.to(next(prior.parameters()).device)


class _Candidates:
    """m candidates of each of n grids, as they are drawn; the same calls on other grids do not change them."""

    def __init__(
        self, prior: GatedPixelCNN, known: Tensor, candidates: int, labels: Tensor | None, streams: list[int]
    ) -> None:
        count, height, self.width = known.shape
        self.m, device = candidates, next(prior.parameters()).device
        self.chooser = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.codes = repeat(known, "n h w -> (n m) h w", m=candidates).to(device, copy=True)
        self.given = self.codes != UNKNOWN
        self.log_weights = torch.zeros(count, candidates, dtype=torch.float64, device=self.chooser)
        numbers = [sample_numbers(stream, candidates, (height, self.width)) for stream in streams]
        self.numbers = torch.cat(numbers, dim=1).to(self.chooser)
        lucks = [sample_numbers(OTHER ^ ANOTHER ^ stream, 1, (height, 1)) for stream in streams]
        self.luck = torch.cat(lucks, dim=1).to(self.chooser)
        flat = None if labels is None else labels.flatten().to(device)
        with torch.inference_mode():
            self.network = IncrementalPrior(prior, len(self.codes), self.width, flat)

    def draw_row(self, row: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
        """Draw what is unknown of a row; weigh the candidates by what is known of it, and let the likely ones go on."""
        if row > 0 and self.m > 1:
            survivors, self.log_weights = resample(self.log_weights, self.luck[row - 1])
            survivors = survivors.to(self.codes.device)
            self.codes = self.codes[survivors]
            self.network.select(survivors)
        self.network.start_row()
        for column in range(self.width):
            logits = self.network.logits(self.network.features(column)).to(self.chooser)
            number = self.numbers[row * self.width + column]
            drawn = choose_codes(logits, number, temperature=temperature, top_k=top_k, top_p=top_p)
            given, kept = self.given[:, row, column].to(self.chooser), self.codes[:, row, column].to(self.chooser)
            here = torch.where(given, kept, drawn)
            likelihood = logits.double().log_softmax(dim=1).gather(1, here[:, None])[:, 0]
            self.log_weights += rearrange(torch.where(given, likelihood, 0.0), "(n m) -> n m", m=self.m)
            here = here.to(self.codes.device)
            self.codes[:, row, column] = here
            self.network.put(column, here)

    def choose(self) -> Tensor:
        """One of the candidates of each grid, by weight: [n,H,W]."""
        chosen = choose_codes(self.log_weights, self.luck[-1])
        first = torch.arange(len(chosen), device=self.chooser) * self.m
        return self.codes[(first + chosen).to(self.codes.device)]


def known_after_unknown(codes: Tensor) -> Tensor:
    """Which of the grids of codes [n,H,W] have a known code after an unknown one in raster order, [n] bool."""
    unknown = (codes == UNKNOWN).flatten(1).int()
    return (unknown.cummax(dim=1).values > unknown).any(dim=1)


def resample(log_weights: Tensor, luck: Tensor) -> tuple[Tensor, Tensor]:
    """Systematic resampling of candidates [n,m] by their weights, of those grids where these have become uneven.

    Args:
        log_weights: [n,m].
        luck: [n] in [0,1).

    Returns:
        The survivors, [n*m] indices into the candidates of all grids one after another, and the weights they keep.
    """
    count, candidates = log_weights.shape
    weights = log_weights.softmax(dim=1)
    uneven = 1 / weights.square().sum(dim=1, keepdim=True) < candidates / 2  # the effective number of candidates [1]
    steps = torch.arange(candidates, device=weights.device)
    ends = weights.cumsum(dim=1)
    positions = ((steps + luck[:, None]) / candidates).clamp_max(1 - 2**-52) * ends[:, -1:]
    chosen = torch.searchsorted(ends, positions, right=True)
    kept = torch.where(uneven, chosen, steps)
    first = torch.arange(count, device=weights.device)[:, None] * candidates
    return (first + kept).flatten(), torch.where(uneven, 0.0, log_weights)
