"""The loss of the prior, and the number it is compared by.

Legend: B batch, H W grid, K codes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import NO_LABEL


def cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the mean of -ln p(code) over all positions of logits [B,K,H,W] and codes [B,H,W], in nats and float32."""
    return F.cross_entropy(_at_least_float32(logits), codes.long())


def drop_labels(labels: Tensor, share: float, uniforms: Tensor | None = None) -> Tensor:
    """Return labels [B] of which each, whatever happens to the others, is NO_LABEL with this probability.

    A prior that learns from them knows both p(codes | label) and p(codes), which guidance needs (`guided_logits`).

    Args:
        labels: [B].
        share: of the labels that are hidden, in [0,1).
        uniforms: [B] in [0,1), which decide; by default of torch's global CPU generator, whatever the device of the
            labels. A share of 0 takes none.
    """
    if share == 0:
        return labels
    dropped = (torch.rand(labels.shape) if uniforms is None else uniforms) < share
    return labels.masked_fill(dropped.to(labels.device), NO_LABEL)


def grid_bits(logits: Tensor, codes: Tensor) -> Tensor:
    """Return -log2 p(grid) of each grid, [B] float64 on the CPU, from logits [B,K,H,W] and codes [B,H,W].

    Summed over a data set and divided by its number of codes this is bits per code, exact for any batch sizes; a
    uniform model scores log2 K.
    """
    return code_nats(logits, codes).sum(dim=(1, 2)) / math.log(2)


def code_nats(logits: Tensor, codes: Tensor) -> Tensor:
    """Return -ln p(code) at each position, [B,H,W] float64 on the CPU, from logits [B,K,H,W] and codes [B,H,W]."""
    nats = F.cross_entropy(_at_least_float32(logits), codes.long(), reduction="none")
    return nats.cpu().double()  # some devices have no float64


def bits_per_dim(bits_per_code: float, grid: tuple[int, int], image: tuple[int, int, int]) -> float:
    """Return bits per code as bits per colour value of the image: bits_per_code * H W / (C H' W').

    Args:
        bits_per_code: of the prior.
        grid: H, W.
        image: C, H', W'.
    """
    return bits_per_code * math.prod(grid) / math.prod(image)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
