"""The health of a codebook: a verdict from the histogram of the codes of a complete evaluation set.

One batch is not enough: it has too few vectors to use every code, so its perplexity says more about its size.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ..codes.statistics import perplexity

ENOUGH_VECTORS = 4  # for each code, before a code that did not occur counts as unused
MOST_CODES = 0.9  # a codebook with this share of its codes in use is alive
FEW_CODES = 1 / 32  # if this share of the codes carries half of all vectors, the others are hardly used


@dataclass(frozen=True, kw_only=True)
class CodebookHealth:
    """How the codes of a codebook are used by the vectors of an evaluation set."""

    num_codes: int  # K
    vectors: int  # in the histogram
    codes_used: int  # codes that occur at least once
    perplexity: float  # of the histogram: 1 to K
    half: int  # the fewest codes that carry half of all vectors
    histogram: Tensor = field(repr=False, compare=False)  # [K] how often each code occurs, on the CPU

    @property
    def verdict(self) -> str:
        """The state of the codebook in one line, with its numbers and, if it is not healthy, what to try."""
        used = f"{self.codes_used} of {self.num_codes} codes in use"
        if self.codes_used < self.num_codes and self.vectors < ENOUGH_VECTORS * self.num_codes:
            return f"too early to tell: {used} by {self.vectors} vectors; {ENOUGH_VECTORS} for each code would tell"
        alive = self.codes_used >= MOST_CODES * self.num_codes
        narrow = self.half <= FEW_CODES * self.num_codes
        carried = (
            f"{self.half} codes carry half of all vectors" if self.half > 1 else "1 code carries half of all vectors"
        )
        if alive and not narrow:
            return f"healthy: {used}, perplexity {self.perplexity:.0f}"
        if alive:
            return f"alive but uneven: {used}, yet {carried}; normal where much of each image is plain background"
        if narrow:
            return f"collapsing: {carried}, {used}; try a lower --lr, a smaller --code-dim or fewer --num-codes"
        return f"partly dead: {used}, perplexity {self.perplexity:.0f}; try fewer --num-codes or more --steps"


def codebook_health(histogram: Tensor) -> CodebookHealth:
    """Return the health of a codebook whose codes have the histogram [K]; without vectors, no code is in use."""
    counts = histogram.sort(descending=True).values
    vectors = int(counts.sum())
    half = int((counts.cumsum(0) * 2 < vectors).sum()) + 1
    return CodebookHealth(
        num_codes=len(histogram),
        vectors=vectors,
        codes_used=int((counts > 0).sum()),
        perplexity=perplexity(histogram),
        half=half,
        histogram=histogram.cpu(),
    )
