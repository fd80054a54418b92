"""Completing grids of which some codes are known.

A PixelCNN draws each code given those before it in raster order. Where all known codes come first (the top of a picture
is kept), keeping them is all there is to do, and exact. A known code that comes later says something about what is
drawn before it, and the prior cannot look ahead; so such a grid is drawn as the particles of a particle filter
(`particles.py`). With more particles the result comes closer to the exact conditional distribution; with one, later
codes are kept, but nothing is conditioned on them: completion with one particle is sampling.

Legend: n grids, m particles of each, H W grid, K codes.
"""

from collections.abc import Callable
from functools import partial

import torch
from einops import repeat
from torch import Tensor

from .choosing import SamplingParameters
from .model import GatedPixelCNN
from .particles import Particles, uniforms_needed
from .raster import UNKNOWN
from .sampling import (
    FinishedRows,
    check_grids,
    check_guidance,
    draw_in_batches,
    evaluating,
    most_at_once,
    start_codes,
)
from .uniforms import draw_seed, draw_uniforms


def complete_codes(
    prior: GatedPixelCNN,
    known: Tensor,
    *,
    candidates: int = 32,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    precision: str = "fp32",
    generator: torch.Generator | None = None,
    first: int = 0,
    on_row: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw the unknown codes of grids [n,H,W]: codes int64 [n,H,W], the known ones unchanged.

    Args:
        prior: used in `eval()` mode.
        known: [n,H,W] codes, -1 where the prior is to draw.
        candidates: m, at least 1, particles of each grid; one is enough, and used, where all known codes come first.
        labels: for a prior with classes: [n], or [n,m] to let the known codes choose among labels too.
        temperature: as in `sample_codes`. The weights are the prior's own probabilities, whatever this is.
        top_k: as in `sample_codes`.
        top_p: as in `sample_codes`.
        guidance: as in `sample_codes`. It makes another distribution p_s of whole grids, the product over the positions
            of the softmax of their guided logits; the weights are its probabilities, so that what is drawn comes close
            to p_s given the known codes.
        precision: as in `sample_codes`.
        generator: the source of randomness, a CPU generator; torch's own by default.
        first: the index of the first grid, as in `sample_codes`.
        on_row: as in `sample_codes`.

    Raises:
        ValueError: an argument out of its range, or labels or `known` that do not fit.
    """
    parameters = SamplingParameters(
        temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, precision=precision
    )
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    if known.ndim != 3:
        raise ValueError(f"known: expected codes [n,H,W], got the shape {list(known.shape)}")
    count, height, width = known.shape
    check_grids(count, (height, width))
    codes = start_codes(prior, count, (height, width), known)
    check_candidate_labels(prior, labels, count, candidates)
    check_guidance(prior, guidance)
    each_label = spread_labels(labels, candidates)
    open_label = labels is not None and labels.ndim == 2
    filtered = torch.full((count,), True) if open_label else known_after_unknown(codes)
    seed, finished_rows = draw_seed(generator) + first, FinishedRows(codes, on_row)

    def begin(batch: Tensor, num_particles: int) -> Particles:
        uniforms = draw_uniforms((seed + batch).tolist(), uniforms_needed(num_particles, height, width))
        batch_labels = None if each_label is None else each_label[batch, :num_particles]
        return Particles(prior, codes[batch], num_particles, uniforms, batch_labels, parameters)

    with evaluating(prior), torch.inference_mode():
        for chosen, m in ((~filtered, 1), (filtered, candidates)):
            at_once = max(1, most_at_once(prior, (height, width)) // (m * parameters.predictions))
            draw_in_batches(partial(begin, num_particles=m), codes, torch.nonzero(chosen)[:, 0], at_once, finished_rows)
    return codes.to(next(prior.parameters()).device)


def check_candidate_labels(prior: GatedPixelCNN, labels: Tensor | None, count: int, candidates: int) -> None:
    """Raise ValueError unless `labels` are [n] or [n,m] and the prior knows them; None without classes."""
    if labels is None or labels.ndim == 1:
        prior.check_labels(labels, count)
        return
    if labels.shape != (count, candidates):
        raise ValueError(f"labels: expected [n] or [n,m] = {[count, candidates]}, got {list(labels.shape)}")
    prior.check_labels(labels.flatten(), labels.numel())


def spread_labels(labels: Tensor | None, candidates: int) -> Tensor | None:
    """Return labels [n] or [n,m] as one for each particle, [n,m] on the CPU."""
    if labels is None:
        return None
    return (repeat(labels, "n -> n m", m=candidates) if labels.ndim == 1 else labels).cpu()


def known_after_unknown(codes: Tensor) -> Tensor:
    """Return which of the grids of codes [n,H,W] have a known code after an unknown one in raster order, [n] bool."""
    unknown = (codes == UNKNOWN).flatten(1).int()
    return (unknown.cummax(dim=1).values > unknown).any(dim=1)
