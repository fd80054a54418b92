"""The random numbers behind samples: each sample has a stream of its own, decided by a seed and its index alone.

So a sample does not depend on how many are drawn with it, nor on how they are divided into batches. What one sample
needs (a number for each position, each particle, each resampling) comes from its one stream, one number after another:
no two of them can be the same number.

torch's CPU generator keeps the low 32 bits of a seed and discards the rest; so samples with neighbouring indices have
neighbouring seeds, which differ there, and what a larger seed says above bit 32 is mixed in first.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SEED_BITS = 32  # of a seed, that torch's CPU generator uses


def seeded_generator(seed: int | None) -> torch.Generator:
    """Return a CPU generator for any seed of 0 or more; None takes a new one, that nobody knows."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed if seed < 2**64 else _hashed(str(seed), bits=64))


def draw_seed(generator: torch.Generator | None) -> int:
    """Return a seed for the streams of one call, drawn from `generator`, a CPU generator (torch's own by default).

    Generators in the same state give the same seed, unless they were seeded with numbers that differ above bit 32.
    """
    drawn = int(torch.randint(2**62, (1,), generator=generator))
    high_bits = (torch.default_generator if generator is None else generator).initial_seed() >> SEED_BITS
    return drawn if high_bits == 0 else _hashed(f"{high_bits}/{drawn}", bits=62)


def draw_uniforms(seeds: Iterable[int], count: int) -> Tensor:
    """Return `count` numbers in [0,1) from the stream of each seed: [n,count] float64, on the CPU."""
    stream = torch.Generator()
    rows = [torch.rand(count, dtype=torch.float64, generator=stream.manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def _hashed(text: str, bits: int) -> int:
    """Return the first bits, up to 64, of the SHA-256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - bits)
