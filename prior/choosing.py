"""From logits to a code: the parameters of sampling, the distribution that they make of logits, and one choice from it.

Legend: n samples, K codes.

[1] Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv:1904.09751 (top-p)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """How codes are chosen from logits; the defaults sample from the prior as it is.

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and what is allowed.
    """

    temperature: float = 1.0  # divides the logits; 0 takes the most likely code
    top_k: int | None = None  # keep the k most likely codes
    top_p: float | None = None  # keep the fewest most likely codes that hold this much probability; in (0, 1]

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")


AS_TRAINED = SamplingParameters()


def choose_codes(logits: Tensor, uniforms: Tensor, parameters: SamplingParameters = AS_TRAINED) -> Tensor:
    """Return the code [n] that each of `uniforms` [n] in [0,1) falls on, the probabilities of `logits` [n,K] laid end
    to end; of logits with NaN any code."""
    if parameters.temperature == 0:
        return logits.argmax(dim=1)
    ends = code_probabilities(logits, parameters).cumsum(dim=1)
    below_1 = uniforms.clamp_max(1 - 2**-52)  # whose product with the total cannot round up to it
    found = torch.searchsorted(ends, (below_1 * ends[:, -1])[:, None], right=True).squeeze(1)
    return found.clamp_max(logits.shape[1] - 1)  # which NaN exceeds


def code_probabilities(logits: Tensor, parameters: SamplingParameters = AS_TRAINED) -> Tensor:
    """Return the distribution [n,K] float64 to choose from: temperature, then top-k, then top-p of what is left [1]."""
    temperature, top_k, top_p = parameters.temperature, parameters.top_k, parameters.top_p
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
        before = ordered.cumsum(dim=1) - ordered  # the first is always kept: nothing comes before it
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(dim=1, keepdim=True), 0)
    ordered = ordered / ordered.sum(dim=1, keepdim=True)
    return torch.zeros_like(ordered).scatter_(1, order, ordered)
