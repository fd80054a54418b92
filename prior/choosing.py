"""From logits to a code: the parameters of sampling, the distribution that they make of logits, and one choice from it.

Legend: n samples, K codes.

[1] Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv:1904.09751 (top-p)
[2] Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598
"""

import math
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
    guidance: float = 1.0  # how far to follow the label, as in `guided_logits`: 1 as the prior does, 0 not at all
    precision: str = "fp32"  # "bf16" computes the vertical stack, most of the arithmetic, in bfloat16

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance: expected a finite number of 0 or more, got {self.guidance}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: expected fp32 or bf16, got {self.precision}")

    @property
    def predictions(self) -> int:
        """How many predictions each sample takes: with and without the label, or where guidance is 0 or 1 only one."""
        return 1 if self.guidance in (0, 1) else 2


AS_TRAINED = SamplingParameters()


def guided_logits(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Return u + s (c - u) [n,K] of the logits c with the label and u without, [n,K] each, and the guidance s [2].

    Their softmax is proportional to p(code) p(label | code)^s, all given the codes before: above 1 codes that speak for
    the label become likelier. [2] calls s - 1 the guidance strength w. 0 gives u and 1 gives c, to the bit.

    The result is in the type of the logits, at least float32. Cancellation does no harm there: the error of c - u is
    that of a rounded c or u, and s only scales it, as it scales the rounding of the network itself.
    """
    at_least = torch.promote_types(conditional.dtype, torch.float32)
    return torch.lerp(unconditional.to(at_least), conditional.to(at_least), guidance)


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
